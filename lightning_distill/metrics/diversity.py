"""Diversity of a set of samples, without a reference: how many different ones there are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_distill.metrics.manifold import neighbour_distances

__all__ = ["duplicate_rate", "pairwise_diversity", "vendi_score"]


def vendi_score(features: Tensor) -> float:
    """Effective number of different samples (Vendi score, arXiv:2210.02410, Eq. 2) under the cosine kernel.

        exp( - sum_i lambda_i log lambda_i ),   lambda = eigenvalues of K / n,  K = X X^T,  rows of X of length 1

    The d x d matrix X^T X / n has the same non-zero eigenvalues, so n may be large.

    Args:
        features: (n, d); only directions matter.

    Returns:
        1 for n equal samples, k for k equally large groups of orthogonal ones, at most min(n, d).

    Raises:
        ValueError: the shape is wrong or the set is empty.
    """
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"the Vendi score needs features (n, d), got {tuple(features.shape)}.")
    x = F.normalize(features.double(), dim=1)
    gram = (x.T @ x if x.shape[1] < len(x) else x @ x.T) / len(x)
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0)
    values = values / values.sum().clamp_min(1e-300)
    return torch.special.entr(values).sum().exp().item()


def pairwise_diversity(features: Tensor) -> float:
    """Mean cosine distance between two different samples, in O(n d).

    Args:
        features: (n, d), n >= 2.

    Returns:
        0 for equal directions, 1 for orthogonal ones.

    Raises:
        ValueError: the shape is wrong or there are fewer than two samples.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"pairwise diversity needs two samples or more, got features {tuple(features.shape)}.")
    x = F.normalize(features.double(), dim=1)
    n = len(x)
    # sum over i != j of x_i . x_j = |sum x|^2 - sum |x_i|^2
    return 1.0 - ((x.sum(dim=0).square().sum() - x.square().sum()) / (n * (n - 1))).item()


def duplicate_rate(features: Tensor, reference: Tensor, quantile: float = 0.01) -> float:
    """Share of samples that have a near twin among the samples.

    Near means closer than all but a share of ``quantile`` of real samples are to each other, so that real data of the
    same number have a rate of ``quantile``.

    Args:
        features: of samples, (n, d), n >= 2.
        reference: of real samples, (m, d), m >= 2; the first min(n, m) of each set are used, since nearest distances
            shrink with the number of samples.
        quantile: share of real samples that counts as twins.

    Returns:
        Share in [0, 1].

    Raises:
        ValueError: too few samples or different dimensions.
    """
    n = min(len(features), len(reference))
    if n < 2 or features.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"the duplicate rate compares features (n, d) with n >= 2, got {tuple(features.shape)} and "
            f"{tuple(reference.shape)}."
        )
    threshold = neighbour_distances(reference[:n], 1).quantile(quantile)
    return (neighbour_distances(features[:n], 1) < threshold).double().mean().item()
