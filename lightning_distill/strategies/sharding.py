"""Which parts of a distillation module are sharded, and how: one FSDP2 group per network and per block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_distill.methods.base import DistillationModule
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import ExpertNetwork
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.tapping import TAPPED, AllTapsSeen

__all__ = [
    "block_names",
    "distribute_like",
    "layout",
    "networks_of",
    "reshard",
    "role_modules",
    "settle_flags",
    "shard_network",
    "unsharded",
]

#: blocks with parameters that the network's own forward reads past the block, which a shard of its own would hide
_READ_FROM_OUTSIDE = {"DiTTransformer2DModel": ("transformer_blocks.0",)}


def role_modules(module: DistillationModule) -> dict[str, nn.Module]:
    """Teacher, trained roles, targets, averages and further denoisers by name, where the configuration has them."""
    names = ["teacher", *(role for roles in module.phases.values() for role in roles), *module.targets]
    found = {name: getattr(module, name, None) for name in dict.fromkeys(names)}
    found |= {f"student_ema.{name}": average for name, average in module.student_ema.items()}
    found |= {name: part for name, part in module.named_children() if isinstance(part, Denoiser)}
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def networks_of(part: nn.Module) -> Iterator[nn.Module]:
    """The modules of a role that are called as a whole and have parameters, outermost first.

    For a denoiser its network and what has been added beside it. The backbone of an adapter is its owner's, and the
    adapter is a part of the backbone. Another role is called as a whole if parameters are its own and not a child's.

    Args:
        part: a role.
    """
    called = not isinstance(part, Denoiser) and type(part).forward is not nn.Module.forward
    if called and any(True for _ in part.parameters(recurse=False)):
        yield part
        return
    for name, child in part.named_children():
        if isinstance(part, AdapterDenoiser) and name in ("adapter", "network"):
            continue
        if type(child).forward is nn.Module.forward or isinstance(child, (Denoiser, nn.ModuleList, nn.ModuleDict)):
            yield from networks_of(child)
        elif any(True for _ in child.parameters()):
            yield child


def block_names(denoiser: Denoiser) -> list[str]:
    """Blocks of a denoiser's network that can be groups of their own."""
    outside: set[str] = set()
    for prefix, network in getattr(denoiser.network, "singles", {"": denoiser.network}).items():
        for cls in type(network).__mro__:
            outside |= {f"{prefix}{name}" for name in _READ_FROM_OUTSIDE.get(cls.__name__, ())}
    return [name for name in denoiser.block_names() if name not in outside]


def shard_network(network: nn.Module, blocks: Sequence[str], mesh: DeviceMesh, **options: Any) -> None:
    """Shard a network over the processes of a mesh, block by block and then what is left; once only.

    Args:
        network: called as a whole.
        blocks: names of its submodules that are gathered and freed one at a time.
        mesh: one dimension to shard over, or (replicas, shards).
        **options: of ``fully_shard``.

    Raises:
        ValueError: experts with batch normalisation.
    """
    if isinstance(network, FSDPModule):
        return
    for part in network.modules():
        if isinstance(part, ExpertNetwork):
            _run_together(part)
    for name in blocks:
        block = network.get_submodule(name)
        # a network that uses another one's blocks leaves them to their owner
        if any(True for _ in block.parameters()) and not isinstance(block, FSDPModule):
            _show_taps(block, network, f"{name}.")
            fully_shard(block, mesh=mesh, reshard_after_forward=True, **options)
            block.register_forward_hook(_hide_taps)
    # the root too: nothing may stay whole after a forward without backward
    _show_taps(network, network, "")
    fully_shard(network, mesh=mesh, reshard_after_forward=True, **options)
    network.register_forward_hook(_hide_taps)


def _run_together(experts: ExpertNetwork) -> None:
    """All processes gather what one of them needs."""
    if any(isinstance(layer, _BatchNorm) for layer in experts.modules()):
        raise ValueError(
            f"role_fsdp2 runs an expert in every process that shares its weights, also on a sample that is another "
            f"one's, which the statistics of batch normalisation in {type(experts.called).__name__} would count; use "
            "strategy=role_ddp, or networks with group or layer normalisation."
        )
    experts.sharded = True


_WITH_TAPS = object()


def _show_taps(part: nn.Module, network: nn.Module, inside: str) -> None:
    """Return the features tapped inside of a part along with its output, so that FSDP sees them leave.

    FSDP gathers a part's parameters again when a gradient reaches its output; a tap is a second way out. A forward that
    ends at its last tap ends here, before it would leave FSDP in the middle of things. Where the graph ended inside,
    behind the last tap, gradients are enabled while FSDP looks at what leaves.
    """
    forward = part.forward

    def with_taps(*args: Any, **kwargs: Any) -> Any:
        try:
            out = forward(*args, **kwargs)
        except AllTapsSeen:
            if inside:
                raise
            out = None
        tapped = {name: t for name, t in network.__dict__.get(TAPPED, {}).items() if name.startswith(inside)}
        if not tapped:
            return out
        mode = torch.is_grad_enabled()
        torch.set_grad_enabled(mode or any(t.requires_grad for t in tapped.values()))
        return _WITH_TAPS, out, tapped, mode

    part.__dict__["forward"] = with_taps


def _hide_taps(_part: nn.Module, _args: Any, out: Any) -> Any:
    if not (isinstance(out, tuple) and len(out) == 4 and out[0] is _WITH_TAPS):
        return out
    torch.set_grad_enabled(out[3])
    return out[1]


def reshard(module: nn.Module) -> None:
    """Free gathered parameters that a forward without a backward, or one that stopped at a tap, has left behind."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def settle_flags(module: nn.Module) -> None:
    """Tell gathered parameters whether their shards require gradients.

    FSDP does so when it gathers them next, which may be inside of a forward-mode derivative, where it is not allowed.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            group = getattr(part._get_fsdp_state(), "_fsdp_param_group", None)
            for parameter in getattr(group, "fsdp_params", ()):
                gathered, wanted = getattr(parameter, "_unsharded_param", None), parameter.sharded_param.requires_grad
                if gathered is not None and gathered.requires_grad != wanted:
                    gathered.requires_grad_(wanted)


def layout(tensor: DTensor) -> tuple[int, int]:
    """The mesh dimension over which a tensor is cut, and the rows of a part; the last parts may have fewer."""
    cut = tensor.placements.index(Shard(0))
    return cut, -(-tensor.shape[0] // tensor.device_mesh.size(cut))


@torch.no_grad()
def unsharded(tensor: Tensor) -> Tensor:
    """The whole of a tensor on the CPU; a collective for a sharded one, also where its parts lie in host memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu()
    mesh, (cut, rows) = tensor.device_mesh, layout(tensor)
    own = tensor.to_local()
    sent = own.new_zeros((rows, *own.shape[1:]), device=mesh.device_type)
    sent[: own.shape[0]] = own
    parts = [torch.empty_like(sent) for _ in range(mesh.size(cut))]
    # the plain collective: it has returned when it is over, and leaves nothing to wait for
    dist.all_gather(parts, sent, group=mesh.get_group(cut))
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for piece, part in zip(whole.split(rows), parts):
        piece.copy_(part[: piece.shape[0]])
    return whole


@torch.no_grad()
def distribute_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process' part of a tensor that every process has, placed as another and in its order; no communication.

    Args:
        whole: of the global shape of ``like``.
        like: a sharded tensor, or an ordinary one.
    """
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    mesh, (cut, rows) = like.device_mesh, layout(like)
    first = min(mesh.get_local_rank(cut) * rows, whole.shape[0])
    # a copy: a slice of a tensor on the device would keep the whole alive; fused optimizers walk through memory
    own = torch.empty_like(like.to_local(), dtype=whole.dtype).copy_(whole[first : first + rows])
    return DTensor.from_local(own, mesh, like.placements, run_check=False, shape=whole.shape, stride=like.stride())
