"""Quality of samples against a shipped reference; pure functions, no Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.generation import default_cond, generate, index_noise
from lightning_distill.metrics.class_accuracy import class_accuracy
from lightning_distill.metrics.features import SmallClassifier, extract
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.manifold import precision_recall
from lightning_distill.metrics.nearest import nearest_reference_ratio
from lightning_distill.metrics.reference import Half, Reference
from lightning_distill.networks.denoiser import Denoiser

__all__ = ["evaluate_samples", "sample_many"]


def sample_many(
    denoiser: Denoiser,
    n: int,
    times: Sequence[float],
    sampler: str,
    seed: int,
    *,
    guidance_scale: float = 1.0,
    batch_size: int = 500,
    bf16: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Many samples with noise that depends on the sample's index only.

    Args:
        denoiser: student or teacher whose network knows its sample shape.
        n: number of samples; classes are cycled through.
        times: descending native times without the final 0.
        sampler: name of a sampler.
        seed: seed of starting and fresh noise.
        guidance_scale: w.
        batch_size: samples per network call.
        bf16: run the network under bfloat16 autocast.

    Returns:
        samples (n, ...) clamped to [-1, 1] when they are images, on the CPU, and their labels (None without classes).

    Raises:
        ValueError: the network does not know its sample shape.
    """
    shape = denoiser.sample_shape
    if shape is None:
        raise ValueError(f"{type(denoiser.network).__name__} does not know the shape of its samples.")
    cond = default_cond(denoiser, n)
    generator = torch.Generator().manual_seed(seed)
    with torch.autocast(denoiser.device.type, torch.bfloat16, enabled=bf16):
        x0 = generate(
            denoiser,
            index_noise(n, shape, seed),
            cond,
            times,
            sampler,
            guidance_scale=guidance_scale,
            generator=generator,
            batch_size=batch_size,
        )
    x0 = x0.float().cpu()
    return (x0.clamp(-1, 1) if x0.ndim == 4 else x0), cond.get("class_labels")


def evaluate_samples(
    images: Tensor,
    labels: Tensor | None,
    reference: Reference,
    classifier: SmallClassifier,
    *,
    half: Half = "held_out",
    teacher_images: Tensor | None = None,
) -> dict[str, Any]:
    """Distance, precision, recall, class accuracy and memorisation of samples.

    Args:
        images: samples (N, C, H, W) in [-1, 1].
        labels: the classes they were made for, (N,), or None.
        reference: features and statistics of real images.
        classifier: extractor the reference was made with.
        half: real features for precision, recall and nearest distances.
        teacher_images: the teacher's samples, for the ratio of nearest-reference distances.

    Returns:
        ``fd_cnn`` (against the statistics of all training images), ``precision``, ``recall``, and where possible
        ``class_accuracy`` and ``nearest_ratio``; floats.
    """
    features, real = extract(classifier, images), reference.features[half]
    n = min(len(features), len(real))
    manifold = precision_recall(features[:n], real[:n])
    figures = {
        "fd_cnn": frechet_distance(FeatureStatistics.from_features(features), reference.statistics["train"]),
        "precision": manifold.precision,
        "recall": manifold.recall,
    }
    if labels is not None:
        figures["class_accuracy"] = class_accuracy(classifier.classify(features), labels)
    if teacher_images is not None:
        figures["nearest_ratio"] = nearest_reference_ratio(features, extract(classifier, teacher_images), real)
    return figures
