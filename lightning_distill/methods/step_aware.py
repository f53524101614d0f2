"""Rollouts that stop anywhere, and fake scores that are told where, as a part of ``FakeScoreMethod``."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.methods.rollout import Rollout, backward_simulation, rollout_key
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.processes import NoiseProcess
from lightning_distill.randomness import Draws

__all__ = ["Scores", "StepAware"]


@dataclass(frozen=True)
class Scores:
    """Both scores at one noisy version of the student's samples.

    Attributes:
        x_t: noisy samples, (B, ...).
        t: their times, (B,).
        real: y_T, the teacher's guided x0-prediction, (B, ...).
        fake: y_F, the fake score's.
        features: tapped activations of the network whose forward was shared, fake score or teacher, by name.
    """

    x_t: Tensor
    t: Tensor
    real: Tensor
    fake: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def gap(self) -> Tensor:
        """Mean squared difference of the two, without graph."""
        return (self.fake - self.real).detach().square().mean()


class StepAware:
    """What a method with a fake score does with the steps of its student."""

    student: Denoiser
    fake_score: Denoiser
    student_times: list[float]
    sample_shape: tuple[int, ...]
    sampler: Literal["renoise", "ode"]
    process: NoiseProcess
    rollout_step: str
    draws: Draws
    _rollouts: dict[tuple[str, int, int], Rollout]
    #: steps that the fake score is told of, where they are not those of the slice's rollout
    _other_steps: Rollout | None = None

    def simulate_student(self, batch: Batch, grad: bool) -> Rollout:  # noqa: D102
        shape, draws = (batch.size, *self.sample_shape), self.draws.of_slice()
        how: dict[str, Any] = {"stops": self.stops(), "per_sample": self.rollout_step == "sample"}
        return backward_simulation(
            self.student, batch.cond, shape, self.student_times, self.sampler, draws, grad, **how
        )

    def stops(self) -> list[int] | None:
        """Steps at which a rollout may stop, ascending; None for all."""
        return None

    def told_step(self) -> AbstractContextManager[None]:
        """Within it the fake score knows which steps made the samples of the current slice, if it is to know."""
        return self.told_to(self.fake_score, self.fake_score)

    def told_to(self, network: Denoiser, learned: Denoiser, share: float = 1.0) -> AbstractContextManager[None]:
        """Within it a network that is made of the fake score's weights knows these steps, as ``told_step``.

        Args:
            network: the one that is called.
            learned: the one whose embedding of steps is used.
            share: how much of it.
        """
        condition = getattr(learned, "step_condition", None)
        if condition is None:
            return nullcontext()
        rollout = self._other_steps or self._rollouts[rollout_key(self.draws)]
        t_max = self.process.t_max
        return condition.told(network, rollout.steps, rollout.prediction.t / t_max, rollout.end / t_max, share)

    @contextmanager
    def other_steps(self, rollout: Rollout) -> Iterator[None]:
        """Within it the fake score is told the steps of another rollout than the slice's.

        Args:
            rollout: of as many samples.
        """
        self._other_steps = rollout
        try:
            yield
        finally:
            self._other_steps = None
