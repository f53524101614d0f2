"""The variance-preserving process of DDPM and Stable Diffusion."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distill.processes.base import NoiseProcess

__all__ = ["VariancePreserving"]


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
        inside = t.clamp(0.0, 1.0)
        # rounding puts t_max beyond 1, where a clamp would have no derivative
        return torch.where((t - inside).abs() < 1e-9, t + (inside - t).detach(), inside)

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
