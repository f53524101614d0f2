"""Networks without weights: every parameter has its shape and dtype and no memory, for planning a run.

Inside of ``weightless()`` the specs that read weights make their networks on the meta device from ``config.json``
alone; no weight file is opened, and none need be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import nn

__all__ = ["is_weightless", "skeleton", "weightless", "where"]

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


def where(network: nn.Module) -> AbstractContextManager[object]:
    """The context in which parts of a network are made on its device where that is the meta device."""
    first = next(network.parameters(), None)
    return torch.device("meta") if first is not None and first.is_meta else nullcontext()
