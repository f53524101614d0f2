"""What one training step does, counted rather than timed: calls, FLOP, bytes kept for backward, host synchronisations.

    with Counter(module, {"student": module.student}) as counted:
        step()
    counted.calls, counted.gflop, counted.saved, counted.synchronisations

Works for any training code, so that two libraries are counted by the same lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill.networks.quantisation import plain_tensors


class Synchronisations(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


class _Held:
    """A saved tensor; its storage counts for as long as the graph holds it."""

    def __init__(self, tensor: Tensor, owner: SavedBytes) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.owner = tensor.detach(), owner  # with its history a saved output would hold itself
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        owner.add(self.key, self.size)

    def __del__(self) -> None:
        self.owner.remove(self.key, self.size)


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Pieces of memory that tensors lie in; quantised ones consist of several."""
    return [part.untyped_storage() for tensor in tensors for part in plain_tensors(tensor).values()]


class SavedBytes:
    """The most bytes that autograd keeps for backward at one time.

    Storages count once however many operations keep them, and those of ``given`` tensors (weights, buffers) not at all.

    Args:
        given: tensors that exist anyway.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        self.peak = self.now = 0
        self._given = {storage.data_ptr() for storage in _storages(given)}
        self._holders: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: getattr(held, "tensor", held))

    def _pack(self, tensor: Tensor) -> Any:
        if hasattr(tensor, "__tensor_flatten__"):  # a quantised weight; activations are ordinary tensors
            return tensor
        if tensor._is_zerotensor():  # tangents that forward mode knows to be zero take no memory
            return tensor
        return tensor if tensor.untyped_storage().data_ptr() in self._given else _Held(tensor, self)

    def add(self, key: int, size: int) -> None:
        """One more holder of a storage."""
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)

    def remove(self, key: int, size: int) -> None:
        """One holder less."""
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= size

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.__exit__()


class Counter:
    """Everything of this module at once.

    A backward pass counts when a gradient reaches a tensor that a network returned. Calls and backward passes are
    weighted with the rows of their first argument over ``batch``: a batched pair of guidance branches is two.

    Args:
        module: everything with weights; these are no activations.
        networks: modules whose calls are counted, by name.
        batch: rows of one call; None counts calls as they are.

    Attributes:
        calls: forwards by name, those that an exception ended early included.
        backwards: backward passes by name.
        gflop: 1e9 floating-point operations of matrix products and convolutions, backward included.
        saved: the most bytes kept for backward at one time.
        synchronisations: reads of a tensor's value by the host.
    """

    def __init__(self, module: nn.Module, networks: Mapping[str, nn.Module], batch: int | None = None) -> None:
        self.calls: dict[str, float] = {}
        self.backwards: dict[str, float] = {}
        self.gflop, self.saved, self.synchronisations = 0.0, 0, 0
        self._module, self._networks, self._batch = module, networks, batch
        self._stack = ExitStack()

    def __enter__(self) -> Counter:
        for name, network in self._networks.items():
            for handle in (
                network.register_forward_pre_hook(self._called(name)),
                network.register_forward_hook(self._returned(name)),
            ):
                self._stack.callback(handle.remove)
        weights = (*self._module.parameters(), *self._module.buffers())
        self._saved = self._stack.enter_context(SavedBytes(weights))
        self._flops = self._stack.enter_context(FlopCounterMode(display=False))
        self._host = self._stack.enter_context(Synchronisations())
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stack.__exit__(*failure)
        self.gflop, self.saved = self._flops.get_total_flops() / 1e9, self._saved.peak
        self.synchronisations = self._host.count

    def _rows(self, arguments: tuple[Any, ...]) -> float:
        return 1 if self._batch is None else len(arguments[0]) / self._batch

    def _called(self, name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.calls[name] = self.calls.get(name, 0) + self._rows(arguments)

        return hook

    def _returned(self, name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], out: Any) -> None:
            first = getattr(out, "raw", out)
            first = first[0] if isinstance(first, (tuple, list)) and first else first
            if isinstance(first, Tensor) and first.requires_grad and first.grad_fn is not None:
                rows = self._rows(arguments)
                first.register_hook(lambda _: self.backwards.update({name: self.backwards.get(name, 0) + rows}))

        return hook

    @property
    def passes(self) -> float:
        """Forwards, with every backward pass as two."""
        return sum(self.calls.values()) + 2 * sum(self.backwards.values())


def floor_bytes(weights: Iterable[Tensor], optimizers: Iterable[Optimizer]) -> int:
    """Bytes that training cannot do without: weights, optimizer states, and gradients of the largest optimizer.

    Args:
        weights: parameters and buffers; shared ones count once.
        optimizers: after their first step.
    """
    held = {storage.data_ptr(): storage.nbytes() for storage in _storages(weights)}
    state = gradients = 0
    for optimizer in optimizers:
        tensors = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        state += sum(part.nbytes for t in tensors for part in plain_tensors(t).values())
        own = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = max(gradients, sum(p.numel() * p.element_size() for p in own))
    return sum(held.values()) + state + gradients
