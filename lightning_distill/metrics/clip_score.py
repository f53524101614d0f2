"""Agreement of text and image in CLIP's common space (arXiv:2104.08718)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CLIPScore"]

VARIABLE = "LIGHTNING_DISTILL_CLIP"


class CLIPScore:
    """100 max(cos(image, text), 0) by a CLIP model from a local folder.

    Args:
        folder: folder of a transformers CLIP model with its tokenizer and image processor (safetensors weights); None
            reads ``LIGHTNING_DISTILL_CLIP``.
        batch_size: images per network call.

    Notes:
        The score is cut at 0 sample by sample, as in the paper; torchmetrics cuts the mean.
    """

    def __init__(self, folder: str | None = None, batch_size: int = 64) -> None:
        self.folder = folder or os.environ.get(VARIABLE)
        self.batch_size = batch_size
        self._parts: tuple[Any, Any] | None = None

    def check(self, shape: Sequence[int] | None = None) -> None:
        """Raise if the folder is incomplete or samples are no images; reads nothing.

        Args:
            shape: of one sample, (C, H, W); None where it is not known yet.

        Raises:
            FileNotFoundError: no folder was given, or a file is missing in it.
            ValueError: the samples are no images of one or three channels.
        """
        if shape is not None and (len(shape) != 3 or shape[0] not in (1, 3)):
            raise ValueError(
                f"CLIPScore reads images of 1 or 3 channels, but the method's samples have the shape {tuple(shape)}; "
                "leave out the measure clip_score for latents and videos."
            )
        if self.folder is None:
            raise FileNotFoundError(
                f"CLIPScore needs a CLIP model; give its folder with CLIPScore(folder=...) or {VARIABLE}=FOLDER."
            )
        root = Path(self.folder).expanduser()
        for pattern in ("config.json", "*.safetensors", "*processor_config.json", "tokenizer*.json"):
            if not any(root.glob(pattern)):
                raise FileNotFoundError(
                    f"{root} has no {pattern}; give the folder of a CLIP model with CLIPScore(folder=...) or "
                    f"{VARIABLE}=FOLDER."
                )

    def build(self) -> tuple[Any, Any]:
        """Model and processor; built once.

        Raises:
            FileNotFoundError: the folder is incomplete.
        """
        if self._parts is None:
            self.check()
            from transformers import CLIPModel, CLIPProcessor

            root = Path(str(self.folder)).expanduser()
            model = CLIPModel.from_pretrained(root, local_files_only=True, use_safetensors=True)
            processor = CLIPProcessor.from_pretrained(root, local_files_only=True)
            self._parts = model.eval().requires_grad_(False), processor
        return self._parts

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score of each pair.

        Args:
            images: (N, C, H, W) in [-1, 1], N >= 1, one or three channels, on the device to compute on.
            prompts: N texts; longer ones than the model reads are cut.

        Returns:
            (N,) in [0, 100], float32, on the device of the images.

        Raises:
            ValueError: different numbers of images and prompts, or images of another shape.
        """
        if isinstance(prompts, str) or len(images) != len(prompts):
            raise ValueError(f"there are {len(images)} images and {len(prompts)} prompts; give one for each.")
        if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
            raise ValueError(f"CLIPScore reads images (N, 1 or 3, H, W), got {tuple(images.shape)}.")
        model, processor = self.build()
        model.to(images.device)
        longest = model.config.text_config.max_position_embeddings
        scores = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size].expand(-1, 3, -1, -1)
            pixels = (part * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
            texts = list(prompts[start : start + self.batch_size])
            inputs = processor(
                text=texts,
                images=list(pixels.cpu()),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=longest,
            )
            out = model(**inputs.to(images.device))
            cosine = F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float(), dim=-1)
            scores.append(100.0 * cosine.clamp_min(0.0))
        return torch.cat(scores)
