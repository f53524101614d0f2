"""ADM's networks, as OpenAI publishes them, in diffusers' format.

Consistency models (arXiv:2303.01469) and the EDM teachers beside them are ADM's UNet (arXiv:2105.05233) with residual
blocks that resample; diffusers' ``UNet2DModel`` computes the same from the same weights under other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

__all__ = ["unet_from_adm"]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_from_adm(state: Mapping[str, Tensor], sample_size: int = 64, layers: int = 3, head: int = 64) -> UNet2DModel:
    """The network of a state dict of OpenAI's, with its weights, in eval mode.

    Widths, levels, attention and classes are read off the weights.

    Args:
        state: as in ``edm_imagenet64_ema.pt`` or ``cd_imagenet64_l2.pt``.
        sample_size: height and width of its pictures.
        layers: residual blocks of a level.
        head: channels of an attention head.

    Raises:
        ValueError: the weights are not those of such a network.
    """
    blocks = {key.split(".")[1] for key in state if key.startswith("input_blocks.")}
    levels, rest = divmod(len(blocks), layers + 1)
    if rest or not levels:
        raise _misfit(f"it has {len(blocks)} input blocks", layers)
    try:
        last = [(layers + 1) * (level + 1) - 1 for level in range(levels)]  # of each level, before it is resampled
        widths = [len(state[f"input_blocks.{index}.0.out_layers.3.bias"]) for index in last]
        attends = [f"input_blocks.{index}.1.qkv.weight" in state for index in last]
        named = dict(_modules(layers, attends))
        shift = len(state["input_blocks.1.0.emb_layers.1.bias"]) == 2 * widths[0]
    except KeyError as error:
        raise _misfit(f"there is no {error.args[0]}", layers) from None
    groups = min(32, widths[0])
    network: Any = UNet2DModel(
        sample_size=sample_size,
        in_channels=state["input_blocks.0.0.weight"].shape[1],
        out_channels=len(state["out.2.bias"]),
        layers_per_block=layers,
        num_class_embeds=len(state["label_emb.weight"]) if "label_emb.weight" in state else None,
        block_out_channels=tuple(widths),
        attention_head_dim=head,
        down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)),
        downsample_type="resnet",
        upsample_type="resnet",
        norm_num_groups=groups,
        attn_norm_num_groups=groups,  # of the middle block, which has none by default beside scale_shift
        resnet_time_scale_shift="scale_shift" if shift else "default",
    )
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    for new, old in named.items():
        for kind in ("weight", "bias"):
            if (value := state.get(f"{old}.{kind}")) is None:
                continue
            used.add(f"{old}.{kind}")
            if old.endswith(".qkv"):
                thirds = (value.flatten(1) if kind == "weight" else value).chunk(3)
                made |= {f"{new}.to_{name}.{kind}": third for name, third in zip("qkv", thirds, strict=True)}
            else:
                made[f"{new}.{kind}"] = value.flatten(1) if old.endswith(".proj_out") and kind == "weight" else value
    if left := sorted(set(state) - used):
        raise _misfit(f"nothing takes {left[0]}", layers)
    try:
        network.load_state_dict(made)
    except RuntimeError as error:
        raise _misfit(str(error).splitlines()[-1].strip(), layers) from None
    unet: UNet2DModel = network.eval()
    return unet


def _misfit(reason: str, layers: int) -> ValueError:
    return ValueError(
        f"these are not the weights of an ADM network that resamples in residual blocks and has {layers} of them a "
        f"level: {reason}; give layers=... as it was trained."
    )


def _modules(layers: int, attends: list[bool]) -> Iterator[tuple[str, str]]:
    """Names of every module with weights, in diffusers and in ADM."""
    yield from _ENDS.items()
    levels, index = len(attends), 1
    for level, attention in enumerate(attends):
        for layer in range(layers):
            yield from _layer(f"down_blocks.{level}", layer, f"input_blocks.{index}", attention)
            index += 1
        if level < levels - 1:
            yield from _resnet(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{index}.0")
            index += 1
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    yield from _attention("mid_block.attentions.0", "middle_block.1")
    yield from _resnet("mid_block.resnets.1", "middle_block.2")
    index = 0
    for level, attention in enumerate(reversed(attends)):
        for layer in range(layers + 1):
            yield from _layer(f"up_blocks.{level}", layer, f"output_blocks.{index}", attention)
            index += 1
        if level < levels - 1:
            yield from _resnet(f"up_blocks.{level}.upsamplers.0", f"output_blocks.{index - 1}.{1 + attention}")


def _layer(block: str, layer: int, old: str, attention: bool) -> Iterator[tuple[str, str]]:
    yield from _resnet(f"{block}.resnets.{layer}", f"{old}.0")
    if attention:
        yield from _attention(f"{block}.attentions.{layer}", f"{old}.1")


def _resnet(new: str, old: str) -> Iterator[tuple[str, str]]:
    return ((f"{new}.{ours}", f"{old}.{theirs}") for ours, theirs in _RESNET.items())


def _attention(new: str, old: str) -> Iterator[tuple[str, str]]:
    yield f"{new}.group_norm", f"{old}.norm"
    yield new, f"{old}.qkv"
    yield f"{new}.to_out.0", f"{old}.proj_out"
