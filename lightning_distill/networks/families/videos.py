"""Text-to-video models; samples are latents (B, C, F, H, W).

    class                           predicts           time     notes
    WanTransformer3DModel           velocity           1000 t   Wan 2.1 and 2.2
    CogVideoXTransformer3DModel     v (epsilon in 2B)  0..999   frames before channels; rotary embedding of the caller's
    LTXVideoTransformer3DModel      velocity           1000 t   a sequence of latent pixels
    HunyuanVideoTransformer3DModel  velocity           1000 t   pooled; guidance embedding of 1000 w
    AnyFlowTransformer3DModel       mean velocity      1000 t   two times, one pair per frame; frames before channels

Wan 2.2 A14B has two experts: ``transformer`` for timesteps of at least ``boundary_ratio`` (``model_index.json``, 0.875
for text-to-video) times 1000, and ``transformer_2`` below. They are two denoisers,
``PretrainedDenoiser(path, subfolder="transformer_2")`` being the second; a student of one of them stays within its side
of the boundary: its times, and the method's matching and critic times, lie in [boundary_ratio, 1] or
(0, boundary_ratio).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.families.base import ATTENTION, Family, register

__all__: list[str] = []


def _frames_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _channels_first(out: Tensor, _shape: Sequence[int]) -> Tensor:
    return out.transpose(1, 2)


register(
    Family(
        "WanTransformer3DModel",
        cond_keys=("encoder_hidden_states",),
        required=("encoder_hidden_states",),
        cond_shapes={"encoder_hidden_states": (8, "text_dim")},
        blocks=("blocks",),
        lora_targets=(*ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
        flow=True,
    )
)
register(
    Family(
        "AnyFlowTransformer3DModel",
        time_per_frame=True,
        target_time="r_timestep",
        needs_target=True,
        pack=_frames_first,
        unpack=_channels_first,
        cond_keys=("encoder_hidden_states",),
        required=("encoder_hidden_states",),
        cond_shapes={"encoder_hidden_states": (8, "text_dim")},
        blocks=("blocks",),
        lora_targets=(*ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
        flow=True,
    )
)


# ------------------------------------------------------------------------------------------------ CogVideoX
@lru_cache(maxsize=8)
def _cog_rotary(
    head: int, patch: int, patch_t: int | None, base: tuple[int, int], size: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of a latent of ``size`` (F, H, W); ``base`` is the size (H, W) that the model was trained at.

    Version 1 stretches positions to those of the training size, 1.5 cuts them out of its table.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, rows, columns = size[0], size[1] // patch, size[2] // patch
    base_rows, base_columns = base[0] // patch, base[1] // patch
    settings: dict[str, Any]
    if patch_t is not None:
        frames = (frames + patch_t - 1) // patch_t
        settings = {"crops_coords": None, "grid_type": "slice", "max_size": (base_rows, base_columns)}
    else:
        if rows / columns > base_rows / base_columns:
            fitted = (base_rows, round(base_rows / rows * columns))
        else:
            fitted = (round(base_columns / columns * rows), base_columns)
        start = (round((base_rows - fitted[0]) / 2.0), round((base_columns - fitted[1]) / 2.0))
        settings = {"crops_coords": (start, (start[0] + fitted[0], start[1] + fitted[1]))}
    # cached beyond this call, which may be in inference mode, whose tensors no graph accepts
    with torch.inference_mode(False):
        cos, sin = get_3d_rotary_pos_embed(
            embed_dim=head, grid_size=(rows, columns), temporal_size=frames, device=device, **settings
        )
    return cos, sin


def _cog_arguments(network: nn.Module, x: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
    config: Any = network.config
    if not config.use_rotary_positional_embeddings:
        return cond
    base, size = (config.sample_height, config.sample_width), (x.shape[2], x.shape[3], x.shape[4])
    rotary = _cog_rotary(config.attention_head_dim, config.patch_size, config.get("patch_size_t"), base, size, x.device)
    return {**cond, "image_rotary_emb": rotary}


def _cog_shape(network: nn.Module) -> tuple[int, ...]:
    config: Any = network.config
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    return (config.in_channels, frames, config.sample_height, config.sample_width)


register(
    Family(
        "CogVideoXTransformer3DModel",
        time_keyword="timestep",
        pack=_frames_first,
        unpack=_channels_first,
        cond_keys=("encoder_hidden_states",),
        required=("encoder_hidden_states",),
        cond_shapes={"encoder_hidden_states": ("max_text_seq_length", "text_embed_dim")},
        arguments=_cog_arguments,
        shared=("image_rotary_emb",),
        blocks=("transformer_blocks",),
        lora_targets=(*ATTENTION, "ff.net.0.proj", "ff.net.2"),
        sample_shape=_cog_shape,
    )
)


# ------------------------------------------------------------------------------------------------ LTX, HunyuanVideo
def _ltx_arguments(_network: nn.Module, x: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
    frames, height, width = x.shape[2:]
    # seconds and pixels between latents: 8 frames at 25 per second, 32 pixels
    scale = (8 / 25, 32, 32)
    mask = cond.pop("encoder_attention_mask", None)
    return {
        **cond,
        "encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": scale,
    }


register(
    Family(
        "LTXVideoTransformer3DModel",
        time_keyword="timestep",
        pack=lambda x: x.flatten(2).transpose(1, 2),
        unpack=lambda tokens, shape: tokens.transpose(1, 2).reshape(shape),
        cond_keys=("encoder_hidden_states", "encoder_attention_mask"),
        required=("encoder_hidden_states",),
        cond_shapes={"encoder_hidden_states": (8, "caption_channels"), "encoder_attention_mask": (8,)},
        arguments=_ltx_arguments,
        blocks=("transformer_blocks",),
        lora_targets=(*ATTENTION, "ff.net.0.proj", "ff.net.2"),
        flow=True,
        tokens=lambda shape: shape[1] * shape[2] * shape[3],
    )
)


def _hunyuan_guidance(network: nn.Module, w: Tensor) -> dict[str, Tensor] | None:
    config: Any = network.config
    return {"guidance": 1000.0 * w} if config.guidance_embeds else None


register(
    Family(
        "HunyuanVideoTransformer3DModel",
        cond_keys=("encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
        required=("encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
        cond_shapes={
            "encoder_hidden_states": (8, "text_embed_dim"),
            "encoder_attention_mask": (8,),
            "pooled_projections": ("pooled_projection_dim",),
        },
        guidance=_hunyuan_guidance,
        guidance_scale=6.0,
        blocks=("transformer_blocks", "single_transformer_blocks"),
        lora_targets=(*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        flow=True,
    )
)
