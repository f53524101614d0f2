"""Distance to the nearest reference sample: too near means memorised, too far means off the data."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.metrics.manifold import distances

__all__ = ["nearest_distances", "nearest_reference_ratio"]


def nearest_distances(samples: Tensor, reference: Tensor, batch_size: int = 1_000) -> Tensor:
    """Euclidean distance of every sample to its nearest reference sample.

    Args:
        samples: features or flattened samples, (n, d).
        reference: (m, d).
        batch_size: samples per block of the distance matrix.

    Returns:
        (n,), dtype of ``samples``.
    """
    return torch.cat([distances(s, reference).min(dim=1).values for s in samples.split(batch_size)]).to(samples)


def nearest_reference_ratio(samples: Tensor, baseline: Tensor, reference: Tensor) -> float:
    """Median nearest-reference distance of samples over that of a baseline.

    The baseline is the teacher's samples or held-out data. Near 1 is right; well below means copies of the
    reference, well above means samples away from the data. A set that copies only part of its samples shows
    in precision and recall, not here.

    Args:
        samples: student's samples, as features (n, d) or flattened pixels.
        baseline: teacher's samples or held-out data, (k, d).
        reference: real samples, (m, d); must not contain the baseline.

    Returns:
        The ratio; inf if the baseline's median distance is 0.

    Raises:
        ValueError: the dimensions differ.
    """
    if (
        not samples.ndim == baseline.ndim == reference.ndim == 2
        or len({v.shape[1] for v in (samples, baseline, reference)}) > 1
    ):
        raise ValueError(
            f"nearest distances compare matrices of equal width, got {tuple(samples.shape)}, "
            f"{tuple(baseline.shape)} "
            f"and {tuple(reference.shape)}."
        )
    own, other = (nearest_distances(v, reference).median().item() for v in (samples, baseline))
    return own / other if other > 0 else float("inf")
