"""Numbers for plots and tables: how they are written, round ticks, smoothing, thinning."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["MAX_POINTS", "column_number", "downsample", "log_ticks", "nice_ticks", "number", "smooth", "tick_text"]

MAX_POINTS = 500


def number(value: float, digits: int = 4) -> str:
    """A figure for people: four significant digits, ``nan`` and ``inf`` as such.

    Args:
        value: figure.
        digits: significant digits.
    """
    if not math.isfinite(value):
        return str(float(value))
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        return f"{mantissa}e{int(exponent)}"
    return text


def column_number(value: float) -> str:
    """A figure with as many decimals as its neighbours in a column: three below 10, four digits above."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 10 else number(value)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values between ``low`` and ``high``: multiples of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        low: lower end.
        high: upper end, larger.
        count: about how many.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) + 0.0 for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between ``low`` and ``high``, with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 5)
    ticks = [10.0**k for k in range(first, last + 1, every)]
    if last - first <= 3:
        ticks += [m * 10.0**k for k in range(first, last) for m in (2, 5)]
    return sorted(t for t in ticks if low * 0.999 <= t <= high * 1.001)


def tick_text(value: float) -> str:
    """A tick's label, with k and M for thousands and millions."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size and abs(value) < 1e9:
            return number(value / size, 6) + suffix
    return number(value, 6)


def smooth(values: np.ndarray, log: bool = False) -> np.ndarray | None:
    """A Gaussian average of a noisy curve; None for a curve that is smooth or short.

    A curve is noisy when it turns often, and the way that it goes up and down is more than four times its range.

    Args:
        values: (n,), finite.
        log: average logarithms; values are positive.
    """
    n = len(values)
    y = np.log(values) if log else values
    if n < 20:
        return None
    change = np.diff(y)
    signs = np.sign(change)
    turns = (signs[1:] * signs[:-1] < 0).mean()
    if turns < 0.2 or np.abs(change).sum() <= 4 * np.ptp(y):
        return None
    width = max(1.5, n / 40)
    reach = min(n - 1, math.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    weight = np.convolve(np.ones(n), kernel, "full")[reach : reach + n]  # less at the ends, where values are missing
    y = np.convolve(y, kernel, "full")[reach : reach + n] / weight
    return np.exp(y) if log else y


def downsample(values: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """Indices of at most ``limit`` values: the least and the greatest of every stretch, so that spikes stay.

    Args:
        values: (n,), finite.
        limit: even number of points.

    Returns:
        ascending indices, the first and the last value always among them.
    """
    n = len(values)
    if n <= limit:
        return np.arange(n)
    kept = {0, n - 1}
    for part in np.array_split(np.arange(1, n - 1), (limit - 2) // 2):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return np.array(sorted(kept))
