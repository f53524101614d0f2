"""Distillation methods; every module of this package is imported by the command line, so a new file is enough."""

from lightning_distill.methods.adversarial import AdversarialMethod, RatioMethod
from lightning_distill.methods.base import DistillationModule, Rollout, Terms
from lightning_distill.methods.diff_instruct import DiffInstruct
from lightning_distill.methods.dmd import DMD
from lightning_distill.methods.dmd2 import DMD2
from lightning_distill.methods.f_distill import FDistill
from lightning_distill.methods.fake_score import FakeScoreMethod, Scores
from lightning_distill.methods.regression import PairRegression
from lightning_distill.methods.sid import SiD
from lightning_distill.methods.swiftbrush import SwiftBrush
from lightning_distill.methods.teacher_training import TeacherTraining
from lightning_distill.methods.uni_instruct import UniInstruct
from lightning_distill.methods.vsd import VSD

__all__ = [
    "DMD",
    "DMD2",
    "VSD",
    "AdversarialMethod",
    "DiffInstruct",
    "DistillationModule",
    "FDistill",
    "FakeScoreMethod",
    "PairRegression",
    "RatioMethod",
    "Rollout",
    "Scores",
    "SiD",
    "SwiftBrush",
    "TeacherTraining",
    "Terms",
    "UniInstruct",
]
