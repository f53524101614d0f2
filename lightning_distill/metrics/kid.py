"""Kernel distance between feature sets (arXiv:1801.01401): unbiased, for samples too few for FD."""

from __future__ import annotations

from torch import Tensor

__all__ = ["kernel_distance"]


def kernel_distance(generated: Tensor, real: Tensor) -> float:
    """Squared maximum mean discrepancy with the cubic kernel (x.y / d + 1)^3 on all samples.

    Args:
        generated: features of generated samples, (n, d).
        real: features of real samples; the first n = min of both sizes of each set are used.

    Returns:
        Unbiased estimate; slightly negative values occur for equal distributions.

    Raises:
        ValueError: the feature dimensions differ, or a set has fewer than two samples.
    """
    from torchmetrics.image.kid import poly_mmd

    n = min(len(generated), len(real))
    if n < 2 or generated.shape[1:] != real.shape[1:]:
        raise ValueError(f"cannot compare features of shapes {tuple(generated.shape)} and {tuple(real.shape)}.")
    return poly_mmd(real[:n].double(), generated[:n].double()).item()
