"""Image towers from a local folder of transformers: DINOv2 and CLIP."""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.metrics.extractors import Extractor, file_sha256
from lightning_distill.metrics.features import FeatureExtractor
from lightning_distill.metrics.inception import to_rgb

__all__ = ["CLIPImage", "DINOv2", "TowerNetwork"]


class TowerNetwork(nn.Module):
    """A vision tower with its own preprocessing, on images in [-1, 1].

    Images are brought to the tower's square as a whole (bicubic, antialiased).

    Args:
        tower: transformers model whose output has ``output``.
        size: height and width that it reads.
        mean: per-channel mean of its inputs in [0, 1].
        std: per-channel standard deviation.
        output: attribute of its output that holds the features.
        num_features: their length.

    Notes:
        transformers' own processors enlarge and then cut out the centre; a metric must see the whole picture.
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
        x = to_rgb(images) * 0.5 + 0.5
        if tuple(x.shape[-2:]) != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", align_corners=False, antialias=True)
        out = self.tower(pixel_values=(x.clamp(0, 1) - self.mean) / self.std)
        return getattr(out, self.output).float()


class _Tower(Extractor):
    """A tower in a folder with ``config.json`` and safetensors weights."""

    variable: ClassVar[str]
    kind: ClassVar[str]
    #: values of ``model_type`` in config.json that it can read
    model_types: ClassVar[tuple[str, ...]]
    #: size, mean and std where the folder has no preprocessor_config.json
    defaults: ClassVar[tuple[int, list[float], list[float]]]

    def __init__(self, folder: str | None, name: str) -> None:
        self.folder = folder or os.environ.get(self.variable)
        self.name = name

    def check(self) -> None:
        """Raise if a file is missing or the folder holds another kind of model; reads no weights.

        Raises:
            FileNotFoundError: no folder was given, or it lacks a file.
            ValueError: the folder holds another kind of model.
        """
        self._root()

    @property
    def key(self) -> str:
        """Hash of the weights (all bytes, read once per process), the configuration and the preprocessing."""
        root = self._root()
        digest = hashlib.sha256(json.dumps(self._preprocessing(root)).encode())
        for file in [root / "config.json", *self._shards(root)]:
            status = file.stat()
            digest.update(_hash(file, status.st_size, status.st_mtime_ns).encode())
        return f"{self.kind}-{digest.hexdigest()[:16]}"

    def _root(self) -> Path:
        owner = type(self).__name__
        if self.folder is None:
            raise FileNotFoundError(
                f"{owner} needs a model; give its folder with {owner}(folder=FOLDER) or {self.variable}=FOLDER."
            )
        root = Path(self.folder).expanduser()
        for file in [root / "config.json", *self._shards(root)]:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{root} has no {file.name}; give the folder of a transformers model with safetensors weights with "
                    f"{owner}(folder=FOLDER) or {self.variable}=FOLDER."
                )
        found = json.loads((root / "config.json").read_text()).get("model_type")
        if found not in self.model_types:
            raise ValueError(
                f"{root} holds a model of type {found!r}, {owner} reads {' or '.join(self.model_types)}; give another "
                f"folder with {owner}(folder=FOLDER) or {self.variable}=FOLDER."
            )
        return root

    @staticmethod
    def _shards(root: Path) -> list[Path]:
        """Files with the weights: those of the index where there is one."""
        index = root / "model.safetensors.index.json"
        if not index.is_file():
            return [root / "model.safetensors"]
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [root / name for name in sorted(names)]

    def _load(self, model_class: Any, root: Path, **options: Any) -> Any:
        """The model, float32, complete; transformers itself draws what a file lacks at random and goes on.

        Raises:
            ValueError: weights are missing, unreadable or of another shape.
        """
        from transformers.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity_error()  # a whole CLIP lists every weight of its text tower
        try:
            model, report = model_class.from_pretrained(
                root, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
            lost = sorted(str(name) for name in report["missing_keys"])
        except RuntimeError:  # how transformers reports shapes that differ
            lost = ["they have other shapes than config.json says"]
        except SafetensorError as error:
            lost = [str(error)]
        finally:
            logging.set_verbosity(level)
        if lost:
            raise ValueError(
                f"{root} lacks readable weights of {type(self).__name__} ({lost[0]}); give the folder of a complete "
                f"model with {type(self).__name__}(folder=FOLDER) or {self.variable}=FOLDER."
            )
        return model.float()

    def _preprocessing(self, root: Path) -> tuple[int, list[float], list[float]]:
        """What the model reads: crop size, mean and std of the folder, else the defaults."""
        size, mean, std = self.defaults
        content: dict[str, Any] = {}
        if (root / "preprocessor_config.json").is_file():
            content = json.loads((root / "preprocessor_config.json").read_text())
        elif (root / "processor_config.json").is_file():  # as newer transformers save it with a tokenizer
            content = json.loads((root / "processor_config.json").read_text()).get("image_processor", {})
        given = content.get("crop_size") or content.get("size") or size
        if isinstance(given, dict):
            given = given.get("height") or given.get("shortest_edge") or size
        return int(given), content.get("image_mean") or mean, content.get("image_std") or std


@lru_cache(maxsize=256)
def _hash(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, kept while its size and time of change stay."""
    return file_sha256(file)


class DINOv2(_Tower):
    """DINOv2's class token after the last norm (arXiv:2304.07193): ``fd_dinov2``.

    Args:
        folder: local transformers folder, for example of ``dinov2-large``; None reads ``LIGHTNING_DISTILL_DINOV2``.
        name: short name in metric names.
    """

    variable = "LIGHTNING_DISTILL_DINOV2"
    kind = "dinov2"
    model_types = ("dinov2", "dinov2_with_registers")
    defaults = (224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def __init__(self, folder: str | None = None, name: str = "dinov2") -> None:
        super().__init__(folder, name)

    def build(self) -> FeatureExtractor:
        """The tower."""
        from transformers import AutoModel

        root = self._root()
        tower = self._load(AutoModel, root)
        width = tower.config.hidden_size
        network = TowerNetwork(tower, *self._preprocessing(root), "pooler_output", width)
        return network.eval().requires_grad_(False)


class CLIPImage(_Tower):
    """CLIP's projected image embedding (arXiv:2103.00020): ``fd_clip``.

    Args:
        folder: local transformers folder of a CLIP model; None reads ``LIGHTNING_DISTILL_CLIP``.
        name: short name in metric names.
    """

    variable = "LIGHTNING_DISTILL_CLIP"
    kind = "clip"
    model_types = ("clip", "clip_vision_model")
    defaults = (224, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])

    def __init__(self, folder: str | None = None, name: str = "clip") -> None:
        super().__init__(folder, name)

    def build(self) -> FeatureExtractor:
        """The tower with its projection."""
        from transformers import CLIPVisionModelWithProjection

        root = self._root()
        # a whole CLIP says the width of its embedding outside the part that describes the vision tower
        width = json.loads((root / "config.json").read_text()).get("projection_dim", 512)
        tower = self._load(CLIPVisionModelWithProjection, root, projection_dim=width)
        network = TowerNetwork(tower, *self._preprocessing(root), "image_embeds", width)
        return network.eval().requires_grad_(False)
