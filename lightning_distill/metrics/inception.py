"""Inception-v3 features: the only ones in which a Frechet distance may be called ``fid``."""

import io
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.metrics.extractors import Extractor, check_file, file_sha256
from lightning_distill.metrics.features import FeatureExtractor

__all__ = ["Inception", "InceptionNetwork", "read_state", "to_bytes", "to_rgb"]

VARIABLE = "LIGHTNING_DISTILL_INCEPTION"
#: of weights-inception-2015-12-05-6726825d.pth, torch-fidelity's conversion of the original TensorFlow weights
PUBLISHED = "6726825d"
_FILE = f"weights-inception-2015-12-05-{PUBLISHED}.pth"
_SIZE = 299


def to_rgb(images: Tensor) -> Tensor:
    """Images as every extractor reads them: three channels, float32, cut to [-1, 1] as a saved picture is.

    Args:
        images: (N, 1 or 3, H, W) in [-1, 1], floating.

    Returns:
        (N, 3, H, W), float32; NaN where a value is NaN or inf, so that broken samples give broken features.

    Raises:
        ValueError: the images have another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"extractors of pictures read images (N, 1 or 3, H, W), got {tuple(images.shape)}; decode latents first."
        )
    images = images.float()
    return images.clamp(-1, 1).masked_fill(~images.isfinite(), float("nan")).expand(-1, 3, -1, -1)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as three-channel bytes, rounded to the nearest: what every published FID was computed on.

    Args:
        images: (N, 1 or 3, H, W), floating; values outside [-1, 1] are cut.

    Returns:
        (N, 3, H, W), uint8.
    """
    return (to_rgb(images) * 127.5 + 128).clamp(0, 255).to(torch.uint8)


class InceptionNetwork(nn.Module):
    """torch-fidelity's Inception-v3 on images in [-1, 1].

    Args:
        state: state dict of the network, under torch-fidelity's names.
        antialias: bring the images to 299 x 299 with an antialiasing filter, which is not what published figures did.

    Raises:
        ValueError: the state dict is another network's.
    """

    num_features = 2048

    def __init__(self, state: dict[str, Tensor], antialias: bool = False) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        source = io.BytesIO()  # the class unpickles whatever it is given: it gets tensors only
        torch.save(state, source)
        source.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=source)
        except RuntimeError:
            raise ValueError(
                f"the weights are not torch-fidelity's Inception-v3 (their first tensor is {next(iter(state))})."
            ) from None
        self.antialias = antialias

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (N, 2048), float32, of images (N, 1 or 3, H, W) in [-1, 1]; NaN where an image has NaN."""
        broken = ~images.isfinite().flatten(1).all(dim=1, keepdim=True)  # bytes would hide them
        pixels = to_bytes(images)
        if self.antialias and tuple(pixels.shape[-2:]) != (_SIZE, _SIZE):
            smooth = F.interpolate(pixels.float(), (_SIZE, _SIZE), mode="bilinear", align_corners=False, antialias=True)
            pixels = smooth.round().to(torch.uint8)
        return self.network(pixels)[0].masked_fill(broken, float("nan"))

    def classify(self, features: Tensor) -> Tensor:
        """Class scores (N, 1008) without the bias, as Inception Score takes them."""
        return features @ self.network.fc.weight.T


class Inception(Extractor):
    """Inception-v3 from a local file: ``fid``.

    Args:
        weights: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``; None reads
            ``LIGHTNING_DISTILL_INCEPTION``. A .safetensors file has another hash: it needs ``published=False``.
        antialias: see ``InceptionNetwork``; figures are then called ``fd_inception``.
        published: require the published weights, recognised by their SHA-256; False accepts any file, and figures are
            called ``fd_inception``.
        allow_download: fetch the published weights into torch.hub's cache when no file is given.
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
                f"Inception needs {_FILE} of torch-fidelity; give the file with Inception(weights=FILE) or "
                f"{VARIABLE}=FILE, or set allow_download=True."
            )
        check_file(self.weights, "weights", VARIABLE, PUBLISHED if self.published else None)

    def build(self) -> FeatureExtractor:
        """The network.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: the file is not the published one where that is required, or holds another network.
        """
        self.check()
        path = _download() if self.weights is None else Path(self.weights).expanduser()
        state = read_state(path)
        try:
            network = InceptionNetwork(state, self.antialias)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return network.eval().requires_grad_(False)

    @property
    def key(self) -> str:
        """Hash of the weights and the way of resizing."""
        # the download is refused unless its hash begins like this
        content = PUBLISHED if self.weights is None else file_sha256(Path(self.weights).expanduser())[:16]
        return f"inception-{content}-{'antialias' if self.antialias else 'tf'}"


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors file, or of a torch file from which nothing but tensors is read.

    Raises:
        ValueError: the file is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # a broken file raises anything, depending on where it is broken
        state = None
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} cannot be read as a state dict (torch or safetensors); copy or download it again.")
    return state


def _download() -> Path:
    """The published weights in torch.hub's cache, fetched if they are not there; their hash is checked either way."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / _FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=PUBLISHED, progress=False)
    return check_file(path, "weights", VARIABLE, PUBLISHED)
