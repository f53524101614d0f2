"""Fidelity and variety by nearest-neighbour manifolds: precision and recall, density and coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "DensityCoverage",
    "PrecisionRecall",
    "density_coverage",
    "distances",
    "neighbour_distances",
    "precision_recall",
]

#: squared distances below this share of the squared norms are 0: float32 features cannot tell such points apart
_RESOLUTION = 1e-13


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


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances between two sets, by a matrix product in float64.

    Several times faster than differences in float32 and still more precise; equal points are at distance 0.

    Args:
        a: (n, d).
        b: (m, d).

    Returns:
        (n, m), float64.
    """
    b = b.double()
    centre = b.mean(dim=0)
    a, b = a.double() - centre, b - centre
    norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    squared = norms - 2.0 * (a @ b.T)
    return squared.masked_fill_(squared < _RESOLUTION * norms, 0.0).sqrt_()


def neighbour_distances(points: Tensor, neighbours: int, batch_size: int = 2_000) -> Tensor:
    """Distance of every point to its k-th nearest other point.

    Args:
        points: (n, d), n > ``neighbours``.
        neighbours: k >= 1.
        batch_size: rows of the distance matrix that are held at a time.

    Returns:
        (n,), float64.
    """
    parts = [distances(rows, points).kthvalue(neighbours + 1, dim=1).values for rows in points.split(batch_size)]
    return torch.cat(parts)


def density_coverage(generated: Tensor, real: Tensor, neighbours: int = 5, batch_size: int = 2_000) -> DensityCoverage:
    """Density and coverage (arXiv:2002.09797, Eq. 4 and 5); the balls are those of the real samples.

        density  = 1 / (k m) sum_j sum_i 1[ |g_j - r_i| < NND_k(r_i) ]
        coverage = 1 / n sum_i 1[ exists j: |g_j - r_i| < NND_k(r_i) ]

    The balls are open, as in the authors' code: the density of exact copies of the real samples is 1.
    Both depend on the numbers of samples: compare figures only at equal sizes.

    Args:
        generated: features of generated samples, (m, d).
        real: features of real samples, (n, d), n > ``neighbours``.
        neighbours: k.
        batch_size: rows of the distance matrix that are held at a time.

    Returns:
        Density and coverage; 1 and 1 - 2^-k are expected of large sets from one distribution, n = m.

    Raises:
        ValueError: wrong shapes or too few samples.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"density and coverage compare two matrices of features, got shapes {tuple(generated.shape)} and "
            f"{tuple(real.shape)}; use one extractor for both."
        )
    if neighbours < 1 or len(real) <= neighbours or len(generated) == 0:
        raise ValueError(
            f"density and coverage with {neighbours} neighbours need more than {neighbours} real samples and a "
            f"generated one, got {len(real)} and {len(generated)}."
        )
    # a rounding error below the radius, so that a copy of the k-th neighbour lies outside like the neighbour itself
    radii = neighbour_distances(real, neighbours, batch_size) * (1.0 - 1e-9)
    hits, covered = 0, 0
    for rows, radius in zip(real.split(batch_size), radii.split(batch_size)):
        inside = distances(rows, generated) < radius[:, None]
        hits += int(inside.sum())
        covered += int(inside.any(dim=1).sum())
    return DensityCoverage(hits / (neighbours * len(generated)), covered / len(real))
