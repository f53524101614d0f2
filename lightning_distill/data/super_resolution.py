"""Pictures together with what is left of them at a lower resolution."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from lightning_distill.batch import Batch, as_batch
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.loader import Source

__all__ = ["Degradation", "SuperResolution", "degrade"]


def degrade(pictures: Tensor, factor: int) -> Tensor:
    """Pictures made smaller and enlarged again, both bicubic with antialiasing (as Pillow's).

    Args:
        pictures: (B, C, H, W), floating; H and W divisible by ``factor``.
        factor: 1 leaves them as they are.

    Returns:
        (B, C, H, W), same dtype; values may leave the range of the input a little.

    Raises:
        ValueError: no pictures, or a size that the factor does not divide.
    """
    if pictures.ndim != 4:
        raise ValueError(f"degrade needs pictures (B, C, H, W), got shape {tuple(pictures.shape)}.")
    height, width = pictures.shape[-2:]
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"factor={factor}: give a divisor of the pictures' height {height} and width {width}.")
    if factor == 1:
        return pictures
    small = F.interpolate(pictures, (height // factor, width // factor), mode="bicubic", antialias=True)
    return F.interpolate(small, (height, width), mode="bicubic", antialias=True)


class Degradation(nn.Module):
    """``degrade`` with its factor: a control that a picture determines.

    Args:
        factor: how many times smaller.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, pictures: Tensor) -> Tensor:
        """The degraded pictures, same shape."""
        return degrade(pictures, self.factor)


def _with_low(batch: Batch, factors: Mapping[str, int]) -> Batch:
    assert batch.x0 is not None
    lows = {name: degrade(batch.x0, factor) for name, factor in factors.items()}
    return replace(batch, cond={**batch.cond, **lows})


class _Degraded:
    """A ``Source`` of whole batches."""

    def __init__(self, source: Source, factors: Mapping[str, int]) -> None:
        self.source, self.factors = source, factors

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        return _with_low(self.source.gather(indices, epoch), self.factors)


class _DegradedItems(Dataset[dict[str, Any]]):
    """A map-style data set, degraded by the loading processes."""

    def __init__(self, items: Dataset[Any], factors: Mapping[str, int]) -> None:
        self.items, self.factors = items, factors

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = _with_low(as_batch(default_collate([self.items[index]])), self.factors)
        found = {field.name: getattr(batch, field.name) for field in fields(batch)}
        item = {name: value[0] for name, value in found.items() if isinstance(value, Tensor)}
        return {**item, "cond": {name: value[0] for name, value in batch.cond.items()}}


class SuperResolution(DistillationDataModule):
    """The pictures of another data module, with ``cond["low"]``: what is left of them at a lower resolution.

    Its clean samples, classes and scaling are those of ``data``; only the batch size, the seed and the workers are its
    own.

    Args:
        data: where the pictures come from, (C, H, W).
        factor: how many times smaller ``low`` was before it was enlarged again.
        easier: further factors; the pictures of factor k are ``cond["low_k"]``, for teachers that may see more.
        **kwargs: arguments of ``DistillationDataModule``.

    Raises:
        ValueError: no pictures, or a factor that does not divide their size or is given twice.
    """

    def __init__(
        self,
        data: DistillationDataModule,
        factor: int = 2,
        easier: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.data = data
        self.factor, self.easier = factor, list(easier)
        self.shape, self.num_classes = tuple(data.shape), data.num_classes
        self.sigma_data, self.mean = data.sigma_data, data.mean
        if len(self.shape) != 3:
            raise ValueError(f"SuperResolution needs pictures (C, H, W), and {type(data).__name__} has {self.shape}.")
        if len({factor, *self.easier}) != 1 + len(self.easier):
            raise ValueError(f"factor={factor} and easier={self.easier}: give every factor once.")
        for wanted in (factor, *self.easier):
            degrade(torch.zeros(1, *self.shape), wanted)
        self.factors = {"low": factor, **{f"low_{easy}": easy for easy in self.easier}}

    def prepare_data(self) -> None:
        """As the data module's."""
        self.data.prepare_data()

    def make_source(self) -> Source | Dataset[Any]:
        """The pictures with their conditions."""
        source = self.data.source
        return _Degraded(source, self.factors) if isinstance(source, Source) else _DegradedItems(source, self.factors)
