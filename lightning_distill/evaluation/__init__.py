"""Evaluation of samples: sampling by index, measures against references, baselines of the teacher."""

from lightning_distill.evaluation.evaluator import DEFAULT_MEASURES, MEASURES, Evaluator, Features
from lightning_distill.evaluation.sampling import sample_many

__all__ = ["DEFAULT_MEASURES", "MEASURES", "Evaluator", "Features", "sample_many"]
