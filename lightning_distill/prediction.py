"""One value object for whatever a diffusion network outputs.

A network of type ``kind`` predicts p x0 + q eps with

    kind               p        q
    epsilon            0        1
    sample             1        0
    v_prediction    -sigma    alpha       (arXiv:2202.00512)
    flow_prediction   -1        1         (arXiv:2210.02747; eps - x0)

and the input is x_t = alpha x0 + sigma eps. Two linear equations give x0 and eps, from which every other form follows;
this file is the only place where they are solved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_distill.processes import NoiseProcess, expand

__all__ = ["PREDICTION_TYPES", "Prediction", "PredictionType", "regression_target"]

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)

_Coefficients = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _solve(kind: str, alpha: Tensor, sigma: Tensor) -> _Coefficients:
    """Coefficients (on x_t, on the raw output) of x0 and of eps."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "epsilon":
        return (one / alpha, -sigma / alpha), (zero, one)
    if kind == "sample":
        return (zero, one), (one / sigma, -alpha / sigma)
    if kind == "v_prediction":
        d = alpha.square() + sigma.square()
        return (alpha / d, -sigma / d), (sigma / d, alpha / d)
    if kind == "flow_prediction":
        d = alpha + sigma
        return (one / d, -sigma / d), (one / d, alpha / d)
    raise ValueError(f"unknown prediction type {kind!r}; choose one of {', '.join(PREDICTION_TYPES)}.")


def regression_target(kind: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of type ``kind`` should output for known x0 and eps.

    Args:
        kind: prediction type.
        x0: clean sample, (B, ...).
        eps: noise, same shape.
        alpha: coefficient of x0 at the sample's time, (B,) or ().
        sigma: coefficient of eps, (B,) or ().

    Returns:
        p x0 + q eps, shape and dtype of ``x0``.
    """
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return expand(alpha, x0) * eps - expand(sigma, x0) * x0
    if kind == "flow_prediction":
        return eps - x0
    raise ValueError(f"unknown prediction type {kind!r}; choose one of {', '.join(PREDICTION_TYPES)}.")


@dataclass(frozen=True)
class Prediction:
    """A network's output with everything that is needed to read it in any parameterisation.

    Attributes:
        raw: network output in the parameterisation ``kind``, (B, ...), float32 (float64 if the input was).
        x_t: noisy sample the output belongs to, same shape and dtype.
        t: native times, (B,).
        process: noise process of ``x_t``.
        kind: prediction type of ``raw``.
        features: activations of the tapped blocks by name, in the network's dtype.
    """

    raw: Tensor
    x_t: Tensor
    t: Tensor
    process: NoiseProcess
    kind: str
    features: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_x0(cls, x0: Tensor, x_t: Tensor, t: Tensor, process: NoiseProcess) -> Prediction:
        """Wrap a clean-sample estimate, for example a guided one or an analytic posterior mean."""
        return cls(raw=x0, x_t=x_t, t=t, process=process, kind="sample")

    def _combine(self, which: int) -> Tensor:
        alpha, sigma = self.process.alpha(self.t), self.process.sigma(self.t)
        on_x, on_raw = _solve(self.kind, alpha, sigma)[which]
        if self.kind == ("sample", "epsilon")[which]:
            return self.raw
        return expand(on_x, self.x_t) * self.x_t + expand(on_raw, self.raw) * self.raw

    @property
    def x0(self) -> Tensor:
        """Estimate of the clean sample, E[x0 | x_t] for an exact network."""
        return self._combine(0)

    @property
    def eps(self) -> Tensor:
        """Estimate of the noise."""
        return self._combine(1)

    @property
    def v_prediction(self) -> Tensor:
        """Alpha eps - sigma x0; not the velocity."""
        return self.as_type("v_prediction")

    @property
    def flow_prediction(self) -> Tensor:
        """Eps - x0: the velocity of flow matching, whatever the process is."""
        return self.as_type("flow_prediction")

    @property
    def score(self) -> Tensor:
        """Gradient of the log-density of x_t: -eps / sigma."""
        return -self.eps / expand(self.process.sigma(self.t), self.x_t)

    @property
    def velocity(self) -> Tensor:
        """dx_t/dt = alpha'(t) x0 + sigma'(t) eps, what probability-flow solvers integrate."""
        d_alpha, d_sigma = self.process.d_alpha(self.t), self.process.d_sigma(self.t)
        return expand(d_alpha, self.x_t) * self.x0 + expand(d_sigma, self.x_t) * self.eps

    def as_type(self, kind: str) -> Tensor:
        """The same estimate in another parameterisation (the raw output itself when ``kind`` is its own)."""
        if kind == self.kind:
            return self.raw
        if kind == "sample":
            return self.x0
        if kind == "epsilon":
            return self.eps
        alpha, sigma = self.process.alpha(self.t), self.process.sigma(self.t)
        return regression_target(kind, self.x0, self.eps, alpha, sigma)
