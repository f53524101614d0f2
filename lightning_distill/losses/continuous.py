"""Continuous-time consistency in TrigFlow: the tangent that a student follows (sCM, arXiv:2410.11081).

    f(x, t) = cos(t) x - sin(t) F(x, t),     x = cos(t) x0 + sin(t) eps,     dx/dt the teacher's F_T

Samples have unit standard deviation; divide data by sigma_data first. For a perfect student df/dt = 0 along the
trajectory. The tangent g is cos(t) df/dt for any F, in the form that stays finite at t = pi/2:

    g = -cos^2 (F - F_T) - w (cos sin x + dF),     dF = cos sin (grad_x F . F_T + dF/dt)

and the student follows F <- F + g / (|g| + c). Neither F in g nor dF has a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_distill.processes import TrigFlow, expand

__all__ = [
    "continuous_loss",
    "normalise_tangent",
    "rcm_tangent",
    "scm_directions",
    "scm_tangent",
    "tangent_warmup",
    "training_velocity",
    "trig_weight",
]


def _cos_sin(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    trig = TrigFlow()
    return expand(trig.alpha(t), like), expand(trig.sigma(t), like)


def training_velocity(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """cos(t) eps - sin(t) x0: what takes the teacher's place in consistency training; right in the mean only.

    Args:
        x0: clean samples of unit standard deviation, (B, ...).
        eps: noise, same shape.
        t: TrigFlow times, (B,).
    """
    cos, sin = _cos_sin(t, x0)
    return cos * eps - sin * x0


def scm_directions(velocity: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of x and t that give dF with its factor cos sin (arXiv:2410.11081, Section 4.1).

    The factor goes into the direction, not onto the derivative: the product stays small where dF/dt is large.

    Args:
        velocity: dx/dt = F_T, (B, ...).
        t: TrigFlow times, (B,).

    Returns:
        cos sin F_T, (B, ...), and cos sin, (B,) in the dtype of ``t``.
    """
    cos, sin = _cos_sin(t, velocity)
    trig = TrigFlow()
    return cos * sin * velocity, (trig.alpha(t) * trig.sigma(t)).to(t.dtype)


def scm_tangent(
    x: Tensor, t: Tensor, student: Tensor, velocity: Tensor, derivative: Tensor, warmup: float = 1.0
) -> Tensor:
    """The tangent g (arXiv:2410.11081, Alg. 1); cos(t) df/dt with ``warmup`` 1.

    Args:
        x: TrigFlow samples of unit standard deviation, (B, ...).
        t: times, (B,).
        student: F(x, t), same shape; its graph is not used.
        velocity: dx/dt: the (guided) teacher's F_T, or ``training_velocity``.
        derivative: dF along ``scm_directions``.
        warmup: w in [0, 1]; at 0 the student is trained to be the teacher.

    Returns:
        g, (B, ...), without graph.
    """
    cos, sin = _cos_sin(t, x)
    return (-(cos**2) * (student - velocity) - warmup * (cos * sin * x + derivative)).detach()


def rcm_tangent(
    x: Tensor, t: Tensor, student: Tensor, velocity: Tensor, derivative: Tensor, warmup: float = 1.0
) -> Tensor:
    """The tangent with rCM's warm-up, which weakens sin x only (arXiv:2510.08431, released code).

        g = -cos sqrt(1 - w^2 sin^2) (F - F_T) - (w cos sin x + dF)

    ``scm_tangent`` for w = 1. Arguments are those of ``scm_tangent``.
    """
    cos, sin = _cos_sin(t, x)
    factor = cos * (1.0 - (warmup * sin) ** 2).clamp_min(0.0).sqrt()
    return (-factor * (student - velocity) - (warmup * cos * sin * x + derivative)).detach()


def normalise_tangent(g: Tensor, c: float = 0.1, norm: Literal["full", "rms"] = "full") -> Tensor:
    """Tangents g / (|g| + c) of each sample (arXiv:2410.11081, Section 4.1).

    Args:
        g: tangents, (B, ...).
        c: keeps small tangents small.
        norm: ``full`` is the vector's length, after which g has a mean square of at most 1/D (the paper, SANA-Sprint);
            ``rms`` the root of its mean square, after which it is at most 1 (FastGen). The two differ by sqrt(D) in the
            gradient.

    Returns:
        the normalised tangents; zeros stay zeros.
    """
    if norm not in ("full", "rms"):
        raise ValueError(f"norm={norm!r} is unknown; choose full or rms.")
    flat = g.flatten(1)
    length = torch.linalg.vector_norm(flat, dim=1)
    if norm == "rms":
        length = length / flat.shape[1] ** 0.5
    return g / expand(length + c, g)


def tangent_warmup(step: int, steps: int) -> float:
    """Share w = min(1, k / H) of the tangent: 10,000 steps in sCM, 4,000 in SANA-Sprint, 1,000 in rCM.

    Args:
        step: student update k, from 0.
        steps: H; 0 means none.
    """
    return 1.0 if steps <= 0 else min(1.0, step / steps)


def trig_weight(t: Tensor) -> Tensor:
    """1 / tan(t), the prior weight of sCM (arXiv:2410.11081, Section 4.2), float64.

    Args:
        t: TrigFlow times, any shape.
    """
    trig = TrigFlow()
    return trig.alpha(t) / trig.sigma(t)


def continuous_loss(
    student: Tensor, g: Tensor, weight: Tensor | None = None, log_variance: Tensor | None = None
) -> Tensor:
    """Regression onto the student's own output plus the tangent (arXiv:2410.11081, Alg. 1).

        mean_B  e^{-u} w / D |F - sg F - g|^2 + u

    Its gradient is -2/D e^{-u} w J^T g, J the student's Jacobian in its weights.

    Args:
        student: F(x, t) with graph, (B, ...).
        g: (normalised) tangent, same shape; no gradient flows into it.
        weight: w, (B,), for example ``trig_weight``; None for 1.
        log_variance: u(t), (B,), a learned function of time (arXiv:2312.02696, Section 2.4); None for 0.

    Returns:
        scalar; without weights the mean square of g, which says nothing about convergence: log |g| before its
        normalisation.
    """
    error = (student - student.detach() - g.detach()).square().flatten(1).mean(1)
    if weight is not None:
        error = weight.to(error) * error
    if log_variance is None:
        return error.mean()
    log_variance = log_variance.to(error)
    return ((-log_variance).exp() * error + log_variance).mean()
