"""Feature extractors: what turns images into the vectors that the metrics compare.

A distance is meaningful only together with the name of its extractor. ``fd_cnn`` means the
``SmallClassifier`` that is shipped for a data set; its 64 features and its class decisions are all that the
small problems need.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.zoo import zoo_file

__all__ = ["FeatureExtractor", "SmallClassifier", "extract", "load_classifier", "save_classifier"]


@runtime_checkable
class FeatureExtractor(Protocol):
    """Anything that maps images (N, C, H, W) in [-1, 1] to features (N, ``num_features``)."""

    num_features: int

    def __call__(self, images: Tensor, /) -> Tensor:
        """Features of a batch of images."""


class SmallClassifier(nn.Module):
    """A small convolutional classifier whose penultimate layer gives the features of ``fd_cnn``.

    Each entry of ``widths`` is a 3x3 convolution with batch norm; a stride of 2 halves the picture. What is
    left is flattened and projected to ``num_features``, from which one linear layer reads the classes.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images, divisible by the product of the strides.
        num_classes: number of classes.
        widths: channels of the convolutions.
        strides: stride of each.
        num_features: length of the feature vectors.
        dropout: on the features, while training only.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 32,
        num_classes: int = 10,
        widths: Sequence[int] = (24, 48, 64, 80),
        strides: Sequence[int] = (2, 2, 1, 2),
        num_features: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(widths) != len(strides):
            raise ValueError(f"SmallClassifier needs one stride per width, got {len(strides)} and {len(widths)}.")
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "image_size": image_size,
            "num_classes": num_classes,
            "widths": list(widths),
            "strides": list(strides),
            "num_features": num_features,
            "dropout": dropout,
        }
        self.num_features = num_features
        self.num_classes = num_classes
        self.image_shape = (in_channels, image_size, image_size)
        blocks: list[nn.Module] = []
        size = image_size
        for width, stride in zip(widths, strides, strict=True):
            blocks += [
                nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            in_channels, size = width, size // stride
        self.trunk = nn.Sequential(*blocks, nn.Flatten())
        self.project = nn.Linear(in_channels * size * size, num_features)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, ``num_features``) of images (N, C, H, W) in [-1, 1].

        Raises:
            ValueError: the images have another shape than the classifier was trained on.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"this classifier reads images of shape {self.image_shape}, got {tuple(images.shape[1:])}; "
                "use the extractor that belongs to the data set."
            )
        return F.gelu(self.project(self.trunk(images)))

    def classify(self, features: Tensor) -> Tensor:
        """Class logits (N, ``num_classes``) of features (N, ``num_features``)."""
        return self.head(self.dropout(features))

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (N, ``num_classes``) of images (N, C, H, W) in [-1, 1]."""
        return self.classify(self(images))


def save_classifier(classifier: SmallClassifier, folder: str | Path, **notes: Any) -> None:
    """Write ``classifier.safetensors`` (float16) and ``classifier.json`` (arguments and ``notes``)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    save_file(state, str(folder / "classifier.safetensors"))
    text = json.dumps({"config": classifier.config, **notes}, indent=2)
    (folder / "classifier.json").write_text(text + "\n")


def load_classifier(name_or_path: str | Path) -> SmallClassifier:
    """A trained classifier, frozen and in eval mode.

    Args:
        name_or_path: zoo name (``digits``, ``fashion``) or a folder with ``classifier.safetensors`` and
            ``classifier.json``.

    Raises:
        ValueError: the name is not in the zoo.
        FileNotFoundError: the folder lacks the file.
    """
    weights = zoo_file(name_or_path, "classifier.safetensors", "benchmarks/build_reference.py")
    config = json.loads(weights.with_suffix(".json").read_text())["config"]
    classifier = SmallClassifier(**config)
    classifier.load_state_dict(load_file(str(weights)))
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features of many images, in batches and without gradient.

    Args:
        extractor: the extractor, already on the device it should run on.
        images: (N, C, H, W) in [-1, 1] on any device.
        batch_size: images per call.

    Returns:
        (N, d), float32, on the CPU.
    """
    device = next((p.device for p in extractor.parameters()), None) if isinstance(extractor, nn.Module) else None
    parts = [extractor(part.to(device=device, dtype=torch.float32)) for part in images.split(batch_size)]
    return torch.cat([part.float().cpu() for part in parts])
