"""Endless samples of the two-stream problem: every epoch is a fresh sample."""

import math
from typing import Any

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.loader import epoch_generator
from lightning_distill.networks.stream_mixture import ring_action

__all__ = ["RingAction"]


class _Samples:
    """A ``Source`` that draws one epoch at a time from (seed, epoch)."""

    def __init__(self, n: int, seed: int, labelled: bool) -> None:
        self.n, self.seed, self.labelled = n, seed, labelled
        self.mixture = ring_action(labelled=True)
        self._epoch: int | None = None

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        if epoch != self._epoch:
            self._x0, self._labels = self.mixture.sample(self.n, epoch_generator(self.seed, epoch, stream=2))
            self._epoch = epoch
        cond = {"class_labels": self._labels.index_select(0, indices)} if self.labelled else {}
        return Batch(cond=cond, x0=self._x0.index_select(0, indices))


class RingAction(DistillationDataModule):
    """A point of a ring and an action that goes with it, packed (3,); see ``networks.stream_mixture.ring_action``.

    Args:
        samples_per_epoch: samples in an epoch.
        labelled: give the mode of each sample as its class.
        **kwargs: arguments of ``DistillationDataModule``.
    """

    shape = (3,)
    mean = 0.0
    # two coordinates of variance 2 + .25^2, and an action of 1/2 + .25^2 + .15^2
    sigma_data = math.sqrt((2.0 * (2.0 + 0.25**2) + 0.5 + 0.25**2 + 0.15**2) / 3.0)

    def __init__(self, samples_per_epoch: int = 51_200, labelled: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.samples_per_epoch = samples_per_epoch
        self.labelled = labelled
        self.num_classes = 8 if labelled else None

    def make_source(self) -> _Samples:
        """The generator of samples."""
        return _Samples(self.samples_per_epoch, self.seed, self.labelled)
