"""Image towers from a local folder of transformers: DINOv2 and CLIP."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.metrics.extractors import Extractor, file_sha256
from lightning_distill.metrics.features import FeatureExtractor

__all__ = ["CLIPImage", "DINOv2", "TowerNetwork"]


class TowerNetwork(nn.Module):
    """A vision tower with its own preprocessing, on images in [-1, 1].

    Args:
        tower: transformers model whose output has ``output``.
        size: height and width that it reads.
        mean: per-channel mean of its inputs in [0, 1].
        std: per-channel standard deviation.
        output: attribute of its output that holds the features.
        num_features: their length.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, tower: nn.Module, size: int, mean: list[float], std: list[float], output: str, num_features: int
    ) -> None:
        super().__init__()
        self.tower = tower
        self.size = size
        self.output = output
        self.num_features = num_features
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, ``num_features``), float32, of images (N, 1 or 3, H, W) in [-1, 1]."""
        x = images.float().expand(-1, 3, -1, -1) * 0.5 + 0.5
        if tuple(x.shape[-2:]) != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", align_corners=False, antialias=True)
        out = self.tower(pixel_values=(x.clamp(0, 1) - self.mean) / self.std)
        return getattr(out, self.output).float()


class _Tower(Extractor):
    """A tower in a folder with ``config.json`` and safetensors weights."""

    variable: ClassVar[str]
    kind: ClassVar[str]
    #: size, mean and std where the folder has no preprocessor_config.json
    defaults: ClassVar[tuple[int, list[float], list[float]]]

    def __init__(self, folder: str | None, name: str) -> None:
        self.folder = folder or os.environ.get(self.variable)
        self.name = name

    def check(self) -> None:
        """Raise if a file is missing.

        Raises:
            FileNotFoundError: no folder was given, or it lacks a file.
        """
        self._root()

    @property
    def key(self) -> str:
        """Hash of the weights, the configuration and the preprocessing."""
        root = self._root()
        digest = hashlib.sha256(json.dumps(self._preprocessing(root)).encode())
        for file in [root / "config.json", *sorted(root.glob("*.safetensors"))]:
            digest.update(file_sha256(file).encode())
        return f"{self.kind}-{digest.hexdigest()[:16]}"

    def _root(self) -> Path:
        owner = type(self).__name__
        if self.folder is None:
            raise FileNotFoundError(
                f"{owner} needs a model; give its folder with {owner}(folder=FOLDER) or {self.variable}=FOLDER."
            )
        root = Path(self.folder).expanduser()
        for pattern in ("config.json", "*.safetensors"):
            if not any(root.glob(pattern)):
                raise FileNotFoundError(
                    f"{root} has no {pattern}; give the folder of a transformers model with safetensors weights with "
                    f"{owner}(folder=FOLDER) or {self.variable}=FOLDER."
                )
        return root

    def _preprocessing(self, root: Path) -> tuple[int, list[float], list[float]]:
        """What the model reads: crop size, mean and std of the folder, else the defaults."""
        size, mean, std = self.defaults
        content: dict[str, Any] = {}
        if (root / "preprocessor_config.json").is_file():
            content = json.loads((root / "preprocessor_config.json").read_text())
        elif (root / "processor_config.json").is_file():  # as newer transformers save it with a tokenizer
            content = json.loads((root / "processor_config.json").read_text()).get("image_processor", {})
        given = content.get("crop_size", content.get("size", size))
        size = int(given.get("height", given.get("shortest_edge", size)) if isinstance(given, dict) else given)
        mean, std = content.get("image_mean", mean), content.get("image_std", std)
        return size, mean, std


class DINOv2(_Tower):
    """DINOv2's class token after the last norm (arXiv:2304.07193): ``fd_dinov2``.

    Args:
        folder: local transformers folder, for example of ``dinov2-large``; None reads ``LIGHTNING_DISTILL_DINOV2``.
        name: short name in metric names.
    """

    variable = "LIGHTNING_DISTILL_DINOV2"
    kind = "dinov2"
    defaults = (224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def __init__(self, folder: str | None = None, name: str = "dinov2") -> None:
        super().__init__(folder, name)

    def build(self) -> FeatureExtractor:
        """The tower."""
        from transformers import Dinov2Model

        root = self._root()
        tower = Dinov2Model.from_pretrained(root, local_files_only=True, use_safetensors=True)
        network = TowerNetwork(tower, *self._preprocessing(root), "pooler_output", tower.config.hidden_size)
        return network.eval().requires_grad_(False)


class CLIPImage(_Tower):
    """CLIP's projected image embedding (arXiv:2103.00020): ``fd_clip``.

    Args:
        folder: local transformers folder of a CLIP model; None reads ``LIGHTNING_DISTILL_CLIP``.
        name: short name in metric names.
    """

    variable = "LIGHTNING_DISTILL_CLIP"
    kind = "clip"
    defaults = (224, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])

    def __init__(self, folder: str | None = None, name: str = "clip") -> None:
        super().__init__(folder, name)

    def build(self) -> FeatureExtractor:
        """The tower with its projection."""
        from transformers import CLIPVisionModelWithProjection

        root = self._root()
        tower = CLIPVisionModelWithProjection.from_pretrained(root, local_files_only=True, use_safetensors=True)
        network = TowerNetwork(tower, *self._preprocessing(root), "image_embeds", tower.config.projection_dim)
        return network.eval().requires_grad_(False)
