"""Where networks embed their time, and small networks that embed one more number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.networks.small import _TimeFeatures

__all__ = ["EMBEDDINGS", "SinusoidBranch", "TimeEmbedding", "embedders_of", "known_embedding"]


@dataclass(frozen=True)
class TimeEmbedding:
    """Where a network embeds its time.

    Attributes:
        embedder: path of the module whose output (B, D) is the embedding; ``*`` stands for every element of a list.
        projection: path of the module that makes the embedder's input from the time, None for the time itself.
        scale: factor of the network on the time that it is called with, before that.
    """

    embedder: str
    projection: str | None = None
    scale: float = 1.0


def _combined(path: str, scale: float = 1.0) -> TimeEmbedding:
    return TimeEmbedding(f"{path}.timestep_embedder", f"{path}.time_proj", scale)


#: by class name
EMBEDDINGS: dict[str, TimeEmbedding] = {
    "ResidualMLP": TimeEmbedding("time_embedding", "time_proj"),
    "UNet2DModel": TimeEmbedding("time_embedding", "time_proj"),
    "UNet2DConditionModel": TimeEmbedding("time_embedding", "time_proj"),
    "DiTTransformer2DModel": TimeEmbedding("transformer_blocks.*.norm1.emb.timestep_embedder"),
    "PixArtTransformer2DModel": _combined("adaln_single.emb"),
    "SD3Transformer2DModel": _combined("time_text_embed"),
    "SanaTransformer2DModel": _combined("time_embed.emb"),
    "Lumina2Transformer2DModel": _combined("time_caption_embed"),
    "ZImageTransformer2DModel": TimeEmbedding("t_embedder", None, 1000.0),
    "FluxTransformer2DModel": _combined("time_text_embed", 1000.0),
    "Flux2Transformer2DModel": _combined("time_guidance_embed", 1000.0),
    "QwenImageTransformer2DModel": _combined("time_text_embed"),
    "WanTransformer3DModel": TimeEmbedding("condition_embedder.time_embedder", "condition_embedder.timesteps_proj"),
    "CogVideoXTransformer3DModel": TimeEmbedding("time_embedding", "time_proj"),
    "LTXVideoTransformer3DModel": _combined("time_embed.emb"),
    "HunyuanVideoTransformer3DModel": _combined("time_text_embed"),
}


def embedders_of(network: nn.Module, embedding: TimeEmbedding | None) -> list[nn.Module]:
    """The modules whose output is the embedding of the time.

    Args:
        network: to look into.
        embedding: where; None where the class is known.

    Raises:
        ValueError: an unknown class, or no such module.
    """
    where = embedding or known_embedding(network)
    head, star, tail = where.embedder.partition(".*.")
    try:
        if not star:
            found: Sequence[nn.Module] = [network.get_submodule(where.embedder)]
        else:
            found = [element.get_submodule(tail) for element in network.get_submodule(head)]  # type: ignore[attr-defined]
    except AttributeError:
        raise ValueError(
            f"{type(network).__name__} has no time embedding at {where.embedder!r}; give "
            "embedding=TimeEmbedding(embedder='path.of.the.module')."
        ) from None
    return list(found)


def known_embedding(network: nn.Module) -> TimeEmbedding:
    """Where a network of a known class embeds its time.

    Raises:
        ValueError: the class is not known.
    """
    name = type(network).__name__
    config: Any = getattr(network, "config", {})
    if name in ("SanaTransformer2DModel", "ControlledSana") and config.get("guidance_embeds"):
        return _combined("time_embed")
    for cls in type(network).__mro__:
        if cls.__name__ in EMBEDDINGS:
            return EMBEDDINGS[cls.__name__]
    raise ValueError(
        f"where {name} embeds its time is not known; give embedding=TimeEmbedding(embedder='path.of.the.module') with "
        f"a module whose output is (B, width). Known classes: {', '.join(EMBEDDINGS)}."
    )


class SinusoidBranch(nn.Module):
    """outer(silu(inner(sinusoids of a number))).

    Args:
        features: number of sinusoids.
        width: of the hidden layer and of the output.
        zero: whether it begins as zero.
    """

    def __init__(self, features: int, width: int, zero: bool) -> None:
        super().__init__()
        self.waves = _TimeFeatures(features)
        self.inner = nn.Linear(features, width)
        self.outer = nn.Linear(width, width)
        if zero:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self, value: Tensor) -> Tensor:
        """Embedding (B, width) of numbers (B,)."""
        dtype = next(self.outer.parameters()).dtype
        wide = dtype if dtype == torch.float64 else torch.float32
        return self.outer(F.silu(self.inner(self.waves(value.to(wide)).to(dtype))))
