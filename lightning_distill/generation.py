"""Sampling from any denoiser: the one path behind ``module.sample``, evaluation, the commands and the export test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.guidance import guided
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.prediction import Prediction
from lightning_distill.samplers import SAMPLERS

__all__ = ["default_cond", "draw_noise", "generate", "index_noise"]


def default_cond(denoiser: Denoiser, n: int, first: int = 0) -> dict[str, Tensor]:
    """Conditions of n samples when the user gives none: the classes in turn, or nothing for unconditional networks."""
    if denoiser.num_classes is None:
        return {}
    return {"class_labels": torch.arange(first, first + n) % denoiser.num_classes}


def draw_noise(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Unit Gaussian noise from a generator, on the generator's device (CPU without one)."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device if generator else "cpu")


def index_noise(n: int, shape: Sequence[int], seed: int, first: int = 0) -> Tensor:
    """Fixed noise of samples ``first .. first + n - 1``, independent of how they are batched; on the CPU."""
    from lightning_distill.randomness import RandomStreams

    return RandomStreams(seed).normal("sample", 0, first, (n, *shape))


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Mapping[str, Any],
    times: Sequence[float],
    sampler: str = "renoise",
    *,
    guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
    noise_scale: float = 1.0,
    batch_size: int | None = None,
) -> Tensor:
    """Samples x0 from starting noise.

    Fresh noise of stochastic samplers is drawn step by step from ``generator``, after the starting noise: the order in
    which diffusers' pipelines draw theirs, so equal seeds give equal images.

    Args:
        denoiser: student or teacher.
        noise: unit Gaussian starting noise, (N, ...); its device does not matter.
        cond: conditions, tensors of N rows.
        times: descending native times without the final 0.
        sampler: name in ``samplers.SAMPLERS``.
        guidance_scale: w of classifier-free guidance; 1 is none.
        generator: source of the fresh noise.
        noise_scale: factor on the fresh noise of the renoise sampler.
        batch_size: samples per network call; None means all at once. Stochastic samplers draw per chunk.

    Returns:
        x0, (N, ...), float32, on the denoiser's device.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(sorted(SAMPLERS))}.")
    device, process = denoiser.device, denoiser.process
    size = batch_size or len(noise)
    chunks = []
    for start in range(0, len(noise), size):
        part = noise[start : start + size].to(device)
        part_cond = {k: v[start : start + size].to(device) if isinstance(v, Tensor) else v for k, v in cond.items()}

        def denoise(x: Tensor, t: Tensor, part_cond: dict[str, Any] = part_cond) -> Prediction:
            t = t.to(device).expand(len(x)) if t.ndim == 0 else t
            return guided(denoiser, x, t, part_cond, guidance_scale)

        def fresh(_step: int, x: Tensor) -> Tensor:
            return draw_noise(x.shape, generator).to(x)

        kwargs: dict[str, Any] = {"noise": fresh}
        if sampler == "renoise":
            kwargs["noise_scale"] = noise_scale
        x = process.prior(part, times[0])
        chunks.append(SAMPLERS[sampler](denoise, x, times, process, **kwargs))
    return torch.cat(chunks)
