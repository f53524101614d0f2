"""Student samples for training: backward simulation of the student's own steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.prediction import Prediction
from lightning_distill.randomness import Draws
from lightning_distill.samplers import simulate

__all__ = ["Rollout", "backward_simulation"]


@dataclass
class Rollout:
    """A student sample and the step that made it.

    Attributes:
        x0: student's clean-sample prediction, (B, ...), float32.
        step: index of the step in the student's time list, the same for the whole batch.
    """

    x0: Tensor
    step: int


def backward_simulation(
    student: Denoiser,
    cond: Mapping[str, Any],
    shape: Sequence[int],
    times: Sequence[float],
    sampler: Literal["renoise", "ode"],
    draws: Draws,
    grad: bool,
) -> Rollout:
    """Run the student to a random step of its time list (DMD2, arXiv:2405.14867, Section 4.5).

    The step is the same for the batch and on all ranks; the steps before it run without graph, exactly as at inference.

    Args:
        student: network being distilled.
        cond: conditions, tensors of B rows.
        shape: (B, ...).
        times: the student's descending native times, without the final 0.
        sampler: how steps are chained.
        draws: source of the step, the starting noise and the fresh noise.
        grad: whether the last step keeps its graph.
    """
    process = student.process
    step = draws.integer("stop", len(times))
    start = process.prior(draws.normal("start", shape), times[0])

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return student(x_t, t, cond)

    def fresh(index: int, x: Tensor) -> Tensor:
        return draws.normal(f"fresh{index}", x.shape)

    with torch.no_grad():
        x = simulate(denoise, start, times, process, step, sampler, noise=fresh)
    t = torch.full((shape[0],), times[step], dtype=torch.float64, device=x.device)
    with torch.set_grad_enabled(grad):
        return Rollout(student(x, t, cond).x0, step)
