"""Entropic optimal transport between two small sets of samples, and the map it makes of one to the other.

Distances are differences of large numbers where samples have much in common, as the predictions of one prompt have, so
that products are computed in float64, which mixed precision leaves alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["barycentric_map", "sinkhorn_plan", "squared_distances"]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance per element of every pair, (..., N, M).

    Args:
        a: samples, (..., N, D).
        b: samples, (..., M, D).

    Returns:
        (..., N, M), float64.
    """
    a, b = a.double(), b.double()
    square = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :] - 2.0 * a @ b.transpose(-1, -2)
    return square.clamp_min(0.0) / a.shape[-1]


@torch.no_grad()
def sinkhorn_plan(cost: Tensor, epsilon: float = 0.05, iterations: int = 50) -> Tensor:
    """The plan P of least cost plus entropy between uniform weights, in the logarithmic domain (arXiv:1306.0895).

        min_P  sum P_ij c_ij + epsilon' sum P_ij (ln P_ij - 1),     sum_j P_ij = 1/N,   sum_i P_ij = 1/M

    Args:
        cost: c, (..., N, M).
        epsilon: epsilon' relative to the mean cost; small is sharp and takes more iterations.
        iterations: of Sinkhorn's alternation; the columns are exact, the rows in the limit.

    Returns:
        (..., N, M), float64.
    """
    cost = cost.double()
    scale = cost.mean((-1, -2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    kernel = -cost / (epsilon * scale)
    n, m = cost.shape[-2:]
    f, g = kernel.new_zeros(*cost.shape[:-1], 1), kernel.new_zeros(*cost.shape[:-2], 1, m)
    for _ in range(iterations):
        f = -math.log(n) - (kernel + g).logsumexp(-1, keepdim=True)
        g = -math.log(m) - (kernel + f).logsumexp(-2, keepdim=True)
    return (kernel + f + g).exp()


def barycentric_map(plan: Tensor, b: Tensor) -> Tensor:
    """Where the plan sends each sample of the first set, on average: sum_j P_ij b_j / sum_j P_ij.

    Args:
        plan: P, (..., N, M).
        b: second set, (..., M, D).

    Returns:
        (..., N, D), dtype of ``b``.
    """
    return (plan / plan.sum(-1, keepdim=True) @ b.double()).to(b.dtype)
