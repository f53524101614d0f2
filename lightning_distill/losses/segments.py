"""Consistency along parts of a trajectory: merging segments, sub-paths, stochastic solvers, jumps between any times.

The parts that a method adds to discrete consistency (``losses.consistency``):

    segments      f(x, t) leads to the end of the segment of t; segments merge, 8 -> 4 -> 2 -> 1    TSCD, MLCM
    sub-paths     a point between x_r and x_t agrees with x_r                                      SPLAM
    stochastic    x_r is drawn by the reverse SDE                                                  SCott
    soft          G(G(x_t, t, s), s, 0) = G(G'(x_u, u, s), s, 0) for s <= u < t                    CTM
    experts       differences of frames, features of a discriminator                               DCM
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lightning_distill.losses.subinterval import transition
from lightning_distill.prediction import Prediction
from lightning_distill.processes import FlowMatching, NoiseProcess, change_process, expand

__all__ = [
    "check_segments",
    "feature_distance",
    "gradient_ratio",
    "least_squares_discriminator",
    "least_squares_generator",
    "segment_stage",
    "soft_consistency",
    "stochastic_step",
    "sub_path",
    "temporal_coherence",
]


# ------------------------------------------------------------------------------------------------ segments that merge
def check_segments(segments: Sequence[int], updates: Sequence[int]) -> None:
    """Refuse a curriculum whose segments do not merge (Hyper-SD, arXiv:2404.13686).

    Args:
        segments: number of segments of each stage, falling, each dividing the one before.
        updates: student updates of each stage but the last.

    Raises:
        ValueError: otherwise.
    """
    listed = list(segments)
    if not listed or min(listed) < 1 or any(a % b or a == b for a, b in pairwise(listed)):
        raise ValueError(
            f"segments={listed} must fall, and each stage's number divide the one before, so that segments merge; "
            "for example [8, 4, 2, 1]."
        )
    if len(updates) != len(listed) - 1 or min(updates, default=1) < 1:
        raise ValueError(
            f"segment_updates={list(updates)} gives the updates of each stage but the last; with {len(listed)} stages "
            f"it has {len(listed) - 1} positive entries."
        )


def segment_stage(update: int, updates: Sequence[int]) -> int:
    """Number of the stage at a student update.

    Args:
        update: from 0.
        updates: student updates of each stage but the last.
    """
    return sum(update >= until for until in accumulate(updates))


def least_squares_generator(fake: Tensor) -> Tensor:
    """Mean of (D(fake) - 1)^2 (LSGAN, arXiv:1611.04076, Eq. 9 with a = 0, b = c = 1).

    Args:
        fake: logits of student samples, (B, ...), with graph to the student.
    """
    return (fake - 1.0).square().mean()


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of (D(real) - 1)^2 + D(fake)^2 (LSGAN, arXiv:1611.04076, Eq. 9); the best D is p_real / (p_real + p_fake).

    Args:
        real: logits of real samples, (B, ...).
        fake: logits of student samples, (B', ...), without graph to the student.
    """
    return (real - 1.0).square().mean() + fake.square().mean()


# ------------------------------------------------------------------------------------------------ sub-paths
def sub_path(
    x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor, share: Tensor, process: NoiseProcess
) -> tuple[Tensor, Tensor]:
    """The point between the two ends of a solver's step, and its time (SPLAM, arXiv:2404.13903).

        x' = (1 - gamma) x_r' + gamma x_t',     t' = (1 - gamma) r' + gamma t'

    in coordinates x' = x / (alpha + sigma) over t' = sigma / (alpha + sigma), where the trajectory of one x0 and eps is
    a line. For a first-order step this is the same step to an intermediate time.

    Args:
        x_t: later points, (B, ...).
        t: native times, (B,).
        x_r: earlier points, same shape.
        r: native times below ``t``, (B,).
        share: gamma in [0, 1], (B,): 0 gives x_r at r, 1 gives x_t at t.
        process: noise process.

    Returns:
        the point (B, ...) and its native time (B,), float64.

    Notes:
        The paper's coordinates are x / alpha over sigma / alpha: the same line, along which gamma moves at another
        speed. Those of flow matching are finite at pure noise.
    """
    (late, scale_t), (early, scale_r) = (change_process(time, process, FlowMatching()) for time in (t, r))
    x = expand((1.0 - share) * scale_r, x_r) * x_r + expand(share * scale_t, x_t) * x_t
    s, scale = change_process((1.0 - share) * early + share * late, FlowMatching(), process)
    return expand(scale, x) * x, s


# ------------------------------------------------------------------------------------------------ stochastic solvers
def stochastic_step(prediction: Prediction, r: Tensor, strength: float, n: Tensor) -> Tensor:
    """One step of the reverse SDE with a noise strength (SCott, arXiv:2403.01505; DDIM's eta).

        x_r = alpha_r x0 + sqrt(sigma_r^2 - s^2) eps + s n,     s = eta (sigma_r / sigma_t) S,
        S^2 = sigma_t^2 - (alpha_t / alpha_r)^2 sigma_r^2

    eta = 0 is the deterministic step. eta = 1 is the forward process' own conditional law of x_r given x_t and x0
    (arXiv:2010.02502, Eq. 16), and in the limit of small steps the reverse SDE.

    Args:
        prediction: of the teacher at (x_t, t).
        r: native target times with alpha_r > 0, (B,).
        strength: eta in [0, 1].
        n: fresh noise, (B, ...).
    """
    process, x = prediction.process, prediction.x_t
    sigma, spread = process.sigma(r), transition(r, prediction.t, process)[1]
    fresh = strength * sigma / process.sigma(prediction.t) * spread
    kept = (sigma.square() - fresh.square()).clamp_min(0.0).sqrt()
    return expand(process.alpha(r), x) * prediction.x0 + expand(kept, x) * prediction.eps + expand(fresh, x) * n


# ------------------------------------------------------------------------------------------------ jumps
def soft_consistency(
    online: Callable[[Tensor, Tensor, Tensor], Tensor],
    frozen: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_t: Tensor,
    t: Tensor,
    x_u: Tensor,
    u: Tensor,
    s: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both sides of soft consistency, in clean samples (CTM, arXiv:2310.02279, Section 3).

        G'(G(x_t, t, s), s, 0)   and   sg G'(G'(x_u, u, s), s, 0),     s <= u < t

    s = u is local consistency, s = 0 is that of consistency models (global). The outer G' has no gradient of its own,
    but passes one to its input.

    Args:
        online: the jump G(x, t, s) -> x_s, with graph.
        frozen: the jump G' of frozen weights; at s = 0 it must be the identity.
        x_t: later points, (B, ...).
        t: native times, (B,).
        x_u: where the teacher's solver leads from x_t, same shape.
        u: native times below ``t``, (B,).
        s: native target times, at most ``u``, (B,).

    Returns:
        estimate, with graph, and target, without, (B, ...) each.
    """
    clean = torch.zeros_like(s)
    estimate = frozen(online(x_t, t, s), s, clean)
    with torch.no_grad():
        target = frozen(frozen(x_u, u, s), s, clean)
    return estimate, target


def gradient_ratio(first: Tensor, other: Tensor, limit: float = 1e4) -> Tensor:
    """Weight |grad L_1| / |grad L_2| that makes a term count as much as the first (arXiv:2012.09841, Eq. 7).

    Args:
        first: squared norm of the first term's gradient.
        other: that of the other term, same shape.
        limit: largest weight.

    Returns:
        without graph; 1 where the other term has no gradient.
    """
    ratio = (first.detach() / other.detach()).sqrt()
    return torch.where(ratio.isfinite(), ratio, torch.ones_like(ratio)).clamp_max(limit)


# ------------------------------------------------------------------------------------------------ experts
def temporal_coherence(a: Tensor, b: Tensor, lag: int) -> Tensor:
    """Mean squared difference of the changes between frames a lag apart (DCM, arXiv:2506.03123, Eq. 8).

        | (a[l:] - a[:L-l]) - (b[l:] - b[:L-l]) |^2

    Args:
        a: videos, (B, C, L, ...).
        b: videos, same shape.
        lag: l in [1, L - 1].

    Returns:
        (B,).

    Raises:
        ValueError: no such frames.
    """
    frames = a.shape[2] if a.ndim == 5 else 1
    if not 1 <= lag < frames:
        raise ValueError(
            f"temporal coherence compares frames {lag} apart, and samples of shape {tuple(a.shape[1:])} have {frames}; "
            f"give videos (channels, frames, height, width) of more than {lag} frames, or a smaller lag."
        )
    change = a - b
    return (change[:, :, lag:] - change[:, :, :-lag]).square().flatten(1).mean(1)


def feature_distance(fake: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Tensor:
    """Feature matching: mean squared distance of features, mean over blocks (DCM, arXiv:2506.03123, Eq. 10).

    Args:
        fake: features of student samples by block, (B, ...) each.
        real: of real samples; no gradient flows into them.

    Returns:
        (B,), float32 (float64 for float64 features).
    """
    wide = [
        (v.double() - real[k].detach().double() if v.dtype == torch.float64 else v.float() - real[k].detach().float())
        for k, v in fake.items()
    ]
    return torch.stack([d.square().flatten(1).mean(1) for d in wide]).mean(0)
