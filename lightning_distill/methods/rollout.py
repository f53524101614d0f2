"""Student samples for training: backward simulation of the student's own steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.modes import evaluation_mode
from lightning_distill.prediction import Prediction
from lightning_distill.randomness import Draws
from lightning_distill.samplers import simulate

__all__ = ["Rollout", "as_in_sampling", "backward_simulation", "rollout_key"]


@dataclass
class Rollout:
    """A student sample and the step that made it.

    Attributes:
        x0: student's clean-sample prediction, (B, ...), float32.
        step: index of the step in the student's time list: one for the whole batch, or (B,).
        prediction: what the step predicted, with its input x_t and time t.
        end: native time at which the step ends, (B,), float64; 0 for the last one.
    """

    x0: Tensor
    step: int | Tensor
    prediction: Prediction
    end: Tensor

    @property
    def steps(self) -> Tensor:
        """Index of the step of each sample, (B,)."""
        if isinstance(self.step, Tensor):
            return self.step
        return torch.full((len(self.x0),), self.step, device=self.x0.device)

    def detached(self) -> "Rollout":
        """The same without graph."""
        prediction = replace(self.prediction, raw=self.prediction.raw.detach(), x_t=self.prediction.x_t.detach())
        return Rollout(self.x0.detach(), self.step, prediction, self.end)


@contextmanager
def as_in_sampling(student: Denoiser) -> Iterator[None]:
    """Without graph and without dropout."""
    with torch.no_grad(), evaluation_mode(student) if student.training else nullcontext():
        yield


def rollout_key(draws: Draws, name: str = "") -> tuple[str, int, int]:
    """Under which a module keeps the samples of a rollout within a cycle.

    Args:
        draws: of the phase that asks.
        name: of the samples, see ``DistillationModule.rollout``.
    """
    return name, draws.slice_index, draws.first


def backward_simulation(
    student: Denoiser,
    cond: Mapping[str, Any],
    shape: Sequence[int],
    times: Sequence[float],
    sampler: Literal["renoise", "ode"],
    draws: Draws,
    grad: bool,
    *,
    stops: Sequence[int] | None = None,
    per_sample: bool = False,
) -> Rollout:
    """Run the student to a random step of its time list (DMD2, arXiv:2405.14867, Section 4.5).

    The step is the same for the batch and on all ranks, or each sample has its own; the steps before it run without
    graph, exactly as at inference.

    Args:
        student: network being distilled.
        cond: conditions, tensors of B rows.
        shape: (B, ...).
        times: the student's descending native times, without the final 0.
        sampler: how steps are chained.
        draws: source of the step, the starting noise and the fresh noise.
        grad: whether the last step keeps its graph.
        stops: steps to choose from, ascending; None for all.
        per_sample: draw a step for each sample; all steps but the last then run on the whole batch.
    """
    process = student.process
    choices = list(range(len(times)) if stops is None else stops)
    start = process.prior(draws.normal("start", shape), times[0])
    ends = [*times[1:], 0.0]

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return student(x_t, t, cond)

    def fresh(index: int, x: Tensor) -> Tensor:
        return draws.normal(f"fresh{index}", x.shape)

    step: int | Tensor
    if not per_sample:
        step = choices[draws.integer("stop", len(choices))]
        with as_in_sampling(student):
            x = simulate(denoise, start, times, process, step, sampler, noise=fresh)
        t = torch.full((shape[0],), times[step], dtype=torch.float64, device=x.device)
        end = torch.full_like(t, ends[step])
    else:
        device = start.device
        u = draws.uniform("stops", shape[0])
        picked = (u * len(choices)).long().clamp_max(len(choices) - 1)
        step = torch.tensor(choices, device=device)[picked]
        x = now = start
        with as_in_sampling(student):
            for i in range(choices[-1]):
                later = lambda _, like, i=i: fresh(i + 1, like)  # noqa: E731
                now = simulate(denoise, now, times[i : i + 2], process, 1, sampler, noise=later)
                x = torch.where((step == i + 1).view(-1, *[1] * (x.ndim - 1)), now, x)
        t = torch.tensor(times, dtype=torch.float64, device=device)[step]
        end = torch.tensor(ends, dtype=torch.float64, device=device)[step]
    with torch.set_grad_enabled(grad):
        prediction = student(x, t, cond)
        return Rollout(prediction.x0, step, prediction, end)
