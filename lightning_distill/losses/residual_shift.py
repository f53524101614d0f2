"""Distribution trajectory matching between restored and true pictures (CTMSR, arXiv:2503.20349).

    z_t = (1 - t) x + t low + sigma_t n,     z'_t = (1 - t) x0 + t low + sigma_t n        the same n, the same low

A consistency function f of the path from data to low-resolution pictures sends z'_t to likely pictures. Where it sends
z_t elsewhere, the restored picture x is not where the data are: f(z_t) - f(z'_t) is the difference of the two
trajectories' remaining velocities, up to a factor of t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.losses.score_matching import surrogate

__all__ = ["trajectory_direction", "trajectory_matching"]

#: smallest mean error by which a direction is divided
_FLOOR = 1e-3


@torch.no_grad()
def trajectory_direction(x: Tensor, own: Tensor, true: Tensor, x0: Tensor) -> Tensor:
    """Where to move a restored picture from: [f(z_t) - f(z'_t)] / mean |x - x0| (released code, ``improved``).

    Args:
        x: restored pictures, (B, ...).
        own: f(z_t), of noised restored pictures, same shape.
        true: f(z'_t), of true pictures with the same noise.
        x0: true pictures.

    Returns:
        (B, ...); 0 where f cannot tell the two apart.
    """
    error = (x - x0).abs().flatten(1).mean(1).clamp_min(_FLOOR)
    return (own - true) / error.reshape(-1, *[1] * (x.ndim - 1))


def trajectory_matching(x: Tensor, own: Tensor, true: Tensor, x0: Tensor) -> Tensor:
    """A loss whose gradient in ``x`` is ``trajectory_direction`` divided by the number of elements.

    Args:
        x: restored pictures with graph, (B, ...); all others are without.
        own: see ``trajectory_direction``.
        true: see there.
        x0: see there.
    """
    return surrogate(x, trajectory_direction(x, own, true, x0))
