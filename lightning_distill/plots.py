"""Pictures of samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["save_comparison", "save_grid", "save_strips"]


def save_grid(images: Tensor, path: str | Path, columns: int = 10, scale: int = 2) -> None:
    """Images (N, C, H, W) in [-1, 1] as one PNG; 2-D points (N, 2) as a scatter plot.

    Args:
        images: samples.
        path: file to write.
        columns: images per row.
        scale: integer enlargement of each pixel.
    """
    if images.ndim == 2:
        _scatter({"samples": images}, path)
        return
    from torchvision.utils import make_grid, save_image

    large = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    save_image(make_grid(large.clamp(-1, 1) * 0.5 + 0.5, nrow=columns), path)


def save_comparison(panels: Mapping[str, Tensor], path: str | Path, columns: int = 10) -> None:
    """Titled blocks of samples side by side, all from the same noise.

    Args:
        panels: samples by title, each (N, C, H, W) in [-1, 1] or (N, 2).
        path: PNG to write.
        columns: images per row of a block.
    """
    if next(iter(panels.values())).ndim == 2:
        _scatter(panels, path)
        return
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    rows = -(-len(next(iter(panels.values()))) // columns)
    figure = Figure(figsize=(4.0 * len(panels), 4.0 * rows / columns + 0.4), layout="constrained")
    for axis, (title, images) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis.imshow(make_grid(images.clamp(-1, 1) * 0.5 + 0.5, nrow=columns).permute(1, 2, 0), interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(path, dpi=110)


def save_strips(strips: Mapping[str, Tensor], path: str | Path, scale: int = 2) -> None:
    """Sequences of images as rows, the named sequences of one sample below each other.

    Args:
        strips: (N, T, C, H, W) in [-1, 1] by name, all of one shape; row order is sample by sample.
        path: PNG to write.
        scale: integer enlargement of each pixel.
    """
    stacked = torch.stack(list(strips.values()), dim=1)
    save_grid(stacked.flatten(0, 2), path, columns=stacked.shape[2], scale=scale)


def _scatter(panels: Mapping[str, Tensor], path: str | Path) -> None:
    from matplotlib.figure import Figure

    limit = 1.1 * float(torch.cat([p.abs() for p in panels.values()]).quantile(0.999))
    figure = Figure(figsize=(4.0 * len(panels), 4.2), layout="constrained")
    for axis, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis.scatter(*points.cpu().T, s=1, alpha=0.4)
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    figure.savefig(path, dpi=80)
