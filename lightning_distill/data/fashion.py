"""Fashion-MNIST: 70,000 pictures of clothes in 10 classes (arXiv:1708.07747), padded to 32x32."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_distill.batch import Batch
from lightning_distill.data.base import DistillationDataModule, bytes_to_unit
from lightning_distill.data.idx import read_idx
from lightning_distill.data.loader import InMemory

__all__ = ["DATA_VARIABLE", "FashionMNIST", "load_fashion", "pad_to_32"]

#: Environment variable with the folder of data sets, used where no ``root`` is given.
DATA_VARIABLE = "LIGHTNING_DISTILL_DATA"

_FOLDERS = ("", "FashionMNIST/raw", "fashion-mnist")
_PREFIX = {"train": "train", "test": "t10k"}


def pad_to_32(images: Tensor) -> Tensor:
    """Bytes (N, 28, 28) to floats (N, 1, 32, 32) in [-1, 1], the border at -1 like the background."""
    return F.pad(bytes_to_unit(images)[:, None], (2, 2, 2, 2), value=-1.0)


def _root(root: str | Path | None) -> Path:
    folder = root if root is not None else os.environ.get(DATA_VARIABLE)
    if not folder:
        raise FileNotFoundError(
            "Fashion-MNIST needs the folder of its IDX files (train-images-idx3-ubyte and so on, plain or "
            ".gz): "
            f"give FashionMNIST(root=...) or set the environment variable {DATA_VARIABLE}."
        )
    return Path(folder).expanduser()


def _find(root: Path, name: str) -> Path:
    for folder in _FOLDERS:
        for suffix in ("", ".gz"):
            if (path := root / folder / (name + suffix)).is_file():
                return path
    raise FileNotFoundError(
        f"{name}[.gz] is not in {root} (nor in its FashionMNIST/raw or fashion-mnist): point "
        "FashionMNIST(root=...) or "
        f"the environment variable {DATA_VARIABLE} to the IDX files, or ask for them with download=True."
    )


def load_fashion(root: str | Path | None = None, split: str = "train") -> tuple[Tensor, Tensor]:
    """Pictures and labels as stored.

    Args:
        root: folder of the IDX files, or the one that torchvision downloaded to; None reads the environment
            variable ``LIGHTNING_DISTILL_DATA``.
        split: ``train`` (60,000) or ``test`` (10,000).

    Returns:
        images (N, 28, 28), uint8, and labels (N,), int64.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is corrupted or truncated, or the two do not belong together.
    """
    if split not in _PREFIX:
        raise ValueError(f"Fashion-MNIST has the splits train and test, not {split!r}.")
    folder = _root(root)
    image_path = _find(folder, f"{_PREFIX[split]}-images-idx3-ubyte")
    label_path = _find(folder, f"{_PREFIX[split]}-labels-idx1-ubyte")
    images, labels = read_idx(image_path, ndim=3), read_idx(label_path, ndim=1)
    if len(images) != len(labels) or tuple(images.shape[1:]) != (28, 28):
        raise ValueError(
            f"{image_path} holds pictures of shape {tuple(images.shape)} and {label_path} {len(labels)} "
            "labels; "
            "Fashion-MNIST has as many 28x28 pictures as labels, so the files belong to different data sets."
        )
    return images, labels.long()


class FashionMNIST(DistillationDataModule):
    """Fashion-MNIST's training pictures, (1, 32, 32) in [-1, 1], with class labels.

    Kept as bytes in memory (47 MB) and converted batch by batch.

    Args:
        root: folder of the IDX files (plain or .gz), or torchvision's root; None reads
            ``LIGHTNING_DISTILL_DATA``.
        download: let torchvision fetch missing files into ``root``. Nothing is fetched otherwise.
        **kwargs: arguments of ``DistillationDataModule``.

    Raises:
        FileNotFoundError: a file is missing; raised before training starts.
        ValueError: a file is corrupted.
    """

    shape = (1, 32, 32)
    num_classes = 10
    sigma_data = 0.664
    mean = -0.562

    def __init__(self, root: str | None = None, download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Fetch the files if that was asked for."""
        if self.download:
            from torchvision.datasets import FashionMNIST as Download

            Download(str(_root(self.root)), download=True)

    def make_source(self) -> InMemory:
        """All 60,000 training pictures."""
        images, labels = load_fashion(self.root)
        return InMemory(Batch(cond={"class_labels": labels}, x0=images), transform=_unit)


def _unit(batch: Batch) -> Batch:
    assert batch.x0 is not None
    return Batch(cond=batch.cond, x0=pad_to_32(batch.x0), size=batch.size)
