"""How the stock pipeline of each text-conditioned model class is called.

One entry per pipeline says what a call takes (names of the embeddings, size, guidance) and how the pipeline drives its
scheduler: which grid of times it hands over, whether the generator reaches ``scheduler.step``. Everything else, weights
and calling convention of the network, is in ``networks.families``; that a pipeline's loop computes what our sampler
computes is tested for every entry.

    pipeline                           grid of times            generator in step  guidance off
    StableDiffusion(XL), PixArt, Cog   the scheduler's          yes                guidance_scale=1.0
    SD3, Wan, Sana                     the scheduler's          Sana only          guidance_scale=1.0
    FLUX, Qwen, Lumina2, Z-Image, LTX  1, 1 - 1/N, ..., 1 / N   no                 true_cfg_scale or guidance_scale
    SanaSprint                         the scheduler's          yes                embedded
    AnyFlow                            the scheduler's          no                 guidance_scale=1.0
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.families import family_of

__all__ = [
    "ENTRIES",
    "StockPipeline",
    "entry_of",
    "from_pipeline_layout",
    "pixel_size",
    "stock_inputs",
    "to_pipeline_layout",
]

_TEXT = {"encoder_hidden_states": "prompt_embeds"}
_MASKED = {**_TEXT, "encoder_attention_mask": "prompt_attention_mask"}
_POOLED = {**_TEXT, "pooled_projections": "pooled_prompt_embeds"}


@dataclass(frozen=True)
class StockPipeline:
    """How one stock pipeline is called.

    Attributes:
        name: class of diffusers.
        model_class: class of its network.
        component: name of the network in the pipeline.
        even_grid: the pipeline hands the times 1, 1 - 1/N, ..., 1/N to its scheduler, which shifts them; else the
            scheduler spaces them itself.
        grid_argument: argument of the call with other times, ``sigmas`` or ``timesteps``; None where there is none.
        step_generator: the call's generator reaches ``scheduler.step``; else fresh noise is the global generator's.
        guidance_off: arguments that switch classifier-free guidance off.
        guided: arguments besides the scale with which a call computes  y_u + w (y_c - y_u); None where it cannot.
        fixed: further arguments of every call.
        jumps: arguments in their place with which a call tells the network the next time, as ``flow_map`` does; None
            where it cannot.
        inputs: arguments by condition.
        with_embeddings: further arguments of a call with embeddings instead of prompts.
        lists: conditions with a mask are lists of unpadded rows.
        folded: pixels per latent pixel beyond the autoencoder's factor.
        latents_first: the pipeline's own layout of starting noise where it is not ours: a permutation of (B, C, F, H,
            W); None where it is ours.
        settings: arguments of the constructor.
        kohya: diffusers reads LoRA files with flattened layer names for it.
    """

    name: str
    model_class: str
    component: str = "transformer"
    even_grid: bool = False
    grid_argument: str | None = None
    step_generator: bool = False
    guidance_off: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    guided: Mapping[str, Any] | None = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    jumps: Mapping[str, Any] | None = None
    inputs: Mapping[str, str] = field(default_factory=lambda: _TEXT)
    with_embeddings: Mapping[str, Any] = field(default_factory=dict)
    lists: bool = False
    folded: int = 1
    latents_first: tuple[int, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    kohya: bool = False

    @property
    def negative_prompt(self) -> dict[str, str]:
        """Argument of guided calls with prompts, where the pipeline does not take the empty negative prompt itself."""
        return {"negative_prompt": ""} if "true_cfg_scale" in self.guidance_off else {}


_UNBINNED = {"use_resolution_binning": False}
_NO_NEGATIVE = {"negative_prompt": None}

#: the first entry of a model class is the one used where no source folder names another
ENTRIES: tuple[StockPipeline, ...] = (
    StockPipeline(
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        component="unet",
        grid_argument="timesteps",
        step_generator=True,
        settings={"requires_safety_checker": False},
        kohya=True,
    ),
    StockPipeline(
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        component="unet",
        grid_argument="timesteps",
        step_generator=True,
        inputs={**_TEXT, "text_embeds": "pooled_prompt_embeds"},
        kohya=True,
    ),
    StockPipeline(
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        grid_argument="timesteps",
        step_generator=True,
        fixed=_UNBINNED,
        inputs=_MASKED,
        with_embeddings=_NO_NEGATIVE,
    ),
    StockPipeline(
        "PixArtAlphaPipeline",
        "PixArtTransformer2DModel",
        grid_argument="timesteps",
        step_generator=True,
        fixed=_UNBINNED,
        inputs=_MASKED,
        with_embeddings=_NO_NEGATIVE,
    ),
    StockPipeline("StableDiffusion3Pipeline", "SD3Transformer2DModel", grid_argument="sigmas", inputs=_POOLED),
    StockPipeline(
        "SanaPipeline",
        "SanaTransformer2DModel",
        grid_argument="sigmas",
        step_generator=True,
        fixed=_UNBINNED,
        inputs=_MASKED,
        with_embeddings=_NO_NEGATIVE,
    ),
    StockPipeline(
        "SanaSprintPipeline",
        "SanaTransformer2DModel",
        grid_argument="timesteps",
        step_generator=True,
        guidance_off={},
        guided=None,
        fixed=_UNBINNED,
        inputs=_MASKED,
    ),
    StockPipeline(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        even_grid=True,
        grid_argument="sigmas",
        guided={"cfg_normalization": False},
        inputs=_MASKED,
    ),
    StockPipeline(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        even_grid=True,
        grid_argument="sigmas",
        guidance_off={"guidance_scale": 0.0},
        lists=True,
        kohya=True,
    ),
    StockPipeline(
        "FluxPipeline",
        "FluxTransformer2DModel",
        even_grid=True,
        grid_argument="sigmas",
        guidance_off={"true_cfg_scale": 1.0},
        inputs=_POOLED,
    ),
    StockPipeline(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        even_grid=True,
        grid_argument="sigmas",
        guidance_off={},
        guided=None,
        folded=2,
    ),
    StockPipeline(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        even_grid=True,
        grid_argument="sigmas",
        guidance_off={"true_cfg_scale": 1.0},
        guided=None,
        inputs={**_TEXT, "encoder_attention_mask": "prompt_embeds_mask"},
        kohya=True,
    ),
    StockPipeline("WanPipeline", "WanTransformer3DModel"),
    StockPipeline(
        "AnyFlowPipeline",
        "AnyFlowTransformer3DModel",
        grid_argument="sigmas",
        fixed={"use_mean_velocity": False},
        jumps={"use_mean_velocity": True},
    ),
    StockPipeline(
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        grid_argument="timesteps",
        step_generator=True,
        latents_first=(0, 2, 1, 3, 4),
    ),
    StockPipeline("LTXPipeline", "LTXVideoTransformer3DModel", even_grid=True, inputs=_MASKED),
    StockPipeline(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        even_grid=True,
        grid_argument="sigmas",
        guidance_off={"true_cfg_scale": 1.0},
        inputs={**_MASKED, **_POOLED},
    ),
)


def entry_of(network: nn.Module, source: Path | None = None) -> StockPipeline | None:
    """The pipeline of a network: the one its source folder names, else the one its configuration tells.

    Args:
        network: a text-conditioned network of diffusers.
        source: pipeline folder that the network comes from.
    """
    names = {cls.__name__ for cls in type(network).__mro__}
    fitting = [entry for entry in ENTRIES if entry.model_class in names]
    if source is not None:
        named = json.loads((source / "model_index.json").read_text()).get("_class_name")
        if match := [entry for entry in fitting if entry.name == named]:
            return match[0]
    if len(fitting) > 1:
        config: Any = network.config
        second = {
            "UNet2DConditionModel": lambda: config.addition_embed_type == "text_time",
            "PixArtTransformer2DModel": lambda: (
                config.sample_size == 128
                if config.use_additional_conditions is None
                else config.use_additional_conditions
            ),
            "SanaTransformer2DModel": lambda: bool(config.get("guidance_embeds")),
        }[fitting[0].model_class]
        return fitting[bool(second())]
    return fitting[0] if fitting else None


def pixel_size(entry: StockPipeline, pipeline: Any, shape: Sequence[int]) -> dict[str, int]:
    """Height, width and number of frames of a call whose latent has the given shape.

    Args:
        entry: of the pipeline.
        pipeline: an instance, which knows the factors of its autoencoder.
        shape: of one sample, (C, H, W) or (C, F, H, W).
    """

    def factor(*names: str) -> int:
        return next(int(getattr(pipeline, name)) for name in names if hasattr(pipeline, name))

    space = factor("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio") * entry.folded
    size = {"height": shape[-2] * space, "width": shape[-1] * space}
    if len(shape) == 4:
        time = factor("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
        size["num_frames"] = (shape[1] - 1) * time + 1
    return size


def stock_inputs(
    entry: StockPipeline, network: nn.Module, cond: Mapping[str, Any], size: Mapping[str, int]
) -> dict[str, Any]:
    """A call's arguments for conditions under our names.

    Args:
        entry: of the pipeline.
        network: the network, for what it requires.
        cond: conditions, (B, ...).
        size: height and width of the call.

    Raises:
        ValueError: conditions that the pipeline computes itself and that differ from its own.
    """
    if missing := [key for key in family_of(network).required if key not in cond]:
        raise ValueError(f"{entry.name} needs embeddings for {missing}; pass every condition of {entry.model_class}.")
    made: dict[str, Any] = {entry.inputs[key]: value for key, value in cond.items() if key in entry.inputs}
    if entry.lists:
        mask = cond.get("encoder_attention_mask")
        rows = made["prompt_embeds"]
        made["prompt_embeds"] = (
            list(rows) if mask is None else [row[keep.bool()] for row, keep in zip(rows, mask, strict=True)]
        )
    computed = {key: cond[key] for key in ("time_ids", "resolution", "aspect_ratio") if key in cond}
    for key, value in computed.items():
        if not bool((value == value[:1]).all()):
            raise ValueError(f"{entry.name} takes one {key} for all samples of a call; make one call for each.")
    if "time_ids" in computed:
        ids = [int(v) for v in computed.pop("time_ids")[0]]
        made |= {"original_size": (ids[0], ids[1]), "crops_coords_top_left": (ids[2], ids[3])}
        made["target_size"] = (ids[4], ids[5])
    own = {"resolution": [size["height"], size["width"]], "aspect_ratio": [size["height"] / size["width"]]}
    for key, value in computed.items():
        if not torch.allclose(value[0].float().cpu(), torch.tensor(own[key]).float()):
            raise ValueError(f"{entry.name} computes {key}={own[key]} from its size, but the given one is {value[0]}.")
    if (
        unknown := set(cond)
        - set(entry.inputs)
        - {"time_ids", *own}
        - ({"encoder_attention_mask"} if entry.lists else set())
    ):
        raise ValueError(f"{entry.name} has no argument for the conditions {sorted(unknown)}.")
    return {**made, **entry.with_embeddings}


def to_pipeline_layout(entry: StockPipeline, network: nn.Module, x: Tensor) -> Tensor:
    """Samples (B, C, ...) as the pipeline returns latents: packed where it packs them."""
    pack = family_of(network).pack
    packed = x if pack is None or entry.name == "AnyFlowPipeline" else pack(x)
    return packed if isinstance(packed, Tensor) else x


def from_pipeline_layout(entry: StockPipeline, network: nn.Module, latents: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of ``to_pipeline_layout`` for samples of ``shape``, (B, C, ...)."""
    unpack = family_of(network).unpack
    if unpack is None or to_pipeline_layout(entry, network, latents.new_zeros(tuple(shape))).shape == tuple(shape):
        return latents
    return unpack(latents, shape)
