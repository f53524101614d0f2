"""Reference features of real data, shipped beside each small teacher.

Two disjoint halves are kept apart: ``selection`` for tuning and checkpoint choice, ``held_out`` for the
figures that are reported. The statistics ``train`` are those of all training images.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_distill.environment import cache_folder
from lightning_distill.metrics.extractors import Extractor
from lightning_distill.metrics.features import extract
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.zoo import zoo_file

__all__ = [
    "HALVES",
    "Half",
    "Reference",
    "ReferenceCache",
    "load_reference",
    "reference_from_images",
    "reference_from_points",
    "save_reference",
    "statistics_reference",
]

Half = Literal["selection", "held_out"]
HALVES: tuple[Half, Half] = ("selection", "held_out")


@dataclass(frozen=True)
class Reference:
    """What generated samples are compared with.

    Attributes:
        statistics: by set, ``train`` and the two halves; computed from float32 features before storage.
        features: by half, (n, d), float32 (stored as float16 where that is exact enough); empty where only statistics
            are known, which then serve the Frechet distance alone.
        labels: by half, (n,), int64; none for data without classes.
        info: extractor, data and the real-vs-real floors.
    """

    statistics: dict[str, FeatureStatistics]
    features: dict[str, Tensor]
    labels: dict[str, Tensor]
    info: dict[str, Any]


def save_reference(reference: Reference, folder: str | Path) -> None:
    """Write ``reference.safetensors``: features and labels as narrow as they can be, statistics as float64."""
    tensors: dict[str, Tensor] = {}
    for name, statistics in reference.statistics.items():
        tensors[f"{name}.mean"] = statistics.mean.contiguous()
        tensors[f"{name}.cov"] = statistics.cov.contiguous()
    for half, features in reference.features.items():
        tensors[f"{half}.features"] = _narrow_features(features).contiguous()
    for half, labels in reference.labels.items():
        tensors[f"{half}.labels"] = _narrow_labels(labels).contiguous()
    counts = {name: statistics.n for name, statistics in reference.statistics.items()}
    metadata = {"info": json.dumps({**reference.info, "n": counts})}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(Path(folder) / "reference.safetensors"), metadata=metadata)


def _narrow_features(features: Tensor) -> Tensor:
    """In float16 where its rounding is below a hundredth of the features' spread; not for large or tiny values."""
    if len(features) < 2:
        return features
    narrow = features.to(torch.float16)
    error = (narrow.double() - features.double()).square().mean()
    return narrow if error < 1e-4 * features.double().var(dim=0).mean() else features


def _narrow_labels(labels: Tensor) -> Tensor:
    """As the smallest of uint8, int32 and int64 that holds every value."""
    for dtype in (torch.uint8, torch.int32):
        if torch.equal(labels.to(dtype).long(), labels.long()):
            return labels.to(dtype)
    return labels.long()


def load_reference(name_or_path: str | Path) -> Reference:
    """Reference features and statistics of a zoo entry (``digits``, ``fashion``) or of a folder.

    Raises:
        ValueError: the name is not in the zoo.
        FileNotFoundError: the folder lacks the file.
    """
    return _read(zoo_file(name_or_path, "reference.safetensors", "benchmarks/build_reference.py"))


def _read(path: Path) -> Reference:
    with safe_open(str(path), framework="pt") as file:
        keys = set(file.keys())
        info = json.loads(file.metadata()["info"])

        def read(name: str, dtype: torch.dtype) -> Tensor:
            # tensors of safetensors are views of the file and would change with it
            return file.get_tensor(name).to(dtype, copy=True)

        statistics = {
            name: FeatureStatistics(read(f"{name}.mean", torch.float64), read(f"{name}.cov", torch.float64), n)
            for name, n in info["n"].items()
        }
        features: dict[str, Tensor] = {
            half: read(f"{half}.features", torch.float32) for half in HALVES if f"{half}.features" in keys
        }
        labels: dict[str, Tensor] = {
            half: read(f"{half}.labels", torch.int64) for half in HALVES if f"{half}.labels" in keys
        }
    return Reference(statistics, features, labels, info)


# ------------------------------------------------------------------------------------------------ made here
def reference_from_images(
    extractor: Extractor,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    most: int = 5_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Reference:
    """Reference of real images in the features of an extractor.

    Args:
        extractor: feature extractor.
        images: (N, C, H, W) in [-1, 1], N >= 2.
        labels: classes, (N,), or None.
        most: largest number of single features kept in each half; the statistics use all images.
        seed: seed of the split into halves.
        device: where features are computed.

    Returns:
        Reference with the distances between the sets of real images as ``info["fd_floors"]``.

    Raises:
        ValueError: fewer than two images, or another number of labels.
    """
    if len(images) < 2:
        raise ValueError(f"a reference needs two images or more, got {len(images)}.")
    if labels is not None and labels.shape != (len(images),):
        raise ValueError(f"a reference needs one label per image, got {tuple(labels.shape)} for {len(images)} images.")
    network = extractor.build()
    if isinstance(network, torch.nn.Module):
        network.to(device)
    features = extract(network, images).cpu()
    return _split(features, labels, most, seed, {"extractor": extractor.frechet_name})


def reference_from_points(points: Tensor, *, most: int = 5_000, seed: int = 0) -> Reference:
    """Reference of samples that are compared as they are: points in a plane, vectors; (N, ...), N >= 2."""
    return _split(points.flatten(1).float(), None, most, seed, {"extractor": "none"})


def _split(features: Tensor, labels: Tensor | None, most: int, seed: int, info: dict[str, Any]) -> Reference:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    size = min(most, len(features) // 2)
    rows = {half: order[i * size : (i + 1) * size] for i, half in enumerate(HALVES)}
    halves: dict[str, Tensor] = {half: features[rows[half]] for half in HALVES}
    statistics = {"train": FeatureStatistics.from_features(features)}
    floors = {}
    if size > 1:
        statistics |= {half: FeatureStatistics.from_features(part) for half, part in halves.items()}
        floors = {
            f"{a}_vs_{b}": frechet_distance(statistics[a], statistics[b])
            for a, b in (("selection", "train"), ("held_out", "train"), ("selection", "held_out"))
        }
    kept: dict[str, Tensor] = {} if labels is None else {half: labels[rows[half]].cpu() for half in HALVES}
    return Reference(statistics, halves, kept, {**info, "fd_floors": floors})


def statistics_reference(path: str | Path) -> Reference:
    """A reference that is only a mean and a covariance, from an ``.npz`` with ``mu`` and ``sigma`` (EDM, ADM).

    Its ``features`` and ``labels`` are empty: measures of single samples cannot use it.

    Raises:
        ValueError: the file lacks one of the two.
    """
    return Reference({"train": FeatureStatistics.load(path)}, {}, {}, {"extractor": Path(path).name, "fd_floors": {}})


class ReferenceCache:
    """References as files under a key of everything that they depend on.

    Args:
        folder: where they are kept; None is ``LIGHTNING_DISTILL_CACHE`` or ``~/.cache/lightning_distill``.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = cache_folder(folder) / "references"

    def get(self, key: str, build: Callable[[], Reference]) -> Reference:
        """The reference under ``key``; built and kept if it is not there or cannot be read.

        Args:
            key: any text; what is no plain name of a folder is kept under its hash.
            build: makes it.
        """
        if not re.fullmatch(r"\w[\w.-]{0,127}", key):
            key = hashlib.sha256(key.encode()).hexdigest()[:32]
        file = self.folder / key / "reference.safetensors"
        if file.is_file():
            try:
                return _read(file)
            except Exception as error:  # damaged: any reader's own error
                warnings.warn(f"{file} cannot be read ({error}) and is made again.", stacklevel=2)
        reference = build()
        try:
            with tempfile.TemporaryDirectory(dir=_made(self.folder)) as part:
                save_reference(reference, part)
                _made(file.parent)
                os.replace(Path(part) / file.name, file)
            return _read(file)  # rounded as later runs see it
        except OSError as error:
            warnings.warn(f"{self.folder} cannot be written ({error}); the next run will start over.", stacklevel=2)
        return reference


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
