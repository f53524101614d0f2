"""Between the latents an autoencoder makes and the samples a diffusion model was trained on.

Every family normalises latents by an affine map per channel,

    x = (z - mean) / std,                      z = std x + mean,

with other names for it: ``scaling_factor`` is 1 / std, ``shift_factor`` the mean (Stable Diffusion, FLUX.1), video
autoencoders list ``latents_mean`` and ``latents_std`` (Wan, Qwen-Image; LTX has a ``scaling_factor`` besides), and
FLUX.2 folds 2 x 2 patches into channels and takes mean and variance of a batch norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NORMALISATION", "LatentScale", "latent_scale"]

#: settings of an autoencoder's configuration on which the map depends
NORMALISATION = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm_eps")

_STATISTICS_IN_WEIGHTS = ("AutoencoderKLFlux2", "AutoencoderKLLTXVideo")


@dataclass(frozen=True)
class LatentScale:
    """The affine map of one autoencoder.

    Attributes:
        mean: per channel of the samples, (C,), or one for all, (1,).
        std: likewise, > 0.
        patch: side of the patches folded into channels before the map; 1 for none.
    """

    mean: Tensor
    std: Tensor
    patch: int = 1

    def to_sample(self, z: Tensor) -> Tensor:
        """Samples x of the diffusion model from latents.

        Args:
            z: latents of the autoencoder, (B, C, ...).
        """
        if self.patch > 1:
            z = _fold(z, self.patch)
        return (z - self._like(self.mean, z)) / self._like(self.std, z)

    def to_latent(self, x: Tensor) -> Tensor:
        """Latents for the autoencoder's decoder from samples, the inverse of ``to_sample``.

        Args:
            x: samples, (B, C, ...).
        """
        z = x * self._like(self.std, x) + self._like(self.mean, x)
        return _unfold(z, self.patch) if self.patch > 1 else z

    def _like(self, values: Tensor, x: Tensor) -> Tensor:
        if len(values) not in (1, x.shape[1]):
            raise ValueError(
                f"the autoencoder's latents have {len(values)} channels and the given ones {x.shape[1]}; use the "
                "autoencoder of the same pipeline."
            )
        return values.to(x).view(1, -1, *[1] * (x.ndim - 2))


def latent_scale(vae: nn.Module | Mapping[str, Any]) -> LatentScale:
    """The normalisation that belongs to an autoencoder.

    Args:
        vae: autoencoder of diffusers, or its ``config.json`` where that says enough (not for LTX and FLUX.2, which
            keep their statistics among the weights).

    Raises:
        ValueError: the autoencoder states no normalisation.
    """
    config: Any = vae if isinstance(vae, Mapping) else vae.config
    own = dict(vae.named_buffers()) if isinstance(vae, nn.Module) else {}
    name = config.get("_class_name") or type(vae).__name__
    scale = float(config.get("scaling_factor") or 1.0)
    if "bn.running_mean" in own:
        std = (own["bn.running_var"].float() + config["batch_norm_eps"]).sqrt()
        return LatentScale(own["bn.running_mean"].float(), std, patch=config["patch_size"][0])
    if "latents_mean" in own:
        return LatentScale(own["latents_mean"].float(), own["latents_std"].float() / scale)
    if name in _STATISTICS_IN_WEIGHTS:
        raise ValueError(
            f"{name} keeps the statistics of its latents among its weights; give the loaded autoencoder instead of its "
            "configuration."
        )
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return LatentScale(torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"]) / scale)
    if config.get("scaling_factor") is None:
        raise ValueError(
            f"{name} states no scaling_factor and no latents_mean, so its samples are not known to be normalised; "
            "construct LatentScale(mean, std) from the data."
        )
    return LatentScale(torch.tensor([float(config.get("shift_factor") or 0.0)]), torch.tensor([1.0 / scale]))


def _fold(z: Tensor, p: int) -> Tensor:
    batch, channels, height, width = z.shape
    z = z.reshape(batch, channels, height // p, p, width // p, p)
    return z.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * p * p, height // p, width // p)


def _unfold(z: Tensor, p: int) -> Tensor:
    batch, channels, height, width = z.shape
    z = z.reshape(batch, channels // (p * p), p, p, height, width)
    return z.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // (p * p), height * p, width * p)
