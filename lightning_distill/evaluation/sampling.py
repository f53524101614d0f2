"""Many samples that depend on their index only: the one path of evaluation, in and outside a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distill.evaluation.conditions import Conditions, RunConditions
from lightning_distill.generation import beginning, bound, index_noise
from lightning_distill.guidance import Guidance
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.randomness import RandomStreams
from lightning_distill.samplers import SAMPLERS

__all__ = ["makes_pixels", "sample_many"]

#: what pipelines call the folder of their autoencoder
_AUTOENCODERS = ("vae", "vqvae", "movq")


def makes_pixels(denoiser: Denoiser, shape: Sequence[int]) -> bool:
    """Whether samples are pictures or videos to look at: of 1 or 3 channels, and no autoencoder beside the network.

    Args:
        denoiser: student or teacher.
        shape: of one sample, (C, H, W) for pictures, (C, F, H, W) for videos.
    """
    from lightning_distill.export.folders import source_of  # exports sample themselves

    if len(shape) not in (3, 4) or shape[0] not in (1, 3):
        return False
    folder = source_of(denoiser.network)
    return folder is None or not any((folder / name).is_dir() for name in _AUTOENCODERS)


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
    noise_share: float = 0.2,
    conditions: Conditions | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Many samples whose starting and fresh noise depend on the sample's index only, not on how they are batched.

    Args:
        denoiser: student or teacher.
        n: number of samples.
        times: descending native times without the final 0.
        sampler: name of a sampler.
        seed: seed of starting and fresh noise.
        first: index of the first sample, so that processes can share the work.
        guidance_scale: w, or a policy.
        batch_size: samples per network call.
        bf16: run the network under bfloat16 autocast.
        shape: of one sample; None asks the network.
        noise_scale: factor on the fresh noise.
        noise_share: share of fresh noise of the gamma sampler.
        conditions: give the samples theirs, by index; None for the classes in turn.

    Returns:
        samples (n, ...), clamped to [-1, 1] where they are pictures rather than latents, on the CPU, and their labels
        (None without classes).

    Raises:
        ValueError: no shape was given and the network does not know it, the sampler is unknown, or the network needs
            conditions that nothing gives, that at which its samples begin among them.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(sorted(SAMPLERS))}.")
    shape = denoiser.sample_shape if shape is None else tuple(shape)
    if shape is None:
        raise ValueError(f"{type(denoiser.network).__name__} does not know the shape of its samples; give shape.")
    made = RunConditions() if conditions is None else conditions
    streams, device, process = RandomStreams(seed), denoiser.device, denoiser.process
    kwargs = {"share": noise_share} if sampler == "gamma" else {}
    parts, labels = [], []
    for done in range(0, n, batch_size):
        begin, count = first + done, min(batch_size, n - done)
        # a batch at a time: the text of thousands of samples is larger than they are
        cond = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made(denoiser, count, begin).items()}
        if "class_labels" in cond:
            labels.append(cond["class_labels"].cpu())
        start = index_noise(count, shape, seed, begin).to(device)

        denoise = bound(denoiser, cond, sampler, guidance_scale)

        def fresh(step: int, x: Tensor, begin: int = begin) -> Tensor:
            return noise_scale * streams.normal(f"sample/fresh{step}", 0, begin, x.shape).to(x)

        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = process.prior(beginning(denoiser, start, cond), times[0])
            x0 = SAMPLERS[sampler](denoise, x, times, process, noise=fresh, **kwargs)
        parts.append(x0.float().cpu())
    samples = torch.cat(parts)
    if samples.ndim == 4 and makes_pixels(denoiser, shape):
        samples = samples.clamp(-1, 1)
    return samples, torch.cat(labels) if labels else None
