"""Fidelity and variety by nearest-neighbour manifolds: precision and recall, density and coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DensityCoverage", "PrecisionRecall", "density_coverage", "neighbour_distances", "precision_recall"]


@dataclass(frozen=True)
class PrecisionRecall:
    """Fidelity and coverage, both in [0, 1].

    Attributes:
        precision: share of generated samples that lie within the manifold of the real ones.
        recall: share of real samples that lie within the manifold of the generated ones.
    """

    precision: float
    recall: float


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = 3, batch_size: int = 2_000) -> PrecisionRecall:
    """Precision and recall; a manifold is the union of the balls that reach each sample's k-th neighbour.

    Both depend on the numbers of samples: compare figures only at equal sizes.

    Args:
        generated: features of generated samples, (n, d).
        real: features of real samples, (m, d).
        neighbours: k >= 1; both sets need more samples than that.
        batch_size: rows of the distance matrix that are held at a time.

    Returns:
        Precision and recall as torch-fidelity computes them.

    Raises:
        ValueError: wrong shapes or too few samples.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"precision and recall compare two matrices of features, got shapes {tuple(generated.shape)} and "
            f"{tuple(real.shape)}; use one extractor for both."
        )
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need more than {neighbours} samples of each kind, "
            f"got {len(generated)} generated and {len(real)} real ones."
        )
    values = prc_features_to_metric(
        generated.float(),
        real.float(),
        prc_neighborhood=neighbours,
        prc_batch_size=batch_size,
        save_cpu_ram=True,
        verbose=False,
    )
    return PrecisionRecall(values["precision"], values["recall"])


@dataclass(frozen=True)
class DensityCoverage:
    """Fidelity and coverage that single outliers do not move (arXiv:2002.09797).

    Attributes:
        density: mean number of real balls around a generated sample over k; 1 for equal distributions, may exceed it.
        coverage: share of real samples whose ball holds a generated sample, in [0, 1].
    """

    density: float
    coverage: float


def neighbour_distances(points: Tensor, neighbours: int, batch_size: int = 2_000) -> Tensor:
    """Distance of every point to its k-th nearest other point.

    Args:
        points: (n, d), n > ``neighbours``.
        neighbours: k >= 1.
        batch_size: rows of the distance matrix that are held at a time.

    Returns:
        (n,), dtype of ``points``.
    """
    exact = "donot_use_mm_for_euclid_dist"  # equal points are at distance 0, not at rounding errors
    nearest = [
        torch.cdist(rows, points, compute_mode=exact).kthvalue(neighbours + 1, dim=1).values
        for rows in points.split(batch_size)
    ]
    return torch.cat(nearest)


def density_coverage(generated: Tensor, real: Tensor, neighbours: int = 5, batch_size: int = 2_000) -> DensityCoverage:
    """Density and coverage (arXiv:2002.09797, Eq. 4 and 5); the balls are those of the real samples.

        density  = 1 / (k m) sum_j sum_i 1[ |g_j - r_i| <= NND_k(r_i) ]
        coverage = 1 / n sum_i 1[ exists j: |g_j - r_i| <= NND_k(r_i) ]

    Both depend on the numbers of samples: compare figures only at equal sizes.

    Args:
        generated: features of generated samples, (m, d).
        real: features of real samples, (n, d), n > ``neighbours``.
        neighbours: k.
        batch_size: rows of the distance matrix that are held at a time.

    Raises:
        ValueError: wrong shapes or too few samples.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"density and coverage compare two matrices of features, got shapes {tuple(generated.shape)} and "
            f"{tuple(real.shape)}; use one extractor for both."
        )
    if len(real) <= neighbours or len(generated) == 0:
        raise ValueError(
            f"density and coverage with {neighbours} neighbours need more than {neighbours} real samples and a "
            f"generated one, got {len(real)} and {len(generated)}."
        )
    generated, real = generated.float(), real.float()
    radii = neighbour_distances(real, neighbours, batch_size)
    hits, covered = 0, 0
    for rows, radius in zip(real.split(batch_size), radii.split(batch_size)):
        inside = torch.cdist(rows, generated) <= radius[:, None]
        hits += int(inside.sum())
        covered += int(inside.any(dim=1).sum())
    return DensityCoverage(hits / (neighbours * len(generated)), covered / len(real))
