"""One network from a given start to every point of its trajectory (OFTSR, arXiv:2412.09465).

Flow matching between data and a source, x_t = (1 - t) x0 + t x_src, of which only the trajectories that begin at a
known x_src matter: X(r) = x_src - (1 - r) u(x_src, r). Released code counts time from the source, s = 1 - t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_distill.processes import expand

__all__ = ["alignment_loss", "perturbed_source", "runge_kutta_velocity", "trajectory_target"]

Velocity = Callable[[Tensor, Tensor], Tensor]


def perturbed_source(source: Tensor, eps: Tensor, level: float) -> Tensor:
    """Where a flow to many possible pictures begins: sqrt(1 - p^2) source + p eps (arXiv:2412.09465).

    Args:
        source: for example an enlarged low-resolution picture, (B, ...).
        eps: unit Gaussian noise, same shape.
        level: p in [0, 1].
    """
    return (1.0 - level**2) ** 0.5 * source + level * eps


@torch.no_grad()
def runge_kutta_velocity(
    velocity: Velocity, x: Tensor, t: Tensor, r: Tensor, ratio: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Velocity of one second-order step from t to r, and the first one in it, without graph.

        v1 = v(x, t),   v2 = v(x - a (t - r) v1, t - a (t - r)),   v1 + (v2 - v1) / (2a)

    Args:
        velocity: of the teacher.
        x: samples at t, (B, ...).
        t: flow-matching times, (B,).
        r: end of the step, (B,), at most t.
        ratio: a in (0, 1]; 1/2 is the mid-point rule, 1 Heun's.

    Returns:
        the step's velocity and v1.
    """
    first = velocity(x, t)
    step = ratio * (t - r)
    second = velocity(x - expand(step, x) * first, t - step)
    return first + (second - first) / (2.0 * ratio), first


def trajectory_target(u: Tensor, velocity: Tensor, r: Tensor, later: Tensor) -> Tensor:
    """Average velocity from the source to a time a little further on (arXiv:2412.09465, its ``v_boot``).

        (1 - r') u(r') = (1 - r) u(r) + (r - r') v(X(r), r),     r' < r

    A Lagrangian condition in differences: with the velocity of a p-th order step its error is O((r - r')^(p + 1)).

    Args:
        u: u(x_src, r), (B, ...).
        velocity: of the teacher's step from X(r) at r to r'.
        r: flow-matching times, (B,).
        later: r', (B,), below r.

    Returns:
        (B, ...), without graph.
    """
    share = expand((r - later) / (1.0 - later), u)
    return (u + share * (velocity - u)).detach()


def alignment_loss(u: Tensor, velocity: Tensor, r: Tensor) -> Tensor:
    """Mean of r^2 |u(x_src, r) - v(X(r), r)|^2: the ends that both see from r lie together (``w_align``).

    It pulls towards what the teacher expects at r; along a bent trajectory that is not its average velocity, so that
    the weight has to be small.

    Args:
        u: u(x_src, r) with graph, (B, ...).
        velocity: the teacher's at X(r); no gradient flows into it.
        r: flow-matching times, (B,).
    """
    return (expand(r.square(), u) * (u - velocity.detach()).square()).mean()
