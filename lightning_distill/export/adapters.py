"""LoRA students as files that ``pipeline.load_lora_weights`` reads.

    style      keys                                                     scale alpha / rank
    diffusers  transformer.<layer>.lora_A.weight, .lora_B.weight        multiplied into B
    kohya      lora_unet_<layer_with_underscores>.lora_down.weight, ..  .alpha beside the weights

Magnitudes (DoRA) are written with diffusers' names, <component>.<layer>.lora_magnitude_vector.weight; from the other
style diffusers drops them.
A LoRA file has no room for the sampler, so the scheduler lies beside it and the card states every argument of the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lightning_distill.export.cards import finish, student_config, text_usage
from lightning_distill.export.folders import atomic_folder, check_target, read_source, source_of, source_vae
from lightning_distill.export.pipeline import call_size, stock_student
from lightning_distill.export.stock import check_no_policy, stock_parts
from lightning_distill.export.target_times import Steps, low_rank, record_steps, stock_sampler
from lightning_distill.networks.adapter_bank import added_parts
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.second_time import SECOND_TIME, second_time_of

__all__ = ["LORA_STYLES", "export_lora", "lora_tensors"]

LORA_STYLES = ("diffusers", "kohya")

#: layers whose flattened names diffusers does not turn back
_UNREAD = ("cond_proj",)
_FILES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "lora.safetensors"}


def export_lora(
    denoiser: Denoiser,
    times: Sequence[float],
    sampler: str,
    out_dir: str | Path,
    *,
    style: Literal["diffusers", "kohya"] = "diffusers",
    source: str | Path | None = None,
    shape: Sequence[int] | None = None,
    guidance: float | None = None,
    card: Mapping[str, Any] | None = None,
    license: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapter of a LoRA student, its scheduler and a card.

    Args:
        denoiser: the student, or one of its averages.
        times: descending native times of ``denoiser.process``.
        sampler: ``renoise`` or ``ode``; ``flow_map`` of a student of two times.
        out_dir: folder to create.
        style: names of the tensors; see the top of this file.
        source: pipeline folder of the base model, for size, licence and name; None for the one the network was read
            from, if any.
        shape: of one sample, which gives the call its height, width and frames; None for the network's own.
        guidance: scale told to a network that embeds it; None for the student's.
        card: JSON values for the model card, for example ``title``.
        license: SPDX name in the card's header; None for that of the source, apache-2.0 without a source.
        dtype: floating-point type of the saved tensors, None for float32.
        overwrite: replace an earlier export in ``out_dir``.

    Returns:
        the folder.

    Raises:
        ValueError: the student is no adapter, its pipeline reads no LoRA files, the style has no place for its
            magnitudes (DoRA), it adapts a layer that the original network has not, or as ``export_pipeline``.
        FileExistsError: ``out_dir`` exists and is not to be overwritten.
    """
    if style not in LORA_STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(LORA_STYLES)}.")
    if not isinstance(denoiser, AdapterDenoiser):
        raise ValueError(
            "this student is a full network, not an adapter; export the pipeline, or train with student: Lora(...)."
        )
    if denoiser.config.use_dora and style == "kohya":
        raise ValueError(
            "this adapter also learned magnitudes (DoRA), which diffusers drops from files with kohya's names; export "
            "the LoRA file with diffusers' names, or the pipeline, whose weights hold the adapter."
        )
    if denoiser.sampling_guidance is not None:
        raise ValueError("this adapter is sampled with classifier-free guidance in two passes; export the pipeline.")
    check_no_policy(denoiser.network)
    check_target(Path(out_dir), overwrite)
    root = source_of(denoiser.network) if source is None else Path(source).expanduser()
    shape = denoiser.sample_shape if shape is None else shape
    network = _original_class(denoiser)
    if second_time_of(denoiser.network) is not None and denoiser.config.use_dora:
        raise ValueError(
            "this adapter also learned magnitudes (DoRA), which rescale what a LoRA file adds to the time embedding "
            "for the target times; export the pipeline, whose weights hold both, or train with dora=False."
        )
    given, own_times = sampler, times
    sampler = stock_sampler(denoiser, given, times)
    process, times, start = stock_student(denoiser, times)
    scale = denoiser.family.guidance_scale if guidance is None else guidance
    parts = stock_parts(
        network, process, denoiser.prediction_type, times, sampler, None, start, source=root, guidance=scale
    )
    _check_reader(parts.pipeline, parts.entry is not None and parts.entry.kohya, style)
    _check_layers(denoiser, root, parts.network_name)
    steps = record_steps(denoiser, own_times, given, shape, scale)
    config = student_config(network, process, denoiser.prediction_type, times, sampler, card, dtype)
    vae = None if root is None else source_vae(root)
    modules = {parts.network_name: network, "scheduler": parts.scheduler}
    facts = None if root is None else read_source(root)
    config |= {
        "pipeline": parts.pipeline.__name__,
        "scheduler": type(parts.scheduler).__name__,
        "component": parts.network_name,
        "call": parts.call,
        "takes_generator": parts.takes_generator,
        "size": call_size(parts, modules, vae, shape),
        "shape": None if shape is None else list(shape),
        "lora_file": _FILES[style],
        "lora_scale": 1.0,
        "lora_rank": denoiser.config.r,
        "folded": bool(steps),
    }
    dtype_name, base = config["dtype"], "BASE_MODEL" if facts is None else facts.name
    load = (
        f"from diffusers import {config['pipeline']}, {config['scheduler']}\n\n"
        f'pipe = {config["pipeline"]}.from_pretrained("{base}", torch_dtype=torch.{dtype_name})\n'
        f'pipe.scheduler = {config["scheduler"]}.from_pretrained(".", subfolder="scheduler")  # this folder\n'
        f'pipe.load_lora_weights(".", weight_name="{config["lora_file"]}")  # lora_scale 1.0'
    )
    with atomic_folder(Path(out_dir), overwrite) as folder:
        tensors = lora_tensors(denoiser, parts.network_name, style, dtype or torch.float32, steps)
        save_file(tensors, folder / config["lora_file"], metadata={"format": "pt"})
        parts.scheduler.save_pretrained(folder / "scheduler")
        usage = text_usage(config, parts, load)
        usage += " The adapter was trained at lora_scale 1.0; pipe.fuse_lora() adds it to the weights."
        finish(folder, config, usage, license, "diffusers", facts, "adapter")
    return Path(out_dir)


def lora_tensors(
    denoiser: AdapterDenoiser,
    component: str,
    style: str,
    dtype: torch.dtype = torch.float32,
    steps: Mapping[str, Steps] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a LoRA file.

    All layers have one rank, since readers take the scale of the whole file from the first: where target times need
    more than the adapter has, the others are filled up with zeros.

    Args:
        denoiser: the student.
        component: name of the network in the pipeline, ``transformer`` or ``unet``.
        style: ``diffusers`` or ``kohya``.
        dtype: of the tensors.
        steps: target times to write into the layers of the time embedding, see ``target_times.record_steps``.

    Returns:
        contiguous copies on the CPU by key.

    Raises:
        ValueError: the style has no name for a layer.
    """
    adapter, factors, magnitudes = denoiser.adapter_state_dict(), {}, {}
    for layer in dict.fromkeys(key.removesuffix(".weight").rpartition(".")[0] for key in adapter):
        scale = float(denoiser.bank.layers[layer].scaling[denoiser.adapter_name])
        a, b = (adapter[f"{layer}.{which}.weight"].detach().cpu() for which in ("lora_A", "lora_B"))
        factors[layer] = (a, b, scale)
        if denoiser.config.use_dora:
            magnitudes[layer] = adapter[f"{layer}.lora_magnitude_vector"].detach().cpu()
    if steps:
        factors = {layer: found for layer, found in factors.items() if not layer.startswith(f"{SECOND_TIME}.")}
    for layer, seen in (steps or {}).items():
        a, b = low_rank(seen)
        if layer in factors:
            own_a, own_b, scale = factors[layer]
            factors[layer] = (torch.cat([own_a, a]), torch.cat([own_b, b / scale], dim=1), scale)
        else:
            factors[layer] = (a, b, 1.0)
    if style == "kohya" and (unread := [layer for layer in factors if layer.endswith(_UNREAD)]):
        raise ValueError(
            f"diffusers reads no name with underscores for {unread[0]}, the embedding of a guidance scale; export the "
            "LoRA file with diffusers' names."
        )
    made: dict[str, Tensor] = {}
    rank = max(len(a) for a, _, _ in factors.values())
    for layer, (a, b, scale) in factors.items():
        if missing := rank - len(a):
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        if style == "diffusers":
            b = b * scale if scale != 1.0 else b
            names = {f"{component}.{layer}.lora_A.weight": a, f"{component}.{layer}.lora_B.weight": b}
            if layer in magnitudes:
                names[f"{component}.{layer}.lora_magnitude_vector.weight"] = magnitudes[layer]
        else:
            flat = f"lora_unet_{layer.replace('.', '_')}"
            names = {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
            names[f"{flat}.alpha"] = torch.tensor(scale * rank)
        made |= {key: value.to(dtype).contiguous().clone() for key, value in names.items()}
    return made


def _original_class(denoiser: AdapterDenoiser) -> Any:
    """The network without adapters and without weights, for what its class and configuration say."""
    cls: Any = type(denoiser.network)
    if not hasattr(cls, "from_config"):
        raise ValueError(
            f"{cls.__name__} has no stock diffusers pipeline to load a LoRA file into; use export_weights."
        )
    with torch.device("meta"):
        return cls.from_config(denoiser.network.config)


def _check_layers(denoiser: AdapterDenoiser, root: Path | None, component: str) -> None:
    """Refuse adapters of layers that were installed for the student: a LoRA file is loaded into the original network.

    Args:
        denoiser: the student.
        root: pipeline folder of the original network; None to ask what was installed.
        component: name of the network in the pipeline.
    """
    layers = dict.fromkeys(key.removesuffix(".weight").rpartition(".")[0] for key in denoiser.adapter_state_dict())
    # the branch of target times, which is folded into layers of the original
    own = [layer for layer in layers if not layer.startswith(f"{SECOND_TIME}.")]
    if root is not None and (root / component / "config.json").is_file():
        cls: Any = type(denoiser.network)
        with torch.device("meta"):
            original = {name for name, _ in cls.from_config(cls.load_config(root / component)).named_modules()}
        missing = [layer for layer in own if layer not in original]
    else:
        installed = {key.rpartition(".")[0] for key in added_parts(denoiser.network)}
        missing = [layer for layer in own if layer in installed]
    if missing:
        raise ValueError(
            f"this adapter also has the layer {missing[0]}, which was installed for the student and which the original "
            "network, into which a LoRA file is loaded, lacks; export the pipeline, whose weights hold both."
        )


def _check_reader(pipeline: Any, kohya: bool, style: str) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(
            f"{pipeline.__name__} of diffusers reads no LoRA files; export the pipeline, whose weights hold the "
            "adapter."
        )
    if style == "kohya" and not kohya:
        raise ValueError(
            f"{pipeline.__name__} does not read layer names of this model with underscores (kohya's scripts name other "
            "layers for it); export the LoRA file with diffusers' names."
        )
