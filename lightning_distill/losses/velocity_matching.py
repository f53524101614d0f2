"""Velocity matching and velocity distillation: a flow map to 0 with one time (MDT-dist, arXiv:2509.04406).

    f(x, t) = x - t u(x, t),     w = u + t du/dt     the velocity field whose trajectories u would end

u is the average velocity from t to 0 and has no second time. For the exact map w is the teacher's velocity v. Velocity
matching trains u towards w = v; velocity distillation uses w, where the student has it already, as the velocity of the
student's own samples, so that their distribution is matched without a critic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.losses.continuous import normalise_tangent
from lightning_distill.losses.flow_maps import mean_flow_target
from lightning_distill.losses.score_matching import surrogate
from lightning_distill.processes import expand

__all__ = ["student_velocity", "velocity_distillation", "velocity_matching_target"]


def student_velocity(u: Tensor, du_dt: Tensor, t: Tensor) -> Tensor:
    """W = u + t du/dt, the derivative of t u along the trajectory (arXiv:2509.04406, Eq. 12).

    Args:
        u: average velocity between t and 0, (B, ...).
        du_dt: its derivative along (v, 1), same shape.
        t: flow-matching times, (B,).
    """
    return u + expand(t, u) * du_dt


def velocity_matching_target(velocity: Tensor, du_dt: Tensor, t: Tensor, norm: float | None = None) -> Tensor:
    """What u is regressed on: v - t du/dt (arXiv:2509.04406, Eq. 13; its derivative has no gradient, Section 4.2).

    MeanFlow's target for r = 0.

    Args:
        velocity: (guided) teacher's v at (x, t), (B, ...).
        du_dt: derivative of u along (v, 1), same shape.
        t: flow-matching times, (B,).
        norm: c, with which du/dt is divided by |du/dt| + c per sample (.1 in the released code); None for the formula
            as it is. Normalised, the exact map is not the solution: the derivative counts as if it had length 1.

    Returns:
        (B, ...), without graph.
    """
    slope = du_dt if norm is None else normalise_tangent(du_dt, norm)
    return mean_flow_target(velocity, slope, t, torch.zeros_like(t))


def velocity_distillation(x: Tensor, own: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Moves the student's samples along w - v at their noised x_t = (1 - t) x + t eps (arXiv:2509.04406, Eq. 17).

        grad_x = -(1 - t) (w - v)

    As scores are -(x_t + (1 - t) v) / t, this is t / (1 - t) times the gradient of KL(student_t || teacher_t) in x
    wherever w is the velocity of the student's distribution.

    Args:
        x: student samples with graph, (B, ...).
        own: w at (x_t, t), no gradient flows into it.
        velocity: (guided) teacher's v there.
        t: flow-matching times, (B,).

    Returns:
        scalar; its gradient in ``x`` is grad_x divided by the number of elements.
    """
    return surrogate(x, expand(t - 1.0, x) * (own - velocity).detach())
