"""What a few-step student computes from its network: maps between two times of one trajectory.

A student is a function ``student(x, t)`` or ``student(x, t, r)`` that returns a ``Prediction``, from which
``samplers.transport`` makes the sample at r. What it was trained for limits how it may be sampled:

    capability      input times    target times    samplers
    one_step_only   t_max          0               any, with the one time t_max
    any_step        all            0               renoise (consistency functions)
    two_time        all            all             flow_map, renoise; ode and heun with r = t
    segments        all            next edge       ode, with the edges as times
    own_times       its own        next one, or 0  as in training, with its own times

Samplers read ``capability`` from the function that they are given and refuse what it was not trained for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.policy_head import policy_head_of, policy_prediction
from lightning_distill.networks.second_time import second_time_of
from lightning_distill.networks.signatures import call_parameters
from lightning_distill.prediction import Prediction
from lightning_distill.processes import EDM, NoiseProcess, TrigFlow, change_process, expand
from lightning_distill.samplers import transport

__all__ = [
    "Capability",
    "ConsistencyFunction",
    "FewStep",
    "SegmentMap",
    "TrajectoryMap",
    "average_velocity",
    "edm_boundary",
    "has_own_target",
    "lcm_boundary",
    "segment_end",
    "segment_start",
    "takes_target",
    "trigflow_consistency",
    "trigflow_input",
    "trigflow_velocity",
]

Capability = Literal["one_step_only", "any_step", "two_time", "segments", "own_times"]


# ------------------------------------------------------------------------------------------------ boundary functions
def edm_boundary(sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.002) -> tuple[Tensor, Tensor]:
    """Coefficients of f = c_skip x + c_out F in EDM, with f(x, sigma_min) = x (arXiv:2303.01469, Appendix C).

        c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2),     c_out = sd (sigma - sigma_min) / sqrt(sigma^2 + sd^2)

    Args:
        sigma: noise levels, any shape.
        sigma_data: standard deviation sd of the data.
        sigma_min: noise level at which f is the identity.

    Returns:
        c_skip and c_out, float64.
    """
    sigma = sigma.double()
    above = sigma - sigma_min
    c_skip = sigma_data**2 / (above.square() + sigma_data**2)
    return c_skip, sigma_data * above / (sigma.square() + sigma_data**2).sqrt()


def lcm_boundary(index: Tensor, scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Coefficients of f = c_skip x + c_out x0_hat of latent consistency models (arXiv:2310.04378, released code).

        c_skip = sd^2 / ((k i)^2 + sd^2),     c_out = k i / sqrt((k i)^2 + sd^2)

    The identity at the timestep i = 0 and the prediction x0_hat almost everywhere else.

    Args:
        index: timesteps 0..999, any shape; times before the first count as the first.
        scaling: k.
        sigma_data: sd.

    Returns:
        c_skip and c_out, float64.
    """
    scaled = scaling * index.double().clamp_min(0.0)
    length = (scaled.square() + sigma_data**2).sqrt()
    return (sigma_data / length).square(), scaled / length


# ------------------------------------------------------------------------------------------------ TrigFlow
def trigflow_input(x: Tensor, tau: Tensor, process: NoiseProcess, sigma_data: float = 1.0) -> tuple[Tensor, Tensor]:
    """The sample that a denoiser of any process sees where TrigFlow has x = cos(tau) x0 / sd + sin(tau) eps.

    For flow matching with sd = 1, t = sin / (sin + cos) and x_t = x / (sin + cos) (SANA-Sprint, arXiv:2503.09641,
    Section 3.1); smooth up to and including tau = pi / 2.

    Args:
        x: TrigFlow samples of unit standard deviation, (B, ...).
        tau: TrigFlow times in [0, pi / 2], (B,) or ().
        process: process wanted.
        sigma_data: sd, standard deviation of the data of ``process``.

    Returns:
        x_t, (B, ...), and the native times t, float64.
    """
    t, scale = change_process(tau, TrigFlow(), process, 1.0 / sigma_data)
    return expand(scale, x) * x, t


def trigflow_velocity(prediction: Prediction, tau: Tensor, sigma_data: float = 1.0) -> Tensor:
    """F = dx/dtau of TrigFlow from a prediction in any process: cos(tau) eps - sin(tau) x0 / sd.

    From a flow-matching velocity v it is [(1 - 2t) x_t + (1 - 2t + 2t^2) v] / sqrt(t^2 + (1 - t)^2) (SANA-Sprint,
    arXiv:2503.09641, Section 3.1), which divides by nothing that vanishes, unlike (cos x - x0) / sin.

    Args:
        prediction: network output at ``trigflow_input(x, tau)``.
        tau: TrigFlow times, (B,) or ().
        sigma_data: sd, standard deviation of the data of the prediction's process.

    Returns:
        F for samples of unit standard deviation, (B, ...).
    """
    trig, x0 = TrigFlow(), prediction.x0
    return expand(trig.alpha(tau), x0) * prediction.eps - expand(trig.sigma(tau) / sigma_data, x0) * x0


def trigflow_consistency(x: Tensor, velocity: Tensor, tau: Tensor) -> Tensor:
    """f(x, tau) = cos(tau) x - sin(tau) F, the identity at tau = 0 (sCM, arXiv:2410.11081, Section 3); unit std.

    Args:
        x: TrigFlow samples, (B, ...).
        velocity: F, same shape.
        tau: times, (B,) or ().
    """
    trig = TrigFlow()
    return expand(trig.alpha(tau), x) * x - expand(trig.sigma(tau), x) * velocity


def average_velocity(x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """u(x, t, r) = (x_t - x_r) / (t - r) of two points of one flow-matching trajectory (arXiv:2505.13447, Eq. 3).

    Args:
        x_t: samples at t, (B, ...).
        x_r: samples at r, same shape.
        t: times, (B,) or ().
        r: other times, nowhere equal to t.
    """
    return (x_t - x_r) / expand(t - r, x_t)


# ------------------------------------------------------------------------------------------------ students
def takes_target(denoiser: Denoiser) -> bool:
    """Whether a network takes a target time, of its own, by an installed branch or for its policy.

    See ``networks.second_time`` and ``networks.policy_head``.
    """
    if policy_head_of(denoiser.network) is not None:
        return True
    installed = second_time_of(denoiser.network)
    return (installed is not None and installed.kind is not None) or has_own_target(denoiser)


def has_own_target(denoiser: Denoiser) -> bool:
    """Whether the network takes a target time by itself, and nothing installed or put behind it does."""
    installed = second_time_of(denoiser.network)
    if policy_head_of(denoiser.network) is not None or (installed is not None and installed.kind is not None):
        return False
    name = denoiser.family.target_time
    return name is not None and name in call_parameters(denoiser.network)


class FewStep:
    """A denoiser with its conditions bound, and what it was trained for.

    Args:
        denoiser: the student.
        cond: conditions of the samples.
        capability: see the table of this module.
        guidance: scale for guidance-embedded networks, None for its default.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        cond: Mapping[str, Any] | None = None,
        capability: Capability = "one_step_only",
        guidance: Tensor | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.cond = cond
        self.capability: Capability = capability
        self.guidance = guidance

    @property
    def process(self) -> NoiseProcess:
        """Noise process of the student."""
        return self.denoiser.process

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """The network's prediction at (x, t)."""
        return self._predict(x, t, None)

    def _predict(self, x: Tensor, t: Tensor, r: Tensor | None) -> Prediction:
        out = self.denoiser(x, t, self.cond, r=r, guidance=self.guidance)
        assert isinstance(out, Prediction)
        return out


class ConsistencyFunction(FewStep):
    """f(x, t), the clean end of the trajectory through x at t (arXiv:2303.01469, Section 3).

        plain   f = x0_hat                        the identity at t = 0 by itself, except where x0_hat divides by alpha
        edm     f = c_skip x + c_out F            the identity at sigma_min; F from x0_hat by EDM's preconditioning
        lcm     f = c_skip x + c_out x0_hat       the identity at the timestep 0

    Args:
        denoiser: the student.
        cond: conditions of the samples.
        boundary: one of the rows above.
        sigma_data: sd of the boundary coefficients, .5 in the papers.
        guidance: scale for guidance-embedded networks.

    Raises:
        ValueError: ``edm`` outside of EDM, ``lcm`` outside of a process with timesteps, or an unknown boundary.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        cond: Mapping[str, Any] | None = None,
        boundary: Literal["plain", "edm", "lcm"] = "plain",
        sigma_data: float = 0.5,
        guidance: Tensor | None = None,
    ) -> None:
        super().__init__(denoiser, cond, "any_step", guidance)
        if boundary not in ("plain", "edm", "lcm"):
            raise ValueError(f"boundary={boundary!r} is unknown; choose plain, edm or lcm.")
        if boundary == "edm" and not isinstance(self.process, EDM):
            raise ValueError(f"boundary='edm' is written in noise levels, and the student is in {self.process!r}.")
        if boundary == "lcm" and not hasattr(self.process, "index_from_t"):
            raise ValueError(f"boundary='lcm' is written in integer timesteps, and the student is in {self.process!r}.")
        self.boundary = boundary
        self.sigma_data = sigma_data

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """The clean end as a prediction."""
        prediction = self._predict(x, t, None)
        if self.boundary == "plain":
            return prediction
        t = prediction.t
        if self.boundary == "lcm":
            index: Callable[[Tensor], Tensor] = self.process.index_from_t  # type: ignore[attr-defined]
            c_skip, c_out = lcm_boundary(index(t), sigma_data=self.sigma_data)
            clean = expand(c_skip, x) * x + expand(c_out, x) * prediction.x0
            return Prediction.from_x0(clean, x, t, self.process)
        sigma_min: float = self.process.sigma_min  # type: ignore[attr-defined]
        c_skip, _ = edm_boundary(t, self.sigma_data, sigma_min)
        plain_skip, _ = edm_boundary(t, self.sigma_data, 0.0)
        # c_out F = (1 - sigma_min / sigma) (x0_hat - plain_skip x), since F is what EDM divides by its own c_out
        share = 1.0 - sigma_min / t.double()
        clean = expand(c_skip - share * plain_skip, x) * x + expand(share, x) * prediction.x0
        return Prediction.from_x0(clean, x, t, self.process)


class TrajectoryMap(FewStep):
    """X_{t -> r}(x), the point at r of the trajectory through x at t, by a two-time network.

    The network's prediction g(x, t, r) is what ``transport`` carries to r: in flow matching its ``flow_prediction`` is
    the average velocity u, X = x + (r - t) u (MeanFlow, arXiv:2505.13447, Eq. 12); in EDM its ``x0`` is CTM's g,
    X = (r/t) x + (1 - r/t) g (arXiv:2310.02279, Section 3). X_{t -> t} is the identity in any of them. A network with a
    policy head leads to where its policy does.

    Args:
        denoiser: a two-time network.
        cond: conditions of the samples.
        guidance: scale for guidance-embedded networks.
    """

    def __init__(
        self, denoiser: Denoiser, cond: Mapping[str, Any] | None = None, guidance: Tensor | None = None
    ) -> None:
        super().__init__(denoiser, cond, "two_time", guidance)

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Prediction:
        """The prediction that leads to r; None is r = t, the direction of the trajectory itself."""
        if policy_head_of(self.denoiser.network) is not None:
            if r is None:
                return self._predict(x, t, None)
            return policy_prediction(self.denoiser, x, t, r, self.cond, self.guidance)
        return self._predict(x, t, t if r is None else r)

    def jump(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """X_{t -> r}(x).

        Args:
            x: samples at t, (B, ...).
            t: native times, (B,) or ().
            r: native target times, (B,) or ().
        """
        return transport(self(x, t, r), r)


def segment_end(t: Tensor, edges: Sequence[float]) -> Tensor:
    """The edge at which the segment of each time ends; an edge belongs to the segment below it.

    Args:
        t: native times, any shape, in (0, edges[0]].
        edges: descending edges without the final 0; the first is the largest time.

    Returns:
        the largest of (edges, 0) that is smaller than t, float64.
    """
    ascending = torch.tensor([0.0, *reversed([float(e) for e in edges])], dtype=torch.float64, device=t.device)
    t = t.double().contiguous()
    return ascending[(torch.searchsorted(ascending, t) - 1).clamp_min(0)]


def segment_start(t: Tensor, edges: Sequence[float]) -> Tensor:
    """The edge at which the segment of each time begins: the smallest of the edges that is at least t, float64.

    Args:
        t: native times, any shape, in (0, edges[0]].
        edges: descending edges without the final 0; the first is the largest time.
    """
    ascending = torch.tensor([float(e) for e in reversed(edges)], dtype=torch.float64, device=t.device)
    return ascending[torch.searchsorted(ascending, t.double().contiguous()).clamp_max(len(ascending) - 1)]


class SegmentMap(FewStep):
    """Consistency within segments: from any time to the end of its segment (PCM, arXiv:2405.18407, Section 3.2).

        f_m(x, t) = DDIM(x, x0_hat, t -> s_m),     s_m <= t the edge below

    the identity at the edges by construction. Sampled with ``ode`` and the edges as times.

    Args:
        denoiser: the student.
        edges: descending edges without the final 0, the first the largest time.
        cond: conditions of the samples.
        guidance: scale for guidance-embedded networks.

    Raises:
        ValueError: edges that do not fall.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        edges: Sequence[float],
        cond: Mapping[str, Any] | None = None,
        guidance: Tensor | None = None,
    ) -> None:
        super().__init__(denoiser, cond, "segments", guidance)
        self.edges = [float(e) for e in edges]
        if not self.edges or any(b >= a for a, b in pairwise([*self.edges, 0.0])):
            raise ValueError(f"edges {list(edges)} must fall strictly from the noisiest time, the final 0 left out.")

    def jump(self, x: Tensor, t: Tensor) -> Tensor:
        """The sample at the end of the segment."""
        return transport(self(x, t), segment_end(t, self.edges))
