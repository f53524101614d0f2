"""What stands for "no condition" in classifier-free guidance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.families import Family
from lightning_distill.networks.families.base import SAME

__all__ = ["NullConditions", "with_null"]


class NullConditions:
    """The part of a ``Denoiser`` that knows the unconditional values of its network."""

    network: nn.Module
    family: Family
    null_class: int | None

    def null_cond(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """The unconditional counterpart of ``cond`` for classifier-free guidance.

        A stored embedding with fewer tokens than the batch's is padded with zeros where a mask hides them.

        Raises:
            ValueError: a key has no unconditional value for this network, or one that does not fit the batch.
        """
        null: dict[str, Any] = {}
        for key, value in cond.items():
            entry = self._null_value(key)
            if entry is None:
                remedy = "null_class=... of the teacher (the label it was trained to ignore)"
                if key != "class_labels":
                    remedy = f"null_cond={{{key!r}: ...}} of the teacher (the embedding of the empty prompt)"
                raise ValueError(
                    f"guidance needs an unconditional value for {key!r}, and {type(self.network).__name__} has none; "
                    f"give {remedy}, or set guidance_scale=1."
                )
            if isinstance(entry, Tensor):
                null[key] = self._fitted(key, entry, value, "encoder_attention_mask" in cond)
            else:
                null[key] = value if entry == SAME else torch.full_like(value, entry)
        return null

    def _fitted(self, key: str, stored: Tensor, like: Tensor, masked: bool) -> Tensor:
        """A stored null condition (1, ...) with the rows, device and dtype of the batch's condition."""
        if stored.device != like.device:
            # kept for the next call, which may have a graph: outside of inference mode
            with torch.inference_mode(False):
                stored = stored.to(like.device)
            self.family.null[key] = stored  # type: ignore[index]  # a dictionary of this denoiser's own
        missing = like.shape[1] - stored.shape[1] if like.ndim > 1 and stored.ndim == like.ndim else 0
        if missing > 0 and masked and key in ("encoder_hidden_states", "encoder_attention_mask"):
            stored = torch.cat([stored, stored.new_zeros(1, missing, *stored.shape[2:])], dim=1)
        if stored.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"the unconditional {key!r} has shape {tuple(stored.shape[1:])} per sample and the batch's "
                f"{tuple(like.shape[1:])}; compute both with the same text encoder, padded to one length."
            )
        return stored.to(like.dtype).expand_as(like)

    def _null_value(self, key: str) -> Any:
        """What stands for "no condition" (see ``Family.null``), None where there is no such value."""
        if key == "class_labels" and self.null_class is not None:
            return self.null_class
        entry = self.family.null.get(key)
        return entry(self.network) if callable(entry) else entry

    @property
    def num_classes(self) -> int | None:
        """Number of real classes (a null class is the label after the last); None without class labels."""
        null = self._null_value("class_labels")
        return self.family.classes(self.network) if null is None else int(null)

    def missing_null(self, cond_keys: Iterable[str] | None = None) -> list[str]:
        """Conditions without an unconditional value: guidance is possible where this is empty.

        Args:
            cond_keys: conditions of the batches; None for those the network cannot run without.
        """
        keys = self.family.required if cond_keys is None else cond_keys
        return [key for key in keys if self._null_value(key) is None]


def with_null(family: Family, null_cond: Mapping[str, Tensor | float], guidance: float | None) -> Family:
    """A family with what the caller knows about one set of weights.

    Args:
        family: entry of the network's class.
        null_cond: unconditional values by condition, (1, ...) or a number.
        guidance: scale that is embedded by default; None for the entry's.

    Raises:
        ValueError: a condition that the class does not take, or more rows than one.
    """
    for key, value in null_cond.items():
        if family.cond_keys and key not in family.cond_keys:
            raise ValueError(
                f"null_cond has {key!r}, but {family.model_class} takes the conditions {list(family.cond_keys)}."
            )
        if isinstance(value, Tensor) and (value.ndim == 0 or len(value) != 1):
            raise ValueError(
                f"null_cond[{key!r}] has shape {tuple(value.shape)}; give one row, (1, ...), as the text encoder makes "
                "it of one prompt."
            )
    if guidance is not None:
        family = replace(family, guidance_scale=float(guidance))
    return replace(family, null={**family.null, **null_cond}) if null_cond else family
