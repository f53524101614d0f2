"""Which adapter of a shared network is on: for the length of one call, and again where a checkpoint recomputes it.

Activation checkpointing recomputes a block after the call is over, so the adapter that was on during the forward is
entered again for the recomputation (``AdapterCheckpoint``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["BANK", "AdapterBank", "AdapterCheckpoint", "adapter_bank", "added_parts"]

#: attribute of a network that holds its bank
BANK = "_lightning_distill_adapters"


class AdapterBank:
    """The adapters of one network, and which of them is on.

    Attributes:
        layers: low-rank layers by the path of the layer they replaced.
        configs: peft configuration of each adapter by name.
    """

    def __init__(self) -> None:
        self.layers: dict[str, Any] = {}  # LoraLayer, which is typed as no module
        self.configs: dict[str, LoraConfig] = {}
        self._state: tuple[str | None, bool] = (None, False)

    @property
    def active(self) -> str | None:
        """Name of the adapter that is on, None at rest."""
        return self._state[0]

    def using(self, name: str | None, training: bool = False) -> AbstractContextManager[None]:
        """A context with adapter ``name`` on (None: all off) that leaves the state it found; reusable.

        Args:
            name: an adapter of this bank, or None.
            training: whether the adapter's dropout is active.
        """
        return _Using(self, (name, training))

    def reenter(self) -> AbstractContextManager[None]:
        """A context that restores, later, the state of this moment."""
        return _Using(self, self._state)

    def _set(self, state: tuple[str | None, bool]) -> None:
        self._state = state
        name, training = state
        for layer in self.layers.values():
            layer._disable_adapters = name is None
            layer._active_adapter = [] if name is None else [name]
            if name is not None and name in layer.lora_dropout:
                # the mode of the role, not of the teacher in whose module tree the dropout lives
                layer.lora_dropout[name].training = training

    def collect(self, network: nn.Module) -> None:
        """Read the low-rank layers from ``network`` and switch all adapters off."""
        self.layers = {path: m for path, m in network.named_modules() if isinstance(m, LoraLayer)}
        self._set((None, False))
        for module in network.modules():
            # torch's fused inference reads the weights of the layers within and calls none of them
            if isinstance(module, nn.TransformerEncoderLayer) and any(
                isinstance(m, LoraLayer) for m in module.modules()
            ):
                module.activation_relu_or_gelu = 0


class _Using(AbstractContextManager):
    """One state of a bank as a context; entered again by every backward through a retained graph."""

    def __init__(self, bank: AdapterBank, state: tuple[str | None, bool]) -> None:
        self.bank = bank
        self.state = state
        self.before: list[tuple[str | None, bool]] = []

    def __enter__(self) -> None:
        self.before.append(self.bank._state)
        self.bank._set(self.state)

    def __exit__(self, *_: object) -> None:
        self.bank._set(self.before.pop())


class AdapterCheckpoint:
    """Activation checkpointing that recomputes with the adapter of the forward.

    It is what diffusers takes as ``gradient_checkpointing_func``.

    A plain network uses it around its own blocks: ``AdapterCheckpoint(adapter_bank(network))(block, x)``.

    Args:
        bank: adapters of the network, None for a network without.
    """

    def __init__(self, bank: AdapterBank | None) -> None:
        self.bank = bank

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``module(*args, **kwargs)`` without keeping its activations."""
        bank = self.bank
        if bank is None:
            return checkpoint(module, *args, use_reentrant=False, **kwargs)
        return self._with_bank(bank, module, *args, **kwargs)

    @torch.compiler.disable(recursive=False)  # a compiler knows no contexts of the second forward
    def _with_bank(self, bank: AdapterBank, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        again = bank.reenter()
        return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)


def adapter_bank(network: nn.Module) -> AdapterBank | None:
    """The adapters of a network, None where it has none."""
    return network.__dict__.get(BANK)


def added_parts(network: nn.Module) -> set[str]:
    """Names of weights that students have installed on a shared frozen network; to be added to."""
    found: set[str] = network.__dict__.setdefault("_lightning_distill_added", set())
    return found
