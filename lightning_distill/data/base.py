"""The datamodule behind every data set of this package, and the check of its declared scaling."""

import math
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_distill.batch import Batch, as_batch
from lightning_distill.data.loader import ResumableLoader, Source

__all__ = ["DistillationDataModule", "Scaling", "check_scaling"]


@dataclass(frozen=True)
class Scaling:
    """Measured scaling of clean samples.

    Attributes:
        mean: per-channel mean, (C,), float64.
        std: root mean square of all elements about the per-channel mean.
    """

    mean: Tensor
    std: float


def check_scaling(
    x0: Tensor, sigma_data: float, mean: float | None = None, tolerance: float = 0.2, where: str = "the data"
) -> Scaling:
    """Refuse clean samples whose scale is not the declared one.

    A wrong scale (bytes instead of [-1, 1], unscaled latents) trains without any error and ruins every noise
    level. What four standard errors explain is not held against the samples, and of fewer than 16 only twice
    the declared spread is refused.

    Args:
        x0: clean samples, (B, C, ...).
        sigma_data: declared standard deviation about the per-channel mean.
        mean: declared mean, the same for every channel; None leaves it unchecked.
        tolerance: largest accepted deviation of the std, and of the mean, in units of ``sigma_data``.
        where: what the samples are, for the message.

    Returns:
        The measured per-channel mean and overall std.

    Raises:
        ValueError: NaN or inf, or a figure is off by more than the tolerance.
    """
    values = x0.detach().double().flatten(2) if x0.ndim > 2 else x0.detach().double()[..., None]
    if bad := int((~values.flatten(1).isfinite().all(dim=1)).sum()):
        raise ValueError(f"{where}: {bad} of {len(x0)} samples contain NaN or inf; remove them or repair the file.")
    centre = values.mean(dim=(0, 2))
    squares = (values - centre[:, None]).square().mean(dim=(1, 2))
    variance = squares.mean().item()
    std = math.sqrt(variance)
    measured = Scaling(centre, std)
    # a few samples may all lie in one mode, but hardly spread much wider than the data
    few = len(x0) < 16
    # four standard errors, and what the estimated centre takes away from the variance
    slack = 0.0 if few else 4.0 * squares.std().item() / math.sqrt(len(x0)) + variance / len(x0)
    low, high = math.sqrt(max(0.0, variance - slack)), math.sqrt(variance + slack)
    lowest, highest = (0.0, 2.0 * sigma_data) if few else (sigma_data, sigma_data)
    if high < (1.0 - tolerance) * lowest or low > (1.0 + tolerance) * highest:
        raise ValueError(
            f"{where} has a standard deviation of {std:.3g}, but sigma_data={sigma_data:.3g} is declared "
            f"(more than {tolerance:.0%} off); rescale the samples or give sigma_data={std:.3g}."
        )
    if mean is None or few:
        return measured
    error = 4.0 * values.mean(dim=2).std(dim=0) / math.sqrt(len(x0))
    if bool(((centre - mean).abs() > tolerance * sigma_data + error).any()):
        found = [round(m, 3) for m in centre.tolist()]
        raise ValueError(
            f"{where} has per-channel means {found}, but a mean of {mean:.3g} is declared; "
            "shift the samples or correct the declaration."
        )
    return measured


class DistillationDataModule(LightningDataModule):
    """Training batches for distillation: resumable, split over ranks, with the sizes that the networks need.

    A batch holds ``batch_size`` samples per rank for every slice that the method's cycle needs
    (``slices_per_cycle`` of the LightningModule, 1 where it has none). A subclass gives ``shape``,
    ``num_classes``, ``sigma_data`` and ``make_source``.

    Args:
        batch_size: samples per rank and slice, that is per update of one network.
        seed: seed of the order (and of samples that are drawn).
        num_workers: loading processes; used by data sets that read files while training.
        pin_memory: put batches into page-locked memory.

    Attributes:
        shape: shape of one sample, (C, H, W) for images, (D,) for points.
        num_classes: number of classes of ``cond["class_labels"]``, None without labels.
        sigma_data: standard deviation of the samples about their per-channel mean.
        mean: their mean over everything, None where it is not declared.
    """

    shape: tuple[int, ...]
    num_classes: int | None
    sigma_data: float
    mean: float | None = None

    def __init__(self, batch_size: int = 64, seed: int = 0, num_workers: int = 0, pin_memory: bool = False) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1 sample per rank.")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._source: Source | Dataset[Any] | None = None

    @abstractmethod
    def make_source(self) -> Source | Dataset[Any]:
        """The training samples: a ``Source`` or a map-style data set. Called once, in ``setup``."""

    @property
    def source(self) -> Source | Dataset[Any]:
        """The training samples, made on first use."""
        if self._source is None:
            self._source = self.make_source()
        return self._source

    def setup(self, stage: str | None = None) -> None:
        """Make the source and check the scaling of its first samples before anything trains."""
        if stage in (None, "fit"):
            self.check(512 if isinstance(self.source, Source) else 64)

    def check(self, count: int = 512) -> Scaling | None:
        """Compare the first ``count`` samples of the first epoch with the declared scaling.

        Returns:
            The measured scaling, or None for batches without clean samples.

        Raises:
            ValueError: the scaling or the shape is not the declared one, or a sample holds NaN or inf.
        """
        source, name = self.source, type(self).__name__
        rows = ResumableLoader(source, batch_size=1, seed=self.seed).indices(0).flatten()[:count]
        if isinstance(source, Source):
            x0 = source.gather(rows, 0).x0
        else:
            x0 = as_batch(default_collate([source[i] for i in rows.tolist()])).x0
        if x0 is None:
            return None
        if tuple(x0.shape[1:]) != tuple(self.shape):
            raise ValueError(f"{name} declares samples of shape {tuple(self.shape)}, but has {tuple(x0.shape[1:])}.")
        return check_scaling(x0, self.sigma_data, self.mean, where=name)

    def train_dataloader(self) -> ResumableLoader:
        """The loader of this rank, sized for one cycle of the method per batch."""
        slices, split = 1, None
        if self.trainer is not None:
            slices = getattr(self.trainer.lightning_module, "slices_per_cycle", 1)
            split = self.trainer.distributed_sampler_kwargs
        return ResumableLoader(
            self.source,
            self.batch_size,
            slices=slices,
            seed=self.seed,
            rank=split["rank"] if split else 0,
            world_size=split["num_replicas"] if split else 1,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            same_epoch=getattr(self.trainer, "overfit_batches", 0) > 0,
        )

    def val_dataloader(self) -> Any:
        """One batch for ``validate``, which is about what callbacks measure; nothing while fitting."""
        if self.trainer is not None and self.trainer.state.fn == "fit":
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # as intended
            return []
        return DataLoader(_OneBatch(self.source, self.batch_size), batch_size=None)

    def test_dataloader(self) -> Any:
        """One batch for ``test``."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """One batch for ``predict``: its conditions, for which ``predict_step`` makes samples."""
        return self.val_dataloader()


class _OneBatch(Dataset[Batch]):
    """The first samples as a single batch."""

    def __init__(self, source: Source | Dataset[Any], size: int) -> None:
        self.source, self.size = source, min(size, len(source))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Batch:
        if isinstance(self.source, Source):
            return self.source.gather(torch.arange(self.size), 0)
        return as_batch(default_collate([self.source[i] for i in range(self.size)]))


def bytes_to_unit(images: Tensor) -> Tensor:
    """Bytes 0..255 to floats in [-1, 1]."""
    return images.float() / 127.5 - 1.0
