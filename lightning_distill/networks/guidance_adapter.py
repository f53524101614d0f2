"""The small network beside one module of a frozen network, which adds what guidance would change (arXiv:2503.07274).

    out = module(x) + A(x; w, t, c),        A = 0 at initialisation

    kind         A(x; w, t, c)
    attention    W_o softmax(W_q x K^T / sqrt(d)) V, with keys and values from the tokens e_w, e_t and e_c
    additive     W_o m(e_w + e_t + e_c), the same at every position

with embeddings e of the scale, the time and the condition (a label, or the text).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.networks.time_embeddings import SinusoidBranch

__all__ = ["AdapterKind", "GuidanceAdapter", "Told", "arranged", "positions"]

AdapterKind = Literal["attention", "additive"]
#: guidance scales are divided by this before their sinusoids
_UNIT = 10.0


class Told(NamedTuple):
    """What the adapters of one call are told.

    Attributes:
        scale: guidance scales w, (B,).
        time: sigma / (alpha + sigma) in [0, 1], (B,).
        cond: conditions of the call.
    """

    scale: Tensor
    time: Tensor
    cond: Mapping[str, Any]


class GuidanceAdapter(nn.Module):
    """What is added to the output of one module of a frozen network.

    Args:
        kind: ``attention`` or ``additive``, see the table of this module.
        channels: channels of the module's input and of its output.
        width: of the embeddings and hidden layers.
        heads: attention heads, dividing ``width``.
        labels: number of labels, the null class among them; 0 to leave ``class_labels`` out.
        text: width of ``encoder_hidden_states``; 0 to leave them out.
        time: whether it is told the time.
    """

    def __init__(
        self, kind: AdapterKind, channels: tuple[int, int], width: int, heads: int, labels: int, text: int, time: bool
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = nn.Sequential(SinusoidBranch(64, width, zero=False), nn.LayerNorm(width))
        self.time = nn.Sequential(SinusoidBranch(64, width, zero=False), nn.LayerNorm(width)) if time else None
        self.label = nn.Embedding(labels, width) if labels else None
        self.text = nn.Linear(text, width) if text else None
        self.query = self.key_value = self.hidden = None
        if kind == "attention":
            self.query = nn.Linear(channels[0], width, bias=False)
            self.key_value = nn.Linear(width, 2 * width, bias=False)
        else:
            self.hidden = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.LayerNorm(width))
        self.out = nn.Linear(width, channels[1])
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """The addition, (B, N, C_out), or (B, 1, C_out) for all positions.

        Args:
            x: input of the module, (B, N, C_in).
            told: scale, time and conditions, of B rows or of B / k, each for k rows in turn.
        """
        singles, text, seen = self.embeddings(told)
        if self.hidden is not None:
            whole = singles.sum(1)
            if text is not None:
                share = torch.ones_like(text[..., :1]) if seen is None else seen[..., None].to(text)
                whole = whole + (share * text).sum(1) / share.sum(1).clamp_min(1.0)
            return _rows(self.out(self.hidden(whole)), len(x))[:, None]
        assert self.query is not None
        assert self.key_value is not None
        tokens = singles if text is None else torch.cat([singles, text], dim=1)
        mask = None
        if seen is not None:
            mask = torch.cat([seen.new_ones(singles.shape[:2]), seen], dim=1)
            mask = _rows(mask, len(x))[:, None, None]
        keys, values = _rows(self.key_value(tokens), len(x)).chunk(2, dim=-1)
        parts = (self.query(x.to(tokens)), keys, values)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def embeddings(self, told: Told) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Those of scale, time and label, (B, S, width), of the text, (B, L, width), and its mask, (B, L).

        Args:
            told: what there is; conditions that this adapter has no embedding for are left out.
        """
        found = [self.scale(told.scale / _UNIT)]
        if self.time is not None:
            found.append(self.time(told.time))
        if self.label is not None and "class_labels" in told.cond:
            found.append(self.label(told.cond["class_labels"]))
        text = seen = None
        if self.text is not None and "encoder_hidden_states" in told.cond:
            text = self.text(told.cond["encoder_hidden_states"].to(self.text.weight.dtype))
            if (mask := told.cond.get("encoder_attention_mask")) is not None:
                seen = mask.bool()
        return torch.stack(found, dim=1), text, seen


def _rows(value: Tensor, n: int) -> Tensor:
    """One row for each of n, which may be several per sample (frames)."""
    return value if len(value) == n else value.repeat_interleave(n // len(value), dim=0)


def positions(x: Tensor) -> Tensor:
    """(B, N, C) of features (B, C), tokens (B, N, C) or pictures (B, C, H, W)."""
    if x.ndim == 2:
        return x[:, None]
    return x if x.ndim == 3 else x.flatten(2).transpose(1, 2)


def arranged(added: Tensor, like: Tensor) -> Tensor:
    """What ``_positions`` made of features, arranged as they were."""
    added = added.to(like.dtype)
    if like.ndim == 2:
        return added[:, 0]
    if like.ndim == 3:
        return added
    side = like.shape[2:] if added.shape[1] > 1 else (1,) * (like.ndim - 2)
    return added.transpose(1, 2).reshape(len(added), -1, *side)
