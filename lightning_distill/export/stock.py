"""Which stock diffusers pipeline and scheduler reproduce a student.

    network             process, output         sampler  pipeline                  scheduler
    UNet2DModel         VP: epsilon, sample, v  both     ConsistencyModelPipeline  LCM; DDIM, DPM-Solver or Euler
    UNet2DModel         flow: flow_prediction   both     DDPMPipeline (no labels)  FlowMatchLCM; FlowMatchEuler
    UNet2DModel         EDM: F                  renoise  ConsistencyModelPipeline  CMStochasticIterative
    DiT + VAE           VP: epsilon, sample, v  both     DiTPipeline               LCM; trailing DDIM
    DiT + VAE           flow: flow_prediction   ode      DiTPipeline               FlowMapEuler
    text to image, video  VP or flow            both     see ``entries``           see ``schedules``

Everything else is refused with what would do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from lightning_distill.export.entries import ENTRIES, StockPipeline, entry_of
from lightning_distill.export.schedules import (
    OTHERWISE,
    check_start,
    cm_scheduler,
    flow_map_scheduler,
    flow_scheduler,
    scm_scheduler,
    vp_scheduler,
)
from lightning_distill.export.two_passes import guided_call
from lightning_distill.networks.families import family_of
from lightning_distill.networks.policy_head import policy_head_of
from lightning_distill.networks.preconditioning import PreconditionedEDM
from lightning_distill.networks.second_time import second_time_of
from lightning_distill.processes import FlowMatching, NoiseProcess, VariancePreserving
from lightning_distill.times import validate_times

__all__ = ["StockParts", "check_no_policy", "check_sampler", "start_scale", "stock_parts"]


@dataclass(frozen=True)
class StockParts:
    """Stock parts that reproduce a student.

    Attributes:
        pipeline: pipeline class of diffusers.
        scheduler: scheduler whose grid is the student's times.
        call: arguments of every call, which a pipeline folder cannot store.
        network_name: component name of the network in the pipeline.
        conditional: whether a call takes class labels.
        entry: how a text-conditioned pipeline is called, None for the others.
        embeds_guidance: the network is told the guidance scale, which ``call`` states.
        guided: calls are guided in two passes by the scale that ``call`` states.
    """

    pipeline: type
    scheduler: Any
    call: dict[str, Any]
    network_name: str
    conditional: bool = False
    entry: StockPipeline | None = None
    embeds_guidance: bool = False
    guided: bool = False

    @property
    def takes_generator(self) -> bool:
        """False where the generator reaches the starting noise only and the global seed drives all draws."""
        if self.entry is not None:
            return self.entry.step_generator
        return self.pipeline is not diffusers.DiTPipeline


def check_no_policy(network: nn.Module) -> None:
    """Refuse networks that put out a policy.

    Raises:
        ValueError: a policy head was added.
    """
    if policy_head_of(network) is not None:
        raise ValueError(
            f"this {type(network).__name__} puts out a policy for each of its steps (networks.policy_head), and no "
            f"stock pipeline can sample it. {OTHERWISE}"
        )


def check_sampler(sampler: str, network: nn.Module) -> None:
    """Refuse samplers that no stock scheduler has.

    Args:
        sampler: of the student.
        network: the student's.

    Raises:
        ValueError: neither ``renoise`` nor ``ode``, nor ``flow_map`` of a network whose pipeline tells it two times.
    """
    jumps = any(entry.jumps for entry in ENTRIES if entry.model_class == type(network).__name__)
    if sampler not in ("renoise", "ode") and not (sampler == "flow_map" and jumps):
        remedy = ""
        if sampler == "adams":
            remedy = (
                " Learned coefficients have no place in any of them: train with coefficients='none', whose times have, "
                "or keep the run and sample it with 'lightning-distill sample RUN_DIR'."
            )
        raise ValueError(
            f"sampler={sampler!r} cannot be exported; stock schedulers exist for 'renoise', 'ode', and "
            f"'flow_map' of networks that are told where a step ends (TwoTime).{remedy}"
        )


def _check_unaltered(network: nn.Module) -> None:
    check_no_policy(network)
    if second_time_of(network) is not None:
        raise ValueError(
            f"this {type(network).__name__} was given a further input (networks.second_time), which no stock pipeline "
            "fills; export_denoiser and export_lora write it into the weights, for the times of the student."
        )


def stock_parts(
    network: nn.Module,
    process: NoiseProcess,
    prediction_type: str,
    times: list[float],
    sampler: str,
    vae: Any | None,
    given_start: float | None,
    *,
    source: Path | None = None,
    guidance: float | None = None,
    guidance_scale: float = 1.0,
    null_class: int | None = None,
) -> StockParts:
    """Choose the pipeline and scheduler of a student.

    Args:
        network: the student's network.
        process: noise process of the network.
        prediction_type: what the network outputs.
        times: the student's descending native times, without the final 0.
        sampler: ``renoise`` or ``ode``; ``flow_map`` where the pipeline tells its network the next time.
        vae: autoencoder of a latent DiT, else None.
        given_start: factor on the starting noise, None to ask the process.
        source: pipeline folder that the network comes from.
        guidance: scale told to a network that embeds it, None for its family's.
        guidance_scale: w of classifier-free guidance in two passes, 1 for none.
        null_class: label that means "no class".

    Raises:
        ValueError: nothing in diffusers reproduces this student; the message says what would do.
    """
    validate_times(times, process)
    name = type(network).__name__
    _check_unaltered(network)
    check_sampler(sampler, network)
    entry = entry_of(network, source)
    if entry is None and not isinstance(network, (UNet2DModel, DiTTransformer2DModel)):
        known = ", ".join(dict.fromkeys(entry.model_class for entry in ENTRIES))
        raise ValueError(
            f"{name} has no stock diffusers pipeline; pipelines are written for UNet2DModel, "
            f"DiTTransformer2DModel, {known}. {OTHERWISE}"
        )
    if any("lora_" in key for key, _ in network.named_parameters()):
        raise ValueError(f"this {name} still carries adapters; pass the role to export_denoiser, which merges them.")
    if entry is None:
        _check_unconditional_parts(network, name, vae)
    cls = _pipeline(network, entry, process)
    guided = {} if guidance_scale == 1.0 else guided_call(entry, cls.__name__, guidance_scale, null_class)
    fresh_noise = sampler == "renoise" and len(times) > 1
    start = start_scale(process, times[0]) if given_start is None else given_start
    if isinstance(process, VariancePreserving):
        grid = cls is diffusers.ConsistencyModelPipeline or (entry is not None and entry.grid_argument == "timesteps")
        scheduler, extra = vp_scheduler(
            process,
            prediction_type,
            times,
            fresh_noise,
            start,
            scales_start=not isinstance(network, DiTTransformer2DModel),
            grid_argument=grid,
        )
    elif isinstance(process, FlowMatching):
        if prediction_type != "flow_prediction":
            raise ValueError(f"stock flow-matching schedulers read flow_prediction, not {prediction_type}; {OTHERWISE}")
        check_start(start, "flow-matching schedulers")
        scheduler, extra = _flow(network, name, entry, times, fresh_noise)
    elif isinstance(process, PreconditionedEDM) and isinstance(network, UNet2DModel):
        scheduler, extra = cm_scheduler(process, times, fresh_noise, start)
    else:
        raise ValueError(
            f"no stock pipeline samples a {name} in {type(process).__name__}; a network that itself works in "
            "VariancePreserving or FlowMatching (Denoiser's network_process), or a UNet2DModel behind EDM's "
            f"preconditioning, can be exported. {OTHERWISE}"
        )
    call: dict[str, Any] = {"num_inference_steps": len(times)}
    if entry is not None:
        if entry.component == "unet":  # Stable Diffusion's constructor insists on it; unused by these spacings
            scheduler.register_to_config(steps_offset=1)
        family = family_of(network)
        embeds = family.guidance is not None and family.guidance(network, torch.ones(1)) is not None
        fixed = (entry.jumps or {}) if sampler == "flow_map" else entry.fixed
        call |= {**extra, **entry.guidance_off, **fixed, **guided}
        if embeds:
            call["guidance_scale"] = family.guidance_scale if guidance is None else guidance
        return StockParts(
            cls, scheduler, call, entry.component, entry=entry, embeds_guidance=embeds, guided=bool(guided)
        )
    if isinstance(network, DiTTransformer2DModel):
        call |= {"guidance_scale": 1.0, **guided}
        return StockParts(cls, scheduler, call, "transformer", True, guided=bool(guided))
    config: Any = network.config
    return StockParts(cls, scheduler, extra or call, "unet", config.num_class_embeds is not None)


def _pipeline(network: nn.Module, entry: StockPipeline | None, process: NoiseProcess) -> Any:
    if entry is not None:
        return getattr(diffusers, entry.name)
    if isinstance(network, DiTTransformer2DModel):
        return diffusers.DiTPipeline
    told = isinstance(process, (VariancePreserving, PreconditionedEDM))
    return diffusers.ConsistencyModelPipeline if told else diffusers.DDPMPipeline


def start_scale(process: NoiseProcess, t: float) -> float:
    """Factor on the unit noise from which a student starts at native time ``t``."""
    return process.prior_std(t)


def _check_unconditional_parts(network: Any, name: str, vae: Any | None) -> None:
    is_dit, settings = isinstance(network, DiTTransformer2DModel), network.config
    if is_dit and vae is None:
        raise ValueError(
            f"DiTPipeline decodes latents, so a {name} is exported with its autoencoder: pass "
            f"vae=AutoencoderKL(...). For a transformer in pixel space, {OTHERWISE}"
        )
    if not is_dit and vae is not None:
        raise ValueError(f"the stock pipelines of {name} have no autoencoder; leave out vae=. {OTHERWISE}")
    if vae is not None and vae.config.latent_channels != settings.in_channels:
        raise ValueError(
            f"the autoencoder has {vae.config.latent_channels} latent channels and the {name} "
            f"{settings.in_channels}; pass the autoencoder of the teacher."
        )
    if not isinstance(settings.sample_size, int):
        raise ValueError(
            f"the stock pipelines of {name} sample squares, but sample_size is {settings.sample_size}; {OTHERWISE}"
        )


def _flow(
    network: Any, name: str, entry: StockPipeline | None, times: list[float], fresh_noise: bool
) -> tuple[Any, dict[str, Any]]:
    if entry is not None and entry.name == "SanaSprintPipeline":
        return scm_scheduler(times, fresh_noise)
    if entry is not None:
        grid = entry.grid_argument == "sigmas"
        return flow_scheduler(times, fresh_noise, even=entry.even_grid, grid_argument=grid)
    if not isinstance(network, DiTTransformer2DModel):
        if network.config.num_class_embeds is not None:
            raise ValueError(
                f"no stock pipeline gives class labels to a flow-matching {name} (DDPMPipeline has none, and "
                "ConsistencyModelPipeline cannot drive flow-matching schedulers); use a variance-preserving "
                f"process or a DiT. {OTHERWISE}"
            )
        return flow_scheduler(times, fresh_noise)
    if fresh_noise:
        raise ValueError(
            "no stock flow-matching scheduler with fresh noise runs in DiTPipeline; train the student "
            f"with one step or with sampler='ode'. {OTHERWISE}"
        )
    return flow_map_scheduler(times)
