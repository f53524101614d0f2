"""Discriminators on images without noise, seen through a frozen network that was trained for something else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.discriminators import DiscriminatorHeads

__all__ = ["FrozenFeatures", "ImageAdversary"]


def _read_weights(path: str) -> dict[str, Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"FrozenFeatures(weights={path!r}) does not exist; give a safetensors or torch file.")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


class FrozenFeatures(nn.Module):
    """Features of images from a network that was trained for something else (projected GANs, arXiv:2111.01007).

    Args:
        network: frozen network, called with images (B, C, H, W).
        taps: submodules whose outputs are the features.
        channels: channels that the network takes; images of one channel are repeated.
        size: height and width to which images are resized; None for none.
        mean: subtracted from images in [-1, 1], per channel or for all.
        std: divided by.
        weights: safetensors or torch file with the network's state; None keeps what the network has.

    Raises:
        ValueError: there is no such submodule, or the file holds other weights.
        FileNotFoundError: there is no such file.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        taps: Sequence[str],
        channels: int = 3,
        size: int | None = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        known = dict(network.named_modules())
        if not taps or (missing := [tap for tap in taps if tap not in known or not tap]):
            wrong = missing[0] if taps else ""
            raise ValueError(
                f"{type(network).__name__} has no submodule {wrong!r} to tap; some of its own: "
                f"{', '.join(list(known)[1:13])}."
            )
        if weights is not None:
            network.load_state_dict(_read_weights(weights))
        self.network = network.requires_grad_(False).eval()
        self.taps = tuple(taps)
        self.channels, self.size = channels, size
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "FrozenFeatures":
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features by tap, each (B, ...), with the graph of the images.

        Args:
            images: (B, C, H, W), in the range of the data.
        """
        if images.shape[1] == 1 and self.channels > 1:
            images = images.expand(-1, self.channels, -1, -1)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = nn.functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        found: dict[str, Tensor] = {}
        handles = [
            self.network.get_submodule(tap).register_forward_hook(
                lambda _m, _a, out, tap=tap: found.__setitem__(tap, out)
            )
            for tap in self.taps
        ]
        try:
            self.network((images - self.mean) / self.std)
        finally:
            for handle in handles:
                handle.remove()
        return found


class ImageAdversary(Adversary):
    """An adversarial term on the features of images without noise.

    Args:
        features: the frozen network.
        kind: ``logistic``, ``hinge`` or ``relativistic``.
        width: channels inside the heads, None for those of the features.
        classes: tell the heads the class of an image; None where the teacher has classes.
        seed: of the heads' initial weights.
    """

    def __init__(
        self,
        features: FrozenFeatures,
        kind: str = "logistic",
        width: int | None = None,
        classes: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(features.taps, "teacher", kind=kind, width=width, classes=classes, seed=seed)
        self.features = "images"
        self.frozen = features

    def build(self, network: Denoiser, shape: Sequence[int]) -> DiscriminatorHeads:
        """Heads for images of ``shape``."""
        with torch.no_grad():
            found = self.frozen(torch.zeros(1, *shape, device=self.frozen.mean.device))
        return self.heads({tap: tuple(feature.shape[1:]) for tap, feature in found.items()}, network)

    def tapped(self, network: Denoiser, x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, Tensor]:
        """Features of the images."""
        return self.frozen(x_t)

    @property
    def network_taps(self) -> tuple[str, ...]:
        """None are blocks of the teacher or of the fake score."""
        return ()
