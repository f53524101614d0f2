"""Batches without data, for methods that learn from the teacher alone."""

from typing import Any

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.data.base import DistillationDataModule

__all__ = ["Prior"]


class _Labels:
    """A ``Source`` of class labels: index i has the class i % num_classes."""

    def __init__(self, n: int, num_classes: int | None) -> None:
        self.n, self.num_classes = n, num_classes

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        cond = {} if self.num_classes is None else {"class_labels": indices % self.num_classes}
        return Batch(cond=cond, size=len(indices))


class Prior(DistillationDataModule):
    """Class labels only, every class equally often in an epoch, or nothing at all; methods draw the noise.

    Args:
        num_classes: number of classes; None for unconditional networks.
        samples_per_epoch: size of an epoch.
        **kwargs: arguments of ``DistillationDataModule``.

    Raises:
        ValueError: ``num_classes`` or ``samples_per_epoch`` below 1.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        samples_per_epoch: int = 51_200,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if samples_per_epoch < 1 or (num_classes is not None and num_classes < 1):
            raise ValueError(
                f"Prior(num_classes={num_classes}, samples_per_epoch={samples_per_epoch}): both must be 1 "
                "or more "
                "(num_classes may be None for unconditional networks)."
            )
        self.num_classes = num_classes
        self.samples_per_epoch = samples_per_epoch

    def make_source(self) -> _Labels:
        """The labels by index."""
        return _Labels(self.samples_per_epoch, self.num_classes)
