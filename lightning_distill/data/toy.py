"""Endless points of two-dimensional distributions: every epoch is a fresh sample."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.loader import epoch_generator
from lightning_distill.networks.analytic import ring, ring4

__all__ = ["TOYS", "Toy2D", "sample_toy"]


def _checkerboard(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The 8 dark unit squares of a 4x4 board on [-2, 2]^2; the class is the square."""
    square = torch.randint(0, 8, (n,), generator=generator)
    column, row = square // 2, 2 * (square % 2) + (square // 2) % 2
    corner = torch.stack([column, row], dim=1).double() - 2.0
    return (corner + torch.rand(n, 2, generator=generator, dtype=torch.float64)).float(), square


def _ring8(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return ring(8, 2.0, 0.15, labelled=True).sample(n, generator)


#: By name: the sampler, the number of classes (modes or squares) and the standard deviation of one
#: coordinate.
TOYS: dict[str, tuple[Callable[[int, torch.Generator], tuple[Tensor, Tensor]], int, float]] = {
    "ring": (lambda n, g: ring(labelled=True).sample(n, g), 8, math.sqrt(2.0**2 / 2 + 0.25**2)),
    "ring4": (lambda n, g: ring4(labelled=True).sample(n, g), 4, math.sqrt(1.5**2 / 2 + 0.35**2)),
    "ring8": (_ring8, 8, math.sqrt(2.0**2 / 2 + 0.15**2)),
    "checkerboard": (_checkerboard, 8, 4.0 / math.sqrt(12.0)),
}


def sample_toy(name: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points of a named distribution.

    Args:
        name: ``ring`` (8 Gaussians, radius 2, std .25), ``ring4`` (radius 1.5, std .35), ``ring8`` (radius 2,
            std .15) or ``checkerboard`` (4x4 on [-2, 2]^2).
        n: number of points.
        generator: CPU generator.

    Returns:
        points (n, 2), float32, and the mode or square of each, (n,), int64.

    Raises:
        ValueError: unknown name.
    """
    if name not in TOYS:
        raise ValueError(f"there is no 2-D distribution {name!r}; choose one of {', '.join(TOYS)}.")
    return TOYS[name][0](n, generator)


class _Points:
    """A ``Source`` that draws one epoch at a time from (seed, epoch)."""

    def __init__(self, name: str, n: int, seed: int, labelled: bool) -> None:
        self.name, self.n, self.seed, self.labelled = name, n, seed, labelled
        self._epoch: int | None = None

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        if epoch != self._epoch:
            self._x0, self._labels = sample_toy(self.name, self.n, epoch_generator(self.seed, epoch, stream=2))
            self._epoch = epoch
        cond = {"class_labels": self._labels.index_select(0, indices)} if self.labelled else {}
        return Batch(cond=cond, x0=self._x0.index_select(0, indices))


class Toy2D(DistillationDataModule):
    """Points in the plane, (2,); no epoch repeats those of another.

    Args:
        name: distribution, see ``sample_toy``.
        samples_per_epoch: points in an epoch.
        labelled: give the mode (or square) of each point as its class.
        **kwargs: arguments of ``DistillationDataModule``.

    Raises:
        ValueError: unknown name.
    """

    shape = (2,)
    mean = 0.0

    def __init__(
        self, name: str = "ring", samples_per_epoch: int = 51_200, labelled: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if name not in TOYS:
            raise ValueError(f"Toy2D has no distribution {name!r}; choose one of {', '.join(TOYS)}.")
        self.distribution = name
        self.samples_per_epoch = samples_per_epoch
        self.labelled = labelled
        _, modes, self.sigma_data = TOYS[name]
        self.num_classes = modes if labelled else None

    def make_source(self) -> _Points:
        """The generator of points."""
        return _Points(self.distribution, self.samples_per_epoch, self.seed, self.labelled)
