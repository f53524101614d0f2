"""Feature extractors as configuration: named, checked before training, built when first needed.

An extractor object costs nothing until ``build``: a YAML file names it, ``check`` makes sure that its weights are there
and are the right ones, and the callback that owns it keeps the built network out of checkpoints and averages.
"""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from torch import nn

from lightning_distill.metrics.contents import content
from lightning_distill.metrics.features import FeatureExtractor, load_classifier
from lightning_distill.zoo import zoo_file

__all__ = ["Extractor", "ModuleExtractor", "ZooClassifier", "check_file", "file_sha256"]


class Extractor(ABC):
    """A named map from images (N, C, H, W) in [-1, 1] to features (N, ``num_features``).

    Attributes:
        name: short name in metric names: ``cnn`` gives ``fd_cnn``, ``recall_cnn``.
    """

    name: str
    #: name of the Frechet distance; only Inception-v3 with the published weights may say ``fid``
    distance_name: ClassVar[str] = ""

    @property
    def frechet_name(self) -> str:
        """Name of the Frechet distance in these features."""
        return self.distance_name or f"fd_{self.name}"

    @abstractmethod
    def check(self) -> None:
        """Raise if the weights are missing or not the expected ones; reads no more than their bytes."""

    @abstractmethod
    def build(self) -> FeatureExtractor:
        """The network, in eval mode, frozen, on the CPU. With class decisions it has ``classify(features)``."""

    @property
    @abstractmethod
    def key(self) -> str:
        """What the features depend on (kind, weights, preprocessing) as a short text: the key of cached statistics."""


class ZooClassifier(Extractor):
    """The small classifier shipped for a data set: ``fd_cnn``.

    Args:
        data: zoo entry (``fashion``, ``digits``) or a folder with ``classifier.safetensors``.
        name: short name in metric names.
    """

    def __init__(self, data: str, name: str = "cnn") -> None:
        self.data = data
        self.name = name

    def check(self) -> None:
        """Raise if the classifier is missing."""
        self._file()

    def build(self) -> FeatureExtractor:
        """The classifier."""
        return load_classifier(self.data)

    @property
    def key(self) -> str:
        """Hash of the weights."""
        return f"classifier-{file_sha256(self._file())[:16]}"

    def _file(self) -> Path:
        return zoo_file(self.data, "classifier.safetensors", "benchmarks/build_reference.py")


class ModuleExtractor(Extractor):
    """A user's own network.

    Args:
        module: maps images (N, C, H, W) in [-1, 1] to features (N, ``num_features``); ``classify(features)`` adds class
            accuracy and Inception Score.
        name: short name in metric names.
    """

    def __init__(self, module: nn.Module, name: str = "user") -> None:
        if not isinstance(module, FeatureExtractor):
            raise ValueError(
                f"{type(module).__name__} cannot extract features: it needs an attribute num_features and a forward "
                "from images (N, C, H, W) in [-1, 1] to (N, num_features)."
            )
        self.module = module
        self.name = name

    def check(self) -> None:
        """Nothing to read."""

    def build(self) -> FeatureExtractor:
        """The module itself, frozen."""
        return self.module.eval().requires_grad_(False)

    @property
    def key(self) -> str:
        """Hash of the module's weights and settings (the public attributes of its parts)."""
        return f"module-{hashlib.sha256(repr(content(self.module)).encode()).hexdigest()[:16]}"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_file(path: str | Path, argument: str, variable: str, sha256_prefix: str | None = None) -> Path:
    """A weights file that exists and has the expected content.

    Args:
        path: file.
        argument: argument that names it, for the message.
        variable: environment variable that names it, for the message.
        sha256_prefix: first characters of its SHA-256; None accepts any content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its content is another.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the weights with {argument}=FILE or {variable}=FILE.")
    if sha256_prefix and not (found := file_sha256(file)).startswith(sha256_prefix):
        raise ValueError(
            f"{file} is not the expected file: its SHA-256 begins with {found[:8]}, not {sha256_prefix}; "
            f"give another with {argument}=FILE or {variable}=FILE."
        )
    return file
