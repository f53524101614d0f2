"""scikit-learn's 1,797 handwritten digits of 8x8 pixels, which need no files and no download."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.loader import InMemory, epoch_generator

__all__ = ["Digits", "load_digits"]


def load_digits(split: Literal["train", "test", "all"] = "all") -> tuple[Tensor, Tensor]:
    """Pictures and labels, in a fixed random order.

    Args:
        split: ``train`` (the first 80 % of that order, 1,437), ``test`` (the other 360) or ``all``.

    Returns:
        images (N, 1, 8, 8), float32 in [-1, 1], and labels (N,), int64.

    Raises:
        ValueError: unknown split.
    """
    from sklearn.datasets import load_digits as load

    if split not in ("train", "test", "all"):
        raise ValueError(f"Digits has the splits train, test and all, not {split!r}.")
    data = load()
    order = torch.randperm(len(data.images), generator=epoch_generator(0, 0))
    images = torch.from_numpy(data.images).float()[order, None] / 8.0 - 1.0  # grey values are 0..16
    labels = torch.from_numpy(data.target).long()[order]
    border = len(images) * 4 // 5
    rows = {"train": slice(0, border), "test": slice(border, None), "all": slice(None)}[split]
    return images[rows], labels[rows]


class Digits(DistillationDataModule):
    """Handwritten digits, (1, 8, 8) in [-1, 1], with class labels.

    Args:
        split: ``train`` (1,437 of them), ``test`` (360) or ``all``.
        **kwargs: arguments of ``DistillationDataModule``.
    """

    shape = (1, 8, 8)
    num_classes = 10
    sigma_data = 0.752
    mean = -0.39

    def __init__(self, split: Literal["train", "test", "all"] = "train", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.split = split

    def make_source(self) -> InMemory:
        """The chosen split."""
        images, labels = load_digits(self.split)
        return InMemory(Batch(cond={"class_labels": labels}, x0=images))
