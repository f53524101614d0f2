"""Resolution and aspect-ratio buckets: pictures of several shapes, batches of one shape each.

A bucket is a size that the network is trained at. A picture goes to the bucket of the nearest aspect ratio, is resized
until it covers the bucket, and the rest is cut off. What was done to it are the sizes that SDXL is conditioned on
(arXiv:2307.01952, section 2.2).

    time_ids = (original height, original width, crop top, crop left, target height, target width)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_distill.data.loader import ResumableLoader, epoch_generator
from lightning_distill.data.shards import listed

__all__ = ["Bucket", "BucketLoader", "assign", "fit_to_bucket", "make_buckets", "time_ids"]


@dataclass(frozen=True, order=True)
class Bucket:
    """One size of pictures, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def make_buckets(resolution: int, step: int = 64, max_ratio: float = 2.0) -> list[Bucket]:
    """Sizes of about ``resolution**2`` pixels, from narrow to wide.

    Every height is a multiple of ``step``, and the width is the largest multiple with which the area does not exceed
    ``resolution**2``; each size is there upright and lying, and the square is among them.

    Args:
        resolution: side of the square one, a multiple of ``step``.
        step: what all sides are multiples of; at least the autoencoder's factor times the patch size.
        max_ratio: largest ratio of the sides, >= 1.

    Raises:
        ValueError: a number is out of range.
    """
    if step < 1 or resolution < step or resolution % step or max_ratio < 1:
        raise ValueError(
            f"buckets of resolution {resolution}, step {step} and max_ratio {max_ratio:g}: the resolution must be a "
            "multiple of the step and the ratio at least 1."
        )
    found = set()
    for short in range(step, resolution + 1, step):
        long = resolution * resolution // short // step * step
        if long / short <= max_ratio:
            found |= {Bucket(short, long), Bucket(long, short)}
    return sorted(found, key=lambda b: (b.width / b.height, b.height))


def assign(height: int, width: int, buckets: Sequence[Bucket]) -> int:
    """Index of the bucket whose aspect ratio is nearest, in the logarithm; the larger one of two alike.

    Args:
        height: of the picture, in pixels.
        width: of the picture.
        buckets: at least one.
    """
    ratio = math.log(width / height)
    return min(
        range(len(buckets)),
        key=lambda i: (
            round(abs(math.log(buckets[i].width / buckets[i].height) - ratio), 12),
            -buckets[i].height * buckets[i].width,
        ),
    )


def fit_to_bucket(image: Tensor, bucket: Bucket) -> tuple[Tensor, tuple[int, int]]:
    """Resize a picture until it covers a bucket, and cut the rest off evenly.

    Args:
        image: (C, H, W) or frames (C, F, H, W), uint8 or floating.
        bucket: the size wanted.

    Returns:
        (C, [F,] bucket.height, bucket.width) of the same dtype, and how many rows and columns of the resized picture
        were cut off at the top and the left.
    """
    from torchvision.transforms.functional import InterpolationMode, resize

    height, width = image.shape[-2:]
    scale = max(bucket.height / height, bucket.width / width)
    size = [max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))]
    if size != [height, width]:
        frames = image.flatten(0, -3)
        image = resize(frames, size, InterpolationMode.BICUBIC, antialias=True).reshape(*image.shape[:-2], *size)
    top, left = (size[0] - bucket.height) // 2, (size[1] - bucket.width) // 2
    return image[..., top : top + bucket.height, left : left + bucket.width], (top, left)


def time_ids(original: tuple[int, int], crop: tuple[int, int], target: Bucket) -> Tensor:
    """SDXL's size conditioning of one picture, (6,), float32.

    Args:
        original: height and width before resizing.
        crop: rows and columns cut off at the top and the left.
        target: the bucket.
    """
    return torch.tensor([*original, *crop, target.height, target.width], dtype=torch.float32)


class BucketLoader(ResumableLoader):
    """A ``ResumableLoader`` whose every batch is of one bucket, over all ranks and slices.

    In each epoch the samples of every bucket are shuffled and cut into global batches; the tails are dropped, and the
    batches of all buckets are shuffled together. Where no bucket fills a global batch, the largest is repeated to fill
    one. The order is a pure function of (seed, epoch), as is its parent's.

    Args:
        *args: of the parent, whose source concatenates the buckets.
        sizes: number of samples of each bucket, in the order of the source.
        **kwargs: of the parent.

    Raises:
        ValueError: the sizes do not add up to the source.
    """

    def __init__(self, *args: Any, sizes: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes = list(sizes)
        if sum(sizes) != len(self.source):  # type: ignore[arg-type]
            raise ValueError(
                f"the buckets hold {sum(sizes)} samples, but the source has {len(self.source)}."  # type: ignore[arg-type]
            )
        unseen = sorted(size for size in sizes if 0 < size < self.global_batch)
        if len(unseen) == len(self.sizes):
            unseen.pop()  # the largest is repeated
        if unseen:
            rank_zero_warn(
                f"{len(unseen)} of the {len(self.sizes)} sizes have fewer samples ({listed(unseen)}) than a cycle "
                f"takes of one size over all processes, {self.global_batch}: they are never drawn. Give fewer sizes, a "
                "smaller batch_size, or more data of these."
            )

    def state_dict(self) -> dict[str, Any]:
        """The position, with the sizes of the buckets, which the order depends on."""
        return {**super().state_dict(), "sizes": list(self.sizes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch.

        Raises:
            ValueError: the samples lie in other buckets than before.
        """
        if (before := list(state.get("sizes", self.sizes))) != self.sizes:
            raise ValueError(
                f"the checkpoint was written with {_told(before)}, but the data now has {_told(self.sizes)}, so that "
                "the order of its samples cannot be continued; give the data and bucket settings of the run that "
                "wrote it, or start a new run from its weights with student=FromCheckpoint(path)."
            )
        super().load_state_dict(state)

    def _batches_of(self, size: int) -> int:
        """Global batches of a bucket in an epoch."""
        return size // self.global_batch

    def __len__(self) -> int:
        return max(1, sum(map(self._batches_of, self.sizes)))

    def order(self, epoch: int) -> Tensor:
        """Sample indices of an epoch in the order of all ranks; every ``global_batch`` of them are of one bucket."""
        if not any(map(self._batches_of, self.sizes)):
            return self._smallest_epoch(epoch)
        batches, first = [], 0
        for stream, size in enumerate(self.sizes):
            count = self._batches_of(size)
            rows = self._permutation(size, epoch, stream)[: count * self.global_batch]
            batches.append(first + rows.reshape(count, self.global_batch))
            first += size
        together = torch.cat(batches)
        return together[self._permutation(len(together), epoch, len(self.sizes))].flatten()

    def _smallest_epoch(self, epoch: int) -> Tensor:
        """One batch: the largest bucket, repeated in other orders until it fills a global batch."""
        largest = max(range(len(self.sizes)), key=self.sizes.__getitem__)
        first, size = sum(self.sizes[:largest]), self.sizes[largest]
        repeats = -(-self.global_batch // size)
        return first + torch.cat([self._permutation(size, epoch, k) for k in range(repeats)])[: self.global_batch]

    def _permutation(self, n: int, epoch: int, stream: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(n)
        return torch.randperm(n, generator=epoch_generator(self.seed, epoch, stream))


def _told(sizes: Sequence[int]) -> str:
    return f"{len(sizes)} buckets of {listed(sizes)} samples"
