"""Many samples that depend on their index only: the one path of evaluation, in and outside a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distill.generation import bound, default_cond, index_noise
from lightning_distill.guidance import Guidance
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.randomness import RandomStreams
from lightning_distill.samplers import SAMPLERS

__all__ = ["sample_many"]


@torch.no_grad()
def sample_many(
    denoiser: Denoiser,
    n: int,
    times: Sequence[float],
    sampler: str,
    seed: int,
    *,
    first: int = 0,
    guidance_scale: float | Guidance = 1.0,
    batch_size: int = 500,
    bf16: bool = False,
    shape: Sequence[int] | None = None,
    noise_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Many samples whose starting and fresh noise depend on the sample's index only, not on how they are batched.

    Args:
        denoiser: student or teacher.
        n: number of samples; classes are cycled through by index.
        times: descending native times without the final 0.
        sampler: name of a sampler.
        seed: seed of starting and fresh noise.
        first: index of the first sample, so that processes can share the work.
        guidance_scale: w, or a policy.
        batch_size: samples per network call.
        bf16: run the network under bfloat16 autocast.
        shape: of one sample; None asks the network.
        noise_scale: factor on the fresh noise.

    Returns:
        samples (n, ...) clamped to [-1, 1] when they are images, on the CPU, and their labels (None without classes).

    Raises:
        ValueError: no shape was given and the network does not know it, or the sampler is unknown.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(sorted(SAMPLERS))}.")
    shape = denoiser.sample_shape if shape is None else tuple(shape)
    if shape is None:
        raise ValueError(f"{type(denoiser.network).__name__} does not know the shape of its samples; give shape.")
    cond = default_cond(denoiser, n, first)
    streams, device, process = RandomStreams(seed), denoiser.device, denoiser.process
    parts = []
    for done in range(0, n, batch_size):
        labels = {k: v[done : done + batch_size].to(device) for k, v in cond.items()}
        begin = first + done
        start = index_noise(min(batch_size, n - done), shape, seed, begin).to(device)

        denoise = bound(denoiser, labels, sampler, guidance_scale)

        def fresh(step: int, x: Tensor, begin: int = begin) -> Tensor:
            return noise_scale * streams.normal(f"sample/fresh{step}", 0, begin, x.shape).to(x)

        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x0 = SAMPLERS[sampler](denoise, process.prior(start, times[0]), times, process, noise=fresh)
        parts.append(x0.float().cpu())
    samples = torch.cat(parts)
    return (samples.clamp(-1, 1) if samples.ndim == 4 else samples), cond.get("class_labels")
