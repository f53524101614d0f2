"""Diversity of a set of samples: how many different ones there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_distill.metrics.manifold import distances, neighbour_distances

__all__ = ["PairwiseDiversity", "duplicate_rate", "pairwise_diversity", "vendi_score"]


def vendi_score(features: Tensor) -> float:
    """Effective number of different samples (Vendi score, arXiv:2210.02410, Eq. 2) under the cosine kernel.

        exp( - sum_i lambda_i log lambda_i ),   lambda = eigenvalues of K / n,  K = X X^T,  rows of X of length 1

    The d x d matrix X^T X / n has the same non-zero eigenvalues, so n may be large.

    Args:
        features: (n, d); only directions matter.

    Returns:
        1 for n equal samples, k for k equally large groups of orthogonal ones, at most min(n, d).

    Raises:
        ValueError: the shape is wrong, the set is empty, or it holds NaN or inf.
    """
    _check(features, 1, "the Vendi score")
    x = F.normalize(features.double(), dim=1)
    gram = (x.T @ x if x.shape[1] < len(x) else x @ x.T) / len(x)
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0)
    values = values / values.sum().clamp_min(1e-300)
    return torch.special.entr(values).sum().exp().item()


@dataclass(frozen=True)
class PairwiseDiversity:
    """Mean distances between two different samples of a set.

    Attributes:
        cosine: one minus the cosine of the angle; 0 for equal directions, 1 for orthogonal ones.
        euclidean: in units of the features.
    """

    cosine: float
    euclidean: float


def pairwise_diversity(features: Tensor, batch_size: int = 2_000) -> PairwiseDiversity:
    """Mean cosine distance, in O(n d), and mean Euclidean distance of all pairs, in O(n^2 d).

    The cosines need no pairs, since  sum_{i != j} x_i . x_j = |sum_i x_i|^2 - sum_i |x_i|^2  for unit vectors x.

    Args:
        features: (n, d), n >= 2.
        batch_size: rows of the distance matrix that are held at a time.

    Returns:
        Both means over the n (n - 1) / 2 pairs.

    Raises:
        ValueError: the shape is wrong, there are fewer than two samples, or they hold NaN or inf.
    """
    _check(features, 2, "pairwise diversity")
    x = F.normalize(features.double(), dim=1)
    pairs = len(x) * (len(x) - 1)
    cosine = 1.0 - (x.sum(dim=0).square().sum() - x.square().sum()).item() / pairs
    total = sum(distances(rows, features).sum().item() for rows in features.split(batch_size))
    return PairwiseDiversity(cosine, total / pairs)


def duplicate_rate(features: Tensor, reference: Tensor, quantile: float = 0.01) -> float:
    """Share of samples that have a near twin among the samples.

    Near means no further than the nearest ``quantile`` of real samples are from each other, so that real data of the
    same number have a rate of about ``quantile``. Where so many real samples are exact twins, only exact twins count.

    Args:
        features: of samples, (n, d), n >= 2.
        reference: of real samples, (m, d), m >= 2; the first min(n, m) of each set are used, since nearest distances
            shrink with the number of samples.
        quantile: share of real samples that counts as twins, in [0, 1].

    Returns:
        Share in [0, 1].

    Raises:
        ValueError: too few samples, different dimensions, NaN or inf, or a quantile outside [0, 1].
    """
    _check(features, 2, "the duplicate rate")
    _check(reference, 2, "the duplicate rate")
    if features.shape[1] != reference.shape[1] or not 0.0 <= quantile <= 1.0:
        raise ValueError(
            f"the duplicate rate compares features of one extractor at a quantile in [0, 1], got shapes "
            f"{tuple(features.shape)} and {tuple(reference.shape)} and quantile={quantile}."
        )
    n = min(len(features), len(reference))
    threshold = neighbour_distances(reference[:n], 1).quantile(quantile)
    return (neighbour_distances(features[:n], 1) <= threshold).double().mean().item()


def _check(features: Tensor, least: int, what: str) -> None:
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"{what} needs features (n, d) with n >= {least}, got {tuple(features.shape)}.")
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite().all(dim=1)).sum())
        raise ValueError(f"{what}: {bad} of {len(features)} feature vectors contain NaN or inf; check the samples.")
