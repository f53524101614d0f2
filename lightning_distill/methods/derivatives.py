"""How a method takes the derivative of its student, checked when it is made rather than in its first update."""

from __future__ import annotations

from typing import get_args

import torch

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.tangents import TangentMode

__all__ = ["check_differences", "check_tangent"]


def check_tangent(tangent: str, tangent_step: float | None) -> None:
    """Refuse a way to take derivatives that is none.

    Args:
        tangent: mode of ``tangents.tangent``.
        tangent_step: step of differences, above 0; None for the default.

    Raises:
        ValueError: an unknown mode, or a step that is not positive.
    """
    if tangent not in get_args(TangentMode):
        raise ValueError(f"tangent={tangent!r} is unknown; choose one of {', '.join(get_args(TangentMode))}.")
    if tangent_step is not None and not tangent_step > 0.0:
        raise ValueError(f"tangent_step={tangent_step}: the step of a difference is positive; None is the default.")


def check_differences(student: Denoiser, tangent: str) -> None:
    """Refuse differences of a network that rounds them away.

    Args:
        student: whose derivative is taken.
        tangent: mode of ``tangents.tangent``.

    Raises:
        ValueError: a difference of a network that computes in half precision, or that is told integer times.
    """
    if tangent == "jvp":
        return
    name, dtype = type(student.network).__name__, student.computes_in(torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"tangent={tangent!r} takes differences, and {name} computes in {str(dtype).removeprefix('torch.')}, whose "
            "rounding is larger than they are; use tangent='jvp', or a network in float32."
        )
    if student.family.integer_time:
        raise ValueError(
            f"tangent={tangent!r} takes differences in time, and {name} is told integer times; give the Denoiser "
            "family=dataclasses.replace(family, integer_time=False), which its embedding can read too."
        )
