"""Text-to-image models whose input is the latent image itself.

    class                      predicts           time           text
    UNet2DConditionModel       epsilon, v         0..999         tokens; SDXL: also text_embeds and time_ids
    PixArtTransformer2DModel   epsilon (+ sigma)  0..999         tokens, mask; alpha: also resolution, aspect_ratio
    SD3Transformer2DModel      velocity           1000 t         tokens, pooled
    SanaTransformer2DModel     velocity           1000 t         tokens, mask
    - with guidance embedding  velocity           t              idem; Sana-Sprint
    Lumina2Transformer2DModel  minus velocity     1 - t          tokens, mask
    ZImageTransformer2DModel   minus velocity     1 - t          tokens, mask; lists of tensors

Sana-Sprint samples in TrigFlow, but its network is a flow-matching one: with s = sin t / (sin t + cos t) the sample
x / (sin t + cos t) = (1 - s) x0 + s eps is what it sees, s is its time, and eps - x0 is what it predicts. Hence it is
``Denoiser(network, TrigFlow(), "flow_prediction", network_process=FlowMatching(), data_scale=1.0)`` on latents of the
scale that the VAE decodes; the pipeline's own factor sigma_data cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.families.base import ATTENTION, SAME, Family, image_shape, register

__all__: list[str] = []

_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


# ------------------------------------------------------------------------------------------------ Stable Diffusion
def _zeros_of_sdxl(network: nn.Module) -> float | None:
    """SDXL drops its text to zeros; SD 1 and 2 to the embedding of the empty prompt, which only the caller has."""
    config: Any = network.config
    return 0.0 if config.addition_embed_type == "text_time" else None


def _unet_shapes(network: nn.Module) -> dict[str, tuple[int | str, ...]]:
    config: Any = network.config
    width = config.encoder_hid_dim or config.cross_attention_dim
    shapes: dict[str, tuple[int | str, ...]] = {
        "encoder_hidden_states": (8, width if isinstance(width, int) else width[0])
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes |= {"text_embeds": (pooled,), "time_ids": (6,)}
    return shapes


def _unet_arguments(_network: nn.Module, _x: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
    added = {key: cond.pop(key) for key in ("text_embeds", "time_ids") if key in cond}
    return {**cond, "added_cond_kwargs": added} if added else cond


def _unet_guidance(network: nn.Module, w: Tensor) -> dict[str, Tensor] | None:
    """Sinusoidal embedding of 1000 (w - 1), as in latent consistency models (arXiv:2310.04378)."""
    config: Any = network.config
    if config.time_cond_proj_dim is None:
        return None
    half = config.time_cond_proj_dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * -(torch.tensor(1e4).log().item() / (half - 1)))
    angles = 1000.0 * (w - 1.0)[:, None] * frequencies
    dtype = network.time_embedding.cond_proj.weight.dtype  # type: ignore[union-attr]
    return {"timestep_cond": torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)}  # type: ignore[arg-type]


register(
    Family(
        "UNet2DConditionModel",
        cond_keys=("encoder_hidden_states", "encoder_attention_mask", "text_embeds", "time_ids", "class_labels"),
        required=("encoder_hidden_states",),
        cond_shapes=_unet_shapes,
        arguments=_unet_arguments,
        null={"encoder_hidden_states": _zeros_of_sdxl, "text_embeds": _zeros_of_sdxl, "time_ids": SAME},
        guidance=_unet_guidance,
        guidance_scale=8.5,
        blocks=("down_blocks", "mid_block", "up_blocks"),
        lora_targets=(
            *ATTENTION,
            *_FEED_FORWARD,
            "proj_in",
            "proj_out",
            "conv1",
            "conv2",
            "conv_shortcut",
            "downsamplers.0.conv",
            "upsamplers.0.conv",
            "time_emb_proj",
        ),
        sample_shape=image_shape,
    )
)


# ------------------------------------------------------------------------------------------------ transformers
def _pixart_shapes(network: nn.Module) -> dict[str, tuple[int | str, ...]]:
    config: Any = network.config
    shapes: dict[str, tuple[int | str, ...]] = {
        "encoder_hidden_states": (8, "caption_channels"),
        "encoder_attention_mask": (8,),
    }
    sized = config.sample_size == 128 if config.use_additional_conditions is None else config.use_additional_conditions
    return shapes | {"resolution": (2,), "aspect_ratio": (1,)} if sized else shapes


def _pixart_arguments(_network: nn.Module, _x: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
    sizes = {key: cond.pop(key, None) for key in ("resolution", "aspect_ratio")}
    return {**cond, "added_cond_kwargs": sizes}


register(
    Family(
        "PixArtTransformer2DModel",
        time_keyword="timestep",
        channel_split=True,
        cond_keys=("encoder_hidden_states", "encoder_attention_mask", "resolution", "aspect_ratio"),
        required=("encoder_hidden_states",),
        cond_shapes=_pixart_shapes,
        arguments=_pixart_arguments,
        null={"resolution": SAME, "aspect_ratio": SAME},
        blocks=("transformer_blocks",),
        lora_targets=(*ATTENTION, *_FEED_FORWARD),
        sample_shape=image_shape,
    )
)
register(
    Family(
        "SD3Transformer2DModel",
        time_keyword="timestep",
        cond_keys=("encoder_hidden_states", "pooled_projections"),
        required=("encoder_hidden_states", "pooled_projections"),
        cond_shapes={
            "encoder_hidden_states": (8, "joint_attention_dim"),
            "pooled_projections": ("pooled_projection_dim",),
        },
        blocks=("transformer_blocks",),
        block_output=1,
        lora_targets=(*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", *_FEED_FORWARD),
        flow=True,
        sample_shape=image_shape,
    )
)


# ------------------------------------------------------------------------------------------------ Sana
def _sana_time(network: nn.Module) -> float:
    config: Any = network.config
    return 1e-3 if config.get("guidance_embeds") else config.get("timestep_scale", 1.0)


def _sana_guidance(network: nn.Module, w: Tensor) -> dict[str, Tensor] | None:
    config: Any = network.config
    return {"guidance": w * config.guidance_embeds_scale} if config.get("guidance_embeds") else None


register(
    Family(
        "SanaTransformer2DModel",
        time_scale=_sana_time,
        time_keyword="timestep",
        channel_split=True,
        cond_keys=("encoder_hidden_states", "encoder_attention_mask"),
        required=("encoder_hidden_states",),
        cond_shapes={"encoder_hidden_states": (8, "caption_channels"), "encoder_attention_mask": (8,)},
        guidance=_sana_guidance,
        guidance_scale=4.5,
        blocks=("transformer_blocks",),
        flow=True,
        sample_shape=image_shape,
    )
)


# ------------------------------------------------------------------------------------------------ time towards data
register(
    Family(
        "Lumina2Transformer2DModel",
        time_scale=1e-3,
        time_flip=True,
        sign=-1.0,
        cond_keys=("encoder_hidden_states", "encoder_attention_mask"),
        required=("encoder_hidden_states", "encoder_attention_mask"),
        cond_shapes={"encoder_hidden_states": (8, "cap_feat_dim"), "encoder_attention_mask": (8,)},
        blocks=("context_refiner", "noise_refiner", "layers"),
        lora_targets=(*ATTENTION, "linear_1", "linear_2", "linear_3"),
        flow=True,
        sample_shape=image_shape,
        # its pipeline takes the channel count for the sequence length
        tokens=lambda shape: shape[0],
    )
)


def _frames_of_images(x: Tensor) -> list[Tensor]:
    return list(x.unsqueeze(2).unbind(0))


def _images_of_frames(out: Sequence[Tensor], _shape: Sequence[int]) -> Tensor:
    return torch.stack(list(out)).squeeze(2)


def _zimage_arguments(_network: nn.Module, _x: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
    tokens, mask = cond["encoder_hidden_states"], cond.get("encoder_attention_mask")
    if mask is None:
        return {"cap_feats": list(tokens.unbind(0))}
    return {"cap_feats": [row[keep.bool()] for row, keep in zip(tokens, mask)]}


register(
    Family(
        "ZImageTransformer2DModel",
        time_scale=1e-3,
        time_flip=True,
        sign=-1.0,
        pack=_frames_of_images,
        unpack=_images_of_frames,
        cond_keys=("encoder_hidden_states", "encoder_attention_mask"),
        required=("encoder_hidden_states",),
        cond_shapes={"encoder_hidden_states": (8, "cap_feat_dim"), "encoder_attention_mask": (8,)},
        arguments=_zimage_arguments,
        blocks=("noise_refiner", "context_refiner", "layers"),
        lora_targets=(*ATTENTION, "w1", "w2", "w3"),
        flow=True,
    )
)
