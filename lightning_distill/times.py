"""Training-time distributions and few-step time lists.

A distribution is given by its inverse distribution function, so that every training time is a deterministic
function of a uniform number: the same seed gives the same times on one rank or on many. Times are native
times of a process, float64, and never exactly 0: they are clamped to [``t_min(process)``,
``process.t_max``].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_distill.processes import EDM, FlowMatching, NoiseProcess, VariancePreserving

__all__ = [
    "Beta",
    "Karras",
    "LogNormal",
    "LogitNormal",
    "Shifted",
    "TimeDistribution",
    "UShaped",
    "Uniform",
    "UniformIndex",
    "bounded",
    "check_times",
    "clamp_times",
    "few_step_times",
    "t_min",
    "validate_times",
]


def t_min(process: NoiseProcess) -> float:
    """Smallest time used in training: index 0 of VP, ``sigma_min`` of EDM, t_max / 10,000 elsewhere."""
    if isinstance(process, VariancePreserving):
        return 1.0 / process.num_train_timesteps
    if isinstance(process, EDM):
        return process.sigma_min
    return 1e-4 * process.t_max


def clamp_times(t: Tensor, process: NoiseProcess) -> Tensor:
    """Times brought into [``t_min(process)``, ``t_max``], float64, same shape."""
    return t.double().clamp(t_min(process), process.t_max)


def _check_bounds(owner: object, low: float, high: float) -> None:
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(
            f"{type(owner).__name__}(low={low}, high={high}): needs 0 <= low < high <= 1; "
            "0 stands for clean data and 1 for t_max."
        )


def _check_positive(owner: object, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{type(owner).__name__}({name}={value}): {name} must be positive.")


def _time_of_ratio(log_ratio: Tensor, process: NoiseProcess) -> Tensor:
    """The clamped time at which ln(sigma / alpha) equals ``log_ratio``."""
    return clamp_times(process.t_from_log_snr(-2.0 * log_ratio), process)


class TimeDistribution(ABC):
    """A distribution of training times, as the inverse of its distribution function."""

    @abstractmethod
    def quantile(self, u: Tensor, process: NoiseProcess) -> Tensor:
        """Times below which the fraction ``u`` of all training times lies.

        Args:
            u: uniform numbers in (0, 1), any shape.
            process: process whose native times are wanted.

        Returns:
            native times in [t_min(process), t_max], float64, shape of ``u``, non-decreasing in ``u``.
        """

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in vars(self).items() if isinstance(v, (int, float)))
        return f"{type(self).__name__}({inner})"


class Uniform(TimeDistribution):
    """Uniform in native time; the default bounds are those of DMD2's matching times (arXiv:2405.14867).

    Args:
        low: smallest time as a fraction of t_max, in [0, 1); 0 means ``t_min``.
        high: largest time as a fraction of t_max, in (low, 1].
    """

    def __init__(self, low: float = 0.02, high: float = 0.98) -> None:
        _check_bounds(self, low, high)
        self.low, self.high = float(low), float(high)

    def quantile(self, u: Tensor, process: NoiseProcess) -> Tensor:  # noqa: D102
        return clamp_times(process.t_max * (self.low + (self.high - self.low) * u.double()), process)


class Shifted(TimeDistribution):
    """A uniform number s moved towards noise: t = k s / (1 + (k - 1) s) (arXiv:2403.03206, Eq. 23).

    Args:
        shift: k > 0; above 1 favours noisy times (SD3 3, Wan 5).
        low: lower bound of s, before the shift, in [0, 1).
        high: upper bound of s, before the shift, in (low, 1].
    """

    def __init__(self, shift: float, low: float = 0.0, high: float = 1.0) -> None:
        _check_positive(self, shift=shift)
        _check_bounds(self, low, high)
        self.shift, self.low, self.high = float(shift), float(low), float(high)

    def quantile(self, u: Tensor, process: NoiseProcess) -> Tensor:  # noqa: D102
        s = self.low + (self.high - self.low) * u.double()
        return clamp_times(process.t_max * FlowMatching(self.shift).warp(s), process)


class LogitNormal(TimeDistribution):
    """t / t_max = sigmoid(z) with z ~ N(mean, std^2), truncated to [low, high] (arXiv:2403.03206, Sec. 3.1).

    A time shift k is the same as adding ln k to ``mean``.

    Args:
        mean: mean of the logit.
        std: standard deviation of the logit, > 0.
        low: smallest time as a fraction of t_max, in [0, 1).
        high: largest time as a fraction of t_max, in (low, 1].
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, low: float = 0.0, high: float = 1.0) -> None:
        _check_positive(self, std=std)
        _check_bounds(self, low, high)
        self.mean, self.std, self.low, self.high = float(mean), float(std), float(low), float(high)

    def quantile(self, u: Tensor, process: NoiseProcess) -> Tensor:  # noqa: D102
        bounds = torch.tensor([self.low, self.high], dtype=torch.float64, device=u.device)
        below, above = torch.special.ndtr((torch.logit(bounds) - self.mean) / self.std)
        z = torch.special.ndtri(below + (above - below) * u.double())
        return clamp_times(process.t_max * torch.sigmoid(self.mean + self.std * z), process)


class LogNormal(TimeDistribution):
    """ln(sigma / alpha) ~ N(mean, std^2): EDM's training times, in any process (arXiv:2206.00364, Table 1).

    In TrigFlow the ratio is tan(t), the proposal of sCM (arXiv:2410.11081) for data of unit std.

    Args:
        mean: mean of ln(sigma / alpha).
        std: standard deviation of it, > 0.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        _check_positive(self, std=std)
        self.mean, self.std = float(mean), float(std)

    def quantile(self, u: Tensor, process: NoiseProcess) -> Tensor:  # noqa: D102
        return _time_of_ratio(self.mean + self.std * torch.special.ndtri(u.double()), process)


class Karras(TimeDistribution):
    """Uniform on EDM's warped grid of noise levels sigma / alpha, in any process (arXiv:2206.00364, Eq. 5).

        (sigma/alpha)^(1/rho) = (1 - s) sigma_min^(1/rho) + s sigma_max^(1/rho),     s in [low, high]

    DMD2 on EDM draws s from [.02, .98]; SiD from [0, .8] (its index counts from the small end, as s does).

    Args:
        sigma_min: noise level at s = 0, > 0.
        sigma_max: noise level at s = 1, > sigma_min.
        rho: exponent of the warp, > 0.
        low: smallest s, in [0, 1).
        high: largest s, in (low, 1].
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        _check_positive(self, sigma_min=sigma_min, rho=rho)
        _check_bounds(self, low, high)
        if not sigma_min < sigma_max:
            raise ValueError(f"Karras needs sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")
        self.sigma_min, self.sigma_max, self.rho = float(sigma_min), float(sigma_max), float(rho)
        self.low, self.high = float(low), float(high)

    def levels(self, s: Tensor) -> Tensor:
        """Noise levels sigma / alpha of s in [0, 1], float64."""
        start, end = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (start + s.double() * (end - start)) ** self.rho

    def quantile(self, u: Tensor, process: NoiseProcess) -> Tensor:  # noqa: D102
        s = self.low + (self.high - self.low) * u.double()
        return _time_of_ratio(self.levels(s).log(), process)


class UniformIndex(TimeDistribution):
    """Uniform over a scheduler's integer timesteps ``low..high``, both included.

    Index i of N lies at (i + 1) / N of t_max.

    Args:
        low: smallest index, >= 0.
        high: largest index, in [low, N - 1].
        num_train_timesteps: N.
    """

    def __init__(self, low: int = 0, high: int = 999, num_train_timesteps: int = 1000) -> None:
        if not 0 <= low <= high < num_train_timesteps:
            raise ValueError(
                f"UniformIndex(low={low}, high={high}, num_train_timesteps={num_train_timesteps}): "
                "needs 0 <= low <= high <= num_train_timesteps - 1."
            )
        self.low, self.high, self.num_train_timesteps = int(low), int(high), int(num_train_timesteps)

    def quantile(self, u: Tensor, process: NoiseProcess) -> Tensor:  # noqa: D102
        if isinstance(process, EDM):
            raise ValueError("UniformIndex has no meaning in EDM, whose time is sigma; use Karras.")
        # u may round up to 1, which belongs to the last index
        index = (self.low + (u.double() * (self.high - self.low + 1)).floor()).clamp(max=self.high)
        return clamp_times(process.t_max * ((index + 1.0) / self.num_train_timesteps), process)


class Beta(TimeDistribution):
    """t / t_max ~ Beta(a, b); a > b favours noise.

    The distribution function is tabulated over the angle theta of t = sin(theta)^2, in which the density
    sin(theta)^(2a - 1) cos(theta)^(2b - 1) stays bounded for a, b >= 1/2; the inverse is interpolated.

    Args:
        a: first shape parameter, >= 0.5.
        b: second shape parameter, >= 0.5.
    """

    _cells = 16384

    def __init__(self, a: float, b: float) -> None:
        if not min(a, b) >= 0.5:
            raise ValueError(f"Beta(a={a}, b={b}): both parameters must be at least 0.5.")
        self.a, self.b = float(a), float(b)
        width = math.pi / 2 / self._cells
        middle = (torch.arange(self._cells, dtype=torch.float64) + 0.5) * width
        log_density = (2 * self.a - 1) * middle.sin().log() + (2 * self.b - 1) * middle.cos().log()
        mass = (log_density - log_density.max()).exp().cumsum(0)
        self._cdf = torch.cat([torch.zeros(1, dtype=torch.float64), mass / mass[-1]])

    def quantile(self, u: Tensor, process: NoiseProcess) -> Tensor:  # noqa: D102
        u, cdf = u.double(), self._cdf.to(u.device)
        right = torch.searchsorted(cdf, u.contiguous()).clamp(1, self._cells)
        left = right - 1
        fraction = (u - cdf[left]) / (cdf[right] - cdf[left]).clamp_min(torch.finfo(torch.float64).tiny)
        theta = (left + fraction) * (math.pi / 2 / self._cells)
        return clamp_times(process.t_max * theta.sin().square(), process)


class UShaped(TimeDistribution):
    """p(t) proportional to e^(a s) + e^(a (1 - s)) with s = t / t_max: both ends more often than the middle.

    Of "Improving the training of rectified flows" (arXiv:2405.20320), where a = 4.

    Args:
        a: steepness, > 0.
    """

    def __init__(self, a: float = 4.0) -> None:
        _check_positive(self, a=a)
        self.a = float(a)

    def quantile(self, u: Tensor, process: NoiseProcess) -> Tensor:  # noqa: D102
        # the distribution function is 1/2 + sinh(a (s - 1/2)) / (2 sinh(a / 2))
        s = 0.5 + torch.asinh((2.0 * u.double() - 1.0) * math.sinh(0.5 * self.a)) / self.a
        return clamp_times(process.t_max * s, process)


def bounded(process: NoiseProcess, low: float, high: float) -> TimeDistribution:
    """The default distribution between two shares of the range: uniform, on EDM's Karras scale for EDM (DMD2's choice).

    Args:
        process: process of the times.
        low: lower share, in [0, 1).
        high: upper share, in (low, 1].
    """
    if isinstance(process, EDM):
        return Karras(process.sigma_min, process.sigma_max, low=low, high=high)
    return Uniform(low, high)


def few_step_times(process: NoiseProcess, num_steps: int, shift: float | None = None) -> list[float]:
    """The student's descending list of input times, from ``t_max``, without the final clean time 0.

    Trailing spacing: fractions 1, (N-1)/N, .., 1/N of t_max, shifted by k s / (1 + (k - 1) s). VP times are
    rounded to the scheduler's integer timesteps (4 steps: 999, 749, 499, 249, as LCM and trailing DDIM).
    EDM has the same fractions on the Karras scale with rho 7 between sigma_max and sigma_min (4 steps: 80, 17.5, 2.52,
    .170): a step at sigma_min, with which many-step samplers end, would leave a few-step student one step less.

    Args:
        process: process of the student.
        num_steps: number of student evaluations, >= 1.
        shift: k > 0; None means the shift of a ``FlowMatching`` process and none elsewhere. Not for EDM.

    Raises:
        ValueError: no steps, a shift for EDM, or more steps than the process can tell apart.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: a student needs at least one step.")
    fractions = 1.0 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    if isinstance(process, EDM):
        if shift is not None and shift != 1.0:
            raise ValueError(f"shift={shift} has no meaning in EDM; give the list of noise levels itself.")
        times = Karras(process.sigma_min, process.sigma_max).levels(fractions).clamp(max=process.t_max).tolist()
    else:
        if shift is None:
            shift = process.shift if isinstance(process, FlowMatching) else 1.0
        fractions = FlowMatching(shift).warp(fractions)
        if isinstance(process, VariancePreserving):
            fractions = (fractions * process.num_train_timesteps).round() / process.num_train_timesteps
        times = (process.t_max * fractions).clamp(max=process.t_max).tolist()
    validate_times(times, process)
    return times


def check_times(t: Tensor, distribution: TimeDistribution, process: NoiseProcess) -> None:
    """Check what a distribution of training times has given; waits for the device.

    Args:
        t: native times, (n,).
        distribution: where they are from.
        process: of the network that is trained.

    Raises:
        ValueError: a time is not in [0, t_max], or is NaN.
    """
    low, high = float(t.min()), float(t.max())
    if not (low >= 0.0 and high <= process.t_max * (1.0 + 1e-6)):
        raise ValueError(
            f"{type(distribution).__name__} gives training times from {low:g} to {high:g}, outside of "
            f"[0, {process.t_max:g}] of {type(process).__name__}; quantile() returns the process' native times."
        )


def validate_times(times: Sequence[float], process: NoiseProcess) -> None:
    """Check a student's list of input times.

    Args:
        times: native times, first the noisiest; the final clean time 0 is implied and not listed.
        process: process of the student.

    Raises:
        ValueError: the list is empty, not strictly descending, or leaves (0, t_max].
    """
    name, listed = type(process).__name__, [float(t) for t in times]
    if len(times) == 0:
        raise ValueError("the list of times is empty; a one-step student has one, the time it starts from.")
    for t in times:
        if not 0.0 < t <= process.t_max:
            raise ValueError(
                f"time {t:g} in {listed} is outside (0, {process.t_max:g}] of {name}; give native times, and "
                "leave out the final clean time 0."
            )
    if any(b >= a for a, b in pairwise(times)):
        raise ValueError(f"times {listed} must fall strictly, from noise to data (t grows towards noise).")
