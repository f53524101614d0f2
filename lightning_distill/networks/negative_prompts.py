"""Negative prompts for students without guidance: negative-away steer attention (arXiv:2412.02687, Section 4.2).

A one-step student has guidance distilled into it, so there is no unconditional branch to extrapolate from. Instead,
every cross-attention attends to both prompts from the same queries and subtracts:

    Z = Attn(Q, K+, V+) - alpha Attn(Q, K-, V-)

before its output projection. The rest of the network runs once; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.denoiser import Denoiser

__all__ = ["negative_prompts"]

_TOKENS, _MASK = "encoder_hidden_states", "encoder_attention_mask"


@contextmanager
def negative_prompts(
    denoiser: Denoiser, cond: Mapping[str, Any], negative: Mapping[str, Any], scale: float = 0.5
) -> Iterator[dict[str, Any]]:
    """Within the context, the network steers away from the negative prompts when called with the yielded conditions.

    Args:
        denoiser: student whose network attends to text by cross-attention (UNet2DConditionModel, PixArt, DiT-like).
        cond: conditions, tensors of N rows, with ``encoder_hidden_states`` (N, L, D).
        negative: the same keys for the negative prompts, (N, L', D) or (1, L', D); other keys are ignored.
        scale: alpha >= 0; 0 changes nothing, the paper uses about .1 to 1.

    Yields:
        conditions with both prompts, for any number of calls.

    Raises:
        ValueError: the network has no cross-attention to text tokens, a prompt lacks its tokens, or ``scale`` is
            negative.

    Notes:
        Both prompts travel as one sequence, so that whatever the network does to its tokens before attention happens to
        both; pooled embeddings and sizes stay those of ``cond``. The output projection W Z + b is linear, so the
        steered output is out+ - alpha (out- - b).
    """
    if not scale >= 0.0:
        raise ValueError(f"scale={scale} is no strength, or would steer towards the negative prompts; give 0 or more.")
    layers = [module for module in denoiser.network.modules() if _attends_to_text(module)]
    if not layers:
        raise ValueError(
            f"{type(denoiser.network).__name__} has no cross-attention layers, by which negative prompts enter; use a "
            "model with cross-attention (UNet2DConditionModel, PixArtTransformer2DModel), or train with guidance."
        )
    for name, given in (("cond", cond), ("negative", negative)):
        if not isinstance(given.get(_TOKENS), Tensor):
            raise ValueError(f"{name} has no {_TOKENS}, the tokens of its prompts; encode the prompts first.")
    joined, length = _joined(cond, negative)
    with ExitStack() as stack:
        for layer in layers:
            steer = _Steer(layer, length, scale)
            stack.callback(layer.register_forward_pre_hook(steer.before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(steer.after, with_kwargs=True).remove)
        yield joined


def _attends_to_text(module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) and isinstance(
        getattr(module, "to_out", None), nn.ModuleList
    )


def _joined(cond: Mapping[str, Any], negative: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Conditions with both token sequences one after the other, and the length of the first."""
    tokens = cond[_TOKENS]
    other = negative[_TOKENS].to(tokens).expand(len(tokens), -1, -1)
    joined = {**cond, _TOKENS: torch.cat([tokens, other], dim=1)}
    if _MASK in cond or _MASK in negative:
        masks = [
            given.get(_MASK, torch.ones(value.shape[:2], dtype=torch.int64, device=value.device))
            for given, value in ((cond, tokens), (negative, other))
        ]
        joined[_MASK] = torch.cat([masks[0], masks[1].to(masks[0]).expand(len(tokens), -1)], dim=1)
    return joined, tokens.shape[1]


class _Steer:
    """Hooks of one attention layer."""

    def __init__(self, layer: nn.Module, length: int, scale: float) -> None:
        self.layer = layer
        self.length = length
        self.scale = scale
        self.negative: dict[str, Any] | None = None
        self.inside = False

    def before(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Show the positive prompt to the layer and keep the negative one for afterwards."""
        tokens = kwargs.get(_TOKENS)
        if self.inside or tokens is None:
            return None
        self.negative = {**kwargs, _TOKENS: tokens[:, self.length :]}
        positive = {**kwargs, _TOKENS: tokens[:, : self.length]}
        if (mask := kwargs.get("attention_mask")) is not None:
            positive["attention_mask"] = mask[..., : self.length]
            self.negative["attention_mask"] = mask[..., self.length :]
        return args, positive

    def after(self, layer: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], out: Tensor) -> Any:
        """Subtract what the negative prompt brings."""
        if self.inside or self.negative is None:
            return None
        self.inside, negative = True, self.negative
        try:
            away = layer(*args, **negative)
        finally:
            self.inside, self.negative = False, None
        if getattr(layer, "residual_connection", False):
            raise ValueError(
                f"{type(layer).__name__} adds its input to its output, so negative prompts cannot be separated from "
                "it; use a model whose blocks add the residual outside of attention."
            )
        bias = layer.to_out[0].bias  # type: ignore[index,union-attr]
        bias = 0.0 if bias is None else bias / getattr(layer, "rescale_output_factor", 1.0)
        return out - self.scale * (away - bias)
