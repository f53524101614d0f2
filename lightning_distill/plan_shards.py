"""Plans of several processes: how a Trainer's settings divide the networks of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_distill.methods.base import DistillationModule
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import AdapterDenoiser

__all__ = ["Processes", "gathered_bytes", "processes_of"]

_SHARDED = ("role_fsdp2", "RoleFSDP2")


@dataclass(frozen=True)
class Processes:
    """The processes of a run and, where the strategy shards, what each of them holds.

    Attributes:
        number: of all processes.
        shards: processes over which every network is divided; 1 where each holds all.
        shard_blocks: gather one block at a time, or whole networks.
        bfloat16: gather and multiply in bfloat16.
        teacher_dtype: dtype of the frozen teacher, None for its own.
        checkpointing: recompute the blocks of trained networks.
        offload: networks in host memory.
    """

    number: int = 1
    shards: int = 1
    shard_blocks: bool = True
    bfloat16: bool = False
    teacher_dtype: torch.dtype | None = None
    checkpointing: bool = False
    offload: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.number == 1:
            return "one process"
        return f"each of {self.number} processes" + (f", {self.shards} shards" if self.shards > 1 else "")


def processes_of(trainer: Mapping[str, Any]) -> Processes:
    """What ``devices``, ``num_nodes`` and ``strategy`` say.

    Args:
        trainer: settings as plain data. Automatic ``devices`` are the GPUs of this machine, or one.

    Raises:
        ValueError: a number that is none, or does not divide into replicas.
    """
    nodes = trainer.get("num_nodes") or 1
    number = _devices(trainer.get("devices")) * nodes
    strategy = trainer.get("strategy") or "auto"
    name, options = strategy, {}
    if isinstance(strategy, Mapping):
        name, options = str(strategy.get("class_path")), dict(strategy.get("init_args") or {})
    if str(name).rpartition(".")[2] not in _SHARDED:
        return Processes(number)
    replicas = options.get("replicas") or 1
    copies = nodes if replicas == "nodes" else int(replicas)
    if number % copies:
        raise ValueError(f"RoleFSDP2(replicas={replicas!r}): {number} processes cannot be divided; give a divisor.")
    return Processes(
        number,
        number // copies,
        options.get("shard_blocks", True),
        options.get("compute_dtype") == "bfloat16",
        getattr(torch, options["teacher_dtype"]) if options.get("teacher_dtype") else None,
        bool(options.get("activation_checkpointing")),
        tuple(options.get("offload") or ()),
    )


def _devices(given: Any) -> int:
    """Processes per node: of a number, a list of devices as YAML or the command line has it, or what is there."""
    if isinstance(given, str) and given not in ("auto", "-1"):
        given = [word for word in given.split(",") if word.strip()] if "," in given else int(given)
    if isinstance(given, (list, tuple)):
        return max(1, len(given))
    if given in (None, "auto", -1, "-1"):
        return max(1, torch.cuda.device_count())
    if int(given) < 1:
        raise ValueError(f"trainer.devices={given}: give 1 or more.")
    return int(given)


def gathered_bytes(module: DistillationModule, processes: Processes) -> int:
    """Bytes that a process gathers of the network that needs most: what is outside of blocks, a block and the next.

    Args:
        module: whose networks are built, with or without weights.
        processes: over which they are divided.
    """
    from lightning_distill.strategies.sharding import block_names  # strategies import methods

    if processes.shards == 1:
        return 0
    most = 0
    for denoiser in module.modules():
        if not isinstance(denoiser, Denoiser) or isinstance(denoiser, AdapterDenoiser):
            continue
        modules = dict(denoiser.network.named_modules())
        names = block_names(denoiser) if processes.shard_blocks else []
        blocks = [sum(_sizes(modules[name], processes)) for name in names]
        whole = sum(_sizes(denoiser.network, processes))
        most = max(most, whole - sum(blocks) + min(2, len(blocks)) * max(blocks, default=0))
    return most


def _sizes(part: torch.nn.Module, processes: Processes) -> list[int]:
    return [p.numel() * (2 if processes.bfloat16 else p.element_size()) for p in part.parameters()]
