"""Losses of recursive consistent generation and its twin branch (TwinFlow, arXiv:2512.05150).

    flow map         u(x, t, r) is regressed on ``flow_maps.rcgm_target``, robustly and more heavily for small gaps
    fake branch      u'(x_s, s) is regressed on eps - x', the velocity of the student's own samples x'
    rectification    x' = eps - u(eps, 1, 0) moves by the difference of the two branches' velocities

The branches are one network: what is told to it apart from (x, t) decides which velocity it gives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_distill.losses.score_matching import surrogate

__all__ = ["fake_flow_loss", "gap_weight", "rectification", "robust_loss", "robust_weight"]


def robust_weight(error: Tensor, c: float = 1e-3) -> Tensor:
    """(e / c^2 + 1)^(-1/2) / c: the slope of Barron's loss with alpha = 1 in e (arXiv:1701.03077, Eq. 8), times 2c.

    Weighted by it, e has the gradient of 2 c (sqrt(e / c^2 + 1) - 1), which is 2 sqrt(e) for e >> c^2.

    Args:
        error: squared error of each sample, (B,).
        c: where the loss turns from quadratic to linear.

    Returns:
        (B,), without graph.
    """
    return (error.detach() / c**2 + 1.0).rsqrt() / c


def gap_weight(t: Tensor, r: Tensor) -> Tensor:
    """tan((1 - |t - r|) pi / 2.5) + 1: from 4.08 without a gap to 1 for the whole path, float64.

    Args:
        t: flow-matching times, (B,).
        r: target times, (B,).
    """
    return torch.tan((1.0 - (t - r).abs().double()) * (math.pi / 2.5)) + 1.0


def robust_loss(u: Tensor, target: Tensor, t: Tensor, r: Tensor, c: float | None = 1e-3) -> Tensor:
    """Mean over the batch of gap weight, robust weight and mean squared error (TwinFlow, released code).

    Args:
        u: average velocity with graph, (B, ...).
        target: what it should be; no gradient flows into it.
        t: flow-matching times, (B,).
        r: target times, (B,).
        c: of ``robust_weight``; None for the squared error itself. A robust loss goes to a median of noisy targets
            (those of single pairs), which is the mean in many dimensions only.

    Returns:
        scalar.
    """
    error = (u - target.detach()).square().flatten(1).mean(1)
    weight = gap_weight(t, r).to(error)
    if c is not None:
        weight = weight * robust_weight(error, c)
    return (weight * error).mean()


def fake_flow_loss(u: Tensor, made: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the fake branch: the velocity eps - x' of the student's samples (arXiv:2512.05150).

    Args:
        u: the fake branch at (1 - s) x' + s eps, with graph, (B, ...).
        made: student samples x'; no gradient flows into them.
        eps: their noise.
    """
    return (u - (eps - made).detach()).square().mean()


def rectification(u: Tensor, fake: Tensor, real: Tensor, limit: float | None = 1.0) -> Tensor:
    """Moves u(eps, 1, 0) by the difference of the branches at the noised sample (arXiv:2512.05150).

        grad_u = clamp(v_fake - v_real, -limit, limit)

    The sample is x' = eps - u and scores are -(x_s + (1 - s) v) / s, so that the difference is s / (1 - s)^2 times the
    gradient of KL(fake_s || real_s) in u.

    Args:
        u: what made the sample, with graph, (B, ...).
        fake: velocity of the fake branch, no gradient flows into it.
        real: velocity of the real branch, neither.
        limit: largest absolute value of the difference, 1 in the released code; None for none. A limit keeps the zero.

    Returns:
        scalar; its gradient in ``u`` is grad_u divided by the number of elements.
    """
    difference = (fake - real).detach()
    return surrogate(u, difference if limit is None else difference.clamp(-limit, limit))
