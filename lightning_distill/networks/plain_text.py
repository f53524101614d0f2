"""Text conditions by a plain model of transformers, such as a sentence transformer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_distill.networks.text import LENGTH, quiet, text_digest
from lightning_distill.networks.text_entries import MASK, POOLED, TOKENS

__all__ = ["TransformersText"]


class TransformersText:
    """A plain text model of transformers, for networks trained on its embeddings.

    Returned are ``encoder_hidden_states`` (B, L, D), the last hidden states; ``encoder_attention_mask`` (B, L), uint8;
    and ``pooled_projections`` (B, D), their mean over the tokens of the prompt, of length 1, as sentence transformers
    compare them.

    Args:
        folder: of a model with its tokenizer, weights as safetensors.
        dtype: of the model and of the embeddings.
        device: where it runs.
        max_length: tokens per prompt, all prompts are padded to it and longer ones cut; None for 32.
        keys: which of the three are wanted.

    Raises:
        FileNotFoundError: the folder is incomplete.
        ValueError: an unknown key.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        keys: Sequence[str] = (TOKENS, MASK),
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.dtype, self.device = dtype, torch.device(device)
        self.keys = tuple(keys)
        if unknown := [key for key in self.keys if key not in (TOKENS, MASK, POOLED)]:
            raise ValueError(f"keys={unknown}: a plain text model gives {TOKENS}, {MASK} and {POOLED}.")
        self.max_length = 32 if max_length is None else max_length
        for pattern in ("config.json", "*.safetensors", "tokenizer*.json"):
            if not any(self.folder.glob(pattern)):
                raise FileNotFoundError(
                    f"{self.folder} has no {pattern}; give the folder of a text model of transformers with its "
                    "tokenizer and safetensors weights."
                )
        self._parts: tuple[Any, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """Digest of the model and settings."""
        return {
            "text_encoder": text_digest(self.folder),
            "pipeline": None,
            "settings": {LENGTH: self.max_length, "keys": list(self.keys)},
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of B prompts, on the CPU."""
        tokenizer, model = self._build()
        batch = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"]
        weight = mask[..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)
        pooled = torch.nn.functional.normalize(mean.float(), dim=-1)
        # what the mask hides must not depend on the model's treatment of padding
        tokens = hidden * weight
        made = {TOKENS: tokens.to(self.dtype), MASK: mask.to(torch.uint8), POOLED: pooled.to(self.dtype)}
        return {key: made[key].cpu().contiguous() for key in self.keys}

    def null(self, negative_prompt: str | None = None) -> dict[str, Tensor]:
        """Embedding of the negative prompt, or of the empty one."""
        return self.encode([negative_prompt or ""])

    def _build(self) -> tuple[Any, Any]:
        if self._parts is None:
            from transformers import AutoModel, AutoTokenizer

            with quiet():
                model = AutoModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True)
                tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            self._parts = tokenizer, model.eval().requires_grad_(False).to(self.device, self.dtype)
        return self._parts
