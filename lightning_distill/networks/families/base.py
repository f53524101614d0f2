"""The ``Family`` entry, its registry and the parts that several entries share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_distill.networks.signatures import call_parameters, called_network

__all__ = [
    "ATTENTION",
    "FAMILIES",
    "PLAIN",
    "SAME",
    "Family",
    "example_cond",
    "family_of",
    "image_shape",
    "linear_mu",
    "register",
]

#: null value of conditions that both branches of guidance share, such as a resolution
SAME = "same"

#: attention projections of one stream
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

_Value = int | float | str | Tensor
_Condition = dict[str, Any]
_Shapes = Mapping[str, tuple[int | str, ...]]


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else getattr(out, "sample", out)


def linear_mu(config: Mapping[str, Any], tokens: int) -> float:
    """Mu of FLUX.1 and most others: linear in the number of image tokens between two sizes of the scheduler."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (top - base) * (tokens - low) / (high - low)


@dataclass(frozen=True)
class Family:
    """Calling convention of one model class.

    Attributes:
        model_class: class name the entry applies to.
        time: ``network`` passes ``process.network_time(t)`` (0..1000), ``native`` the process' own t.
        time_scale: factor on that time, or a function of the network that gives it.
        time_flip: pass ``time_scale * 1000 - time`` (models whose time grows towards data).
        integer_time: the model embeds integer timesteps only.
        time_per_frame: the model takes a time for every frame of x_t, (B, F).
        time_keyword: name of the time argument where the text tokens are the second positional one; None where
            time itself is second.
        target_time: name of the argument for r; None for one-time models.
        needs_target: r is t where the caller gives none (the velocity at t); else the argument is left out.
        guidance: makes the arguments that embed the guidance scale (B,) from network and scale; None from it, or no
            function at all, for networks without such an embedding.
        guidance_scale: scale embedded when the caller gives none.
        start: name of the condition at which samples begin, and the share of noise in it; None begins at noise.
        sign: factor on the output (-1 for models that return the negative velocity).
        channel_split: the output carries a learned variance; keep its first half along the channel dimension.
        output: how to get the tensor out of the model's return value.
        pack: sample (B, C, ...) -> what the model takes as its first argument.
        unpack: tensor from ``output`` and shape of the sample -> (B, C, ...).
        cond_keys: conditions the model accepts, in the batch's ``cond``.
        required: those it cannot run without.
        arguments: network, sample x (B, C, ...) and conditions -> keyword arguments; None passes conditions as they
            are.
        shared: names of keyword arguments that all samples of a call share, such as position ids; tensors and lists of
            all others are divided with the samples.
        cond_shapes: shape of one sample's conditions by key, without the batch dimension: a number, or the name of a
            setting of the network's configuration; lengths of text are arbitrary. Or a function of the network.
        null: value that stands for "no condition", by key: a number, a tensor (1, ...), ``SAME``, or a function of the
            network that gives one (None for a network without). Keys without an entry have no unconditional
            counterpart unless the caller gives one.
        classes: number of classes of a network that was trained with a class for every sample; a null class, where
            there is one, says it else.
        blocks: attribute paths of the block lists, in execution order: units of sharding, activation checkpointing
            and discriminator features.
        block_output: which element the image stream is, where a block returns a tuple.
        lora_targets: module-name endings that adapters attach to by default.
        eval_only: the model changes its output at random in train mode (label dropout); keep it in eval mode.
        flow: every released network of the class is trained by flow matching, so a file without a scheduler is too.
        sample_shape: shape of one sample without the batch dimension, where the network knows it.
        tokens: sample shape -> the token count from which the pipeline computes a resolution-dependent shift.
        mu: scheduler settings and token count -> mu of such a shift.
    """

    model_class: str
    time: Literal["network", "native"] = "network"
    time_scale: float | Callable[[nn.Module], float] = 1.0
    time_flip: bool = False
    integer_time: bool = False
    time_per_frame: bool = False
    time_keyword: str | None = None
    target_time: str | None = None
    needs_target: bool = False
    guidance: Callable[[nn.Module, Tensor], dict[str, Tensor] | None] | None = None
    guidance_scale: float | None = None
    start: tuple[str, float] | None = None
    sign: float = 1.0
    channel_split: bool = False
    output: Callable[[Any], Any] = _first
    pack: Callable[[Tensor], Any] | None = None
    unpack: Callable[[Any, Sequence[int]], Tensor] | None = None
    cond_keys: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    arguments: Callable[[nn.Module, Tensor, _Condition], dict[str, Any]] | None = None
    shared: tuple[str, ...] = ()
    cond_shapes: _Shapes | Callable[[nn.Module], _Shapes] = field(default_factory=dict)
    null: Mapping[str, _Value | Callable[[nn.Module], _Value | None]] = field(default_factory=dict)
    classes: Callable[[nn.Module], int | None] = lambda network: None
    blocks: tuple[str, ...] = ()
    block_output: int = 0
    lora_targets: tuple[str, ...] = ATTENTION
    eval_only: bool = False
    flow: bool = False
    sample_shape: Callable[[nn.Module], tuple[int, ...] | None] = lambda network: getattr(network, "shape", None)
    tokens: Callable[[Sequence[int]], int] = lambda shape: math.prod(shape[1:]) // 4
    mu: Callable[[Mapping[str, Any], int], float] = linear_mu

    def network_time(self, time: Tensor, network: nn.Module) -> Tensor:
        """Apply scale, flip and rounding to a time that ``time`` names."""
        scale = self.time_scale(network) if callable(self.time_scale) else self.time_scale
        time = time * scale
        if self.time_flip:
            time = 1000.0 * scale - time
        return time.round().to(torch.int64) if self.integer_time else time


FAMILIES: dict[str, Family] = {}


def _declared_classes(network: nn.Module) -> int | None:
    count = getattr(network, "num_classes", None)
    known = isinstance(count, int) and count > 0 and "class_labels" in call_parameters(network)
    return count if known else None


#: Any module with ``forward(x, t, **cond) -> tensor``; t is the process' native time. Its attribute ``num_classes``
#: says how many labels there are, if ``forward`` takes ``class_labels``.
PLAIN = Family(
    "Module",
    time="native",
    target_time="r",
    guidance=lambda _network, w: {"guidance": w},
    classes=_declared_classes,
    lora_targets=(),
)


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


def example_cond(network: nn.Module, n: int) -> dict[str, Tensor]:
    """Conditions that a network accepts, zeros of n samples: for counting, and for the shapes of features.

    Args:
        network: of a family that states its ``cond_shapes``; empty for any other.
        n: number of rows.
    """
    if family_of(network) is PLAIN:
        network = called_network(network)
    shapes, config = family_of(network).cond_shapes, getattr(network, "config", {})
    shapes = shapes(network) if callable(shapes) else shapes
    device = next((p.device for p in network.parameters()), None)
    made = {}
    for key, shape in shapes.items():
        sides = [config[side] if isinstance(side, str) else side for side in shape]
        is_mask = key == "encoder_attention_mask"
        made[key] = torch.full((n, *sides), float(is_mask), device=device, dtype=torch.int64 if is_mask else None)
    return made


def image_shape(network: nn.Module) -> tuple[int, ...] | None:
    """Channels, height and width from ``in_channels`` and ``sample_size`` of a network's configuration."""
    config: Any = network.config
    size = config.sample_size
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return (config.in_channels, height, width)
