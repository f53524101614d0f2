"""Where a distribution of training times lies: shares, restrictions to an interval, and whether one covers another."""

import math

import torch
from torch import Tensor

from lightning_distill.processes import NoiseProcess
from lightning_distill.times import TimeDistribution

__all__ = ["check_coverage", "density_ratio", "restricted"]


def _share_below(distribution: TimeDistribution, t: Tensor, process: NoiseProcess) -> Tensor:
    """Share of the distribution below given times: the inverse of ``quantile`` by bisection, exact at both ends."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    ends = [distribution.quantile(end, process) for end in (low, high)]
    below, above = t <= ends[0], t >= ends[1]
    for _ in range(50):
        middle = 0.5 * (low + high)
        left = distribution.quantile(middle, process) < t
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    return torch.where(below, 0.0, torch.where(above, 1.0, low))


def restricted(
    distribution: TimeDistribution, u: Tensor, low: Tensor, high: Tensor, process: NoiseProcess, margin: float = 0.0
) -> Tensor:
    """Times of a distribution given that they lie between two times; all of it where both ends lie outside.

    Args:
        distribution: of training times.
        u: uniform numbers in (0, 1), (B,).
        low: lower native times, (B,).
        high: upper native times, (B,).
        process: process of the times.
        margin: share of the interval kept free above ``low``, where that lies within the distribution.

    Returns:
        native times, (B,), float64; ``high`` where the distribution has none between the two.
    """
    start, end = (_share_below(distribution, ends.double(), process) for ends in (low, high))
    start = torch.where(start > 0, start + margin * (end - start), start)
    t = distribution.quantile(start + u.double() * (end - start), process)
    return torch.where(end > start, t, torch.minimum(high.double(), t))


def _worst_bin(
    reference: TimeDistribution, proposal: TimeDistribution, process: NoiseProcess, bins: int
) -> tuple[float, float, float]:
    """The largest density ratio and the two ends of the bin where it occurs."""
    u = (torch.arange(200 * bins, dtype=torch.float64) + 0.5) / (200 * bins)
    wanted, offered = reference.quantile(u, process), proposal.quantile(u, process)
    # bins of equal pooled mass: fine where either density is large, never empty of both
    pooled = torch.cat([wanted, offered]).sort().values
    edges = pooled[:: len(pooled) // bins].unique()
    counts = [
        torch.bincount(torch.searchsorted(edges, t, right=True) - 1, minlength=len(edges)).double()
        for t in (wanted, offered)
    ]
    ratio = torch.where(counts[0] > 0, counts[0] / counts[1], torch.zeros_like(counts[0]))
    worst = int(ratio.argmax())
    end = edges[worst + 1] if worst + 1 < len(edges) else pooled[-1]
    return float(ratio[worst]), float(edges[worst]), float(end)


def density_ratio(
    reference: TimeDistribution, proposal: TimeDistribution, process: NoiseProcess, bins: int = 64
) -> float:
    """Largest ratio (density of ``reference``) / (density of ``proposal``) over time.

    Both densities are counted from evenly spaced quantiles, in ``bins`` bins of equal pooled mass;
    differences within one bin are not resolved.

    Args:
        reference: distribution of the times at which a network is used.
        proposal: distribution of the times at which it is trained.
        process: process of the times.
        bins: number of bins.

    Returns:
        the ratio, >= 1 up to the bins' resolution; inf where the proposal has no times at all.
    """
    return _worst_bin(reference, proposal, process, bins)[0]


def check_coverage(
    matching: TimeDistribution, critic: TimeDistribution, process: NoiseProcess, limit: float = 10.0
) -> None:
    """Refuse a critic that is hardly trained at times where it is used.

    Args:
        matching: times at which the student is matched to the teacher.
        critic: times at which the critic (fake score, discriminator) is trained.
        process: process of the times.
        limit: largest accepted density ratio.

    Raises:
        ValueError: the ratio exceeds ``limit`` somewhere.
    """
    ratio, start, end = _worst_bin(matching, critic, process, bins=64)
    if ratio > limit:
        detail = "has no times" if math.isinf(ratio) else f"has {ratio:.0f} times fewer"
        raise ValueError(
            f"the critic's time distribution {critic!r} does not cover the matching times {matching!r}: "
            f"between t={start:.4g} and t={end:.4g} it {detail} (limit {limit:g}); widen the critic's "
            "distribution or narrow the matching one."
        )
