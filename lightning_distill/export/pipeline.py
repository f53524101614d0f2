"""Student -> a folder that stock diffusers loads and samples exactly as we do, without any code of ours.

``DiffusionPipeline.from_pretrained(folder)`` restores the network and a scheduler whose settings are the student's
sampler; what a scheduler cannot store (steps, size, guidance off) stands in the model card.

``stock.stock_parts`` chooses the parts and refuses what no stock pipeline samples; ``export_weights`` writes
the weights and the card of every network.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_model
from torch import Tensor, nn

from lightning_distill.export.cards import (
    combine_usage,
    finish,
    pipeline_usage,
    student_config,
    text_usage,
    weights_usage,
)
from lightning_distill.export.entries import pixel_size
from lightning_distill.export.folders import (
    atomic_folder,
    check_target,
    copy_components,
    drop_local_paths,
    read_source,
    source_of,
    source_vae,
)
from lightning_distill.export.schedules import OTHERWISE
from lightning_distill.export.stock import StockParts, check_no_policy, check_sampler, start_scale, stock_parts
from lightning_distill.export.stock_run import quiet
from lightning_distill.export.target_times import fold_into, record_steps, stock_sampler
from lightning_distill.export.two_passes import constant_scale, null_values, write_null
from lightning_distill.guidance import is_told
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import family_of
from lightning_distill.networks.preconditioning import PreconditionedEDM
from lightning_distill.processes import EDM, NoiseProcess, change_process
from lightning_distill.times import validate_times

#: of stock flow-matching schedulers, in which a boundary between experts is counted
TIMESTEPS = 1000.0

__all__ = ["empty_pipeline", "export_denoiser", "export_pipeline", "export_weights", "stock_student"]


def export_pipeline(
    network: nn.Module,
    process: NoiseProcess,
    prediction_type: str,
    times: Sequence[float],
    sampler: str,
    out_dir: str | Path,
    *,
    vae: nn.Module | None = None,
    null_class: int | None = None,
    start_scale: float | None = None,
    source: str | Path | None = None,
    shape: Sequence[int] | None = None,
    guidance: float | None = None,
    guidance_scale: float = 1.0,
    null_cond: Mapping[str, Tensor | float] | None = None,
    second: nn.Module | None = None,
    boundary_ratio: float | None = None,
    folded: bool = False,
    card: Mapping[str, Any] | None = None,
    license: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a student as a pipeline folder for stock diffusers.

    The folder appears at once when everything is written; an interrupted export leaves nothing behind. Text encoders,
    tokenizers and the autoencoder are copied from the teacher's pipeline; without one the folder holds network and
    scheduler, and its card says how they are combined with a base model.

    Args:
        network: the student's network without adapters: a class that ``stock`` lists.
        process: noise process of the network.
        prediction_type: what the network outputs.
        times: the student's descending native times, without the final 0.
        sampler: ``renoise`` or ``ode``.
        out_dir: folder to create.
        vae: the decoder of a latent DiT.
        null_class: label that means "no class", named in the card.
        start_scale: factor on the unit noise that the student starts from; None asks ``process.prior``.
        source: pipeline folder of the teacher; None for the one the network was read from, if any.
        shape: of one sample, which gives the call its height, width and frames; None for the network's own.
        guidance: scale told to a network that embeds it; None for its family's.
        guidance_scale: w of classifier-free guidance in two passes, with which the student is sampled; 1 for none.
        null_cond: what stands for "no condition" there, see ``two_passes.null_values``; the rows are written beside the
            network.
        second: the low-noise expert of a Wan 2.2 student, sampled below the boundary.
        boundary_ratio: time in (0, 1) from which on ``network`` is sampled rather than ``second``.
        folded: target times are part of the weights (``target_times``), which the card then says.
        card: JSON values for the model card, for example ``title``, ``teacher``, ``teacher_sha256``.
        license: SPDX name in the card's header; None for that of the source, apache-2.0 without a source.
        dtype: floating-point type of the saved weights, None for float32.
        overwrite: replace an earlier export in ``out_dir``.

    Returns:
        the folder.

    Raises:
        ValueError: no stock pipeline reproduces this student; the message says which times or parts would do.
        FileExistsError: ``out_dir`` exists and is not to be overwritten.
    """
    times = [float(t) for t in times]
    check_target(Path(out_dir), overwrite)
    root = source_of(network) if source is None else Path(source).expanduser()
    facts = None if root is None else read_source(root)
    known_vae = vae if vae is not None or root is None else source_vae(root)
    parts = stock_parts(
        network,
        process,
        prediction_type,
        times,
        sampler,
        known_vae if isinstance(network, DiTTransformer2DModel) else vae,
        start_scale,
        source=root,
        guidance=guidance,
        guidance_scale=guidance_scale,
        null_class=null_class,
    )
    network = _cast(network, dtype)
    modules: dict[str, Any] = {parts.network_name: network, "scheduler": parts.scheduler}
    if vae is not None:
        modules["vae"] = _cast(vae, dtype)
    if second is not None or boundary_ratio is not None:
        modules |= _experts(network, second, boundary_ratio, dtype)
    config = student_config(network, process, prediction_type, times, sampler, card, dtype)
    config |= {
        "pipeline": parts.pipeline.__name__,
        "scheduler": type(parts.scheduler).__name__,
        "component": parts.network_name,
        "call": parts.call,
        "conditional": parts.conditional,
        "null_class": null_class,
        "takes_generator": parts.takes_generator,
        "size": call_size(parts, modules, known_vae, shape),
        "shape": None if shape is None else list(shape),
        "folded": folded,
    }
    with atomic_folder(Path(out_dir), overwrite) as folder:
        with quiet():
            empty_pipeline(parts, modules).save_pretrained(folder, safe_serialization=True)
        drop_local_paths(folder)
        if root is not None:
            copy_components(root, folder)
        if parts.guided:
            config["guidance_scale"] = guidance_scale
        if parts.guided and parts.entry is not None:
            config["null_cond"] = write_null(folder, null_cond or {})
        if parts.entry is None:
            usage = pipeline_usage(config, network, null_class)
        else:
            usage = text_usage(config, parts, combine_usage(config, parts, facts is not None))
        finish(folder, config, usage, license, "diffusers", facts, "finetune")
    return Path(out_dir)


def export_denoiser(
    denoiser: Denoiser, times: Sequence[float], sampler: str, out_dir: str | Path, **options: Any
) -> Path:
    """``export_pipeline`` of a role: adapters are merged, times are brought into the network's own process.

    Target times of a student of two times become part of its weights (``target_times``).

    Args:
        denoiser: the student, or one of its averages.
        times: descending native times of ``denoiser.process``.
        sampler: ``renoise`` or ``ode``; ``flow_map`` of a student of two times.
        out_dir: folder to create.
        options: keyword arguments of ``export_pipeline``; ``second`` is a denoiser here.

    Raises:
        ValueError: as ``export_pipeline``; or the network sees rescaled data, which no scheduler undoes.
    """
    from lightning_distill.networks.experts import ExpertNetwork
    from lightning_distill.networks.merging import merged_network

    if isinstance(denoiser.network, ExpertNetwork):
        denoiser, options["second"], options["boundary_ratio"] = _switched(denoiser)
    check_no_policy(denoiser.network)
    kind = stock_sampler(denoiser, sampler, times)
    check_sampler(kind, denoiser.network)
    check_target(Path(out_dir), options.get("overwrite", False))
    process, stock_times, start = stock_student(denoiser, times)
    options.setdefault("null_class", denoiser.null_class)
    options.setdefault("guidance", denoiser.family.guidance_scale)
    options.setdefault("shape", denoiser.sample_shape)
    if denoiser.sampling_guidance is not None:
        scale = constant_scale(denoiser.sampling_guidance, times)
        options |= {"guidance": scale} if is_told(denoiser) else {"guidance_scale": scale}
        options.setdefault("null_cond", null_values(denoiser))

    def folded(role: Denoiser) -> nn.Module:
        steps = record_steps(role, times, sampler, options["shape"], options["guidance"])
        options["folded"] = options.get("folded", False) or bool(steps)
        merged = merged_network(role, widened=True)
        fold_into(merged, steps)
        return merged

    if isinstance(options.get("second"), Denoiser):
        options["second"] = folded(options["second"])
    network = folded(denoiser)
    options.setdefault("start_scale", start)
    return export_pipeline(network, process, denoiser.prediction_type, stock_times, kind, out_dir, **options)


def stock_student(denoiser: Denoiser, times: Sequence[float]) -> tuple[NoiseProcess, list[float], float]:
    """A student as a stock scheduler sees it: the network's own process, times in it, factor on the starting noise.

    Args:
        denoiser: the student.
        times: descending native times of ``denoiser.process``.

    Raises:
        ValueError: the network sees rescaled data, which no scheduler undoes.
    """
    if not denoiser.stands_alone:
        raise ValueError(
            f"the predictions of this {type(denoiser.network).__name__} student need more than its network, and no "
            "stock pipeline has the rest (adapters beside it, a rendering to leap from); keep the run and sample it "
            "with 'lightning-distill sample RUN_DIR'."
        )
    process, start = denoiser.process, start_scale(denoiser.process, times[0])
    if denoiser.network_process is None:
        return process, list(times), start
    if isinstance(inner_process := denoiser.network_process, PreconditionedEDM) and type(process) is EDM:
        if denoiser.family.sign != -1.0:
            raise ValueError(
                "the network puts out a v-prediction behind EDM's preconditioning, and the stock pipeline reads EDM's "
                f"F, which has the other sign. {OTHERWISE}"
            )
        return inner_process, list(times), start
    if denoiser.data_scale != 1.0:
        raise ValueError(
            f"the student's network works on data divided by {denoiser.data_scale:g}, which no stock "
            "scheduler multiplies back; train on data of unit standard deviation, or use export_weights."
        )
    inner, factor = change_process(torch.tensor(list(times), dtype=torch.float64), process, denoiser.network_process)
    return denoiser.network_process, inner.tolist(), start * float(factor[0])


def export_weights(
    network: nn.Module,
    process: NoiseProcess,
    prediction_type: str,
    times: Sequence[float],
    sampler: str,
    out_dir: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    license: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write any student's weights (``model.safetensors``), settings and card.

    Loading them needs the network's class. Arguments and atomicity are those of ``export_pipeline``; every
    process, sampler and valid time list is accepted.
    """
    times = [float(t) for t in times]
    validate_times(times, process)
    network = _cast(network, dtype)
    config = student_config(network, process, prediction_type, times, sampler, card, dtype)
    with atomic_folder(Path(out_dir), overwrite) as folder:
        save_model(network, str(folder / "model.safetensors"))
        finish(folder, config, weights_usage(config), license, "lightning-distill")
    return Path(out_dir)


# ------------------------------------------------------------------------------------------------ parts
def empty_pipeline(parts: StockParts, modules: Mapping[str, Any]) -> Any:
    """The stock pipeline with the given components and without every other."""
    parameters = inspect.signature(parts.pipeline).parameters
    needed = {name: None for name, p in parameters.items() if p.default is p.empty}
    settings = {} if parts.entry is None else parts.entry.settings
    pipeline = parts.pipeline(**{**needed, **settings, **modules})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_size(
    parts: StockParts, modules: Mapping[str, Any], vae: Any | None, shape: Sequence[int] | None
) -> dict[str, int]:
    """Height, width and frames of a call; empty where the shape is unknown or the pipeline has no such arguments.

    Args:
        parts: of the export.
        modules: network and scheduler.
        vae: autoencoder, with or without weights; None for the family's usual factors.
        shape: of one sample; None to ask the network.
    """
    network = modules[parts.network_name]
    shape = family_of(network).sample_shape(network) if shape is None else shape
    if parts.entry is None or shape is None:
        return {}
    return pixel_size(parts.entry, empty_pipeline(parts, {**modules, "vae": vae}), shape)


def _switched(denoiser: Denoiser) -> tuple[Denoiser, Denoiser, float]:
    """High-noise expert, low-noise expert and the time between them in (0, 1)."""
    from lightning_distill.networks.experts import TimeExperts, single_experts

    experts, network = single_experts(denoiser), denoiser.network
    if not isinstance(network, TimeExperts) or len(experts) != 2 or not network.rising:
        raise ValueError(
            f"a stock pipeline switches between two experts by time, not between {len(experts)} in a "
            f"{type(network).__name__}; export each of networks.experts.single_experts(denoiser) by itself."
        )
    return experts[0], experts[1], float(network.boundaries[0]) / TIMESTEPS


def _experts(
    network: nn.Module, second: nn.Module | None, boundary_ratio: float | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    if second is None or boundary_ratio is None or not 0.0 < boundary_ratio < 1.0:
        raise ValueError(
            f"a student of two experts needs second=... and boundary_ratio=... in (0, 1), got boundary_ratio="
            f"{boundary_ratio} and {'no second' if second is None else 'a second network'}."
        )
    if type(network).__name__ != "WanTransformer3DModel" or type(second) is not type(network):
        raise ValueError(
            f"only WanPipeline switches between two experts, not one of {type(network).__name__} and "
            f"{type(second).__name__}; export them one by one."
        )
    return {"transformer_2": _cast(second, dtype), "boundary_ratio": boundary_ratio}


def _cast(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    dtype = dtype or torch.float32
    if all(p.dtype == dtype for p in network.parameters()):
        return network
    return nn.Module.to(copy.deepcopy(network), dtype)  # past diffusers' own, which warns
