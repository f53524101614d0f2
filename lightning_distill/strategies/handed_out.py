"""Weights that only the first process has read: taken off before sharding, handed out shard by shard afterwards.

All processes then shard networks on the meta device, which costs no memory, and each gets room for its own part only.
The first process sends every process the rows of a tensor that are its own, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_distill.strategies.sharding import layout

__all__ = ["give_room", "hand_out", "structure", "take_off"]


def _owners(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Full name, owner, name there and value of every parameter, each place once.

    Raises:
        ValueError: two places share one parameter.
    """
    seen: dict[int, str] = {}
    for prefix, owner in module.named_modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            if (other := seen.setdefault(id(parameter), full)) != full:
                raise ValueError(
                    f"RoleFSDP2(meta_device=True): {other} and {full} are one tied parameter, which cannot be built on "
                    "the meta device; leave meta_device out."
                )
            yield full, owner, name, parameter


def structure(module: nn.Module) -> str:
    """Name, shape, dtype and whether it is trained, of every parameter: what all processes must have built alike."""
    lines = (f"{full} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for full, _, _, p in _owners(module))
    return "\n".join(lines)


def take_off(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Put all parameters of a module on the meta device.

    Args:
        module: not sharded; its parameters may be there already.
        keep: whether their values are wanted.

    Returns:
        with ``keep`` the values by full name, else nothing.
    """
    values = {}
    for full, owner, name, parameter in list(_owners(module)):
        if keep:
            values[full] = parameter.detach()
        empty = torch.empty_like(parameter, device="meta")
        owner._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return values


def give_room(network: nn.Module, device: torch.device) -> None:
    """Memory for this process' part of a sharded network, with any values in it."""
    network._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)


@torch.no_grad()
def hand_out(module: nn.Module, values: dict[str, Tensor], device: torch.device) -> None:
    """Give all processes the first one's parameters and buffers; a collective.

    Args:
        module: its networks are sharded and have room.
        values: of the parameters, by full name, on the first process; emptied on the way. Buffers are its own.
        device: on which tensors are sent.

    Raises:
        RuntimeError: a parameter has no room.
    """
    first = dist.get_rank() == 0
    for full, owner, name, parameter in list(_owners(module)):
        value = values.pop(full).to(parameter.dtype) if first else None
        if isinstance(parameter, DTensor):
            if parameter.to_local().is_meta:
                raise RuntimeError(f"{full} is sharded, but no part of a network that was given room.")
            _scatter(parameter, value, device)
            continue
        if parameter.is_meta:
            empty = torch.empty_like(parameter, device=device)
            owner._parameters[name] = parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        _broadcast(parameter, value, device)
    for owner, name, buffer in _buffers(module):
        if buffer.is_meta:
            owner._buffers[name] = torch.empty_like(buffer, device=device)
        _broadcast(owner._buffers[name], buffer if first else None, device)  # type: ignore[arg-type]


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]


def _broadcast(own: Tensor, value: Tensor | None, device: torch.device) -> None:
    """The first process' value for all; ``own`` may lie anywhere and have any strides."""
    sent = torch.empty(own.shape, dtype=own.dtype, device=device)
    if value is not None:
        sent.copy_(value)
    if sent.numel():
        dist.broadcast(sent, src=0)
        own.copy_(sent)


def _scatter(own: DTensor, value: Tensor | None, device: torch.device) -> None:
    """Each process' rows of the first one's value, which are a k-th of them, the last ones filled up for sending."""
    mesh, (cut, rows) = own.device_mesh, layout(own)
    sent = torch.empty((rows, *own.shape[1:]), dtype=own.dtype, device=device)
    parts = None
    if value is not None:
        places = [int((mesh.mesh == rank).nonzero()[0, cut]) for rank in range(dist.get_world_size())]
        parts = [_filled_up(value[place * rows : (place + 1) * rows], sent) for place in places]
    dist.scatter(sent, parts, src=0)
    local = own.to_local()
    local.copy_(sent[: local.shape[0]])


def _filled_up(piece: Tensor, like: Tensor) -> Tensor:
    full = torch.zeros_like(like)
    full[: piece.shape[0]] = piece
    return full
