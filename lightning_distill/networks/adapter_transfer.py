"""Adapters carried from one model to another of the same architecture, such as teacher to student (arXiv:2503.10637).

Distillation moves weights little, so a low-rank change learned on the teacher (a style, a concept slider) means the
same to the student: W' = W + scale (alpha / rank) B A, layer by layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import AdapterDenoiser, adapter_bank

__all__ = ["adapter_changes", "transfer_adapter"]

_PREFIXES = ("transformer.", "unet.", "adapter.")
_MAGNITUDES = (
    "this adapter also learned magnitudes (DoRA), so its change depends on the weights it was learned on and cannot be "
    "carried over; train a plain LoRA (dora=False)."
)


def adapter_changes(source: AdapterDenoiser | Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """Change of every layer's weight, (out, in) or a convolution's shape, by the layer's name.

    Args:
        source: adapter role; or a LoRA file of diffusers (or its tensors), ``<layer>.lora_A.weight`` and ``lora_B``,
            with ``<layer>.alpha``, or the configuration in the file's header, where the scale is not 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: tensors that belong to no adapter, or magnitudes (DoRA), whose change depends on the weights.
    """
    header: dict[str, Any] = {}
    if isinstance(source, AdapterDenoiser):
        if source.config.use_dora:
            raise ValueError(_MAGNITUDES)
        layers = source.bank.layers.items()
        name = source.adapter_name
        return {path: layer.get_delta_weight(name).detach() for path, layer in layers if name in layer.lora_A}
    if not isinstance(source, Mapping):
        file = Path(source).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; give the safetensors file of an adapter.")
        source, header = load_file(file), _header(file)
    tensors = {_without_prefix(key): value for key, value in source.items()}
    if any("lora_magnitude_vector" in key or key.endswith(".dora_scale") for key in tensors):
        raise ValueError(_MAGNITUDES)
    changes = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removesuffix(".lora_A.weight")
        up = tensors.get(f"{path}.lora_B.weight")
        if up is None:
            raise ValueError(f"the adapter has {key} but no {path}.lora_B.weight; give a complete file.")
        if f"{path}.alpha" in tensors:
            scale = float(tensors[f"{path}.alpha"]) / len(down)
        else:
            scale = _header_scale(header, path, len(down))
        # a convolution's B is 1 x 1, so its product is the one of the flattened kernels
        change = up.flatten(1).float() @ down.flatten(1).float()
        changes[path] = scale * change.view(len(up), *down.shape[1:])
    if not changes:
        raise ValueError("no layer of a low-rank adapter (<layer>.lora_A.weight) is among the tensors.")
    return changes


def _header(file: Path) -> dict[str, Any]:
    """The adapter's configuration that diffusers writes into the header of a LoRA file; empty where there is none."""
    with safe_open(file, "pt") as opened:
        entry = (opened.metadata() or {}).get("lora_adapter_metadata")
    return {} if entry is None else {_without_prefix(key): value for key, value in json.loads(entry).items()}


def _header_scale(header: Mapping[str, Any], path: str, rank: int) -> float:
    """By a configuration of peft alpha / rank of a layer, or alpha / sqrt(rank) (rsLoRA); 1 without one."""
    if "lora_alpha" not in header:
        return 1.0
    pattern = header.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), path), header["lora_alpha"]))
    return alpha / (rank**0.5 if header.get("use_rslora") else rank)


def _without_prefix(key: str) -> str:
    return next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)


@torch.no_grad()
def transfer_adapter(
    source: AdapterDenoiser | Mapping[str, Tensor] | str | Path, target: Denoiser, scale: float = 1.0
) -> list[str]:
    """Add an adapter to the weights of another model, in place.

    Args:
        source: see ``adapter_changes``.
        target: model that gets the change; a negative ``scale`` afterwards takes it away again, up to rounding.
        scale: strength; 1 is that of the source.

    Returns:
        names of the changed layers.

    Raises:
        ValueError: the target lacks a layer, has another shape there, or is itself an adapter on shared weights;
            nothing has been changed then.
    """
    if isinstance(target, AdapterDenoiser) or adapter_bank(target.network) is not None:
        raise ValueError(
            "the target shares its weights with other roles, which would change too; transfer to a model of its own "
            "(merged_network of the role, or an exported pipeline)."
        )
    changes = adapter_changes(source)
    name = type(target.network).__name__
    layers = dict(target.network.named_modules())
    for path, change in changes.items():
        weight = getattr(layers.get(path), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"the adapter changes {path}, which {name} does not have; use one of the same architecture."
            )
        if weight.shape != change.shape:
            raise ValueError(
                f"the adapter changes {path} of shape {tuple(change.shape)}, and {name} has {tuple(weight.shape)} "
                "there; use an adapter of the same architecture and size."
            )
    for path, change in changes.items():
        weight = layers[path].weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.float() + scale * change.to(weight.device, torch.float32))
    return list(changes)
