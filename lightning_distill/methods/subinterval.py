"""Methods that compare distributions where a student step ends, instead of on clean samples."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.losses.score_matching import space_weight
from lightning_distill.losses.subinterval import (
    balanced_weight,
    noise_further,
    subinterval_target,
    subinterval_weight,
)
from lightning_distill.methods.fake_score import FakeScoreMethod
from lightning_distill.methods.rollout import Rollout
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.oracle import OracleNetwork
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.samplers import transport
from lightning_distill.streams import StreamProcess
from lightning_distill.time_coverage import restricted
from lightning_distill.times import TimeDistribution

__all__ = ["SubintervalMethod"]


class SubintervalMethod(FakeScoreMethod):
    """Base of methods whose samples are x_u, u the time at which a step of the student ends.

        x_u = alpha_u x0_S + sigma_u eps,     x_t = A x_u + S n,     t in (u, t_high)         (``losses.subinterval``)

    For the last step u is 0 and x_u the clean sample.

    Args:
        teacher: the pretrained model.
        interval_margin: share of the times above u that are left out, where S is small and the critic's target large.
        critic_condition_on: see ``FakeScoreMethod``; here the fake score knows the step unless told otherwise.
        critic_weight: of the fake score's error, whose target is noisy where u is: ``balanced`` gives the gradients of
            all steps one size (see ``balanced_weight``), ``clamped`` is that of released code for flows
            (``subinterval_weight``), with which early steps drown the others.
        **kwargs: see ``FakeScoreMethod`` and ``DistillationModule``.
    """

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        interval_margin: float = 0.01,
        critic_condition_on: Literal["none", "step", "interval"] = "step",
        critic_weight: Literal["balanced", "clamped"] = "balanced",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, critic_condition_on=critic_condition_on, **kwargs)
        if critic_weight not in ("balanced", "clamped"):
            raise ValueError(f"critic_weight={critic_weight!r} is unknown; choose balanced or clamped.")
        self.critic_weight = critic_weight
        if not 0.0 <= interval_margin < 1.0:
            raise ValueError(f"interval_margin={interval_margin}: give a share of the interval, from 0 to below 1.")
        self.interval_margin = interval_margin

    def build_roles(self) -> None:
        """As usual; a one-step student has nothing to tell its fake score."""
        if len(self._given_times or range(self._num_steps)) == 1:
            self.critic_condition_on = "none"
        super().build_roles()

    def check_configuration(self) -> None:
        """There must be times at which the end of every step can be compared, of one stream."""
        super().check_configuration()
        if isinstance(self.process, StreamProcess):
            raise ValueError(
                f"{type(self).__name__} weighs samples by the noise left where a step ends, of which several streams "
                "have one each; use DMD2 or SiD for them."
            )
        top = float(self.matching_times.quantile(torch.ones((), dtype=torch.float64), self.process))
        ends = self.step_ends()
        if isinstance(self.fake_score.network, OracleNetwork) and len(ends) > 1:
            raise ValueError(
                "an OracleScore remembers clean samples, and this method compares samples where a step ends; give the "
                "fake score a network."
            )
        if ends[0] >= top:
            raise ValueError(
                f"the student's first step ends at t={ends[0]:g}, but the matching times reach only {top:g}; give "
                "matching_times with a higher end, or student_times with a lower second entry."
            )

    def step_ends(self) -> list[float]:
        """Time at which the sample of each step lives."""
        return [*self.student_times[1:], 0.0]

    def where_it_ends(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """x_u, with the graph of the rollout, and u (B,); fresh noise is that of the slice."""
        u = torch.tensor(self.step_ends(), dtype=torch.float64, device=rollout.x0.device)[rollout.steps]
        eps = None if self.sampler == "ode" else self.draws.of_slice().normal("end", rollout.x0.shape)
        return transport(rollout.prediction, u, eps), u

    def highest(self, rollout: Rollout) -> Tensor:
        """Upper end of the compared times, (B,)."""
        return torch.full_like(rollout.end, self.process.t_max)

    def noised(
        self, x_u: Tensor, u: Tensor, rollout: Rollout, distribution: TimeDistribution, name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, its time and the fresh noise, at a random time between u and ``highest``.

        Args:
            x_u: samples at u, (B, ...).
            u: their times, (B,).
            rollout: where they come from.
            distribution: of the times.
            name: of the draws.
        """
        v = self.draws.uniform(f"{name}/time", len(x_u))
        t = restricted(distribution, v, u, self.highest(rollout), self.process, self.interval_margin)
        n = self.draws.normal(f"{name}/noise", x_u.shape)
        return noise_further(x_u, u, t, n, self.process), t, n

    def at_level(self, rollout: Rollout, level: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t and the x0 that the fake score should predict there, at a given quantile of the times above u.

        Args:
            rollout: student samples without graph.
            level: quantiles of the matching times between u and ``highest``, (B,).
            n: unit noise, (B, ...).
        """
        x_u, u = self.where_it_ends(rollout)
        t = restricted(self.matching_times, level, u, self.highest(rollout), self.process, self.interval_margin)
        # x0_S is what renoising made x_u of; a deterministic step's noise is its own
        clean = subinterval_target(x_u, u, t, n, self.process)[0] if self.sampler == "ode" else rollout.x0
        return noise_further(x_u, u, t, n, self.process), t, clean

    def critic_samples(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The fake score learns the score of x_t from x_u alone."""
        x_u, u = self.where_it_ends(rollout)
        x_t, t, n = self.noised(x_u, u, rollout, self.critic_times, "critic")
        x0, eps = subinterval_target(x_u, u, t, n, self.process)
        if self.critic_weight == "clamped":
            return x_t, t, x0, eps, subinterval_weight(u, t, self.process)
        w = space_weight(self.error_space(), t, self.process, self.fake_score.data_scale)
        return x_t, t, x0, eps, balanced_weight(u, t, self.process, w)
