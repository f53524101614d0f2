"""Networks without weights: every parameter has its shape and dtype and no memory, for planning a run.

Inside of ``weightless()`` the specs that read weights make their networks on the meta device from ``config.json``
alone; no weight file is opened, and none need be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Shapes", "is_weightless", "skeleton", "weightless", "where"]

_ACTIVE: ContextVar[bool] = ContextVar("weightless", default=False)


@contextmanager
def weightless(active: bool = True) -> Iterator[None]:
    """Within it, specs build networks without weights (with ``active=False``: ordinary ones)."""
    token = _ACTIVE.set(active)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def is_weightless() -> bool:
    """Whether networks are to be built without weights."""
    return _ACTIVE.get()


def skeleton() -> AbstractContextManager[None]:
    """Modules constructed within it have parameters on the meta device; buffers are computed as ever."""
    if not is_weightless():
        return nullcontext()
    from accelerate import init_empty_weights  # what diffusers itself loads with

    return init_empty_weights()


class Shapes(TorchDispatchMode):
    """Operations on tensors of the meta device and of others give tensors of the meta device.

    Networks without weights have buffers with values. What a method finds out by running such a network while it is
    built is the shapes of features.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(t.is_meta for t in tensors) and not all(t.is_meta for t in tensors):
            leaves = [leaf.to("meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(leaves, spec)
        return func(*args, **(kwargs or {}))


def where(network: nn.Module) -> AbstractContextManager[object]:
    """The context in which parts of a network are made on its device where that is the meta device."""
    first = next(network.parameters(), None)
    return torch.device("meta") if first is not None and first.is_meta else nullcontext()
