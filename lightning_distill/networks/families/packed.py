"""Text-to-image models that take a sequence of 2 x 2 latent patches instead of an image.

    class                        x_t here             tokens      time   also takes
    FluxTransformer2DModel       (B, 16, H, W)        H W / 4     t      pooled, guidance
    Flux2Transformer2DModel      (B, 128, H/2, W/2)   H W / 4     t      guidance
    QwenImageTransformer2DModel  (B, 16, H, W)        H W / 4     t      mask, image shapes

FLUX.2 normalises its latents after they have been folded into 2 x 2 patches (see ``latents.LatentScale``), so its
samples here are the folded ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.families.base import ATTENTION, Family, register

__all__ = ["pack_patches", "unpack_patches"]

_JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def pack_patches(x: Tensor) -> Tensor:
    """Images (B, C, H, W) with even sides -> tokens (B, H W / 4, 4 C), row by row."""
    batch, channels, height, width = x.shape
    if height % 2 or width % 2:
        raise ValueError(
            f"the model sees patches of 2 x 2, but the latent is {height} x {width}; give a shape with even height and "
            "width."
        )
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack_patches(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of ``pack_patches`` for images of ``shape``."""
    batch, channels, height, width = shape
    x = tokens.reshape(batch, height // 2, width // 2, channels, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def _grid(height: int, width: int, axes: int, device: torch.device) -> Tensor:
    """Position ids (height * width, axes) with row and column on axes 1 and 2."""
    ids = torch.zeros(height, width, axes, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.reshape(height * width, axes)


def _guidance(network: nn.Module, w: Tensor) -> dict[str, Tensor] | None:
    config: Any = network.config
    return {"guidance": w} if config.get("guidance_embeds") else None


# ------------------------------------------------------------------------------------------------ FLUX
def _flux_arguments(_network: nn.Module, x: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
    length = cond["encoder_hidden_states"].shape[1]
    ids = _grid(x.shape[2] // 2, x.shape[3] // 2, 3, x.device)
    return {**cond, "img_ids": ids, "txt_ids": torch.zeros(length, 3, device=x.device)}


register(
    Family(
        "FluxTransformer2DModel",
        time_scale=1e-3,
        time_keyword="timestep",
        pack=pack_patches,
        unpack=unpack_patches,
        cond_keys=("encoder_hidden_states", "pooled_projections"),
        required=("encoder_hidden_states", "pooled_projections"),
        cond_shapes={
            "encoder_hidden_states": (8, "joint_attention_dim"),
            "pooled_projections": ("pooled_projection_dim",),
        },
        arguments=_flux_arguments,
        shared=("img_ids", "txt_ids"),
        guidance=_guidance,
        guidance_scale=3.5,
        blocks=("transformer_blocks", "single_transformer_blocks"),
        block_output=1,
        lora_targets=(*_JOINT, "ff.net.0.proj", "ff.net.2", "proj_mlp"),
        flow=True,
    )
)


def _flux2_arguments(_network: nn.Module, x: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
    length = cond["encoder_hidden_states"].shape[1]
    text = torch.zeros(length, 4, device=x.device)
    text[:, 3] = torch.arange(length, device=x.device)
    return {**cond, "img_ids": _grid(x.shape[2], x.shape[3], 4, x.device), "txt_ids": text}


def flux2_mu(_config: Mapping[str, Any], tokens: int, num_steps: int = 50) -> float:
    """Mu of FLUX.2: two lines fitted in the number of tokens, for 10 and for 200 steps, interpolated between them."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_10 - at_200) * (200 - num_steps) / 190


register(
    Family(
        "Flux2Transformer2DModel",
        time_scale=1e-3,
        time_keyword="timestep",
        pack=lambda x: x.flatten(2).transpose(1, 2),
        unpack=lambda tokens, shape: tokens.transpose(1, 2).reshape(shape),
        cond_keys=("encoder_hidden_states",),
        required=("encoder_hidden_states",),
        cond_shapes={"encoder_hidden_states": (8, "joint_attention_dim")},
        arguments=_flux2_arguments,
        shared=("img_ids", "txt_ids"),
        guidance=_guidance,
        guidance_scale=4.0,
        blocks=("transformer_blocks", "single_transformer_blocks"),
        block_output=1,
        lora_targets=(*_JOINT, "to_qkv_mlp_proj"),
        flow=True,
        tokens=lambda shape: math.prod(shape[1:]),
        mu=flux2_mu,
    )
)


# ------------------------------------------------------------------------------------------------ Qwen-Image
def _qwen_arguments(_network: nn.Module, x: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
    mask = cond.pop("encoder_attention_mask", None)
    shapes = [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)
    return {**cond, "encoder_hidden_states_mask": mask, "img_shapes": shapes}


register(
    Family(
        "QwenImageTransformer2DModel",
        time_scale=1e-3,
        time_keyword="timestep",
        pack=pack_patches,
        unpack=unpack_patches,
        cond_keys=("encoder_hidden_states", "encoder_attention_mask"),
        required=("encoder_hidden_states",),
        cond_shapes={"encoder_hidden_states": (8, "joint_attention_dim"), "encoder_attention_mask": (8,)},
        arguments=_qwen_arguments,
        guidance=_guidance,
        guidance_scale=1.0,
        blocks=("transformer_blocks",),
        block_output=1,
        lora_targets=_JOINT,
        flow=True,
    )
)
