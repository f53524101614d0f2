"""Discrete consistency: pairs of times on one trajectory, their distances, weights and schedules.

    L = w(t, r) d( f(x_t, t), sg f'(x_r, r) ),     r < t                       (consistency models, arXiv:2303.01469)

x_r comes from x_t by a solver step of the teacher (distillation: local error O(h^2) for Euler, O(h^3) for Heun), or
from the same x0 and eps (training: O(h), exact in the mean). f' is f itself without gradient, or an average of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.prediction import Prediction
from lightning_distill.processes import NoiseProcess, expand
from lightning_distill.samplers import heun_step, transport

__all__ = [
    "Metric",
    "PairWeight",
    "cm_ema_decay",
    "cm_steps",
    "consistency_loss",
    "distance",
    "ect_target",
    "ect_time",
    "huber_constant",
    "ict_probabilities",
    "ict_steps",
    "pair_weight",
    "phase_edges",
    "progressive_target",
    "solver_step",
]

Metric = Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] | Callable[[Tensor, Tensor], Tensor]
PairWeight = Literal["one", "inverse_gap", "inverse_sqrt_gap", "inverse_variance", "inverse_c_out", "inverse_c_out2"]


# ------------------------------------------------------------------------------------------------ loss
def huber_constant(elements: int) -> float:
    """The constant c = .00054 sqrt(D) of improved consistency training (arXiv:2310.14189, Section 3.3).

    Args:
        elements: D, number of elements of one sample.
    """
    return 0.00054 * math.sqrt(elements)


def distance(a: Tensor, b: Tensor, metric: Metric = "pseudo_huber", c: float | None = None) -> Tensor:
    """Distance of each pair of samples.

        l2                        sum (a - b)^2
        mse                       mean (a - b)^2
        l1                        mean |a - b|
        pseudo_huber              sqrt(|a - b|^2 + c^2) - c          of the whole vector (arXiv:2310.14189)
        pseudo_huber_elementwise  mean sqrt((a - b)^2 + c^2) - c     (LCM, released code, c = 1e-3)
        a function                (a, b) -> (B,), for example LPIPS

    Args:
        a: samples, (B, ...).
        b: samples, same shape.
        metric: one of the above.
        c: constant of pseudo-Huber; None is ``huber_constant`` (whole vector) or 1e-3 (elementwise). With 0 they are
            the Euclidean norm and the mean absolute difference, whose gradients are 0 where a = b.

    Returns:
        (B,).

    Raises:
        ValueError: an unknown name, or a function that does not return one number per sample.
    """
    if callable(metric):
        value = metric(a, b)
        if value.shape not in ((len(a),), (len(a), 1, 1, 1)):
            raise ValueError(
                f"the metric returned shape {tuple(value.shape)} for {len(a)} pairs; return one number per pair, "
                f"({len(a)},)."
            )
        return value.reshape(len(a))
    difference = (a - b).flatten(1)
    if metric == "l2":
        return difference.square().sum(1)
    if metric == "mse":
        return difference.square().mean(1)
    if metric == "l1":
        return difference.abs().mean(1)
    if metric == "pseudo_huber":
        c = huber_constant(difference.shape[1]) if c is None else c
        squared = difference.square().sum(1)
        if c == 0.0:
            return torch.linalg.vector_norm(difference, dim=1)
        # |d|^2 / (sqrt(|d|^2 + c^2) + c): the same without the cancellation at small |d|
        return squared / ((squared + c**2).sqrt() + c)
    if metric == "pseudo_huber_elementwise":
        c = 1e-3 if c is None else c
        if c == 0.0:
            return difference.abs().mean(1)
        squared = difference.square()
        return (squared / ((squared + c**2).sqrt() + c)).mean(1)
    raise ValueError(
        f"unknown metric {metric!r}; choose l2, mse, l1, pseudo_huber, pseudo_huber_elementwise or a function."
    )


def pair_weight(
    kind: PairWeight, t: Tensor, r: Tensor, process: NoiseProcess | None = None, sigma_data: float = 0.5
) -> Tensor:
    """Weight of each pair of times.

        one               1
        inverse_gap       1 / (t - r)                                       (iCT, ECT)
        inverse_sqrt_gap  1 / sqrt(t - r)
        inverse_variance  alpha^2 / sigma^2: none at pure noise
        inverse_c_out     sqrt(sigma^2 + alpha^2 sd^2) / (sd sigma); inverse_c_out2 its square

    A gap is like a noise level on Karras' grids alone. Grids of flow matching are even, so that ``inverse_gap`` is no
    weight there and small times, whose gradients are small, drift; ``inverse_c_out`` (``inverse_c_out2`` with squared
    errors) gives all times their share.

    Args:
        kind: one of the above.
        t: later (noisier) times, (B,).
        r: earlier times, (B,), below ``t``.
        process: noise process of the times, for the last four.
        sigma_data: sd.

    Returns:
        (B,), float64.
    """
    gap = t.double() - r.double()
    if kind == "one":
        return torch.ones_like(gap)
    if kind == "inverse_gap":
        return 1.0 / gap
    if kind == "inverse_sqrt_gap":
        return gap.rsqrt()
    if kind not in ("inverse_variance", "inverse_c_out", "inverse_c_out2"):
        raise ValueError(
            f"unknown pair weight {kind!r}; choose one, inverse_gap, inverse_sqrt_gap, inverse_variance, "
            "inverse_c_out or inverse_c_out2."
        )
    if process is None:
        raise ValueError(f"the weight {kind!r} needs the noise process of the times.")
    alpha, sigma = process.alpha(t), process.sigma(t)
    if kind == "inverse_variance":
        return (alpha / sigma).square()
    inverse = (sigma.square() + (alpha * sigma_data).square()).sqrt() / (sigma_data * sigma)
    return inverse if kind == "inverse_c_out" else inverse.square()


def consistency_loss(
    online: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    metric: Metric = "pseudo_huber",
    c: float | None = None,
) -> Tensor:
    """Mean over the batch of w d(f(x_t, t), sg f'(x_r, r)) (arXiv:2303.01469, Eq. 7 and 10).

    Args:
        online: f(x_t, t) with graph, (B, ...).
        target: f'(x_r, r), same shape; no gradient flows into it.
        weight: (B,), None for 1.
        metric: see ``distance``.
        c: constant of pseudo-Huber.
    """
    value = distance(online, target.detach(), metric, c)
    return value.mean() if weight is None else (weight.to(value) * value).mean()


# ------------------------------------------------------------------------------------------------ pairs
@torch.no_grad()
def solver_step(
    denoise: Callable[[Tensor, Tensor], Prediction],
    x: Tensor,
    t: Tensor,
    r: Tensor,
    solver: Literal["euler", "heun"],
    process: NoiseProcess,
) -> Tensor:
    """One step of the teacher from each sample's t to its r, without graph (arXiv:2303.01469, Alg. 2).

    Euler is DDIM, the deterministic step in any coordinates.

    Args:
        denoise: the guided teacher, (x, t) -> Prediction.
        x: samples at t, (B, ...).
        t: native times, (B,).
        r: native target times, (B,), in (0, t].
        solver: ``euler`` (one evaluation) or ``heun`` (two).
        process: of the times.

    Returns:
        samples at r, (B, ...).

    Notes:
        Heun is that of ``samplers.heun``, in flow-matching coordinates, which are finite at pure noise; the paper
        takes it in noise levels. The order of its error is the same.
    """
    if solver == "euler":
        return transport(denoise(x, t), r)
    if solver != "heun":
        raise ValueError(f"unknown solver {solver!r}; choose euler or heun.")
    return heun_step(denoise, x, t, r, process)


def progressive_target(x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor, process: NoiseProcess) -> Tensor:
    """The x0 whose one deterministic step from t to r ends at x_r (progressive distillation, arXiv:2202.00512, Alg. 2).

        x0 = (sigma_t x_r - sigma_r x_t) / (alpha_r sigma_t - alpha_t sigma_r)

    Args:
        x_t: samples at t, (B, ...).
        x_r: where two (or more) teacher steps lead, same shape.
        t: native times, (B,) or ().
        r: native target times below ``t``.
        process: noise process.

    Returns:
        x0, (B, ...), without graph.
    """
    alpha, sigma, alpha_r, sigma_r = process.alpha(t), process.sigma(t), process.alpha(r), process.sigma(r)
    scale = alpha_r * sigma - alpha * sigma_r
    return (expand(sigma / scale, x_t) * x_r - expand(sigma_r / scale, x_t) * x_t).detach()


def ect_target(consistent: Tensor, x0: Tensor, r: Tensor) -> Tensor:
    """Target of easy consistency tuning: f(x_r, r), and the clean sample where r = 0 (arXiv:2406.14548).

    Args:
        consistent: f(x_r, r), (B, ...); what it is at r = 0 does not matter, not even if it is nan.
        x0: clean samples, same shape.
        r: earlier times, (B,).
    """
    return torch.where(expand((r > 0).double(), x0).bool(), consistent.detach(), x0)


# ------------------------------------------------------------------------------------------------ schedules
def cm_steps(step: int, total: int, s0: int = 2, s1: int = 150) -> int:
    """Number of times N(k) of consistency training: grows like a root (arXiv:2303.01469, Appendix C).

        N(k) = ceil( sqrt( k/K ((s1 + 1)^2 - s0^2) + s0^2 ) - 1 ) + 1

    Args:
        step: k, in [0, K].
        total: K.
        s0: number at the start.
        s1: at the end there are s1 + 1.
    """
    squared = min(step, total) / total * ((s1 + 1) ** 2 - s0**2) + s0**2
    # a root that is a whole number up to rounding is that number
    return math.ceil(math.sqrt(squared) - 1.0 - 1e-9) + 1


def cm_ema_decay(steps: int, s0: int = 2, mu0: float = 0.9) -> float:
    """Decay mu of the target average with N times: exp(s0 ln(mu0) / N) (arXiv:2303.01469, Appendix C).

    Args:
        steps: N.
        s0: number of times at the start of training.
        mu0: decay at the start.
    """
    return math.exp(s0 * math.log(mu0) / steps)


def ict_steps(step: int, total: int, s0: int = 10, s1: int = 1280) -> int:
    """Number of times N(k) of improved consistency training: doubles (arXiv:2310.14189, Section 3.4).

        N(k) = min(s0 2^floor(k/K'), s1) + 1,     K' = floor( K / (log2(s1/s0) + 1) )

    Args:
        step: k, in [0, K].
        total: K.
        s0: number of intervals at the start.
        s1: at the end.
    """
    period = max(1, math.floor(total / (math.log2(s1 / s0) + 1)))
    return min(s0 * 2 ** min(step // period, 60), s1) + 1


def ict_probabilities(levels: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """Probability of each interval of noise levels: a discretised log-normal (arXiv:2310.14189, Section 3.5).

    Args:
        levels: ascending noise levels sigma, (N,).
        mean: of ln sigma.
        std: of ln sigma.

    Returns:
        (N - 1,), float64, sums to 1; entry i is the pair (levels[i], levels[i + 1]).
    """
    cdf = torch.special.ndtr((levels.double().log() - mean) / std)
    mass = cdf.diff()
    return mass / mass.sum()


def ect_time(t: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """Earlier time r(t) of easy consistency tuning (arXiv:2406.14548, Section 3.2).

        r = max(0, t (1 - (1 + k sigmoid(-b t)) / q^(stage + 1)))

    Stage 0 is mostly ordinary denoising (r = 0); later stages bring r towards t.

    Args:
        t: noise levels of EDM, any shape.
        stage: number of completed periods, >= 0.
        q: decay of the gap per stage, > 1; 256 for a short run at one stage.
        k: how much larger the relative gap is at small t.
        b: where it changes.

    Returns:
        r, float64.
    """
    t = t.double()
    return (t * (1.0 - (1.0 + k * torch.sigmoid(-b * t)) / q ** (stage + 1))).clamp_min(0.0)


def phase_edges(times: Sequence[float], phases: int) -> list[float]:
    """Start of each phase on a solver's grid: equal numbers of steps each (PCM, arXiv:2405.18407, Section 3.2).

    Args:
        times: the solver's descending times without the final 0, N of them.
        phases: M in [1, N].

    Returns:
        M descending edges without the final 0; the first is ``times[0]``.
    """
    if not 1 <= phases <= len(times):
        raise ValueError(f"{phases} phases do not fit a grid of {len(times)} times; give 1 to {len(times)}.")
    n = len(times)
    return [float(times[n - n * (phases - m) // phases]) for m in range(phases)]
