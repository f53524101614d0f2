"""Dropping conditions at random, which gives a network the unconditional branch that guidance needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_distill.networks.denoiser import Denoiser

__all__ = ["drop_conditions"]


def drop_conditions(denoiser: Denoiser, cond: Mapping[str, Any], u: Tensor, share: float) -> dict[str, Any]:
    """The conditions with those of a random share of the samples replaced (classifier-free guidance, arXiv:2207.12598).

        c_i <- null  where  u_i < share

    All conditions of a sample are dropped together. What both branches of guidance share, such as a resolution, stays.

    Args:
        denoiser: knows what stands for "no condition" (``Denoiser.null_cond``).
        cond: conditions, tensors of B rows; other values stay as they are.
        u: one uniform number per sample in (0, 1), (B,).
        share: in [0, 1); 0 leaves the conditions alone.

    Returns:
        conditions of the same keys, shapes and dtypes.

    Raises:
        ValueError: a condition has no unconditional value for this network, or one of another shape.
    """
    rows = {key: value for key, value in cond.items() if isinstance(value, Tensor) and value.ndim > 0}
    if share == 0.0 or not rows:
        return dict(cond)
    drop = u < share
    null = denoiser.null_cond(rows)
    return {**cond, **{k: torch.where(drop.view(-1, *[1] * (v.ndim - 1)), null[k], v) for k, v in rows.items()}}
