"""Divergences D_f(p_T || p_S) = E_{p_S}[f(r)] with r = p_T / p_S, teacher over student, and their gradients.

Two gradients need the same function h(r) = r^2 f''(r):

    d/dtheta D_f(p_T,t || p_S,t)  =  E_{p_S,t}[ h(r) (score_F - score_T) dx_t/dtheta ]     (f-distill: arXiv:2502.15681)
    d/dt     D_f(p_T,t || p_S,t)  =  -g_t^2 / 2  E_{p_S,t}[ h(r) |score_F - score_T|^2 ]   (Uni-Instruct: 2505.20755)

so that h is 1 for the reverse KL and grows with r for divergences that punish missing modes. Ratios are given as
logarithms: a logistic discriminator's best logit is ln r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DIVERGENCES", "Divergence", "divergence", "expanded_divergence_loss", "log_ratio"]

_Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """One f-divergence, as functions of u = ln r.

    Attributes:
        f: f(r), convex with f(1) = 0.
        weight: h = r^2 f''(r).
        slope: dh/du.
    """

    f: _Map
    weight: _Map
    slope: _Map


def _softplus(u: Tensor) -> Tensor:
    return torch.nn.functional.softplus(u)


_LN2 = 0.6931471805599453

#: name: f(r), its h(r); factors are chosen for the simplest h
DIVERGENCES: dict[str, Divergence] = {
    # -ln r, 1
    "rkl": Divergence(lambda u: -u, torch.ones_like, torch.zeros_like),
    # r ln r, r
    "kl": Divergence(lambda u: u.exp() * u, torch.exp, torch.exp),
    # r ln r - (1 + r) ln((1 + r) / 2), r / (1 + r): twice the Jensen-Shannon divergence
    "js": Divergence(
        lambda u: u.exp() * u - (1 + u.exp()) * (_softplus(u) - _LN2),
        torch.sigmoid,
        lambda u: torch.sigmoid(u) * torch.sigmoid(-u),
    ),
    # (1 + r) ln((1 + r) / (2 r)), 1 / (1 + r): the reverse KL, bounded where the student is alone
    "softened_rkl": Divergence(
        lambda u: (1 + u.exp()) * (_softplus(u) - u - _LN2),
        lambda u: torch.sigmoid(-u),
        lambda u: -torch.sigmoid(u) * torch.sigmoid(-u),
    ),
    # (1 - r)^2 / (2 r), 1 / r
    "neyman": Divergence(lambda u: u.cosh() - 1, lambda u: (-u).exp(), lambda u: -(-u).exp()),
    # 2 (1 - sqrt r)^2, sqrt r
    "hellinger": Divergence(
        lambda u: 2 * (1 - (0.5 * u).exp()).square(), lambda u: (0.5 * u).exp(), lambda u: 0.5 * (0.5 * u).exp()
    ),
    # (r - 1) ln r, 1 + r
    "jeffreys": Divergence(lambda u: (u.exp() - 1) * u, lambda u: 1 + u.exp(), torch.exp),
    # (r - 1)^2 / 2, r^2
    "pearson": Divergence(lambda u: 0.5 * (u.exp() - 1).square(), lambda u: (2 * u).exp(), lambda u: 2 * (2 * u).exp()),
}


def divergence(name: str) -> Divergence:
    """The divergence of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"the divergence {name!r} is unknown; choose one of {', '.join(DIVERGENCES)}.")
    return DIVERGENCES[name]


def log_ratio(logits: Tensor, limit: float = 10.0) -> Tensor:
    """Estimate of ln p_T,t / p_S,t from a logistic discriminator (arXiv:1406.2661, Prop. 1).

    Args:
        logits: of all heads at x_t, (B, n).
        limit: largest absolute value.

    Returns:
        (B,), float32 (float64 for float64 logits), with the graph of ``logits``.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.mean(1).clamp(-limit, limit)


def expanded_divergence_loss(
    x: Tensor, real: Tensor, fake: Tensor, log_ratio: Tensor, weight: Tensor, name: str
) -> Tensor:
    """Diffusion expansion of an f-divergence (Uni-Instruct, arXiv:2505.20755).

        mean  c ( (h - h')/2 |d|^2 + h d (x - y_F) ),     d = y_F - y_T,     h' = dh / d ln r

    With c = 2 alpha_t^2 / sigma_t^4, exact y_F, y_T and log ratio, and all gradients through x_t, its gradient is that
    of E_{p_S}[ h(r) |score_F - score_T|^2 ]. For the reverse KL it is ``fisher_loss`` with alpha = 1/2.

    Args:
        x: student samples with graph, (B, ...).
        real: y_T with graph to ``x``, same shape.
        fake: y_F with graph to ``x``, same shape.
        log_ratio: ln p_T,t / p_S,t at x_t, (B,); with graph for the exact gradient.
        weight: c, broadcastable to ``x``, without graph; see ``sid.fisher_weight``.
        name: one of ``DIVERGENCES``.
    """
    chosen = divergence(name)
    u = log_ratio.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    h, slope = chosen.weight(u), chosen.slope(u)
    d = fake - real
    return (weight * (0.5 * (h - slope) * d.square() + h * d * (x - fake))).mean()
