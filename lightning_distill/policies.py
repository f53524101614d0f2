"""Policies: velocities of a whole segment of times that one network call gives, so that substeps cost no call.

    policy      velocity at (x, t), flow matching, s the segment's start
    grid        (x - x0(t)) / t,  x0(t) through N values on [end, s], piecewise linear or a polynomial
    mixture     (x - E[x0 | x_t = x]) / t,  the posterior of a Gaussian mixture q(x0 | x_s)
    momentum    sum_k w_k u_k exp(g_k (s - t)),  whose integral is in closed form

One value on the grid, one component without variance, and modes without growth are the straight step (DDIM, Euler).
All are written in flow matching, x = (1 - t) x0 + t eps, in which every other process has an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distill.processes import expand

__all__ = [
    "GridPolicy",
    "MixturePolicy",
    "MomentumPolicy",
    "Policy",
    "PolicyKind",
    "exponential_mean",
    "grid_weights",
    "groups_of",
    "initial_offsets",
    "make_policy",
    "mixture_posterior",
]

PolicyKind = Literal["mixture", "grid", "polynomial", "momentum"]

#: ln of the components' standard deviation at initialisation, in units of the noise level
_LOG_STD = -3.0
#: largest absolute growth rate of a mode, per unit of time
_GROWTH = 8.0


class Policy(ABC):
    """A velocity field on one segment of times, without network calls."""

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The field at a point.

        Args:
            x: samples at t, (B, C, ...).
            t: flow-matching times within the segment, above 0, (B,).
        """

    def average(self, x: Tensor, t: Tensor, r: Tensor, substeps: int) -> Tensor:
        """Average velocity from t to r along the policy's own trajectory; the velocity itself for r = t.

        Args:
            x: samples at t, (B, C, ...).
            t: flow-matching times, (B,).
            r: end, (B,), at most t; may be 0.
            substeps: Euler steps, even in time. The field is never asked at r.
        """
        h = (t - r) / substeps
        total = torch.zeros_like(x)
        for i in range(substeps):
            v = self.velocity(x, t - i * h)
            x, total = x - expand(h, x) * v, total + v
        return total / substeps

    def step(self, x: Tensor, t: Tensor, r: Tensor, substeps: int) -> Tensor:
        """The sample at r; arguments as ``average``."""
        return x - expand(t - r, x) * self.average(x, t, r, substeps)

    @abstractmethod
    def detach(self) -> Policy:
        """The same policy without graph."""

    def dropout(self, u: Tensor, share: float) -> Policy:
        """The policy without some of its components, the others' weights raised; policies without weights stay.

        Args:
            u: one uniform number per component, (B, K).
            share: probability p of leaving one out, in [0, 1); where all would go, none does.
        """
        return self

    def sharpened(self, temperature: Tensor) -> Policy:
        """The policy of a less random posterior, for sampling; policies without one stay.

        Args:
            temperature: T in (0, 1] of each sample, (B,); 1 changes nothing.
        """
        return self


def _normalised(log_weights: Tensor) -> Tensor:
    """A softmax over components; torch's own is slow where few components are not the last dimension."""
    return (log_weights - log_weights.logsumexp(1, keepdim=True)).exp()


def _kept(log_weights: Tensor, u: Tensor, share: float) -> Tensor:
    gone = u < share
    gone = gone & ~gone.all(dim=1, keepdim=True)
    return log_weights.masked_fill(gone.reshape(*u.shape, *[1] * (log_weights.ndim - 2)), -torch.inf)


# ------------------------------------------------------------------------------------------------ grid
def grid_weights(position: Tensor, points: int, kind: Literal["grid", "polynomial"]) -> Tensor:
    """Weights of N values on a regular grid at a position between its ends.

    Args:
        position: 0 at the first value, 1 at the last, (B,).
        points: N.
        kind: ``grid``, linear between neighbours, or ``polynomial``, the one of degree N - 1 (Lagrange).

    Returns:
        (B, N), float64, rows sum to 1.
    """
    nodes = torch.arange(points, dtype=torch.float64, device=position.device)
    if points == 1:
        return torch.ones(len(position), 1, dtype=torch.float64, device=position.device)
    away = position.double().clamp(0.0, 1.0)[:, None] * (points - 1) - nodes
    if kind == "grid":
        return (1.0 - away.abs()).clamp_min(0.0)
    same = torch.eye(points, dtype=torch.bool, device=position.device)
    apart = (nodes[:, None] - nodes).masked_fill(same, 1.0)
    factors = (away[:, None, :] / apart).masked_fill(same, 1.0)
    return factors.prod(dim=-1)


@dataclass(frozen=True)
class GridPolicy(Policy):
    """A clean sample that moves along a curve of time (the DX policy, arXiv:2510.14974).

    Attributes:
        x0: values from the segment's end to its start, (B, N, C, ...).
        start: flow-matching times at which the segment begins, (B,).
        end: times at which it ends, (B,).
        kind: interpolation, see ``grid_weights``.
    """

    x0: Tensor
    start: Tensor
    end: Tensor
    kind: Literal["grid", "polynomial"] = "grid"

    def clean(self, t: Tensor) -> Tensor:
        """x0(t), (B, C, ...)."""
        width = self.start - self.end
        position = (t - self.end) / torch.where(width > 0, width, 1.0)
        weights = grid_weights(position, self.x0.shape[1], self.kind)
        return (expand_pairs(weights, self.x0) * self.x0).sum(1)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        return (x - self.clean(t)) / expand(t, x)

    def detach(self) -> GridPolicy:  # noqa: D102
        return replace(self, x0=self.x0.detach())


def expand_pairs(weights: Tensor, like: Tensor) -> Tensor:
    """Weights (B, K) shaped to multiply (B, K, C, ...), in its dtype."""
    return weights.to(like.dtype).reshape(*weights.shape, *[1] * (like.ndim - 2))


# ------------------------------------------------------------------------------------------------ mixture
def mixture_posterior(
    means: Tensor, variance: Tensor, log_weights: Tensor, x_s: Tensor, s: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """E[x0 | x_t] of the data whose posterior at an earlier point is a Gaussian mixture (arXiv:2510.14974).

        q(x0 | x_s) = sum_k w_k N(m_k, v_k)      q(x0 | x_t) ~ q(x0 | x_s) N(x_t; a_t x0, b_t^2) / N(x_s; a_s x0, b_s^2)
        z = a_t^2 / b_t^2 - a_s^2 / b_s^2,    n = a_t x_t / b_t^2 - a_s x_s / b_s^2,     a = 1 - t,  b = t
        E = sum_k w'_k (m_k + v_k n) / (1 + v_k z)
        ln w'_k = ln w_k - (z |m_k|^2 - 2 n m_k - v_k |n|^2) / (2 (1 + v_k z)) - C/2 ln(1 + v_k z)

    Exact, so that for an isotropic mixture of data every later velocity of its flow follows from one posterior. The
    result does not depend on the origin of x0. With it at c = n / max(z, 1), nothing of the size 1/t^2 is left to
    cancel, so that float32 is enough near clean data.

    Args:
        means: m_k, (B, K, C, ...).
        variance: v_k, broadcasts to (B, K, 1, ...); of each of the C channels.
        log_weights: ln w_k up to a constant, (B, K, 1, ...); a mixture for every position, joint over its channels.
        x_s: the earlier (noisier) point, (B, C, ...).
        s: its flow-matching times, (B,).
        x_t: the later point.
        t: its times, in (0, s].

    Returns:
        (B, C, ...).
    """
    precision = [(1.0 - time.double()) / time.double().square() for time in (t, s)]  # a / b^2
    z = precision[0] * (1.0 - t.double()) - precision[1] * (1.0 - s.double())
    n = (expand(precision[0], x_t) * x_t - expand(precision[1], x_s) * x_s)[:, None]
    z = expand(z, means)
    shrink = 1.0 + variance * z
    origin = n / z.clamp_min(1.0)
    means, n = means - origin, n * (1.0 - z).clamp_min(0.0)
    fit = (z * means.square() - 2.0 * n * means - variance * n.square()).sum(2, keepdim=True)
    log_weights = log_weights - 0.5 * fit / shrink - 0.5 * means.shape[2] * shrink.log()
    return origin.squeeze(1) + (_normalised(log_weights) * (means + variance * n) / shrink).sum(1)


@dataclass(frozen=True)
class MixturePolicy(Policy):
    """A Gaussian mixture of clean samples with its exact posteriors (GMFlow, arXiv:2510.14974).

    Attributes:
        means: (B, K, C, ...).
        variance: broadcasts to (B, K, 1, ...).
        log_weights: (B, K, 1, ...), up to a constant.
        x_start: where the network was called, (B, C, ...).
        start: at which flow-matching times, (B,).
    """

    means: Tensor
    variance: Tensor
    log_weights: Tensor
    x_start: Tensor
    start: Tensor

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        clean = mixture_posterior(self.means, self.variance, self.log_weights, self.x_start, self.start, x, t)
        return (x - clean) / expand(t, x)

    def detach(self) -> MixturePolicy:  # noqa: D102
        return replace(
            self,
            means=self.means.detach(),
            variance=self.variance.detach(),
            log_weights=self.log_weights.detach(),
        )

    def dropout(self, u: Tensor, share: float) -> MixturePolicy:  # noqa: D102
        return replace(self, log_weights=_kept(self.log_weights, u, share)) if share else self

    def sharpened(self, temperature: Tensor) -> MixturePolicy:
        """Weights to the power 1/T and variances times T: the mixture to the power 1/T where components lie apart."""
        t = expand(temperature, self.means)
        return replace(self, log_weights=self.log_weights / t, variance=self.variance * t)


# ------------------------------------------------------------------------------------------------ momentum
def exponential_mean(z: Tensor) -> Tensor:
    """(e^z - 1) / z, the mean of e^y over y from 0 to z; smooth through z = 0, as are its derivatives."""
    small = z.abs() < 1e-2
    safe = torch.where(small, 1.0, z)
    series = 1.0 + z / 2.0 * (1.0 + z / 3.0 * (1.0 + z / 4.0 * (1.0 + z / 5.0)))
    return torch.where(small, series, torch.expm1(safe) / safe)


@dataclass(frozen=True)
class MomentumPolicy(Policy):
    """A mixture of modes that grow or decay at constant rates (arXiv:2602.09014).

        v(t) = sum_k w_k u_k e^{g_k (s - t)},     int_r^t v = (t - r) sum_k w_k u_k e^{g_k (s - t)} phi(g_k (t - r))

    with phi(z) = (e^z - 1) / z. The velocity does not depend on the sample.

    Attributes:
        velocities: u_k, (B, K, C, ...).
        growth: g_k = ln gamma_k, per unit of time, broadcasts to ``velocities``.
        log_weights: ln w_k up to a constant, (B, K, 1, ...).
        start: s, flow-matching times, (B,).
    """

    velocities: Tensor
    growth: Tensor
    log_weights: Tensor
    start: Tensor

    def _modes(self, t: Tensor) -> Tensor:
        passed = expand(self.start - t, self.velocities)
        return _normalised(self.log_weights) * self.velocities * (self.growth * passed).exp()

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        return self._modes(t).sum(1)

    def average(self, x: Tensor, t: Tensor, r: Tensor, substeps: int = 1) -> Tensor:
        """The average velocity in closed form; ``substeps`` are not needed."""
        return (self._modes(t) * exponential_mean(self.growth * expand(t - r, self.velocities))).sum(1)

    def detach(self) -> MomentumPolicy:  # noqa: D102
        return replace(
            self,
            velocities=self.velocities.detach(),
            growth=self.growth.detach(),
            log_weights=self.log_weights.detach(),
        )

    def dropout(self, u: Tensor, share: float) -> MomentumPolicy:  # noqa: D102
        return replace(self, log_weights=_kept(self.log_weights, u, share)) if share else self


# ------------------------------------------------------------------------------------------------ from a network
def groups_of(kind: PolicyKind, components: int) -> int:
    """How many outputs of a sample's shape describe a policy, beside the network's own.

    Raises:
        ValueError: an unknown kind, or no component.
    """
    if kind not in get_args(PolicyKind):
        raise ValueError(f"policy={kind!r} is unknown; choose one of {', '.join(get_args(PolicyKind))}.")
    if components < 1 or (kind == "momentum" and components < 2):
        raise ValueError(
            f"components={components}: a {kind} policy has at least {2 if kind == 'momentum' else 1} of them."
        )
    if kind == "mixture":
        return 2 * components + 1
    return components if kind in ("grid", "polynomial") else 3 * components - 1


def initial_offsets(kind: PolicyKind, components: int, generator: torch.Generator, spread: float = 0.2) -> Tensor:
    """Constants of the extra outputs at initialisation, (groups,), when they depend on nothing else.

    The components of a mixture, or the modes of a momentum policy, start a little apart, else all of them would stay
    equal; their mean is 0, so that the velocity at the segment's start is the network's own.

    Args:
        kind: policy.
        components: K.
        generator: of the offsets.
        spread: their size, in units of the velocity.
    """
    offsets = torch.zeros(groups_of(kind, components))
    if kind in ("mixture", "momentum") and components > 1:
        drawn = torch.randn(components, generator=generator)
        offsets[:components] = spread * (drawn - drawn.mean())
    return offsets


def make_policy(
    kind: PolicyKind, components: int, velocity: Tensor, extra: Tensor, x: Tensor, t: Tensor, end: Tensor
) -> Policy:
    """The policy that a network describes at the start of a segment.

    Extra outputs of zero are the straight step along the network's own velocity (of a mixture: up to the square of
    its components' initial standard deviation).

    Args:
        kind: policy.
        components: K, or N of the grid.
        velocity: the network's velocity eps - x0, (B, C, ...).
        extra: its further outputs, (B, ``groups_of(kind, components)``, C, ...): offsets of the K velocities, then
            logits of the weights (their mean over channels counts); then ln of one standard deviation (its mean), or
            the growth rates of all modes but the first, which has none.
        x: sample in flow matching, (B, C, ...).
        t: flow-matching times, (B,).
        end: times at which the segment ends, (B,).
    """
    own = velocity[:, None] + extra[:, :components]
    if kind in ("grid", "polynomial"):
        return GridPolicy(x[:, None] - expand(t, own) * own, t, end, "grid" if kind == "grid" else "polynomial")
    log_weights = extra[:, components : 2 * components].mean(2, keepdim=True)
    if kind == "momentum":
        growth = _GROWTH * torch.tanh(extra[:, 2 * components :] / _GROWTH)
        return MomentumPolicy(own, torch.cat([torch.zeros_like(growth[:, :1]), growth], 1), log_weights, t)
    log_std = _LOG_STD + extra[:, -1:].flatten(1).mean(1)
    std = log_std.clamp(-8.0, 1.0).exp().reshape(-1, *[1] * (own.ndim - 1)) * expand(t, own)
    return MixturePolicy(x[:, None] - expand(t, own) * own, std.square(), log_weights, x, t)
