"""Quality of samples against a shipped reference; pure functions, no Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.generation import default_cond, index_noise
from lightning_distill.guidance import guided
from lightning_distill.metrics.class_accuracy import class_accuracy
from lightning_distill.metrics.features import SmallClassifier, extract
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.manifold import precision_recall
from lightning_distill.metrics.nearest import nearest_reference_ratio
from lightning_distill.metrics.reference import Half, Reference
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.prediction import Prediction
from lightning_distill.randomness import RandomStreams
from lightning_distill.samplers import SAMPLERS

__all__ = ["evaluate_samples", "sample_many"]


@torch.no_grad()
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
    """Many samples whose starting and fresh noise depend on the sample's index only, not on how they are batched.

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
        ValueError: the network does not know its sample shape, or the sampler is unknown.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(sorted(SAMPLERS))}.")
    shape = denoiser.sample_shape
    if shape is None:
        raise ValueError(f"{type(denoiser.network).__name__} does not know the shape of its samples.")
    cond = default_cond(denoiser, n)
    streams, device, process = RandomStreams(seed), denoiser.device, denoiser.process
    parts = []
    for first in range(0, n, batch_size):
        labels = {k: v[first : first + batch_size].to(device) for k, v in cond.items()}
        start = index_noise(min(batch_size, n - first), shape, seed, first).to(device)

        def denoise(x: Tensor, t: Tensor, labels: dict[str, Tensor] = labels) -> Prediction:
            return guided(denoiser, x, t.expand(len(x)), labels, guidance_scale)

        def fresh(step: int, x: Tensor, first: int = first) -> Tensor:
            return streams.normal(f"sample/fresh{step}", 0, first, x.shape).to(x)

        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x0 = SAMPLERS[sampler](denoise, process.prior(start, times[0]), times, process, noise=fresh)
        parts.append(x0.float().cpu())
    samples = torch.cat(parts)
    return (samples.clamp(-1, 1) if samples.ndim == 4 else samples), cond.get("class_labels")


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
