"""Text conditions by a plain model of transformers, such as a sentence transformer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_distill.networks.json_files import read_json
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
        max_length: tokens per prompt, all prompts are padded to it and longer ones cut; None for 32, or for as many as
            the model takes.
        keys: which of the three are wanted.

    Raises:
        FileNotFoundError: the folder is incomplete.
        ValueError: an unknown key, a model that encodes no text, or more tokens than it has positions.
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
        for pattern in ("config.json", "*.safetensors", "tokenizer*.json"):
            if not any(self.folder.glob(pattern)):
                raise FileNotFoundError(
                    f"{self.folder} has no {pattern}; give the folder of a text model of transformers with its "
                    "tokenizer and safetensors weights."
                )
        limit = self._limit()
        self.max_length = min(32, limit) if max_length is None else max_length
        if self.max_length > limit:
            raise ValueError(f"max_length={max_length}: the text model {self.folder} takes {limit} tokens at most.")
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

    def _limit(self) -> int:
        """Tokens that the model has positions for."""
        positions = getattr(self._config(), "max_position_embeddings", None)
        if positions is None:  # relative ones, as in T5, have no end
            return sys.maxsize
        file = self.folder / "tokenizer_config.json"
        # some models keep a few positions for themselves, which their tokenizer leaves out
        own = read_json(file).get("model_max_length") if file.is_file() else None
        return int(positions if own is None else min(positions, own))

    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder, local_files_only=True)

    def _build(self) -> tuple[Any, Any]:
        if self._parts is None:
            from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer

            config = self._config()
            # AutoModel would add a decoder to T5's encoder
            encodes = type(config) in AutoModelForTextEncoding._model_mapping
            if config.is_encoder_decoder and not encodes:
                raise ValueError(
                    f"{self.folder} is a {config.model_type} model, whose output is its decoder's; give a text encoder."
                )
            maker: Any = AutoModelForTextEncoding if encodes else AutoModel
            with quiet():
                model = maker.from_pretrained(self.folder, local_files_only=True, use_safetensors=True)
                tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token  # which one, the mask makes no matter
            self._parts = tokenizer, model.eval().requires_grad_(False).to(self.device, self.dtype)
        return self._parts
