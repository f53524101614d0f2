"""Rectified flow: coupled pairs, how straight a flow is, and the choice of the times at which it is followed.

A flow whose trajectories are straight is exact in one Euler step. Reflow (arXiv:2209.03003) trains on pairs (eps, x0)
that an earlier flow has coupled, and so straightens it; Bellman knots (arXiv:2312.16414) put the steps where the flow
bends.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.processes import expand

__all__ = ["Annealing", "annealed_noise", "annealing", "best_knots", "jump_costs", "straightness", "total_cost"]

Annealing = Literal["linear", "cosine", "exponential"]


def straightness(velocity: Tensor, noise: Tensor, x0: Tensor) -> Tensor:
    """|(eps - x0) - v|^2 of each pair, 0 for a straight flow (arXiv:2209.03003).

    Args:
        velocity: v(x_t, t), (B, ...).
        noise: eps of the pair, (B, ...).
        x0: data of the pair, (B, ...).

    Returns:
        mean over elements, (B,).
    """
    return (noise - x0 - velocity).square().flatten(1).mean(1)


def annealing(update: int, total: int, kind: Annealing = "linear") -> float:
    """Share r of fresh noise in annealed reflow (arXiv:2407.12718): 1 at the start, 0 from ``total`` on.

        linear 1 - s,     cosine (1 + cos(pi s)) / 2,     exponential (e^(-5 s) - e^-5) / (1 - e^-5),     s = k / total

    Args:
        update: k, student updates so far.
        total: updates until r is 0; 0 for none.
        kind: shape.

    Raises:
        ValueError: an unknown shape.
    """
    if kind not in ("linear", "cosine", "exponential"):
        raise ValueError(f"annealing {kind!r} is unknown; choose linear, cosine or exponential.")
    if update >= total:
        return 0.0
    s = update / total
    if kind == "linear":
        return 1.0 - s
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * s))
    return (math.exp(-5.0 * s) - math.exp(-5.0)) / -math.expm1(-5.0)


def annealed_noise(noise: Tensor, fresh: Tensor, share: float) -> Tensor:
    """sqrt(1 - r^2) eps + r eps': unit Gaussian whatever r is (arXiv:2407.12718).

    Args:
        noise: eps of the pair, (B, ...).
        fresh: eps' independent of it, (B, ...).
        share: r in [0, 1]; at both ends one of the two is returned as it is.
    """
    if share == 0.0:
        return noise
    return fresh if share == 1.0 else math.sqrt(1.0 - share**2) * noise + share * fresh


def jump_costs(states: Tensor, velocities: Tensor, times: Tensor) -> Tensor:
    """What an Euler step between any two points of a trajectory misses the later one by (arXiv:2312.16414).

        c_ij = E | x_i + (t_j - t_i) v_i - x_j |^2,     i < j

    Args:
        states: of N + 1 points from noise to data, in flow-matching coordinates, (N + 1, B, ...).
        velocities: at the first N of them, (N, B, ...).
        times: flow-matching times, falling, (N + 1,).

    Returns:
        (N + 1, N + 1), float64, mean over samples of the sum over elements; infinite where j <= i.
    """
    points, slopes = states.flatten(2).double(), velocities.flatten(2).double()
    times = times.to(points)
    count = len(points)
    costs = torch.full((count, count), math.inf, dtype=torch.float64, device=points.device)
    for i in range(count - 1):
        steps = expand(times[i + 1 :] - times[i], points[i + 1 :])
        missed = points[i] + steps * slopes[i] - points[i + 1 :]
        costs[i, i + 1 :] = missed.square().sum(2).mean(1)
    return costs


def best_knots(costs: Tensor, steps: int) -> list[int]:
    """The points to visit so that the sum of the costs of the jumps is smallest, by dynamic programming.

        V_1(i) = c_iN,     V_k(i) = min_j>i c_ij + V_k-1(j)     (arXiv:2312.16414)

    Args:
        costs: of jumps, (N + 1, N + 1), see ``jump_costs``.
        steps: number of jumps, in [1, N].

    Returns:
        indices of ``steps`` + 1 points, the first 0 and the last N.

    Raises:
        ValueError: more jumps than there are points, or none.
    """
    last = len(costs) - 1
    if not 1 <= steps <= last:
        raise ValueError(f"steps={steps}: a grid of {last} intervals has trajectories of 1 to {last} jumps.")
    later = torch.full_like(costs, math.inf)
    later[torch.triu_indices(last + 1, last + 1, 1).unbind(0)] = 0.0
    table = costs.double() + later
    value, choices = table[:, last].clone(), []
    for _ in range(steps - 1):
        value, best = (table + value).min(dim=1)
        choices.append(best)
    knots = [0]
    for best in reversed(choices):
        knots.append(int(best[knots[-1]]))
    return [*knots, last]


def total_cost(costs: Tensor, knots: Sequence[int]) -> float:
    """Sum of the costs of the jumps between consecutive knots."""
    return float(sum(costs[i, j] for i, j in pairwise(knots)))
