"""An exact teacher of several streams: Gaussian mixtures whose elements are noised at different paces."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distill.networks.analytic import AnalyticNetwork, GaussianMixture, runge_kutta
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import NoiseProcess
from lightning_distill.streams import StreamProcess

__all__ = ["RING_ACTION", "RingActionTeacher", "StreamMixture", "ring_action"]

#: shapes of the streams of ``ring_action``
RING_ACTION: dict[str, tuple[int, ...]] = {"action": (1,), "video": (2,)}


class StreamMixture(GaussianMixture):
    """A mixture of Gaussians of packed samples under ``StreamProcess``.

    With A and S the diagonal matrices of alpha and sigma, component k of x_t is N(A m_k, M_k), M_k = A C_k A + S^2, and

        y = M_k^-1 (x_t - A m_k),     E[x0 | x_t, k] = m_k + C_k A y,     E[eps | x_t, k] = S y

    Args:
        means: (K, N).
        covariances: (K, N, N), symmetric positive definite.
        weights: relative weights, (K,); None means equal.
        labels: class of each component, None for no classes.
    """

    covariances: Tensor

    def __init__(
        self,
        means: Tensor,
        covariances: Tensor,
        weights: Tensor | None = None,
        labels: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__(means, covariances=covariances, weights=weights, labels=labels)
        self.register_buffer("covariances", torch.as_tensor(covariances, dtype=torch.float64))

    def posterior(
        self, x_t: Tensor, t: Tensor, process: NoiseProcess, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t] and E[eps | x_t], see ``GaussianMixture.posterior``."""
        log_joint, y, alpha, sigma = self._solved(x_t, t, process, labels)
        weight = log_joint.softmax(-1)[..., None]
        x0 = self.means.double() + torch.einsum("kij,bkj->bki", self.covariances.double(), alpha * y)
        return self._like((weight * x0).sum(1), x_t), self._like((weight * sigma * y).sum(1), x_t)

    def score(self, x_t: Tensor, t: Tensor, process: NoiseProcess, labels: Tensor | None = None) -> Tensor:
        """Gradient of ``log_prob`` in x_t."""
        log_joint, y, _, _ = self._solved(x_t, t, process, labels)
        return self._like(-(log_joint.softmax(-1)[..., None] * y).sum(1), x_t)

    def log_prob(self, x_t: Tensor, t: Tensor, process: NoiseProcess, labels: Tensor | None = None) -> Tensor:
        """Log-density of x_t (given the class), (B,), float64."""
        return self._solved(x_t, t, process, labels)[0].logsumexp(-1)

    @torch.no_grad()
    def flow_map(
        self,
        x: Tensor,
        t: float,
        r: float,
        process: NoiseProcess,
        labels: Tensor | None = None,
        num_steps: int = 128,
    ) -> Tensor:
        """The probability-flow ODE from time t to time r, by RK4 in the process' own time."""
        start, stop = torch.tensor([t, r], dtype=torch.float64, device=x.device)
        y = runge_kutta(lambda y, s: self.velocity(y, s, process, labels), x.double(), start, stop, num_steps)
        return y.to(x.dtype)

    def _solved(
        self, x_t: Tensor, t: Tensor, process: NoiseProcess, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log joint of component and x_t, (B, K); y, (B, K, N); alpha and sigma, (B, 1, N) or (1, 1, N)."""
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        noise = torch.diag_embed(sigma.square())
        variance = alpha[..., :, None] * self.covariances.double() * alpha[..., None, :] + noise
        factor = torch.linalg.cholesky(variance)
        offset = x_t.double()[:, None] - alpha * self.means.double()
        half = torch.linalg.solve_triangular(factor, offset[..., None], upper=False)
        y = torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]
        log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        n = x_t.shape[1]
        log_normal = -0.5 * half[..., 0].square().sum(-1) - 0.5 * log_det - 0.5 * n * math.log(2.0 * math.pi)
        return log_normal + self._log_weights(labels), y, alpha, sigma


def ring_action(labelled: bool = False) -> StreamMixture:
    """A point of a ring (``video``, 2 numbers) and what is done there (``action``, 1 number).

    Eight Gaussians of radius 2 and std .25; about each mode the action is the product of the coordinates over 2, to
    first order, with noise of std .15.

    Args:
        labelled: make every Gaussian a class of its own.
    """
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    cos, sin = angles.cos(), angles.sin()
    slope = torch.stack([sin, cos], dim=-1)  # of x y / 2 at (2 cos, 2 sin)
    means = torch.stack([2.0 * cos * sin, 2.0 * cos, 2.0 * sin], dim=-1)
    covariances = torch.zeros(8, 3, 3, dtype=torch.float64)
    covariances[:, 1, 1] = covariances[:, 2, 2] = 0.25**2
    covariances[:, 0, 1:] = covariances[:, 1:, 0] = 0.25**2 * slope
    covariances[:, 0, 0] = 0.25**2 * slope.square().sum(1) + 0.15**2
    return StreamMixture(means, covariances, labels=range(8) if labelled else None)


class RingActionTeacher(DenoiserSpec):
    """The exact denoiser of ``ring_action``.

    Args:
        process: with the streams ``action`` (1 number) and ``video`` (2 numbers).
        labelled: make every mode a class of its own.
    """

    def __init__(self, process: StreamProcess, labelled: bool = False) -> None:
        self.process = process
        self.labelled = labelled

    def check(self) -> None:  # noqa: D102
        if (found := {name: tuple(s.shape) for name, s in self.process.streams.items()}) != RING_ACTION:
            raise ValueError(f"RingActionTeacher has streams of shapes {RING_ACTION}, and its process {found}.")

    def build(self) -> Denoiser:  # noqa: D102
        return Denoiser(AnalyticNetwork(ring_action(self.labelled), self.process), self.process, "sample")
