"""Models of pixels or latents that are conditioned on class labels or on nothing."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_distill.networks.families.base import ATTENTION, Family, image_shape, register

__all__: list[str] = []


def _dit_classes(network: nn.Module) -> int | None:
    config: Any = network.config
    return config.num_embeds_ada_norm


def _unet_classes(network: nn.Module) -> int | None:
    config: Any = network.config
    return config.num_class_embeds


register(
    Family(
        "UNet2DModel",
        cond_keys=("class_labels",),
        classes=_unet_classes,
        blocks=("down_blocks", "mid_block", "up_blocks"),
        lora_targets=(*ATTENTION, "conv1", "conv2", "time_emb_proj"),
        sample_shape=image_shape,
    )
)
register(
    Family(
        "DiTTransformer2DModel",
        integer_time=True,
        channel_split=True,
        cond_keys=("class_labels",),
        null={"class_labels": _dit_classes},
        blocks=("transformer_blocks",),
        eval_only=True,
        sample_shape=image_shape,
    )
)
