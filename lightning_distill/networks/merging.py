"""Networks without their adapters: plain copies, with an adapter added to the weights or left out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_distill.networks.adapter_bank import BANK, AdapterBank, adapter_bank, added_parts
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import AdapterDenoiser, checkpoint_with
from lightning_distill.networks.quantisation import dequantise, holds_quantised, plain_tensors

__all__ = ["base_state_dict", "merged_network", "widen", "widest", "without_adapters"]


#: share of an adapter's change in the rounding of which it is told
LOST = 0.1


def without_adapters(network: nn.Module) -> nn.Module:
    """A deep copy of the original network: same weights, no adapters.

    Args:
        network: any network, with or without adapters.
    """
    return _plain_copy(network, None)


def merged_network(denoiser: Denoiser, widened: bool = False) -> nn.Module:
    """A deep copy of the network a role runs, as an ordinary module: its adapter is added to the weights.

    For a role without adapter it is the plain copy of its network.

    Args:
        denoiser: any role.
        widened: bring half-precision weights of the copy to float32 first; they would round away most of a small
            adapter.

    Returns:
        a network of the original class, equal in output up to rounding, ready for ``save_pretrained``.
    """
    name = denoiser.adapter_name if isinstance(denoiser, AdapterDenoiser) else None
    return _plain_copy(denoiser.network, name, widened)


def _plain_copy(network: nn.Module, name: str | None, widened: bool = False) -> nn.Module:
    network = copy.deepcopy(network)
    added_parts(network).clear()  # they are the copy's own
    dequantise(network, torch.float32 if widened else None)
    if widened:
        widen(network)
    bank = network.__dict__.pop(BANK, None)
    if bank is None:
        return network
    lost = change = torch.zeros((), dtype=torch.float64)
    for path, layer in bank.layers.items():
        base = layer.get_base_layer()
        if name in layer.lora_A:
            with torch.no_grad():
                weight = base.weight.to(layer.lora_A[name].weight.dtype) + layer.get_delta_weight(name)
                if name in layer.lora_magnitude_vector:
                    magnitude = layer.lora_magnitude_vector[name].weight.flatten()
                    scale = magnitude / weight.flatten(1).norm(dim=1)
                    weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
                if not weight.is_meta and base.weight.dtype != weight.dtype:
                    change = change + (weight - base.weight).double().square().sum().cpu()
                    lost = lost + (weight - weight.to(base.weight.dtype)).double().square().sum().cpu()
                base.weight.copy_(weight)
        parent, _, child = path.rpartition(".")
        network.get_submodule(parent)._modules[child] = base
    network.__dict__.pop("peft_config", None)
    if lost > LOST**2 * change:
        rank_zero_warn(
            f"the adapter {name!r} is added to weights of half precision of {type(network).__name__}, which rounds "
            f"{math.sqrt(float(lost / change)):.0%} of its change away; give PretrainedDenoiser dtype: float32 in the "
            "configuration of its run, or distil an exported pipeline."
        )
    if getattr(network, "is_gradient_checkpointing", False):
        checkpoint_with(network, None)
    return network


def widen(network: nn.Module) -> None:
    """Bring parameters and buffers of half precision to float32, in place; wider ones keep their dtype."""
    narrow = {torch.float16, torch.bfloat16}
    for module in network.modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(t.dtype in narrow for t in tensors):
            module._apply(lambda t: t.float() if t.dtype in narrow else t, recurse=False)


@contextmanager
def widest(network: nn.Module) -> Iterator[None]:
    """``widen`` for as long as the context lasts; afterwards every tensor has its own dtype and value again.

    Args:
        network: with quantised weights, it is left alone.
    """
    if holds_quantised(network):
        yield
        return
    narrow = (torch.float16, torch.bfloat16)
    parameters = [(p, p.dtype) for p in network.parameters() if p.dtype in narrow]
    buffers = [(m, k, b) for m in network.modules() for k, b in m.named_buffers(recurse=False) if b.dtype in narrow]
    widen(network)
    try:
        yield
    finally:
        for parameter, dtype in parameters:
            parameter.data = parameter.data.to(dtype)
        for module, key, buffer in buffers:  # conversion puts new ones into their places
            module._buffers[key] = buffer


def base_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The network's state under its original names, without what students added: what identifies a frozen source.

    Quantised weights are listed as the tensors they consist of.

    Args:
        network: any network, with or without adapters.
    """
    bank, added = adapter_bank(network) or AdapterBank(), added_parts(network)
    state: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        path, _, rest = key.rpartition(".base_layer.")
        if path in bank.layers:
            key = f"{path}.{rest}"
        elif any(key.startswith(f"{layer}.lora_") for layer in bank.layers):
            continue
        if key in added:
            continue
        state |= {f"{key}.{part}" if part else key: tensor for part, tensor in plain_tensors(value).items()}
    return state
