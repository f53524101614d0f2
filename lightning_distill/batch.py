"""The one batch type of the package, and how ordinary loader outputs become it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batch", "as_batch", "pack_streams", "slice_cond"]

#: fields of which a sample may be several tensors
_STREAMS = ("x0", "noise")


def slice_cond(cond: Mapping[str, Any], rows: slice | Tensor, size: int) -> dict[str, Any]:
    """The given rows of every tensor in a conditioning mapping, and of lists with an entry for each sample.

    Args:
        cond: by name.
        rows: which samples; indices, on any device, may repeat some.
        size: number of samples.
    """

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.ndim == 0 else value[rows if isinstance(rows, slice) else rows.to(value.device)]
        if isinstance(value, list | tuple) and len(value) == size:
            return list(value[rows] if isinstance(rows, slice) else (value[i] for i in rows.tolist()))
        return value

    return {key: pick(value) for key, value in cond.items()}


def pack_streams(samples: Mapping[str, Tensor]) -> Tensor:
    """Several tensors per sample as one: flattened, and put behind each other in the order of their names.

    Args:
        samples: by name, (B, ...) each.

    Returns:
        (B, N), N the number of all elements of a sample; ``streams.StreamProcess.unpack`` takes it apart.

    Raises:
        ValueError: no tensor, or numbers of samples that differ.
    """
    sizes = {name: len(value) for name, value in samples.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"streams of one batch have one number of samples, and these have {sizes}.")
    return torch.cat([samples[name].flatten(1) for name in sorted(samples)], dim=1)


@dataclass
class Batch:
    """One batch: conditions, and clean samples where the method uses data.

    Attributes:
        cond: conditioning tensors by the name the network's family declares, each (B, ...), or for a network of one's
            own lists of B entries; may be empty.
        x0: clean samples, (B, ...), or None for data-free training.
        noise: starting noise of a stored trajectory, (B, ...), or None; with it ``x0`` is the teacher's output.
        size: B.
        states: noisy samples on the way from ``noise`` to ``x0``, (B, K, ...), or None.
        times: native times of the K states, descending, (K,), float64; the same for all samples.
        predictions: what the teacher predicted at the states, as ``flow_prediction``: ``guided`` and ``unguided``,
            (B, K, ...), and the guidance ``scale``, (B,); empty where it is not stored.
    """

    cond: dict[str, Any] = field(default_factory=dict)
    x0: Tensor | None = None
    noise: Tensor | None = None
    size: int = -1
    states: Tensor | None = None
    times: Tensor | None = None
    predictions: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 0:
            sources = [self.x0, self.noise, self.states, *self.cond.values()]
            tensors = [v for v in sources if isinstance(v, Tensor) and v.ndim > 0]
            if not tensors:
                raise ValueError("a Batch without x0 and without conditions needs its size: Batch(size=B).")
            self.size = len(tensors[0])

    def cond_of(self, rows: slice | Tensor) -> dict[str, Any]:
        """Conditions of some samples, as ``slice_cond``."""
        return slice_cond(self.cond, rows, self.size)

    def rows(self, start: int, stop: int) -> Batch:
        """Samples ``start:stop`` of this batch."""
        rows = slice(start, stop)
        return Batch(
            cond=self.cond_of(rows),
            x0=None if self.x0 is None else self.x0[rows],
            noise=None if self.noise is None else self.noise[rows],
            states=None if self.states is None else self.states[rows],
            times=self.times,
            predictions=slice_cond(self.predictions, rows, self.size),
            size=len(range(*rows.indices(self.size))),
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with a function applied to each of its tensors."""

        def apply(value: Any) -> Any:
            return f(value) if isinstance(value, Tensor) else value

        return Batch(
            cond={key: apply(value) for key, value in self.cond.items()},
            x0=apply(self.x0),
            noise=apply(self.noise),
            states=apply(self.states),
            times=apply(self.times),
            predictions={key: f(value) for key, value in self.predictions.items()},
            size=self.size,
        )


def as_batch(data: Any) -> Batch:
    """Turn what a loader yields into a ``Batch``.

    Accepted: a ``Batch``; a mapping with its field names; ``x0``; ``(x0,)``; ``(x0, class_labels)``. In a mapping,
    ``x0`` and ``noise`` may be mappings of several tensors per sample, see ``pack_streams``.

    Raises:
        TypeError: anything else, with the accepted forms.
    """
    if isinstance(data, Batch):
        return data
    if isinstance(data, Tensor):
        return Batch(x0=data)
    if isinstance(data, Mapping) and set(data) <= {f.name for f in fields(Batch)}:
        given: dict[str, Any] = dict(data)
        packed = {k: pack_streams(given[k]) for k in _STREAMS if isinstance(given.get(k), Mapping)}
        return Batch(**{**given, **packed})
    if isinstance(data, (tuple, list)) and 1 <= len(data) <= 2 and all(isinstance(v, Tensor) for v in data):
        cond = {} if len(data) == 1 else {"class_labels": data[1].to(torch.long)}
        return Batch(x0=data[0], cond=cond)
    raise TypeError(
        f"cannot read a batch of type {type(data).__name__}; yield lightning_distill.Batch, a tensor of clean samples, "
        f"(samples, class_labels), or a mapping with the keys {', '.join(f.name for f in fields(Batch))}."
    )
