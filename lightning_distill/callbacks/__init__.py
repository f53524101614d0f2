"""Callbacks: evaluation, pictures and health of a run; they use public attributes of the module only."""

from lightning_distill.callbacks.alarm import CollapseAlarm
from lightning_distill.callbacks.evaluation import GenerativeEvaluation
from lightning_distill.callbacks.health import TrainingHealth
from lightning_distill.callbacks.samples import SampleGrid

__all__ = ["CollapseAlarm", "GenerativeEvaluation", "SampleGrid", "TrainingHealth"]
