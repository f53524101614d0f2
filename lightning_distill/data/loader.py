"""A sized loader whose order is a pure function of (seed, epoch) and whose position can be saved.

    position in the epoch's order  =  batch_idx * global_batch + rank * batch_size + i

Neither the number of workers nor prefetching nor an interruption changes which samples come next, nor the random
numbers with which a data set makes them, and two ranks together see exactly what one rank with the doubled batch would
see.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_distill.batch import Batch, as_batch, slice_cond
from lightning_distill.randomness import derive_seed

__all__ = ["InMemory", "ResumableLoader", "Source", "epoch_generator", "pinned"]


def epoch_generator(seed: int, epoch: int, stream: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, epoch, stream) only."""
    return torch.Generator().manual_seed(derive_seed(seed, "data", epoch, stream))


@runtime_checkable
class Source(Protocol):
    """Samples that can be had in whole batches: tensors in memory, or samples computed from their index."""

    def __len__(self) -> int:
        """Number of samples in an epoch."""

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        """The samples of the given indices (B,), int64; a pure function of both arguments."""


class InMemory:
    """A data set that fits into memory, held as one big batch; a batch is one ``index_select`` per tensor.

    Args:
        data: all samples.
        transform: applied to every gathered batch, for example bytes to [-1, 1].
    """

    def __init__(self, data: Batch, transform: Callable[[Batch], Batch] | None = None) -> None:
        self.data = data
        self.transform = transform

    def __len__(self) -> int:
        return self.data.size

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        """Rows ``indices`` of every tensor; ``epoch`` plays no part."""

        def pick(value: Tensor) -> Tensor:
            return value.index_select(0, indices) if value.ndim > 0 else value

        times = self.data.times  # the same for all samples
        cond = slice_cond(self.data.cond, indices, self.data.size)
        batch = replace(replace(self.data, times=None, cond={}).map(pick), cond=cond, times=times, size=len(indices))
        return batch if self.transform is None else self.transform(batch)


class ResumableLoader:
    """A loader of ``Batch`` objects with a position that goes into checkpoints.

    It is sized and has ``state_dict`` and ``load_state_dict``, by which Lightning saves and restores it with
    the fit loop; it is no ``DataLoader``, so Lightning leaves its order alone (``use_distributed_sampler``
    has no effect). The position counts batches handed out, not batches prefetched by workers.

    An epoch has ``max(1, len(source) // global_batch)`` batches. All ranks drop the same tail. A source
    smaller than one global batch is repeated, each time in another order, to fill it.

    With ``slices`` > 1 a batch is made of that many consecutive global batches, of which each rank holds its part:
    slice s of rank r begins at s * world_size * batch_size + r * batch_size, so that every slice, taken over all ranks,
    is what one process would have seen.

    Args:
        source: a ``Source``, or a map-style data set whose items collate to what ``as_batch`` reads.
        batch_size: samples per rank and slice.
        slices: slices per batch; a batch has ``batch_size * slices`` samples.
        seed: seed of the order.
        rank: index of this data-parallel process.
        world_size: number of them.
        num_workers: loading processes, for map-style data sets.
        pin_memory: put batches into page-locked memory, for faster copies to an accelerator; without one they stay
            where they are.
        shuffle: draw a new order every epoch; otherwise keep the stored one.
        same_epoch: every epoch is like the first one, as ``overfit_batches`` wants it.

    Raises:
        ValueError: the source is empty, or a number is out of range.
    """

    def __init__(
        self,
        source: Source | Dataset[Any],
        batch_size: int,
        *,
        slices: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        shuffle: bool = True,
        same_epoch: bool = False,
    ) -> None:
        if batch_size < 1 or slices < 1:
            raise ValueError(f"batch_size={batch_size} and slices={slices} must both be 1 or more.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size} processes.")
        if len(source) < 1:  # type: ignore[arg-type]
            raise ValueError(f"{type(source).__name__} has no samples; check where the data should come from.")
        self.source = source
        self.batch_size = batch_size
        self.slices = slices
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.shuffle = shuffle
        self.same_epoch = same_epoch
        self.epoch = 0
        self.batch = 0
        self._restored = False
        self._rows = _Rows()
        self._workers: DataLoader[Any] | None = None

    @property
    def global_batch(self) -> int:
        """Samples per batch over all slices and ranks."""
        return self.batch_size * self.slices * self.world_size

    def __len__(self) -> int:
        return max(1, len(self.source) // self.global_batch)  # type: ignore[arg-type]

    # -------------------------------------------------------------------------------------------------- order
    def order(self, epoch: int) -> Tensor:
        """Sample indices of an epoch in the order of all ranks, (len(self) * global_batch,), int64."""
        n, wanted = len(self.source), len(self) * self.global_batch  # type: ignore[arg-type]
        repeats = -(-wanted // n)
        if self.shuffle:
            parts = [torch.randperm(n, generator=epoch_generator(self.seed, epoch, k)) for k in range(repeats)]
        else:
            parts = [torch.arange(n)] * repeats
        return torch.cat(parts)[:wanted]

    def indices(self, epoch: int) -> Tensor:
        """Sample indices of this rank's batches of an epoch, (len(self), batch_size * slices), int64."""
        return self._own(self.order(epoch))

    def _own(self, of_all: Tensor) -> Tensor:
        parts = of_all.reshape(len(self), self.slices, self.world_size, self.batch_size)
        return parts[:, :, self.rank].reshape(len(self), self.slices * self.batch_size)

    # ---------------------------------------------------------------------------------------------- iteration
    def __iter__(self) -> Iterator[Batch]:
        if not self._restored and self.batch > 0:
            self.epoch, self.batch = self.epoch + 1, 0
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        self._restored = False
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        # a generator: nothing is read before the first batch is asked for, after which the epoch is settled
        epoch = 0 if self.same_epoch else self.epoch
        indices = self.indices(epoch)[self.batch :]
        for batch in self._gather(indices, epoch) if isinstance(self.source, Source) else self._collate(indices, epoch):
            self.batch += 1
            yield batch

    def _gather(self, indices: Tensor, epoch: int) -> Iterator[Batch]:
        assert isinstance(self.source, Source)
        for rows in indices:
            batch = self.source.gather(rows, epoch)
            yield pinned(batch) if self.pin_memory else batch

    def _collate(self, indices: Tensor, epoch: int) -> Iterator[Batch]:
        if self._workers is None:
            self._workers = DataLoader(
                _Seeded(self.source),  # type: ignore[arg-type]
                batch_sampler=self._rows,
                collate_fn=_collate,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                persistent_workers=self.num_workers > 0,
                # workers are seeded from here, so that iterating leaves the global random state alone
                generator=epoch_generator(self.seed, 0, stream=1),
            )
        places = self._own(torch.arange(len(self) * self.global_batch))[self.batch :]
        self._rows.rows = torch.stack([places, indices], dim=-1)
        self._rows.about = (self.seed, "item", epoch)
        for data in self._workers:
            yield as_batch(data)

    # ----------------------------------------------------------------------------------------------- position
    @property
    def sampler(self) -> ResumableLoader:
        """The object that Lightning tells the epoch: this loader itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless the loader is within it already."""
        if epoch != self.epoch:
            self.epoch, self.batch = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """The position: epoch, batches handed out in it, and what is needed to read that number."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "samples": len(self.source),  # type: ignore[arg-type]
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the batch after the last one handed out when ``state`` was saved.

        Another world size is fine as long as the global batch stays the same. Otherwise, or with another seed
        or data set, the loader warns and continues after as many samples as had been seen in the epoch.
        """
        self.epoch, self.batch = state["epoch"], state["batch"]
        now = self.state_dict()
        if changed := [k for k in ("seed", "global_batch", "samples") if state[k] != now[k]]:
            what = ", ".join(f"{k} {state[k]} -> {now[k]}" for k in changed)
            warnings.warn(f"resuming with other data settings ({what}): the order of samples differs.", stacklevel=2)
            self.batch = min(len(self), state["batch"] * state["global_batch"] // self.global_batch)
        self._restored = True


class _Seeded(Dataset[Any]):
    """A data set whose random numbers depend on the epoch and the place of a sample in it only.

    Items are asked for with a seed for the global generators of torch, numpy and Python, which are left as they were:
    augmentations are the same in whatever process and however often a run was interrupted.

    Args:
        source: map-style data set.
    """

    def __init__(self, source: Dataset[Any]) -> None:
        self.source = source

    def __getitem__(self, item: tuple[int, int]) -> Any:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[Any]:
        """Items by (seed, index); those of a data set that fetches batches share the first's seed."""
        torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
        try:
            if callable(fetch := getattr(self.source, "__getitems__", None)):
                _seed(items[0][0])
                return list(fetch([index for _, index in items]))
            found = []
            for seed, index in items:
                _seed(seed)
                found.append(self.source[index])
            return found
        finally:
            torch.set_rng_state(torch_state)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class _Rows:
    """Batches of (seed, index) for ``DataLoader``: what is left of the epoch when its iteration begins.

    It knows nothing of the loader, since worker processes in a reference cycle are stopped late and slowly.
    """

    def __init__(self) -> None:
        self.rows = torch.empty(0, 0, 2, dtype=torch.long)
        self.about: tuple[int | str, ...] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for row in self.rows:
            yield [(derive_seed(*self.about, place), index) for place, index in row.tolist()]

    def __len__(self) -> int:
        return len(self.rows)


def _collate(items: list[Any]) -> Any:
    return default_collate(items)


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory; as it is where no accelerator would copy from there."""
    if not torch.accelerator.is_available() or torch.backends.mps.is_available():
        return batch
    return batch.map(Tensor.pin_memory)
