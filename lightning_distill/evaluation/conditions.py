"""Conditions of samples that are made inside a run, or from its folder: classes in turn, or rows of the run's data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from lightning_distill.batch import Batch, as_batch
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.cached import StoreSource
from lightning_distill.data.loader import Source
from lightning_distill.environment import cache_folder
from lightning_distill.evaluation.teacher import TeacherCache
from lightning_distill.generation import default_cond, needed_conditions
from lightning_distill.networks.denoiser import Denoiser

__all__ = ["Conditions", "RunConditions", "conditions_of"]

_LABELS = "class_labels"
#: rows whose content tells one set of conditions from another
_TOLD = 64


class Conditions(Protocol):
    """What gives samples their conditions."""

    def __call__(self, denoiser: Denoiser, n: int, first: int = 0) -> dict[str, Any]:
        """Conditions of the samples ``first .. first + n - 1`` of a network, tensors of n rows."""


class RunConditions:
    """Conditions by the sample's index, the same on every rank and at every time.

    Classes in turn where the data have no other conditions; else the rows of the data in their stored order, from the
    first one on and over again after the last, with all that they hold: text of the data's own length, sizes, sources.

    Args:
        data: data module or loader of the run; None where there is none. Of a ``DistillationDataModule`` the training
            samples are taken (of the first size where it has several), of others the data set of the training loader.
            A loader without a map-style data set gives its first batch, to networks that cannot do without; ranks
            whose loaders differ then have different ones.
        most: rows that are used at most; None is all.
    """

    def __init__(self, data: Any = None, most: int | None = None) -> None:
        self.name = None if data is None else type(data).__name__
        self.most = most
        self._loader = _loader_of(data)
        self._items = _items_of(self._loader)

    def __call__(self, denoiser: Denoiser, n: int, first: int = 0) -> dict[str, Any]:
        """Conditions of the samples ``first .. first + n - 1``.

        Args:
            denoiser: the network that makes them; it is given what it accepts.
            n: number of samples.
            first: index of the first.

        Raises:
            ValueError: neither the classes nor the data give what the network cannot run without.
        """
        keys = self.keys(denoiser)
        needed = needed_conditions(denoiser)
        if missing := [key for key in needed if key not in keys]:
            have = "no data are given" if self.name is None else f"{self.name} has {', '.join(keys) or 'no conditions'}"
            raise ValueError(
                f"{type(denoiser.network).__name__} needs {', '.join(missing)} for every sample, and {have}; use a "
                "data module whose batches have them (CachedConditions, for example)."
            )
        if not self.from_data(denoiser):
            return default_cond(denoiser, n, first)
        gather, rows = self._rows
        chosen = denoiser.accepted(gather(torch.arange(first, first + n) % rows).cond)
        if denoiser.num_classes is not None and _LABELS not in chosen:
            chosen[_LABELS] = torch.arange(first, first + n) % denoiser.num_classes
        return chosen

    def keys(self, denoiser: Denoiser) -> list[str]:
        """Conditions that the data have and the network accepts."""
        if self._items is None and not needed_conditions(denoiser):
            return []  # a stream may never give a batch again that was taken from it
        gather, rows = self._rows
        return list(denoiser.accepted(gather(torch.zeros(1, dtype=torch.int64)).cond)) if rows else []

    def from_data(self, denoiser: Denoiser) -> bool:
        """Whether samples of a network have the conditions of the data, rather than classes in turn or nothing."""
        keys = set(self.keys(denoiser))
        return bool(needed_conditions(denoiser) or keys - {_LABELS} or (keys and denoiser.num_classes is None))

    def facts(
        self, denoiser: Denoiser, measures: Sequence[str], num_samples: int, prompts: Sequence[str] = ()
    ) -> dict[str, Any]:
        """What an ``Evaluator`` must know of the conditions: its ``num_classes``, ``rows`` and ``prompts``.

        Args:
            denoiser: the network that makes the samples.
            measures: names in ``MEASURES``.
            num_samples: samples of a row of figures.
            prompts: prompt of each class, or of each row; none is the text that the data have of their rows.

        Raises:
            ValueError: ``clip_score`` without a prompt for every sample, ``lpips_diversity`` without two samples of one
                condition.
        """
        classes, rows = denoiser.num_classes, self._rows[1] if self.from_data(denoiser) else None
        if "lpips_diversity" in measures and num_samples <= (different := rows or classes or 1):
            raise ValueError(
                f"lpips_diversity compares samples of one condition, and {num_samples} samples have {different} "
                f"conditions: use {2 * different} samples or more, or leave the measure out."
            )
        if "clip_score" in measures:
            prompts = prompts or (self.prompts if classes is None else ())
            wanted = classes if classes is not None else min(rows or 0, num_samples)
            what = "classes" if classes is not None else f"rows of {self.name}"
            if not wanted:
                raise ValueError("clip_score needs samples of classes or of text, and the network takes neither.")
            if len(prompts) < wanted:
                raise ValueError(f"there are {len(prompts)} prompts for {wanted} {what}; give one for each.")
        return {"num_classes": classes, "rows": rows, "prompts": prompts}

    @property
    def prompts(self) -> list[str]:
        """Text of the rows, in their order; none where the data do not tell it (stores of prompts do)."""
        texts = getattr(self._items, "prompts", None)
        if not isinstance(texts, list) or not any(texts):
            return []
        rows = torch.arange(self._rows[1])
        if isinstance(self._items, StoreSource):  # records may come more than once
            rows = self._items.records(rows, 0)
        return [texts[i] for i in rows.tolist()]

    @property
    def digest(self) -> str:
        """What the conditions are, of a spread of the rows."""
        gather, rows = self._rows
        digest = hashlib.sha256(str(rows).encode())
        for key, value in sorted(gather(torch.arange(0, rows, max(1, rows // _TOLD))).cond.items()):
            digest.update(key.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().double().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def teacher_cache(self, teacher: Denoiser | None, folder: str | Path | None) -> TeacherCache:
        """Where a teacher's rows are kept; those for conditions of the data apart, by these conditions."""
        if teacher is None or not self.from_data(teacher):
            return TeacherCache(folder)
        return TeacherCache(cache_folder(folder) / "conditions" / self.digest)

    @cached_property
    def _rows(self) -> tuple[Callable[[Tensor], Batch], int]:
        """How to get rows of the data, and how many there are; 0 where they cannot be had."""
        if self._items is None:
            gather, rows = _first_batch(self._loader)
        else:
            gather, rows = _rows_of(self._items, getattr(self._loader, "collate_fn", None) or default_collate)
        return gather, rows if self.most is None else min(rows, self.most)


def conditions_of(trainer: Trainer, most: int | None = None) -> RunConditions:
    """The conditions of a run's samples, from its data module or else the loader that it was given.

    Args:
        trainer: of the run.
        most: see ``RunConditions``.
    """
    data = getattr(trainer, "datamodule", None)
    if data is None:  # a loader that was given to fit, validate or test; before the loops are set up nothing tells it
        loops = (trainer.fit_loop, trainer.validate_loop, trainer.test_loop)
        given = (getattr(getattr(loop, "_data_source", None), "instance", None) for loop in loops)
        data = next((source for source in given if source is not None), None)
    return RunConditions(data, most)


def _loader_of(data: Any) -> Any:
    """The data module of this package, or a loader of another."""
    if isinstance(data, LightningDataModule) and not isinstance(data, DistillationDataModule):
        names = [name for name in ("train_dataloader", "val_dataloader") if is_overridden(name, data)]
        data = getattr(data, names[0])() if names else None
    return next(iter(data), None) if isinstance(data, (list, tuple)) else data


def _items_of(loader: Any) -> Any:
    """Samples that can be had by index; None where a loader has no such."""
    items = getattr(loader, "source", getattr(loader, "dataset", None))
    listed = hasattr(items, "__len__") and not isinstance(items, IterableDataset)
    return items if listed and getattr(loader, "batch_size", None) is not None else None


def _rows_of(items: Any, collate: Callable[[list[Any]], Any]) -> tuple[Callable[[Tensor], Batch], int]:
    if isinstance(items, Source):
        sizes = getattr(items, "sizes", None)
        return lambda rows: items.gather(rows, 0), sizes[0] if sizes else len(items)

    def gather(rows: Tensor) -> Batch:
        with isolate_rng():  # data sets may augment at random
            return as_batch(collate([items[i] for i in rows.tolist()]))

    return gather, len(items)


def _first_batch(loader: Any) -> tuple[Callable[[Tensor], Batch], int]:
    first = None
    if hasattr(loader, "__iter__") and not isinstance(loader, (Iterator, Mapping)):
        with isolate_rng():
            first = next(iter(loader), None)
    batch = Batch(size=0) if first is None else as_batch(first)
    return lambda rows: Batch(cond=batch.cond_of(rows), size=len(rows)), batch.size
