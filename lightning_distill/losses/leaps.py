"""Where trajectories of consistency begin: at a random time, or at a noised picture that is nearly right already."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["leap_grid", "shifted_pair"]


def leap_grid(grid: Sequence[float], leap: float) -> list[float]:
    """The part of a grid that lies below a time, from that time on (VideoScene, arXiv:2504.01956).

    Args:
        grid: descending times.
        leap: above the last of them, at most the first.

    Returns:
        descending times; the first is ``leap``.

    Raises:
        ValueError: ``leap`` lies outside of the grid.
    """
    if not grid[-1] < leap <= grid[0]:
        raise ValueError(f"leap time {leap:g} lies outside of the grid from {grid[0]:g} to {grid[-1]:g}.")
    return [float(leap), *(float(t) for t in grid if t < leap - 1e-9)]


def shifted_pair(grid: Tensor, u: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours on a grid that is moved along itself, each sample by an amount of its own.

        t = grid(k + offset),     r = grid(k + 1 + offset),     linear between the grid's times, held at its end

    Args:
        grid: N + 1 descending times.
        u: uniform numbers in (0, 1) that choose the interval k, (B,).
        offset: in [0, 1], in units of intervals, (B,).

    Returns:
        t and r, (B,), float64; r is below t.
    """
    n = len(grid) - 1
    k = (u.double() * n).floor().clamp_max(n - 1)

    def at(position: Tensor) -> Tensor:
        position = position.clamp(0.0, n)
        left = position.floor().long().clamp_max(n - 1)
        share = position - left
        return (1.0 - share) * grid[left] + share * grid[left + 1]

    # never the very end, where there is no earlier time
    offset = offset.double().clamp(0.0, 1.0 - 1e-6)
    return at(k + offset), at(k + 1.0 + offset)
