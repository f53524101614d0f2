"""Pictures of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_distill.generation import bound, stock_noise
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.prediction import Prediction
from lightning_distill.samplers import SAMPLERS

__all__ = ["aligned_strips", "save_comparison", "save_grid", "save_strips", "target_strip"]


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
        strips: (N, T, C, H, W) in [-1, 1] by name, all of one shape; row order is sample by sample. Or points
            (N, T, 2), which become a row of scatter plots by name.
        path: PNG to write.
        scale: integer enlargement of each pixel.
    """
    if next(iter(strips.values())).ndim == 3:
        _scatter(
            {f"{name}, {k + 1}": x for name, xs in strips.items() for k, x in enumerate(xs.unbind(1))},
            path,
            len(strips),
        )
        return
    stacked = torch.stack(list(strips.values()), dim=1)
    save_grid(stacked.flatten(0, 2), path, columns=stacked.shape[2], scale=scale)


@torch.no_grad()
def target_strip(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Mapping[str, Any],
    times: Sequence[float],
    sampler: str = "ode",
    *,
    guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The clean-sample prediction at every step of a model's own sampling (diffusion target, arXiv:2503.10637).

    What the first steps of a student and of its teacher aim at shows where diversity is lost.

    Args:
        denoiser: student or teacher.
        noise: unit Gaussian starting noise, (N, ...), the same for all models that are compared.
        cond: conditions, tensors of N rows.
        times: the model's descending native times, without the final 0.
        sampler: ``ode`` or ``renoise``, which call the network once a step.
        guidance_scale: w of classifier-free guidance.
        generator: source of the fresh noise, drawn as in ``generation.generate``.

    Returns:
        (N, T, ...), float32, on the CPU; with either sampler the last one is the sample.

    Raises:
        ValueError: another sampler.
    """
    if sampler not in ("ode", "renoise"):
        raise ValueError(f"sampler={sampler!r} has no one prediction per step; give ode or renoise.")
    device, process = denoiser.device, denoiser.process
    placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in cond.items()}
    denoise = bound(denoiser, placed, sampler, guidance_scale)
    seen: list[Prediction] = []

    def recorded(*at: Tensor) -> Prediction:
        seen.append(denoise(*at))
        return seen[-1]

    def fresh(_step: int, x: Tensor) -> Tensor:
        return stock_noise(denoiser, x, generator)

    recorded.capability = getattr(denoise, "capability", None)  # type: ignore[attr-defined]
    SAMPLERS[sampler](recorded, process.prior(noise.to(device), times[0]), times, process, noise=fresh)
    return torch.stack([prediction.x0 for prediction in seen], dim=1).float().cpu()


def aligned_strips(strips: Mapping[str, tuple[Tensor, Sequence[float]]]) -> dict[str, Tensor]:
    """Strips of models with different numbers of steps in columns of equal time, for ``save_strips``.

    A model of fewer steps shows its latest prediction until it makes the next.

    Args:
        strips: what ``target_strip`` returned and its times, by name.

    Returns:
        strips of the length of the longest.
    """
    longest = max((times for _, times in strips.values()), key=len)
    made = {}
    for name, (strip, times) in strips.items():
        latest = [max(sum(t >= now * (1.0 - 1e-9) for t in times), 1) - 1 for now in longest]
        made[name] = strip[:, latest]
    return made


def _scatter(panels: Mapping[str, Tensor], path: str | Path, rows: int = 1) -> None:
    from matplotlib.figure import Figure

    limit = 1.1 * float(torch.cat([p.abs() for p in panels.values()]).quantile(0.999))
    figure = Figure(figsize=(4.0 * len(panels) / rows, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, len(panels) // rows, squeeze=False).flatten()
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        axis.scatter(*points.cpu().T, s=1, alpha=0.4)
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    figure.savefig(path, dpi=80)
