"""Inception-v3 features: the only ones in which a Frechet distance may be called ``fid``."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.metrics.extractors import Extractor, check_file, file_sha256
from lightning_distill.metrics.features import FeatureExtractor

__all__ = ["Inception", "InceptionNetwork", "to_bytes"]

VARIABLE = "LIGHTNING_DISTILL_INCEPTION"
#: of weights-inception-2015-12-05-6726825d.pth, torch-fidelity's conversion of the original TensorFlow weights
PUBLISHED = "6726825d"
_SIZE = 299


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as three-channel bytes, rounded to the nearest: what every published FID was computed on.

    Args:
        images: (N, 1 or 3, H, W), floating.
    """
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


class InceptionNetwork(nn.Module):
    """torch-fidelity's Inception-v3 on images in [-1, 1].

    Args:
        state: state dict of the network; None lets torch-fidelity fetch the published one.
        antialias: reduce large images with an antialiasing filter first, which is not what published figures did.
    """

    num_features = 2048

    def __init__(self, state: dict[str, Tensor] | None, antialias: bool = False) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        source: Any = None
        if state is not None:  # the class reads pickles; it gets one of ours, with nothing but tensors in it
            source = io.BytesIO()
            torch.save(state, source)
            source.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=source)
        except RuntimeError as error:
            raise ValueError(
                f"the file does not hold torch-fidelity's Inception-v3 ({str(error).splitlines()[0]})."
            ) from None
        self.antialias = antialias

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (N, 2048), float32, of images (N, 1 or 3, H, W) in [-1, 1]."""
        if self.antialias and max(images.shape[-2:]) > _SIZE:
            images = F.interpolate(images, (_SIZE, _SIZE), mode="bilinear", align_corners=False, antialias=True)
        return self.network(to_bytes(images))[0]

    def classify(self, features: Tensor) -> Tensor:
        """Class scores (N, 1008) without the bias, as Inception Score takes them."""
        return features @ self.network.fc.weight.T


class Inception(Extractor):
    """Inception-v3 from a local file: ``fid``.

    Args:
        weights: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth`` (or the same as .safetensors); None
            reads ``LIGHTNING_DISTILL_INCEPTION``.
        antialias: see ``InceptionNetwork``; figures are then called ``fd_inception``.
        published: require the published weights, recognised by their SHA-256; with other weights figures are called
            ``fd_inception``.
        allow_download: let torch-fidelity fetch the published weights when no file is given.
        name: short name in metric names.
    """

    def __init__(
        self,
        weights: str | None = None,
        antialias: bool = False,
        published: bool = True,
        allow_download: bool = False,
        name: str = "inception",
    ) -> None:
        self.weights = weights or os.environ.get(VARIABLE)
        self.antialias = antialias
        self.published = published
        self.allow_download = allow_download
        self.name = name

    @property
    def frechet_name(self) -> str:
        """``fid`` for the published weights with the published resizing, else ``fd_inception``."""
        return "fid" if self.published and not self.antialias else f"fd_{self.name}"

    def check(self) -> None:
        """Raise if the file is missing, or is not the published one where that is required."""
        if self.weights is None:
            if self.allow_download:
                return
            raise FileNotFoundError(
                "Inception needs weights-inception-2015-12-05-6726825d.pth of torch-fidelity; give the file with "
                f"Inception(weights=FILE) or {VARIABLE}=FILE, or set allow_download=True."
            )
        # a conversion to safetensors has another hash than the file it was made from
        check_file(self.weights, "Inception(weights)", VARIABLE, PUBLISHED if self.published else None)

    def build(self) -> FeatureExtractor:
        """The network."""
        self.check()
        state = None
        if self.weights is not None:
            path = Path(self.weights).expanduser()
            safe = path.suffix == ".safetensors"
            state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        return InceptionNetwork(state, self.antialias).eval().requires_grad_(False)

    @property
    def key(self) -> str:
        """Hash of the weights and the way of resizing."""
        content = PUBLISHED if self.weights is None else file_sha256(Path(self.weights).expanduser())[:16]
        return f"inception-{content}-{'antialias' if self.antialias else 'tf'}"
