"""Metrics: pure functions on tensors, one idea per file."""

from lightning_distill.metrics.class_accuracy import class_accuracy
from lightning_distill.metrics.features import FeatureExtractor, SmallClassifier, extract, load_classifier
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.kid import kernel_distance
from lightning_distill.metrics.manifold import PrecisionRecall, precision_recall
from lightning_distill.metrics.nearest import nearest_distances, nearest_reference_ratio
from lightning_distill.metrics.progress import progress
from lightning_distill.metrics.reference import Reference, load_reference
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = [
    "FeatureExtractor",
    "FeatureStatistics",
    "PrecisionRecall",
    "Reference",
    "SmallClassifier",
    "class_accuracy",
    "extract",
    "frechet_distance",
    "kernel_distance",
    "load_classifier",
    "load_reference",
    "nearest_distances",
    "nearest_reference_ratio",
    "precision_recall",
    "progress",
    "sliced_wasserstein",
]
