"""Score identity distillation: the Fisher divergence between student and teacher, with gradients through both scores.

Notation as in ``score_matching``: y_T, y_F are the x0-predictions of teacher and fake score at
x_t = alpha x + sigma eps, x the student's sample; score_F - score_T = (alpha / sigma^2) (y_F - y_T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.losses.score_matching import matching_weight
from lightning_distill.processes import NoiseProcess, expand

__all__ = ["FISHER_WEIGHTS", "fisher_loss", "fisher_weight"]

#: what ``fisher_weight`` knows besides the kinds of ``matching_weight``
FISHER_WEIGHTS = ("fisher", "divergence")


def fisher_loss(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor, alpha: float = 1.2) -> Tensor:
    """Score identity distillation (SiD, arXiv:2404.04057).

        mean  c (y_T - y_F) ((y_T - x) - alpha (y_T - y_F))

    The networks' weights are frozen, but the gradient passes through x_t into y_T and y_F, and through x. The identity
    E[u(x_t) (y_F - x)] = 0, which holds for every u when y_F is exact, makes it with c = 2 alpha_t^2 / sigma_t^4

        alpha = 1/2    the exact gradient of E |score_F - score_T|^2 over the student's x_t
        alpha = 1      the same with the distribution of x_t held fixed (score implicit matching, arXiv:2410.16794)

    and anything else a mixture of the two; 1.2 gave the best images.

    Args:
        x: student samples with graph, (B, ...).
        real: y_T with graph to ``x``, same shape.
        fake: y_F with graph to ``x``, same shape.
        weight: c, broadcastable to ``x``, without graph; see ``fisher_weight``.
        alpha: see above.
    """
    difference = real - fake
    return (weight * difference * ((real - x) - alpha * difference)).mean()


@torch.no_grad()
def fisher_weight(kind: str, x: Tensor, real: Tensor, t: Tensor, process: NoiseProcess) -> Tensor:
    """Per-sample factor c of ``fisher_loss``, (B, 1, ...), dtype of ``x``.

        fisher        2 alpha^2 / sigma^4                              the Fisher divergence itself
        divergence    fisher g^2 / 2 = 2 alpha (alpha sigma' - sigma alpha') / sigma^3

    (integrated over uniform times with the g^2 of the process' diffusion, that is the divergence of clean samples) and
    all kinds of ``matching_weight``; ``dmd``, 1 / mean |x - y_T|, is SiD's own.

    Args:
        kind: one of the names.
        x: student samples, (B, ...).
        real: teacher's x0-prediction, same shape.
        t: native times, (B,).
        process: noise process of ``t``.
    """
    if kind == "fisher":
        return expand(2.0 * process.alpha(t).square() / process.sigma(t) ** 4, x)
    if kind == "divergence":
        alpha, sigma = process.alpha(t), process.sigma(t)
        return expand(2.0 * alpha * (alpha * process.d_sigma(t) - sigma * process.d_alpha(t)) / sigma**3, x)
    return matching_weight(kind, x, real, t, process)
