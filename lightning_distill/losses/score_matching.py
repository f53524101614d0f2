"""Losses of the distribution-matching family: denoising for critics and teachers, score differences for students.

Notation: y_T, y_F are the x0-predictions of teacher and fake score at x_t = alpha x + sigma eps, x = G(z) the student's
sample, w the guidance scale inside y_T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distill.prediction import PREDICTION_TYPES, Prediction, regression_target
from lightning_distill.processes import NoiseProcess, expand

__all__ = [
    "MatchingWeight",
    "checked_space",
    "checked_weight",
    "denoising_loss",
    "matching_weight",
    "score_difference",
    "space_weight",
    "surrogate",
]

MatchingWeight = Literal["dmd", "dmd_v1", "dmd_clamped", "kl", "vsd", "one"]


def _checked(what: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; choose {', '.join(known[:-1])} or {known[-1]}.")
    return name


def checked_weight(kind: str, further: Sequence[str] = ()) -> str:
    """The name of a factor, as given.

    Args:
        kind: one of ``matching_weight``'s.
        further: names that the caller knows besides.

    Raises:
        ValueError: it is none of them.
    """
    return _checked("matching weight", kind, [*get_args(MatchingWeight), *further])


def checked_space(space: str | None) -> str | None:
    """The name of a space of ``denoising_loss``, as given; None for that of the prediction.

    Args:
        space: one of the prediction types, ``edm`` or ``scaled_epsilon``.

    Raises:
        ValueError: it is none of them.
    """
    known = [*PREDICTION_TYPES, "edm", "scaled_epsilon"]
    return space if space is None else _checked("space of the loss", space, known)


def denoising_loss(
    prediction: Prediction,
    x0: Tensor,
    eps: Tensor,
    space: str | None = None,
    sigma_data: float = 1.0,
    factor: Tensor | None = None,
) -> Tensor:
    """Mean-squared denoising error, in the space that fixes its weight over time.

        E | out - target |^2  =  E w(t) | x0_hat - x0 |^2

    with w = (alpha/sigma)^2 for ``epsilon``, 1 for ``sample``, (alpha^2 + sigma^2)^2 / sigma^2 for ``v_prediction``,
    ((alpha + sigma)/sigma)^2 for ``flow_prediction``, (alpha^2 s^2 + sigma^2) / (s sigma)^2 for ``edm`` (s =
    ``sigma_data``; arXiv:2206.00364, Table 1, lambda(sigma), for alpha = 1) and alpha^4 / sigma^2 for
    ``scaled_epsilon``, the error of alpha eps (SwiftBrush's critic, arXiv:2312.05239, released code).

    Args:
        prediction: network output at x_t = alpha x0 + sigma eps.
        x0: clean samples, (B, ...).
        eps: the noise in x_t, same shape.
        space: a prediction type, ``edm`` or ``scaled_epsilon``; None is the prediction's own type.
        sigma_data: s of the ``edm`` weight.
        factor: further weight per sample, (B,).

    Returns:
        scalar mean over all elements.
    """
    process, t = prediction.process, prediction.t
    alpha, sigma = process.alpha(t), process.sigma(t)
    if space == "edm":
        error = expand(space_weight(space, t, process, sigma_data), x0) * (prediction.x0 - x0).square()
    elif space == "scaled_epsilon":
        error = (expand(alpha, x0) * (prediction.eps - eps)).square()
    else:
        space = space or prediction.kind
        error = (prediction.as_type(space) - regression_target(space, x0, eps, alpha, sigma)).square()
    return error.mean() if factor is None else (expand(factor, error) * error).mean()


def space_weight(space: str, t: Tensor, process: NoiseProcess, sigma_data: float = 1.0) -> Tensor:
    """The w(t) by which ``denoising_loss`` in a space weighs the squared error of x0, (B,), float64.

    Args:
        space: a prediction type, ``edm`` or ``scaled_epsilon``.
        t: native times above 0, (B,).
        process: noise process.
        sigma_data: s of the ``edm`` weight.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    if space == "edm":
        return (alpha.square() * sigma_data**2 + sigma.square()) / (sigma_data * sigma).square()
    # the error of the target where that of x0 is 1 and x_t is known
    kind, scale = ("epsilon", alpha) if space == "scaled_epsilon" else (space, torch.ones_like(alpha))
    return (scale * regression_target(kind, torch.ones_like(alpha), -alpha / sigma, alpha, sigma)).square()


def surrogate(x: Tensor, direction: Tensor) -> Tensor:
    """A loss whose gradient with respect to ``x`` is ``direction`` divided by the number of elements.

        1/2 mean | x - sg(x - g) |^2      (DMD2, arXiv:2405.14867, released code)

    Args:
        x: student samples with graph, (B, ...).
        direction: g, same shape; no gradient flows through it.
    """
    target = (x - direction).detach()
    return 0.5 * (x - target).square().mean()


@torch.no_grad()
def matching_weight(kind: str, x: Tensor, real: Tensor, t: Tensor, process: NoiseProcess) -> Tensor:
    """Per-sample factor lambda on the direction y_F - y_T, (B, 1, ...), float32.

        kl      alpha^2 / sigma^2        exact gradient of KL(p_student,t || p_teacher,t)
        vsd     alpha sigma              w(t) = sigma^2 on the noise difference (VSD, arXiv:2305.16213)
        dmd     1 / mean |x - y_T|       DMD2 and public re-implementations of DMD
        dmd_v1  alpha / mean |x - y_T|   DMD's paper, w_t = sigma^2 / alpha on the score difference (arXiv:2311.18828,
                                         Eq. 8)
        dmd_clamped  1 / max(.1, mean |x - y_T|)    CDM (arXiv:2605.06376)
        one     1                        Diff-Instruct (arXiv:2305.18455)

    Args:
        kind: one of the names above.
        x: student samples, (B, ...).
        real: teacher's (guided) x0-prediction, same shape.
        t: native times of the matching, (B,).
        process: noise process of ``t``.
    """
    checked_weight(kind)
    if kind in ("dmd", "dmd_v1", "dmd_clamped"):
        scale = (x - real).abs().flatten(1).mean(1).clamp_min(0.1 if kind == "dmd_clamped" else 1e-6)
        weight = 1.0 / scale
        if kind == "dmd_v1":
            return expand(weight, x) * expand(process.alpha(t).to(weight), x)
    elif kind == "kl":
        weight = (process.alpha(t) / process.sigma(t)).square()
    elif kind == "vsd":
        weight = process.alpha(t) * process.sigma(t)
    else:
        weight = torch.ones_like(t)
    return expand(weight, x)


def score_difference(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """Distribution-matching loss: moves x along lambda (y_T - y_F) (DMD2, arXiv:2405.14867, Eq. 1).

    Args:
        x: student samples with graph, (B, ...).
        real: y_T, guided x0-prediction of the teacher, same shape, no graph needed.
        fake: y_F, x0-prediction of the fake score, same shape, no graph needed.
        weight: lambda, broadcastable to ``x``; see ``matching_weight``.
    """
    return surrogate(x, weight * (fake - real).detach())
