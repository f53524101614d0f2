"""What differs between model classes, as one small declarative entry each.

A ``Family`` says how a network wants to be called; ``Denoiser`` does everything else. The entry of a network is found
by the names in its class hierarchy, so a subclass inherits the entry of its parent. A user's own class is registered
with the same few lines:

    register(Family("MyTransformer", cond_keys=("tokens",), blocks=("layers",), time_scale=1 / 1000))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family", "family_of", "register"]


def _image_shape(network: nn.Module) -> tuple[int, ...] | None:
    config: Any = network.config
    size = config.sample_size
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return (config.in_channels, height, width)


def _dit_classes(network: nn.Module) -> int | None:
    config: Any = network.config
    return config.num_embeds_ada_norm


@dataclass(frozen=True)
class Family:
    """Calling convention of one model class.

    Attributes:
        model_class: class name the entry applies to.
        time: ``network`` passes ``process.network_time(t)`` (0..1000), ``native`` the process' own t.
        time_scale: factor on that time.
        time_flip: pass ``time_scale * 1000 - time`` (models whose time grows towards data).
        integer_time: the model embeds integer timesteps only.
        sign: factor on the output (-1 for models that return the negative velocity).
        channel_split: the output carries a learned variance; keep its first half along the channel dimension.
        output: how to get the tensor out of the model's return value.
        cond_keys: conditioning keyword arguments the model accepts, in the batch's ``cond``.
        null: value that stands for "no condition", by key: a constant or a function of the network. Keys without an
            entry have no unconditional counterpart unless the caller gives one.
        blocks: attribute paths of the block lists, in execution order: units of sharding, activation checkpointing
            and discriminator features.
        lora_targets: module-name endings that adapters attach to by default.
        eval_only: the model changes its output at random in train mode (label dropout); keep it in eval mode.
        sample_shape: shape of one sample without the batch dimension, where the network knows it.
    """

    model_class: str
    time: Literal["network", "native"] = "network"
    time_scale: float = 1.0
    time_flip: bool = False
    integer_time: bool = False
    sign: float = 1.0
    channel_split: bool = False
    output: Callable[[Any], Tensor] = lambda out: out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
    cond_keys: tuple[str, ...] = ()
    null: Mapping[str, int | float | Callable[[nn.Module], int | None]] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    eval_only: bool = False
    sample_shape: Callable[[nn.Module], tuple[int, ...] | None] = lambda network: getattr(network, "shape", None)

    def network_time(self, time: Tensor) -> Tensor:
        """Apply scale, flip and rounding to a time that ``time`` names."""
        time = time * self.time_scale
        if self.time_flip:
            time = 1000.0 * self.time_scale - time
        return time.round().to(torch.int64) if self.integer_time else time


FAMILIES: dict[str, Family] = {}

#: Any module with ``forward(x, t, **cond) -> tensor``; t is the process' native time.
PLAIN = Family("Module", time="native", lora_targets=())


def register(family: Family) -> Family:
    """Add or replace the entry of one model class."""
    FAMILIES[family.model_class] = family
    return family


def family_of(network: nn.Module) -> Family:
    """The entry of a network's class or of its nearest registered parent; ``PLAIN`` where there is none."""
    for cls in type(network).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    return PLAIN


register(
    Family(
        "UNet2DModel",
        cond_keys=("class_labels",),
        blocks=("down_blocks", "mid_block", "up_blocks"),
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj"),
        sample_shape=_image_shape,
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
        sample_shape=_image_shape,
    )
)
