"""Distillation methods; every module of this package is imported by the command line, so a new file is enough."""

from lightning_distill.methods.base import DistillationModule, Rollout, Terms
from lightning_distill.methods.dmd2 import DMD2
from lightning_distill.methods.fake_score import FakeScoreMethod
from lightning_distill.methods.teacher_training import TeacherTraining

__all__ = ["DMD2", "DistillationModule", "FakeScoreMethod", "Rollout", "TeacherTraining", "Terms"]
