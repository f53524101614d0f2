"""Noise processes: how a clean sample x0 becomes a noisy sample x_t.

Every process is the linear Gaussian path

    x_t = alpha(t) x0 + sigma(t) eps,        eps ~ N(0, I),

with t growing from data (t = 0) to noise (t = ``t_max``). Four coefficients define it: alpha, sigma and their time
derivatives. Everything else (log-SNR, its inverse, velocity, change of process) follows from them.

Coefficients are computed in float64 whatever dtype ``t`` has; callers cast at the end (see ``expand``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "EDM",
    "FlowMatching",
    "NoiseProcess",
    "ResidualShift",
    "TrigFlow",
    "VariancePreserving",
    "change_process",
    "expand",
]


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Reshape a coefficient (B,) or () to broadcast over ``like`` (B, ...), in the dtype of ``like``.

    A coefficient with as many dimensions as ``like`` has one value per element already (``streams``).
    """
    coefficient = coefficient.to(device=like.device, dtype=like.dtype)
    if coefficient.ndim in (0, like.ndim):
        return coefficient
    return coefficient.reshape(coefficient.shape[0], *([1] * (like.ndim - 1)))


class NoiseProcess(ABC):
    """A linear Gaussian noise process in its own native time.

    Subclasses give ``alpha, sigma, d_alpha, d_sigma`` and ``t_from_log_snr``. Times are tensors of any shape and dtype;
    results are float64 of the same shape.

    Attributes:
        t_max: native time of (almost) pure noise.
    """

    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the clean sample at time ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time ``t``."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Time derivative of ``alpha``."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Time derivative of ``sigma``."""

    @abstractmethod
    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Inverse of ``log_snr``: the native time at which 2 log(alpha/sigma) equals ``log_snr``."""

    def t_from_coefficients(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The native time with the ratio alpha : sigma; where it can be, differentiable up to both ends.

        Args:
            alpha: factor on the clean sample, >= 0, up to a common factor, float64.
            sigma: factor on the noise, >= 0, same shape.
        """
        return self.t_from_log_snr(2.0 * (alpha.log() - sigma.log()))

    def t_beyond(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """As ``t_from_coefficients``, and a little past ``t_max`` as the schedule goes on, for differences in time."""
        return self.t_from_coefficients(alpha, sigma)

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha / sigma): +inf at clean data, -inf at pure noise."""
        return 2.0 * (self.alpha(t).log() - self.sigma(t).log())

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The noisy sample x_t = alpha(t) x0 + sigma(t) eps.

        Args:
            x0: clean sample, (B, ...).
            eps: unit Gaussian noise, same shape.
            t: native times, (B,) or ().

        Returns:
            x_t of the same shape and dtype as ``x0``.
        """
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def network_time(self, t: Tensor) -> Tensor:
        """Time as diffusion networks expect it, on the common 0..1000 scale; families rescale it where they differ.

        Default 1000 t (flow matching as in SD3 and Wan). VP gives the scheduler's timestep, EDM 250 ln(sigma)
        (consistency models, arXiv:2303.01469: 1000 * ln(sigma) / 4).
        """
        return 1000.0 * t.double()

    def prior(self, eps: Tensor, t_init: float | None = None) -> Tensor:
        """The input from which a student starts at ``t_init``: ``prior_std`` times eps, the data part left out.

        Students may start below ``t_max`` (SiD at sigma = 2.5, one-step SDXL at index 399); a process without zero
        terminal SNR leaves alpha(t_max) x0 in training inputs, which no sampler has at generation time.

        Args:
            eps: unit Gaussian noise, (B, ...).
            t_init: native start time in (0, t_max]; None means ``t_max``.

        Raises:
            ValueError: ``t_init`` lies outside (0, t_max].
        """
        t_init = self.t_max if t_init is None else t_init
        if not 0.0 < t_init <= self.t_max:
            raise ValueError(
                f"start time {t_init} is outside (0, {self.t_max}] of {type(self).__name__}; "
                "give the first entry of the student's time list in the process' native time."
            )
        return self.prior_std(t_init) * eps

    def prior_std(self, t_init: float) -> float:
        """Standard deviation of the starting noise at native time ``t_init``; sigma(t_init) unless overridden."""
        return float(self.sigma(torch.tensor(t_init, dtype=torch.float64)))

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in vars(self).items() if isinstance(v, (int, float, str, bool)))
        return f"{type(self).__name__}({inner})"


class FlowMatching(NoiseProcess):
    """Rectified flow / flow matching: alpha = 1 - t, sigma = t, velocity eps - x0, t in [0, 1].

    ``shift`` k moves grids and time samplers towards noise through ``warp``: t -> k t / (1 + (k - 1) t)
    (SD3, arXiv:2403.03206, Eq. 23). It never changes the path itself, so a time always means the same noise level.

    Args:
        shift: k > 0; 1 means none, SD3 uses 3, Wan 5.
    """

    t_max = 1.0

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0:
            raise ValueError(f"FlowMatching(shift={shift}): the shift must be positive (1 means none).")
        self.shift = float(shift)

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return 1.0 - t.double()

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.double()

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return -torch.ones_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(t, dtype=torch.float64)

    def t_from_coefficients(self, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: D102
        return sigma / (alpha + sigma)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:  # noqa: D102
        return torch.sigmoid(-0.5 * log_snr.double())

    def warp(self, t: Tensor) -> Tensor:
        """Shifted time k t / (1 + (k - 1) t) of an unshifted t in [0, 1]."""
        t = t.double()
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def prior_std(self, t_init: float) -> float:  # noqa: D102
        return float(t_init)


class VariancePreserving(NoiseProcess):
    """Discrete-time diffusion (DDPM, DDIM, LCM, ...) made continuous: alpha^2 + sigma^2 = 1, t in [0, 1].

    Index i of the N training steps lies at t = (i + 1) / N, and t = 0 is clean data. Between two indices the angle
    phi = atan2(sigma, alpha) is interpolated linearly. That reproduces the scheduler's coefficients exactly at every
    index, is invertible in closed form, and stays finite at zero terminal SNR, where an interpolation of the log-SNR
    would not.

    Args:
        beta_schedule: name understood by diffusers' schedulers (``scaled_linear``, ``linear``, ``squaredcos_cap_v2``).
        beta_start: first beta of the linear schedules.
        beta_end: last beta of the linear schedules.
        num_train_timesteps: N.
        zero_terminal_snr: rescale the betas so that alpha(1) = 0 exactly (arXiv:2305.08891, Alg. 1).
    """

    t_max = 1.0

    def __init__(
        self,
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> None:
        from diffusers import DDPMScheduler
        from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

        self.beta_schedule = beta_schedule
        self.beta_start = float(beta_start)
        self.beta_end = float(beta_end)
        self.num_train_timesteps = int(num_train_timesteps)
        self.zero_terminal_snr = bool(zero_terminal_snr)
        scheduler = DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_schedule=beta_schedule,
            beta_start=beta_start,
            beta_end=beta_end,
        )
        betas: Tensor = scheduler.betas  # type: ignore[attr-defined]
        if zero_terminal_snr:
            betas = rescale_zero_terminal_snr(betas)
        self._set_alphas_cumprod(torch.cumprod(1.0 - betas, dim=0))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float]) -> VariancePreserving:
        """A process with the given squared alphas, index 0 first (diffusers' ``scheduler.alphas_cumprod``)."""
        self = cls.__new__(cls)
        values = torch.as_tensor(alphas_cumprod)
        self.beta_schedule = "given"
        self.num_train_timesteps = len(values)
        self.zero_terminal_snr = bool(values[-1] <= 1e-12)
        self._set_alphas_cumprod(values)
        return self

    def _set_alphas_cumprod(self, alphas_cumprod: Tensor) -> None:
        squared = alphas_cumprod.detach().cpu().double()
        if not bool(((squared[1:] < squared[:-1]).all() & (squared >= 0).all() & (squared <= 1).all()).item()):
            raise ValueError("alphas_cumprod must fall strictly from <= 1 to >= 0; check the scheduler's betas.")
        angles = torch.atan2((1.0 - squared).sqrt(), squared.sqrt())
        self._angles = torch.cat([torch.zeros(1, dtype=torch.float64), angles])

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Angle phi(t) and its slope d phi / d t; the last interval owns its right end."""
        n = self.num_train_timesteps
        angles = self._angles.to(t.device)
        position = t.double() * n
        left = position.floor().clamp(0, n - 1).long()
        # take, not indexing: a 0-dim index would wait for the device
        start = angles.take(left)
        slope = angles.take(left + 1) - start
        return start + (position - left) * slope, slope * n

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        phi, _ = self._interpolate(t)
        # sin of the complement is exactly 0 at the zero-terminal-SNR end, where cos(pi/2) is 6e-17
        return torch.sin(math.pi / 2 - phi)

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return self._interpolate(t)[0].sin()

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        phi, slope = self._interpolate(t)
        return -phi.sin() * slope

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        phi, slope = self._interpolate(t)
        return phi.cos() * slope

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:  # noqa: D102
        return self._t_from_angle(torch.atan(torch.exp(-0.5 * log_snr.double()))).clamp(0.0, 1.0)

    def t_from_coefficients(self, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: D102
        t = self.t_beyond(alpha, sigma)
        # rounding puts t_max beyond 1, where a clamp would have no derivative
        return t + (t.clamp(0.0, 1.0) - t).detach()

    def t_beyond(self, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: D102
        return self._t_from_angle(torch.atan2(sigma, alpha))

    def _t_from_angle(self, phi: Tensor) -> Tensor:
        """Inverse of phi(t), its last interval going on to both sides."""
        angles = self._angles.to(phi.device)
        right = torch.searchsorted(angles, phi.detach().contiguous()).clamp(1, self.num_train_timesteps)
        left = right - 1
        # take, not indexing: a 0-dim index would wait for the device
        start = angles.take(left)
        return (left + (phi - start) / (angles.take(right) - start)) / self.num_train_timesteps

    def network_time(self, t: Tensor) -> Tensor:  # noqa: D102
        return self.index_from_t(t)

    def prior_std(self, t_init: float) -> float:
        """1: VP students start from unit noise at any time, as DMD2, LCM and diffusers' schedulers do."""
        return 1.0

    def t_from_index(self, index: Tensor | int) -> Tensor:
        """Native time (i + 1) / N of the scheduler's integer timestep i."""
        return (torch.as_tensor(index, dtype=torch.float64) + 1.0) / self.num_train_timesteps

    def index_from_t(self, t: Tensor) -> Tensor:
        """The scheduler's (real-valued) timestep N t - 1 of a native time."""
        return t.double() * self.num_train_timesteps - 1.0


class EDM(NoiseProcess):
    """Variance-exploding process of EDM (arXiv:2206.00364): alpha = 1, sigma = t, native time is sigma itself.

    Args:
        sigma_min: smallest noise level used by grids and samplers.
        sigma_max: noise level of the prior, equals ``t_max``.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"EDM needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")
        self.sigma_min = float(sigma_min)
        self.sigma_max = float(sigma_max)
        self.t_max = float(sigma_max)

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.double()

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(t, dtype=torch.float64)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:  # noqa: D102
        return torch.exp(-0.5 * log_snr.double())

    def network_time(self, t: Tensor) -> Tensor:  # noqa: D102
        return 250.0 * t.double().log()

    def prior_std(self, t_init: float) -> float:  # noqa: D102
        return float(t_init)


class ResidualShift(NoiseProcess):
    """A path from a sample to a known picture ``low`` with noise (ResShift, arXiv:2307.12348), less its known part.

        z_t = x0 + t (low - x0) + sigma n,     x_t = z_t - t low = (1 - t) x0 + sigma n,     sigma = kappa sqrt(t)

    The shift t low is known wherever the condition is, and a plain process remains: x_t is what samplers carry, z_t
    what a network is shown (``networks.concatenated``, ``residual_shift``). A time is the share t of the shift.

    Args:
        kappa: standard deviation of the noise at t = 1.
        noise: ``sqrt`` (ResShift), or ``linear``, sigma = kappa t; with kappa = 1 that is flow matching from the noisy
            picture.
    """

    t_max = 1.0

    def __init__(self, kappa: float = 2.0, noise: Literal["sqrt", "linear"] = "sqrt") -> None:
        if not kappa > 0 or noise not in ("sqrt", "linear"):
            raise ValueError(f"ResidualShift(kappa={kappa}, noise={noise!r}): kappa > 0, and noise is sqrt or linear.")
        self.kappa = float(kappa)
        self.noise = noise

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return 1.0 - t.double()

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return self.kappa * (t.double().sqrt() if self.noise == "sqrt" else t.double())

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return -torch.ones_like(t, dtype=torch.float64)

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        if self.noise == "linear":
            return torch.full_like(t, self.kappa, dtype=torch.float64)
        return 0.5 * self.kappa * t.double().rsqrt()

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:  # noqa: D102
        ratio = self.kappa * torch.exp(0.5 * log_snr.double())  # (1 - t) / sqrt(t), or / t
        if self.noise == "linear":
            return 1.0 / (1.0 + ratio)
        return (2.0 / (ratio + (ratio.square() + 4.0).sqrt())).square()


class TrigFlow(NoiseProcess):
    """TrigFlow (sCM, arXiv:2410.11081): alpha = cos t, sigma = sin t, t in [0, pi/2], for data of unit std."""

    t_max = math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return torch.sin(math.pi / 2 - t.double())

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.double().sin()

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return -t.double().sin()

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.double().cos()

    def t_from_coefficients(self, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: D102
        return torch.atan2(sigma, alpha)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:  # noqa: D102
        return torch.atan(torch.exp(-0.5 * log_snr.double()))


def change_process(
    t: Tensor, source: NoiseProcess, target: NoiseProcess, data_scale: float = 1.0, beyond: bool = False
) -> tuple[Tensor, Tensor]:
    """The same noisy sample seen by another process: x'_t' = c x_t, exactly, with the same x0 direction and eps.

    With data divided by ``data_scale`` (the data's std, so that the target process sees unit-variance data), the source
    path is x_t = (alpha s) (x0 / s) + sigma eps. The target time has the same ratio of the two coefficients, and c
    brings both to the target's scale (EDM's preconditioning, arXiv:2206.00364 Table 1, is the case EDM -> TrigFlow).

    Args:
        t: native times of ``source``, any shape.
        source: process of x_t.
        target: process wanted.
        data_scale: s, standard deviation of the data.
        beyond: go on a little past the end of the target's times instead of stopping there, for differences in time.

    Returns:
        t', native times of ``target``, and the factor c = |(alpha', sigma')| / |(alpha s, sigma)|; both float64.
    """
    alpha, sigma = source.alpha(t) * data_scale, source.sigma(t)
    t_new = target.t_beyond(alpha, sigma) if beyond else target.t_from_coefficients(alpha, sigma)
    scale = torch.hypot(target.alpha(t_new), target.sigma(t_new)) / torch.hypot(alpha, sigma)
    return t_new, scale
