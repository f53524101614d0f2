"""What of two images differs in their fine detail."""

import torch
from torch import Tensor

__all__ = ["high_frequency_distance", "high_pass"]


def high_pass(x: Tensor, radius: float) -> Tensor:
    """Images without their low spatial frequencies.

    Args:
        x: images or latents, (B, C, H, W).
        radius: frequencies below it are removed, in cycles per pixel; in (0, .5 sqrt 2), .5 is the finest one along an
            axis.

    Returns:
        (B, C, H, W), float32 or float64.

    Raises:
        ValueError: no images.
    """
    if x.ndim != 4:
        raise ValueError(f"high_pass needs images (B, C, H, W), got shape {tuple(x.shape)}.")
    x = x if x.dtype == torch.float64 else x.float()
    height, width = x.shape[-2:]
    rows = torch.fft.fftfreq(height, device=x.device, dtype=x.dtype)
    columns = torch.fft.rfftfreq(width, device=x.device, dtype=x.dtype)
    kept = torch.hypot(rows[:, None], columns[None, :]) >= radius
    return torch.fft.irfft2(torch.fft.rfft2(x) * kept, s=(height, width))


def high_frequency_distance(a: Tensor, b: Tensor, radius: float = 0.1) -> Tensor:
    """Mean squared difference of the high frequencies of each pair, (B,); see ``high_pass``."""
    return high_pass(a - b, radius).square().flatten(1).mean(1)
