"""Which of Lightning's strategies can train a cycle of several phases, and why the others cannot."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_distill.strategies.role_data_parallel import RoleDataParallel
from lightning_distill.strategies.role_fsdp2 import RoleFSDP2

__all__ = ["check_strategy"]

_REASONS = {
    "DeepSpeedStrategy": "DeepSpeed has one engine with one optimizer and one backward pass per step, and a cycle has "
    "several of each",
    "FSDPStrategy": "FSDP wraps the module as one network with one forward, and a method calls several networks",
}


def check_strategy(strategy: Any, phases: int) -> None:
    """Raise one sentence for a strategy that would fail, or train something else, after training has begun.

    Args:
        strategy: of the Trainer.
        phases: backward passes of a cycle with parameters of their own.
    """
    name = type(strategy).__name__
    for kind in type(strategy).__mro__:
        if kind.__name__ in _REASONS:
            raise ValueError(f"{_REASONS[kind.__name__]}; use strategy=role_fsdp2, which shards network by network.")
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, RoleFSDP2):
        raise ValueError(
            f"{name} leaves it to the module to shard itself, and no method does; use strategy=role_fsdp2, which "
            "shards every network of a method."
        )
    if isinstance(strategy, DDPStrategy) and not isinstance(strategy, RoleDataParallel) and phases > 1:
        options = strategy._ddp_kwargs
        if not options.get("find_unused_parameters") or options.get("static_graph"):
            raise ValueError(
                "plain DDP expects gradients of every trained network in each backward pass, and the phases of a cycle "
                "train one after the other; use strategy=role_ddp (or ddp_find_unused_parameters_true, which moves "
                "more bytes)."
            )
