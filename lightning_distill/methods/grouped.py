"""Samples in groups that share their conditions and their noise levels, as a part of methods that compare them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.times import TimeDistribution

if TYPE_CHECKING:
    from lightning_distill.methods.adversarial import AdversarialMethod

    _Base = AdversarialMethod
else:
    _Base = object

__all__ = ["Grouped"]


@dataclass
class GroupedBatch(Batch):
    """A batch with common conditions in every group.

    Attributes:
        own: the conditions that belong to its data, (B, ...).
    """

    own: dict[str, Any] = field(default_factory=dict)


class Grouped(_Base):
    """Consecutive ``group_size`` samples of a batch form a group, with the conditions of its first.

    Groups do not cross ranks or micro-batches, so that splitting a batch into whole groups changes nothing.
    """

    group_size: int
    matching_times: TimeDistribution

    def first_of_group(self, value: Tensor) -> Tensor:
        """Each row replaced by that of its group's first, (B, ...)."""
        if self.group_size == 1:
            return value
        self._check_groups(len(value))
        return value[:: self.group_size].repeat_interleave(self.group_size, dim=0)

    def group_mean(self, value: Tensor) -> Tensor:
        """Each number replaced by the mean of its group, (B,)."""
        if self.group_size == 1:
            return value
        self._check_groups(len(value))
        return value.view(-1, self.group_size).mean(1).repeat_interleave(self.group_size)

    def group_advantage(self, value: Tensor) -> Tensor:
        """Each number's distance from the mean of its group in units of the group's spread, (B,); 0 in equal groups."""
        difference = value - self.group_mean(value)
        spread = self.group_mean(difference.square()).sqrt()
        return difference / spread.clamp_min(torch.finfo(spread.dtype).tiny)

    def grouped(self, batch: Batch) -> Batch:
        """The batch with common conditions in every group."""
        if self.group_size == 1:
            return batch
        leaders = self.first_of_group(torch.arange(batch.size, device=self.device))
        return GroupedBatch(cond=batch.cond_of(leaders), x0=batch.x0, size=batch.size, own=batch.cond)

    def real_logits(self, batch: Batch, t: Tensor) -> Tensor:
        """Logits of the batch's data, told the conditions that are theirs."""
        if isinstance(batch, GroupedBatch):
            batch = Batch(cond=batch.own, x0=batch.x0, size=batch.size)
        return super().real_logits(batch, t)

    def scale_draw(self, n: int) -> Tensor:
        """As usual, one number per group."""
        return super().scale_draw(n)[:: self.group_size].repeat_interleave(self.group_size)[:n]

    def group_noisy(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """x_t and t, (B,), as in ``renoise`` at matching times, with one time per group."""
        t = self.first_of_group(self.times(f"{name}/time", self.matching_times, len(x)))
        return self.process.add_noise(x, self.draws.normal(f"{name}/noise", x.shape), t), t

    def check_group_size(self) -> None:
        """Raise unless it is a number of samples."""
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: a group has at least one sample.")

    def _check_groups(self, n: int) -> None:
        if n % self.group_size:
            raise ValueError(
                f"{n} samples do not make whole groups of {self.group_size}; give a batch (per micro-batch and rank) "
                f"that is a multiple of group_size={self.group_size}."
            )
