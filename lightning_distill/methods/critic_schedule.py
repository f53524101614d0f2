"""How many critic updates follow a student update, set from the measured lag of the critic.

The updates of a cycle move the critic's predictions at given noisy samples of the student from y_0 to y_n. Along that
line its denoising loss is a parabola, and lowest at lambda times the move,

    L(y_0 + lambda (y_n - y_0)):     lambda = (L_0 - L_n + U) / (2 U),     U the loss of y_n with y_0 as its target

which says how far behind the critic is: it should have gone lambda times as far as it did. A critic that halves its
error in a cycle has lambda = 2, generally 1 / (1 - q^n) if an update leaves the share q of the error; one that has
caught up has 1; where only the noise of its batches moves it, lambda is 1/2, since then L_0 = L_n. L_0 and L_n are
compared at the same samples, times and noise, so that most of their variance cancels.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.collectives import sum_over_processes
from lightning_distill.networks.modes import evaluation_mode
from lightning_distill.prediction import Prediction
from lightning_distill.randomness import Draws

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule
    from lightning_distill.networks.denoiser import Denoiser

    _Base = DistillationModule
else:
    _Base = object

__all__ = ["ScheduledCritic", "UpdateSchedule"]


class UpdateSchedule:
    """Between ``minimum`` and ``maximum`` critic updates per student update, as many as keep lambda at ``reach``.

        level <- level clip(lambda / reach, 1/2, 2),     number of updates = round(level)

    with lambda from ``methods.critic_schedule``, measured in every ``every``-th cycle by one more forward of the
    critic. A decision takes effect a cycle after it was made, when its number has reached the host: no cycle waits
    for the device. A run begins at the maximum.

    Args:
        minimum: fewest updates, at least 1.
        maximum: most updates; the loader provides samples for so many.
        reach: how far the critic may lag, above 1/2; 2 is half of its error per cycle, smaller is closer.
        every: student updates between two measurements, at least 2.
        decay: factor on the weight of past measurements, in [0, 1).

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self, minimum: int = 1, maximum: int = 10, reach: float = 2.0, every: int = 5, decay: float = 0.7
    ) -> None:
        if not 1 <= minimum <= maximum:
            raise ValueError(
                f"UpdateSchedule(minimum={minimum}, maximum={maximum}): give 1 <= minimum <= maximum critic updates."
            )
        if not reach > 0.5 or every < 2 or not 0.0 <= decay < 1.0:
            raise ValueError(
                f"UpdateSchedule(reach={reach}, every={every}, decay={decay}): give a reach above 1/2, at least 2 "
                "updates between measurements, and a decay in [0, 1)."
            )
        self.minimum, self.maximum = minimum, maximum
        self.reach = reach
        self.every = every
        self.decay = decay

    def lag(self, sums: Tensor) -> Tensor:
        """Lambda; ``reach`` where the critic was never seen to move.

        Args:
            sums: of L_0 - L_n and of U over samples, (2,).
        """
        gain, move = sums.double()
        return torch.where(move > 0, (gain + move) / (2.0 * move), torch.full_like(move, self.reach))

    def following(self, level: Tensor, sums: Tensor) -> Tensor:
        """The level after a decision.

        Args:
            level: in use, ().
            sums: see ``lag``.
        """
        factor = (self.lag(sums) / self.reach).clamp(0.5, 2.0)
        return (level.double() * factor).clamp(self.minimum, self.maximum)


class _Before(NamedTuple):
    """What the first critic update of a cycle has seen and predicted, and the draws that go with it."""

    draws: Draws
    cond: Mapping[str, Any]
    prediction: Prediction
    x0: Tensor
    eps: Tensor
    weight: Tensor | None


class ScheduledCritic(_Base):
    """What a method with a fake score does with an ``UpdateSchedule``; its state is checkpointed and equal on ranks."""

    critic_schedule: UpdateSchedule | None
    fake_score_steps: int
    critic_moves: Tensor
    critic_levels: Tensor
    fake_score: "Denoiser"
    criticised: Callable[..., Any]
    critic_error: Callable[..., Tensor]
    _critic_updates: int | None = None
    _arriving: "tuple[Tensor, torch.cuda.Event | None] | None" = None

    def add_schedule(self, schedule: UpdateSchedule | None) -> None:
        """Take a schedule, or None for ``fake_score_steps`` updates in every cycle."""
        self.critic_schedule = schedule
        self._before: list[_Before] = []
        if schedule is not None:
            self.fake_score_steps = schedule.maximum
            self.register_buffer("critic_moves", torch.zeros(2))
            self.register_buffer("critic_levels", torch.full((2,), float(schedule.maximum)))  # in use, decided

    def check_schedule(self) -> None:
        """Games must not be counted by critic updates."""
        if self.critic_schedule is not None and getattr(self, "gan_every", 1) != 1:
            raise ValueError(
                "gan_every counts critic updates, whose number critic_schedule varies; leave one of them out."
            )

    # ------------------------------------------------------------------------------------------------ the number
    @property
    def critic_updates(self) -> int:
        """Critic updates of a cycle."""
        if self.critic_schedule is None:
            return self.fake_score_steps
        return round(float(self.critic_levels[0])) if self._critic_updates is None else self._critic_updates

    def on_train_start(self) -> None:
        """Read what a checkpoint may have brought."""
        super().on_train_start()
        self._read_levels()

    def after_rollback(self) -> None:
        """Read what the earlier state has brought."""
        super().after_rollback()
        self._read_levels()

    def _read_levels(self) -> None:
        if self.critic_schedule is not None:
            self._critic_updates = round(float(self.critic_levels[0]))
            self._arriving = _to_host(self.critic_levels[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A decision of the cycle before takes effect."""
        super().on_train_batch_start(batch, batch_idx)
        if self._arriving is not None:
            self._critic_updates = round(_arrived(*self._arriving))
            self._arriving = None
            self.critic_levels[0] = self.critic_levels[1]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """As usual; with a student's step comes the decision from what was measured."""
        super().on_before_optimizer_step(optimizer)
        schedule, update = self.critic_schedule, self.draws.update
        if schedule is None or not update or update % schedule.every or self._stepping[0]:
            return
        self.critic_levels[1] = schedule.following(self.critic_levels[0], self.critic_moves)
        self._arriving = _to_host(self.critic_levels[1])

    # ------------------------------------------------------------------------------------------------ the measurement
    def remember_prediction(
        self, cond: Mapping[str, Any], prediction: Prediction, x0: Tensor, eps: Tensor, weight: Tensor | None
    ) -> None:
        """Keep what the first critic update of a cycle predicted, where it is to be measured.

        Args:
            cond: conditions, tensors of B rows.
            prediction: at x_t, (B, ...).
            x0: its target, same shape.
            eps: the noise that belongs to it.
            weight: factor on the error, (B,) or None.
        """
        schedule, draws = self.critic_schedule, self.draws
        if schedule is None or draws.phase != "fake_score0" or (draws.update + 1) % schedule.every:
            return
        if self.fake_score.training:  # masks of dropout are no move of the critic
            with torch.no_grad(), evaluation_mode(self.fake_score):
                prediction = self.criticised(prediction.x_t, prediction.t, cond)
        kept = Prediction(prediction.raw.detach(), prediction.x_t, prediction.t, prediction.process, prediction.kind)
        self._before.append(_Before(draws, cond, kept, x0, eps, weight))

    @torch.no_grad()
    def after_phase(self, phase: str) -> None:
        """As usual; the last critic update of a measured cycle is followed by the measurement."""
        super().after_phase(phase)
        if not self._before or self.draws.phase != f"fake_score{self.critic_updates - 1}":
            return
        assert self.critic_schedule is not None
        draws, seen, fresh = self.draws, self._before, self.critic_moves.new_zeros(3)
        self._before = []
        for part in seen:
            self.draws, old = part.draws, part.prediction
            with evaluation_mode(self.fake_score):
                new = self.criticised(old.x_t, old.t, part.cond)
            before, after = (self.critic_error(p, part.x0, part.eps, part.weight) for p in (old, new))
            move = self.critic_error(new, old.x0, old.eps, part.weight)
            fresh += len(old.t) * torch.stack([before - after, move, before])
        self.draws = draws
        fresh = sum_over_processes(fresh)
        usable = fresh.isfinite().all() & (fresh[1] > 1e-12 * fresh[2])  # what rounding alone makes is none
        taken = self.critic_schedule.decay * self.critic_moves + fresh[:2]
        self.critic_moves.copy_(torch.where(usable, taken, self.critic_moves))

    def schedule_diagnostics(self) -> dict[str, Tensor]:
        """Number of critic updates and lambda, for logging."""
        schedule = self.critic_schedule
        if schedule is None:
            return {}
        updates = torch.full_like(self.critic_moves[0], float(self.critic_updates))
        return {"critic_updates": updates, "critic_lag": schedule.lag(self.critic_moves)}


def _to_host(value: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what says that it is complete."""
    value = value.detach().float()
    if value.device.type != "cuda":
        return value.to("cpu", copy=True), None
    host, event = torch.empty((), pin_memory=True), torch.cuda.Event()
    host.copy_(value, non_blocking=True)
    event.record()
    return host, event


def _arrived(host: Tensor, event: torch.cuda.Event | None) -> float:
    """The number of a copy on the host."""
    if event is not None:
        event.synchronize()
    return float(host.numpy())
