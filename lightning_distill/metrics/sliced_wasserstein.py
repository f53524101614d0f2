"""Sliced Wasserstein-2 distance between two point sets: the measure of the 2-D problems."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sliced_wasserstein"]


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 64, seed: int = 0) -> float:
    """Root of the mean squared Wasserstein-2 distance over one-dimensional projections.

        SW2^2 = mean over theta of  int_0^1 (Q_{theta a}(u) - Q_{theta b}(u))^2 du

    with Q the quantile function. Sets of different size are compared at n + m common quantiles, sets of equal
    size by their sorted values, which is exact.

    Args:
        a: points, (n, ...); everything behind the first dimension is flattened.
        b: points, (m, ...).
        projections: number of unit directions. In the plane they are equally spaced half-turns, elsewhere
            drawn.
        seed: seed of the directions, so that figures can be compared.

    Returns:
        The distance, computed in float64.

    Raises:
        ValueError: the points have different dimensions, or a set is empty or holds NaN or inf.
    """
    x, y = a.detach().cpu().double().flatten(1), b.detach().cpu().double().flatten(1)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) == 0:
        raise ValueError(f"cannot compare points of shapes {tuple(a.shape)} and {tuple(b.shape)}.")
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise ValueError("the points contain NaN or inf; check the samples before measuring them.")
    directions = _directions(x.shape[1], projections, seed)
    p, q = (x @ directions).sort(dim=0).values, (y @ directions).sort(dim=0).values
    if len(p) != len(q):
        levels = (torch.arange(len(p) + len(q), dtype=torch.float64) + 0.5) / (len(p) + len(q))
        p, q = (values[(levels * len(values)).long()] for values in (p, q))
    return (p - q).square().mean().sqrt().item()


def _directions(dim: int, projections: int, seed: int) -> Tensor:
    """Unit directions as columns, (dim, projections), float64."""
    if dim == 2:
        angles = (torch.arange(projections, dtype=torch.float64) + 0.5) * (torch.pi / projections)
        return torch.stack([angles.cos(), angles.sin()])
    directions = torch.randn(dim, projections, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return directions / directions.norm(dim=0, keepdim=True)
