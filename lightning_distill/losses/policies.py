"""Imitation of a teacher along the trajectory of a student's policy (arXiv:2510.14974, arXiv:2602.09014).

The policy is rolled out without graph; at a few points of its trajectory the teacher says which velocity is right
there, and the policy is moved towards it. The student sees its own mistakes, hence learns to correct them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.policies import Policy
from lightning_distill.processes import expand

__all__ = ["Imitation", "imitate", "imitation_intervals", "teacher_ratio"]


def teacher_ratio(update: int, decay_updates: int) -> float:
    """Share of a segment that the teacher walks: from 1 to 0 over the first updates, linearly.

    Args:
        update: student updates so far.
        decay_updates: when it is 0; 0 for always.
    """
    return 0.0 if decay_updates <= 0 else 1.0 - min(update, decay_updates) / decay_updates


def imitation_intervals(own: Tensor, theirs: Tensor, span: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """How far the policy and then the teacher go before and after each point of imitation.

    The M steps of the policy cover at most (1 - ratio) of the span, those of the teacher exactly ``ratio`` of it.

    Args:
        own: uniform numbers, (B, M).
        theirs: uniform numbers, (B, M - 1).
        span: length of the segment in time, (B,).
        ratio: share of the teacher.

    Returns:
        lengths of the policy's and of the teacher's steps, (B, M) each, float64.
    """
    points = own.double().sort(1)[0]
    policy = torch.diff(points, dim=1, prepend=torch.zeros_like(points[:, :1]))
    edges = torch.cat([theirs.double().sort(1)[0], torch.ones_like(points[:, :1])], dim=1)
    teacher = torch.diff(edges, dim=1, prepend=torch.zeros_like(points[:, :1]))
    return (1.0 - ratio) * span[:, None] * policy, ratio * span[:, None] * teacher


@dataclass(frozen=True)
class Imitation:
    """What imitation made of one segment.

    Attributes:
        loss: mean squared error of the policy's velocities, scalar.
        points: where the teacher was asked, (M, B, ...).
        times: when, flow-matching times, (M, B).
    """

    loss: Tensor
    points: Tensor
    times: Tensor


def imitate(
    policy: Policy,
    rolled: Policy,
    teacher: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    steps: tuple[Tensor, Tensor],
    window: Tensor,
    substeps: int,
    window_substeps: int,
) -> Imitation:
    """Mean squared error between the policy's velocity and the teacher's along the policy (arXiv:2510.14974).

        x_a = policy from x over the next of its steps,    v = teacher(x_a, t_a)
        L = mean |u(x_a; t_a -> t_b - window) - v|^2,      x = x_a - (t_a - t_b) v  over the teacher's next step

    u is the policy's average velocity, with graph; points and targets have none.

    Args:
        policy: of the segment's start, with graph.
        rolled: the policy that walks, without graph; possibly with components left out.
        teacher: velocity at (x, t), without graph.
        x: the segment's start, (B, ...).
        t: its flow-matching times, (B,).
        steps: see ``imitation_intervals``.
        window: over which u is averaged beyond the teacher's step, (B,); 0 for the velocity itself where the teacher
            makes no step.
        substeps: of the policy in each of its steps.
        window_substeps: of the average; 1 where it is the velocity itself.
    """
    found, points, times = [], [], []
    for own, theirs in zip(steps[0].unbind(1), steps[1].unbind(1)):
        with torch.no_grad():
            x = rolled.step(x, t, t - own, substeps)
            t = t - own
            v = teacher(x, t)
        u = policy.average(x, t, (t - theirs - window).clamp_min(0.0), window_substeps)
        found.append((u - v).square().mean())
        points.append(x)
        times.append(t)
        x, t = x - expand(theirs, x) * v, t - theirs
    return Imitation(torch.stack(found).mean(), torch.stack(points), torch.stack(times))
