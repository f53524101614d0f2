"""Brightness, contrast and colour of images, and how far a student drifted from its reference.

Distillation with guidance moves these first: over-saturated, too contrasty pictures show here long before a feature
distance says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ImageMoments", "drift", "image_moments"]

#: weights of red, green and blue in the grey picture (ITU-R BT.601)
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ImageMoments:
    """First and second moments of a set of images, in units of the range: 0 is black, 1 is white.

    Attributes:
        brightness: mean of the grey pictures.
        contrast: standard deviation over the pixels of a grey picture, mean over the pictures.
        saturation: (max - min) / max of a pixel's channels (HSV), 0 for black; 0 for pictures that are not RGB.
        channels: mean of each channel.
    """

    brightness: float
    contrast: float
    saturation: float
    channels: tuple[float, ...]


def image_moments(images: Tensor, batch_size: int = 1_000) -> ImageMoments:
    """Moments of a set of images.

    Args:
        images: (N, C, H, W) in [-1, 1]; values outside are cut, as they are when a picture is saved. Three channels are
            red, green and blue; any other number is averaged to grey.
        batch_size: images that are converted at a time.

    Returns:
        The moments, computed in float64.

    Raises:
        ValueError: the shape is wrong, the set is empty, or it holds NaN or inf.
    """
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"moments need images (N, C, H, W), got {tuple(images.shape)}.")
    if not bool(images.isfinite().all()):
        raise ValueError("the images contain NaN or inf; check the samples before measuring them.")
    color = images.shape[1] == 3
    weights = torch.tensor(_GREY if color else [1.0 / images.shape[1]] * images.shape[1], dtype=torch.float64)
    totals = torch.zeros(2 + images.shape[1], dtype=torch.float64)
    for part in images.split(batch_size):
        x = part.double().cpu().clamp(-1.0, 1.0).add(1.0).div(2.0)
        grey = torch.einsum("nchw,c->nhw", x, weights)
        contrast = grey.flatten(1).std(dim=1, correction=0).sum()
        saturation = _saturation(x).mean(dim=(1, 2)).sum() if color else contrast.new_zeros(())
        totals += torch.cat([torch.stack([contrast, saturation]), x.mean(dim=(2, 3)).sum(dim=0)])
    contrast, saturation, *channels = (totals / len(images)).tolist()
    brightness = sum(w * c for w, c in zip(weights.tolist(), channels, strict=True))
    return ImageMoments(brightness, contrast, saturation, tuple(channels))


def drift(moments: ImageMoments, reference: ImageMoments) -> ImageMoments:
    """Signed differences ``moments - reference``: positive means brighter, more contrast, more colour.

    Args:
        moments: of the samples.
        reference: of the teacher's samples or of real images.

    Raises:
        ValueError: different numbers of channels.
    """
    if len(moments.channels) != len(reference.channels):
        raise ValueError(
            f"images of {len(moments.channels)} and of {len(reference.channels)} channels cannot be compared."
        )
    return ImageMoments(
        moments.brightness - reference.brightness,
        moments.contrast - reference.contrast,
        moments.saturation - reference.saturation,
        tuple(a - b for a, b in zip(moments.channels, reference.channels, strict=True)),
    )


def _saturation(rgb: Tensor) -> Tensor:
    """HSV saturation (N, H, W) of images (N, 3, H, W) in [0, 1]."""
    most, least = rgb.amax(dim=1), rgb.amin(dim=1)
    return (most - least) / most.clamp_min(torch.finfo(rgb.dtype).tiny)
