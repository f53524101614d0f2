"""Means over the samples of past updates, as a part of methods that normalise weights by them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.collectives import sum_over_processes

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

    _Base = DistillationModule
else:
    _Base = object

__all__ = ["RunningMeans"]


class RunningMeans(_Base):
    """Weighted sums and counts, kept in checkpoints and equal on all ranks.

    A loss that divides by the mean of its own batch gives each sample another gradient when the batch is split over
    ranks or micro-batches. These are the means of the samples before the update; those of the update enter after the
    student's gradients, unless its step is skipped. A column that has no samples left keeps its last mean.
    """

    _running: dict[str, float]

    def add_running(self, name: str, columns: int, decay: float, made_up: bool = True) -> None:
        """Make the buffers ``<name>_state`` and ``<name>_pending``, (2, columns): sums and counts.

        Args:
            name: of the means.
            columns: number of means.
            decay: factor on the weight of past samples per update, in [0, 1).
            made_up: begin with one made-up sample of 1; else there is no mean before the first sample.
        """
        self.register_buffer(f"{name}_state", torch.ones(2, columns) if made_up else torch.zeros(2, columns))
        self.register_buffer(f"{name}_pending", torch.zeros(2, columns), persistent=False)
        self.__dict__.setdefault("_running", {})[name] = decay

    def running_means(self, name: str) -> Tensor:
        """The means, (columns,); NaN where there are no samples yet."""
        state = self.get_buffer(f"{name}_state")
        return state[0] / state[1]

    def note(self, name: str, sums: Tensor, counts: Tensor) -> None:
        """Add samples of this update.

        Args:
            name: of the means.
            sums: sums of their values, (columns,).
            counts: their numbers, (columns,).
        """
        self.get_buffer(f"{name}_pending").add_(torch.stack([sums, counts]))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """As usual, and the samples noted by the student's loss enter the means."""
        super().on_before_optimizer_step(optimizer)
        if self._stepping[0] != list(self.phases).index("student"):
            return
        for name, decay in self._running.items():
            state, pending = self.get_buffer(f"{name}_state"), self.get_buffer(f"{name}_pending")
            mixed = decay * state + sum_over_processes(pending)
            forgotten = mixed[1] < torch.finfo(mixed.dtype).eps
            state.copy_(torch.where(self._skipped.bool() | forgotten, state, mixed))
            pending.zero_()
