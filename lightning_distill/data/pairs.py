"""Stored noise-image pairs: what the teacher's deterministic sampler made of each noise.

A few thousand pairs fit into one safetensors file, which any tool can write; ``lightning-distill trajectories`` writes
stores (``data/trajectories.py``), which know their teacher and may be larger than the memory.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.loader import InMemory
from lightning_distill.data.store import is_store
from lightning_distill.data.trajectories import StoredTrajectories

__all__ = ["Pairs", "load_pairs", "open_pairs", "single_precision"]


def open_pairs(path: str | Path, conditions: str | None = None) -> InMemory | StoredTrajectories:
    """The pairs of a store or of a file, as a ``Source`` that gives float32.

    Args:
        path: store of ``lightning-distill trajectories``, or safetensors file.
        conditions: store of the conditions, for trajectories that were made with one.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: something else lies there.
    """
    if is_store(path):
        return StoredTrajectories(str(path), conditions)
    return InMemory(load_pairs(path), transform=single_precision)


def load_pairs(path: str | Path) -> Batch:
    """All pairs of a file as one batch.

    Args:
        path: safetensors file with ``noise`` (N, ...) and ``x0`` of the same shape, floating, and optionally
            ``class_labels`` (N,), integers.

    Returns:
        A batch with ``noise`` and ``x0`` in their stored dtype.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing, shapes do not agree, or a pair holds NaN or inf.
    """
    path = Path(path).expanduser()
    if is_store(path):
        raise ValueError(f"{path} is a store; read it with Trajectories(path=...) instead of Pairs.")
    if not path.is_file():
        raise FileNotFoundError(f"the pairs file {path} does not exist; give Pairs(path=...) a safetensors file.")
    try:
        tensors = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); write it again.") from None
    if missing := {"noise", "x0"} - set(tensors):
        raise ValueError(
            f"{path} lacks {sorted(missing)}; a pairs file holds noise, x0 and, for conditional teachers, "
            f"class_labels, this one holds {sorted(tensors)}."
        )
    noise, x0, labels = tensors["noise"], tensors["x0"], tensors.get("class_labels")
    if noise.shape != x0.shape or x0.ndim < 2:
        raise ValueError(f"{path}: noise {tuple(noise.shape)} and x0 {tuple(x0.shape)} must have one shape, (N, ...).")
    if labels is not None and (labels.shape != x0.shape[:1] or labels.is_floating_point()):
        raise ValueError(
            f"{path}: class_labels must be {len(x0)} integers, one per pair, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    for key, value in (("noise", noise), ("x0", x0)):
        if bad := int((~value.flatten(1).isfinite().all(dim=1)).sum()):
            raise ValueError(f"{path}: {bad} of {len(value)} samples of {key} contain NaN or inf; sample them again.")
    return Batch(cond={} if labels is None else {"class_labels": labels.long()}, x0=x0, noise=noise)


class Pairs(DistillationDataModule):
    """Noise-image pairs from a file; half-precision files stay so in memory and are given out as float32.

    Args:
        path: safetensors file, see ``load_pairs``.
        sigma_data: standard deviation of ``x0`` about its per-channel mean.
        num_classes: number of classes; None means one more than the largest label in the file.
        **kwargs: arguments of ``DistillationDataModule``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold pairs, or a label is not below ``num_classes``.
    """

    def __init__(self, path: str, sigma_data: float = 0.5, num_classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = path
        self.sigma_data = sigma_data
        pairs = load_pairs(path)
        assert pairs.x0 is not None
        self.shape = tuple(pairs.x0.shape[1:])
        labels = pairs.cond.get("class_labels")
        found = None if labels is None else int(labels.max()) + 1
        if found is not None and num_classes is not None and found > num_classes:
            raise ValueError(f"{path} holds the class {found - 1}, but num_classes={num_classes}.")
        self.num_classes = None if found is None else num_classes or found
        self._pairs = pairs

    def make_source(self) -> InMemory:
        """All pairs."""
        return InMemory(self._pairs, transform=single_precision)


def single_precision(batch: Batch) -> Batch:
    """Pairs of any dtype as float32."""

    def single(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(torch.float32)

    return Batch(cond=batch.cond, x0=single(batch.x0), noise=single(batch.noise), size=batch.size)
