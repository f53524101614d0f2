"""Classifier-free guidance, in the convention  uncond + w (cond - uncond)  (w = 1 means none).

Papers that write  cond + s (cond - uncond)  use s = w - 1; convert at the edge. Guidance is linear in the network's
output, and the two passes share x_t and t, so it is the same in every parameterisation; it is done on x0 in float32.

Networks that embed a scale (FLUX.1-dev, SANA-Sprint, students of guidance distillation) are told w in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_distill.networks.denoiser import Denoiser, per_sample
from lightning_distill.prediction import Prediction
from lightning_distill.processes import expand

__all__ = [
    "Guidance",
    "IntervalGuidance",
    "RandomGuidance",
    "check_guidance",
    "combined",
    "guided",
    "is_told",
    "per_sample",
    "telling",
    "unguided_and_guided",
]


def is_told(denoiser: Denoiser) -> bool:
    """Whether a denoiser is guided by telling it the scale, in one pass."""
    return denoiser.family.guidance_scale is not None and denoiser.embeds_guidance


@contextmanager
def telling(network: Denoiser, scale: float | Tensor | None) -> Iterator[None]:
    """Within it a network that embeds a guidance scale is told this one by every call that names none.

    Args:
        network: with a branch for the scale.
        scale: w, a number or one of each sample, (B,); None tells nothing.
    """
    before = network.family
    now: Any = scale  # a family has a number; calls take a tensor, too
    network.family = replace(before, guidance_scale=now)
    try:
        yield
    finally:
        network.family = before


def _concatenate(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return {k: torch.cat([a[k], b[k]]) if isinstance(a[k], Tensor) else a[k] for k in a}


def combined(with_cond: Tensor, without: Tensor, scale: float | Tensor) -> Tensor:
    """y_u + w (y_c - y_u).

    Args:
        with_cond: y_c, (B, ...).
        without: y_u, (B, ...).
        scale: w, a number or (B,).
    """
    return without + (expand(scale, with_cond) if isinstance(scale, Tensor) else scale) * (with_cond - without)


def unguided_and_guided(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Mapping[str, Any], scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """x0-predictions y_c and y_u + w (y_c - y_u), in one batched pass, (B, ...) each; arguments as ``guided``.

    For a network that embeds a scale they are those at its own default and at w.
    """
    if not is_told(denoiser):
        both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), _concatenate(cond, denoiser.null_cond(cond)))
        with_cond, without = both.x0.chunk(2)
        return with_cond, combined(with_cond, without, scale)
    told = torch.cat([per_sample(w, x_t) for w in (denoiser.family.guidance_scale, scale)])
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), _concatenate(cond, cond), guidance=told)
    default, whole = both.x0.chunk(2)
    return default, whole


def guided(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Mapping[str, Any],
    scale: float | Tensor,
) -> Prediction:
    """The guided prediction  y_u + w (y_c - y_u), both branches in one batched pass.

    Scales 1 and 0 are one pass (conditional, unconditional); negative scales are allowed (Anti-CFG). A network that
    embeds a scale is told w instead, and its own default where w is the number 1.

    Args:
        denoiser: network with an unconditional branch.
        x_t: noisy samples, (B, ...).
        t: native times, (B,).
        cond: conditions; empty for unconditional networks, which cannot be guided.
        scale: w, a number or (B,).

    Raises:
        ValueError: w is not 1 and there is no condition, or no unconditional value for one.
    """
    if not isinstance(scale, Tensor) and scale == 1.0:
        return denoiser(x_t, t, cond)
    if is_told(denoiser):
        return denoiser(x_t, t, cond, guidance=per_sample(scale, x_t))
    if not cond:
        raise ValueError(
            f"guidance_scale={scale} needs conditions (class labels, text), but the batch has none; "
            "use guidance_scale=1 for unconditional models."
        )
    if not isinstance(scale, Tensor) and scale == 0.0:
        return denoiser(x_t, t, denoiser.null_cond(cond))
    return Prediction.from_x0(unguided_and_guided(denoiser, x_t, t, cond, scale)[1], x_t, t, denoiser.process)


class Guidance:
    """Guidance with one fixed scale.

    Args:
        scale: w; 1 is none, 0 the unconditional network (Zero-CFG), negative values push away from it (Anti-CFG).
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = float(scale)

    @property
    def needs_null(self) -> bool:
        """Whether the network must have an unconditional branch."""
        return self.scale != 1.0

    def scales(self, t: Tensor, u: Tensor) -> float | Tensor:
        """Guidance scale per sample.

        Args:
            t: native times, (B,).
            u: one uniform number per sample in (0, 1), float64, (B,); used by random policies.
        """
        return self.scale

    def label(self, u: Tensor) -> float | Tensor:
        """The scale by which a trajectory is named to students that are told one: w, whatever the time.

        Args:
            u: as for ``scales``.
        """
        return self.scale

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def __call__(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Mapping[str, Any], u: Tensor) -> Prediction:
        """Guided prediction; see ``guided``."""
        return guided(denoiser, x_t, t, cond, self.scales(t, u))


class IntervalGuidance(Guidance):
    """Guidance inside a time interval only (arXiv:2404.07724); outside it w = 1.

    Args:
        scale: w inside the interval.
        low: lower native time.
        high: upper native time.
    """

    def __init__(self, scale: float, low: float, high: float) -> None:
        super().__init__(scale)
        if not low < high:
            raise ValueError(f"IntervalGuidance needs low < high, got {low} and {high}.")
        self.low, self.high = float(low), float(high)

    def inside(self, t: Tensor) -> Tensor:
        """Which of the times lie in the interval, its ends included."""
        return (t >= self.low) & (t <= self.high)

    def scales(self, t: Tensor, u: Tensor) -> float | Tensor:  # noqa: D102
        return torch.where(self.inside(t), self.scale, 1.0)


class RandomGuidance(Guidance):
    """A scale drawn uniformly per sample and step (SNOOPI's PG-SB, arXiv:2412.02687).

    Args:
        low: smallest w.
        high: largest w.
        interval: native times, lower and upper, outside of which w = 1; None for all.
    """

    def __init__(self, low: float, high: float, interval: tuple[float, float] | None = None) -> None:
        super().__init__(0.5 * (low + high))
        if not low < high:
            raise ValueError(f"RandomGuidance needs low < high, got {low} and {high}.")
        self.low, self.high = float(low), float(high)
        self.interval = None if interval is None else IntervalGuidance(1.0, *interval)

    @property
    def needs_null(self) -> bool:  # noqa: D102
        return True

    def scales(self, t: Tensor, u: Tensor) -> float | Tensor:  # noqa: D102
        w = self.label(u)
        return w if self.interval is None else torch.where(self.interval.inside(t), w, 1.0)

    def label(self, u: Tensor) -> float | Tensor:  # noqa: D102
        return self.low + (self.high - self.low) * u


def check_guidance(teacher: Denoiser, *policies: Guidance) -> None:
    """Refuse guidance of networks that have no unconditional branch and are told no scale.

    Args:
        teacher: the network, or the one that the guided networks were made from.
        policies: what it is guided with.

    Raises:
        ValueError: a policy needs the unconditional branch.
    """
    if is_told(teacher):
        return
    others = set(teacher.family.null) - {"class_labels"}
    missing = [key for key in teacher.missing_null() if key != "class_labels"]
    for guidance in policies:
        if not guidance.needs_null:
            continue
        name = type(teacher.network).__name__
        if missing:
            raise ValueError(
                f"guidance scale {guidance.scale:g} needs an unconditional branch, but the teacher ({name}) has no "
                f"unconditional value for {missing[0]!r}; give null_cond=... of the teacher, or use Guidance(1)."
            )
        if not others and teacher.missing_null(["class_labels"]):
            raise ValueError(
                f"guidance scale {guidance.scale:g} needs an unconditional branch, but the teacher ({name}) has no "
                "null class; give null_class=... of the teacher, or use Guidance(1)."
            )
