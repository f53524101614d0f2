"""Reference features of real data, shipped beside each small teacher.

Two disjoint halves are kept apart: ``selection`` for tuning and checkpoint choice, ``held_out`` for the
figures that are reported. The statistics ``train`` are those of all training images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_distill.metrics.frechet import FeatureStatistics
from lightning_distill.zoo import zoo_file

__all__ = ["HALVES", "Half", "Reference", "load_reference", "save_reference"]

Half = Literal["selection", "held_out"]
HALVES: tuple[Half, Half] = ("selection", "held_out")


@dataclass(frozen=True)
class Reference:
    """What generated samples are compared with.

    Attributes:
        statistics: by set, ``train`` and the two halves; computed from float32 features before storage.
        features: by half, (n, d), float32 (stored as float16).
        labels: by half, (n,), int64.
        info: extractor, data and the real-vs-real floors.
    """

    statistics: dict[str, FeatureStatistics]
    features: dict[str, Tensor]
    labels: dict[str, Tensor]
    info: dict[str, Any]


def save_reference(reference: Reference, folder: str | Path) -> None:
    """Write ``reference.safetensors``: features as float16, labels as uint8, statistics as float64."""
    tensors: dict[str, Tensor] = {}
    for name, statistics in reference.statistics.items():
        tensors[f"{name}.mean"] = statistics.mean.contiguous()
        tensors[f"{name}.cov"] = statistics.cov.contiguous()
    for half in HALVES:
        tensors[f"{half}.features"] = reference.features[half].to(torch.float16)
        tensors[f"{half}.labels"] = reference.labels[half].to(torch.uint8)
    counts = {name: statistics.n for name, statistics in reference.statistics.items()}
    metadata = {"info": json.dumps({**reference.info, "n": counts})}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(Path(folder) / "reference.safetensors"), metadata=metadata)


def load_reference(name_or_path: str | Path) -> Reference:
    """Reference features and statistics of a zoo entry (``digits``, ``fashion``) or of a folder.

    Raises:
        ValueError: the name is not in the zoo.
        FileNotFoundError: the folder lacks the file.
    """
    path = zoo_file(name_or_path, "reference.safetensors", "benchmarks/build_reference.py")
    with safe_open(str(path), framework="pt") as file:
        info = json.loads(file.metadata()["info"])
        statistics = {
            name: FeatureStatistics(file.get_tensor(f"{name}.mean"), file.get_tensor(f"{name}.cov"), n)
            for name, n in info["n"].items()
        }
        features: dict[str, Tensor] = {half: file.get_tensor(f"{half}.features").float() for half in HALVES}
        labels: dict[str, Tensor] = {half: file.get_tensor(f"{half}.labels").long() for half in HALVES}
    return Reference(statistics, features, labels, info)
