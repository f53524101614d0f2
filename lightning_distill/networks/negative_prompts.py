"""Negative prompts for students without guidance: negative-away steer attention (arXiv:2412.02687, Section 4.2).

A one-step student has guidance distilled into it, so there is no unconditional branch to extrapolate from. Instead,
every cross-attention attends to both prompts from the same queries and subtracts:

    Z = Attn(Q, K+, V+) - alpha Attn(Q, K-, V-)

before its output projection. The rest of the network runs once; nothing is trained.
"""

from __future__ import annotations

import inspect
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
        denoiser: student whose network attends to text by cross-attention (UNet2DConditionModel, PixArt, SANA,
            Wan).
        cond: conditions, tensors of N rows, with ``encoder_hidden_states`` (N, L, D).
        negative: the same keys for the negative prompts, (N, L', D) or (1, L', D); other keys are ignored.
        scale: alpha >= 0; 0 changes nothing, the paper uses about .1 to 1.

    Yields:
        conditions with both prompts, for any number of calls. Calls with other conditions are no use here: every
        sequence is divided where that of ``cond`` ends.

    Raises:
        ValueError: the network has no cross-attention to text tokens alone, a prompt lacks its tokens, ``scale`` is
            negative; or, when the network is called, no layer is shown its tokens, or a layer those of one prompt.

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
    if any(getattr(layer, "add_k_proj", None) is not None for layer in layers):
        raise ValueError(
            f"{type(denoiser.network).__name__} attends to text and to a picture in the same layers, so negative "
            "prompts cannot be separated from the picture; use a model that is conditioned on text alone."
        )
    for name, given in (("cond", cond), ("negative", negative)):
        if not isinstance(given.get(_TOKENS), Tensor):
            raise ValueError(f"{name} has no {_TOKENS}, the tokens of its prompts; encode the prompts first.")
    joined, length = _joined(cond, negative)
    steers = [_Steer(layer, length, joined[_TOKENS].shape[1], scale) for layer in layers]

    def check(network: nn.Module, _args: Any, _out: Any) -> None:
        if not any(steer.acted for steer in steers):
            raise ValueError(
                f"no cross-attention layer of {type(network).__name__} was shown the tokens of the prompts, so the "
                "negative ones would have been attended to as the others; leave negative=... out."
            )

    with ExitStack() as stack:
        for layer, steer in zip(layers, steers):
            stack.callback(layer.register_forward_pre_hook(steer.before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(steer.after).remove)
        stack.callback(denoiser.network.register_forward_hook(check).remove)
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
    """Hooks of one attention layer.

    Args:
        layer: called with the tokens and their mask by name or by place.
        length: tokens of the positive prompt.
        total: tokens of both.
        scale: alpha.

    Attributes:
        acted: whether the layer has been shown tokens.
    """

    def __init__(self, layer: nn.Module, length: int, total: int, scale: float) -> None:
        self.signature = inspect.signature(layer.forward)
        self.length, self.total = length, total
        self.scale = scale
        self.negative: inspect.BoundArguments | None = None
        self.inside = False
        self.acted = False

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Show the positive prompt to the layer and keep the negative one for afterwards."""
        given = self.signature.bind(*args, **kwargs)
        tokens = given.arguments.get(_TOKENS)
        if self.inside or tokens is None:
            return None
        if tokens.shape[1] != self.total:
            raise ValueError(
                f"{type(layer).__name__} is shown {tokens.shape[1]} tokens, but the positive and the negative prompt "
                f"have {self.total} together; call the network with the conditions that negative_prompts yields."
            )
        self.acted = True
        self.negative = self.signature.bind(*args, **kwargs)
        mask = given.arguments.get("attention_mask")
        for half, part in ((given, slice(0, self.length)), (self.negative, slice(self.length, None))):
            half.arguments[_TOKENS] = tokens[:, part]
            if mask is not None:
                half.arguments["attention_mask"] = mask[..., part]
        return given.args, given.kwargs

    def after(self, layer: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Any:
        """Subtract what the negative prompt brings."""
        if self.inside or self.negative is None:
            return None
        self.inside, negative = True, self.negative
        try:
            away = layer(*negative.args, **negative.kwargs)
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
