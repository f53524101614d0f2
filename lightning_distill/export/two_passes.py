"""Students that stock pipelines guide in two passes: the scale, and what stands for "no condition".

    pipeline                argument          its scale    besides
    most                    guidance_scale    w
    FLUX, HunyuanVideo      true_cfg_scale    w            a negative prompt, without which it is not guided
    Z-Image                 guidance_scale    w - 1
    Lumina2                 guidance_scale    w            cfg_normalization=False
    DiTPipeline             guidance_scale    w            the label 1000 for "no class"

Nothing else guides exactly: Qwen-Image rescales, FLUX.2 and Sana-Sprint are told a scale, and pipelines of UNet2DModel
have one pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_distill.export.entries import StockPipeline, stock_inputs
from lightning_distill.export.folders import CONFIG
from lightning_distill.guidance import Guidance
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import family_of
from lightning_distill.networks.null_conditions import NullConditions, with_null
from lightning_distill.networks.sources import NULL_FILE

__all__ = ["constant_scale", "guided_call", "negative_inputs", "null_values", "write_null"]

#: label that DiTPipeline gives to the pass without a class, whatever the network
DIT_NULL = 1000
_KEEP = "keep the run and sample it with 'lightning-distill sample RUN_DIR'"


def constant_scale(policy: Guidance | None, times: Sequence[float]) -> float:
    """The one scale w by which a student is guided in all of its steps; 1 where it is not.

    Args:
        policy: by which it is sampled, None for none.
        times: its native times.

    Raises:
        ValueError: the scale changes on the way, which stock pipelines do not do.
    """
    if policy is None:
        return 1.0
    t = torch.tensor(list(times), dtype=torch.float64)
    found = torch.as_tensor(policy.scales(t, torch.full_like(t, 0.5)), dtype=torch.float64).expand(len(t))
    if bool((found != found[0]).any()):
        raise ValueError(
            f"the guidance scale of this student's steps is {[round(w, 3) for w in found.tolist()]}, and stock "
            f"pipelines guide every step by one; train it with Guidance(scale), or {_KEEP}."
        )
    return float(found[0])


def guided_call(entry: StockPipeline | None, pipeline: str, scale: float, null_class: int | None) -> dict[str, Any]:
    """Arguments of a call that is guided by a scale in two passes.

    Args:
        entry: of a text-conditioned pipeline, None for the others.
        pipeline: its class.
        scale: w.
        null_class: label that means "no class".

    Raises:
        ValueError: the pipeline does not compute  y_u + w (y_c - y_u)  for this scale.
    """
    if pipeline != "DiTPipeline" and (entry is None or entry.guided is None):
        raise ValueError(
            f"{pipeline} of diffusers does not guide as this student is guided, in two passes by a scale of {scale:g}; "
            f"distil the guidance first (GuidanceDistillation), train with Guidance(1), or {_KEEP}."
        )
    if scale < 1.0:
        raise ValueError(
            f"the student is guided by a scale of {scale:g}, but stock pipelines guide above 1 only; train it with a "
            f"larger scale, or {_KEEP}."
        )
    if entry is None:
        if null_class != DIT_NULL:
            raise ValueError(
                f"DiTPipeline takes the label {DIT_NULL} for no class, but the null class of this network is "
                f"{null_class}; distil the guidance first (GuidanceDistillation), or {_KEEP}."
            )
        return {"guidance_scale": scale}
    (name, off), *_ = entry.guidance_off.items()
    return {name: round(scale - (1.0 - off), 9), **(entry.guided or {})}


def null_values(denoiser: Denoiser) -> dict[str, Tensor | float]:
    """What stands for "no condition" in a text-conditioned denoiser, by condition: a row (1, ...) or a number."""
    found = {key: denoiser._null_value(key) for key in denoiser.family.null if key != "class_labels"}
    return {key: value for key, value in found.items() if value is not None and not isinstance(value, str)}


def write_null(folder: Path, values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Write the rows of ``null_values`` beside an export as ``null_cond.safetensors``; the numbers are returned."""
    rows = {key: value.detach().cpu().contiguous() for key, value in values.items() if isinstance(value, Tensor)}
    if rows:
        save_file(rows, folder / NULL_FILE)
    return {key: float(value) for key, value in values.items() if not isinstance(value, Tensor)}


class _Nulls(NullConditions):
    def __init__(self, network: nn.Module, values: Mapping[str, Tensor | float]) -> None:
        self.network, self.null_class = network, None
        self.family = with_null(family_of(network), values, None)


def negative_inputs(
    folder: Path, entry: StockPipeline, network: nn.Module, cond: Mapping[str, Any], size: Mapping[str, int]
) -> dict[str, Any]:
    """A call's arguments for the pass without conditions; none where the export is not guided in two passes.

    Args:
        folder: the export.
        entry: of its pipeline.
        network: of its class, with or without weights.
        cond: conditions of the call under our names, (B, ...).
        size: height and width of the call.
    """
    numbers = json.loads((folder / CONFIG).read_text()).get("null_cond")
    if numbers is None:
        return {}
    file = folder / NULL_FILE
    values = {**numbers, **(load_file(file) if file.is_file() else {})}
    made = stock_inputs(entry, network, _Nulls(network, values).null_cond(cond), size)
    return {f"negative_{name}": made[name] for name in entry.inputs.values() if name in made}
