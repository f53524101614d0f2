"""Tensors without memory, the storages that are alive at a time, and operations counted: what plans are made of."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from lightning_distill.randomness import RandomStreams

__all__ = ["EmptyStreams", "EmptyTensors", "LiveMemory", "Work", "forget_values", "mixed_precision"]

#: functions that CUDA's autocast runs in float32 and that keep what they are given
_WIDE = ((F, "group_norm"), (F, "layer_norm"), (F, "softmax"), (torch, "softmax"))


class LiveMemory(TorchDispatchMode):
    """A mode that sums up the storages which were made within it and are alive.

    Attributes:
        now: their bytes.
        peak: largest value of ``now`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these tensors."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


@contextmanager
def _wide_functions() -> Iterator[None]:
    """What CUDA's autocast does and the CPU's does not: normalisations and softmax run in float32.

    The functions are exchanged: a function mode is off within ``backward``, where checkpoints recompute.
    """
    originals = [(holder, name, getattr(holder, name)) for holder, name in _WIDE]

    def wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map(_widened, (args, kwargs))
            return function(*args, **kwargs)

        return run

    try:
        for holder, name, function in originals:
            setattr(holder, name, wide(function))
        yield
    finally:
        for holder, name, function in originals:
            setattr(holder, name, function)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


class EmptyTensors(FakeTensorMode):
    """Tensors that have a shape and a dtype, live on the CPU as far as anyone can see, and have no memory."""

    def __init__(self) -> None:
        # computations mix them with small real tensors, such as times
        super().__init__(allow_non_fake_inputs=True)

    @functools.cached_property
    def avoid_device_init(self) -> bool:
        """Asked for at every use, and slow to find out where there is no accelerator."""
        return super().avoid_device_init


class EmptyStreams(RandomStreams):
    """Noise without memory. Rollouts stop at the first step: the last step needs most, whichever it is.

    Of experts that take turns the first has the first update and the last all others.

    Args:
        streams: whose place these take.
        fakes: mode of the tensors.
    """

    def __init__(self, streams: RandomStreams, fakes: EmptyTensors) -> None:
        super().__init__(streams.seed)
        self.fakes = fakes

    def normal(  # noqa: D102
        self, stream: str, update: int, first: int, shape: Sequence[int], device: Any = "cpu", dtype: Any = None
    ) -> Tensor:
        with self.fakes:
            return torch.empty(tuple(shape), dtype=dtype or torch.float32)

    def integer(self, stream: str, update: int, high: int) -> int:  # noqa: D102
        return high - 1 if update and stream.endswith("/expert") else 0


def forget_values(module: nn.Module, fakes: EmptyTensors) -> None:
    """Replace all parameters, and the buffers of networks, by tensors without memory; shared ones stay shared.

    Buffers of parts with ``values_decide`` keep their values.

    Args:
        module: its own buffers (counters) keep their values, those of its parts do not.
        fakes: mode of the new tensors.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    cpu = torch.device("cpu")

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            plain = tensor.detach()
            if plain.is_meta:
                new: Tensor = fakes.fake_tensor_converter.from_meta_and_device(fakes, plain, cpu)
            else:
                new = fakes.from_tensor(plain)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = (tensor, nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new)
        return made[id(tensor)][1]

    for part in module.modules():
        keeps = part is module or getattr(part, "values_decide", False)
        for held in (part._parameters, {} if keeps else part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor)  # type: ignore[assignment]


@contextmanager
def mixed_precision(autocast: torch.dtype | None, device: str) -> Iterator[None]:
    """Autocast as a Trainer enters it, on tensors without memory.

    Args:
        autocast: low-precision dtype, None for no autocast.
        device: ``cuda`` or ``cpu``, whose rules hold.
    """
    if autocast is None:
        yield
        return
    # no cache: Lightning keeps no casts either, a cast weight lives as long as its use
    with torch.autocast("cpu", autocast, cache_enabled=False), _wide_functions() if device == "cuda" else nullcontext():
        yield


class Work(TorchDispatchMode):
    """Sums floating-point operations; torch's FlopCounterMode also follows modules, by which it keeps activations.

    Attributes:
        flop: the sum so far.
    """

    flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out
