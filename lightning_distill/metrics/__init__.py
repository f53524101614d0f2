"""Metrics: pure functions on tensors, one idea per file."""

from lightning_distill.metrics.class_accuracy import class_accuracy
from lightning_distill.metrics.clip_score import CLIPScore
from lightning_distill.metrics.diversity import PairwiseDiversity, duplicate_rate, pairwise_diversity, vendi_score
from lightning_distill.metrics.extractors import Extractor, ModuleExtractor, ZooClassifier
from lightning_distill.metrics.features import FeatureExtractor, SmallClassifier, extract, load_classifier
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.inception_score import inception_score
from lightning_distill.metrics.kid import kernel_distance
from lightning_distill.metrics.lpips_diversity import PerceptualDistance, lpips_diversity
from lightning_distill.metrics.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from lightning_distill.metrics.nearest import nearest_distances, nearest_reference_ratio
from lightning_distill.metrics.progress import progress
from lightning_distill.metrics.reference import (
    Reference,
    ReferenceCache,
    load_reference,
    reference_from_images,
    statistics_reference,
)
from lightning_distill.metrics.shift import ImageMoments, drift, image_moments
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = [
    "CLIPScore",
    "DensityCoverage",
    "Extractor",
    "FeatureExtractor",
    "FeatureStatistics",
    "ImageMoments",
    "ModuleExtractor",
    "PairwiseDiversity",
    "PerceptualDistance",
    "PrecisionRecall",
    "Reference",
    "ReferenceCache",
    "SmallClassifier",
    "ZooClassifier",
    "class_accuracy",
    "density_coverage",
    "drift",
    "duplicate_rate",
    "extract",
    "frechet_distance",
    "image_moments",
    "inception_score",
    "kernel_distance",
    "load_classifier",
    "load_reference",
    "lpips_diversity",
    "nearest_distances",
    "nearest_reference_ratio",
    "pairwise_diversity",
    "precision_recall",
    "progress",
    "reference_from_images",
    "sliced_wasserstein",
    "statistics_reference",
    "vendi_score",
]
