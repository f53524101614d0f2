"""MDT-dist: velocity matching and velocity distillation (arXiv:2509.04406)."""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, check_guidance, telling
from lightning_distill.losses.velocity_matching import (
    student_velocity,
    velocity_distillation,
    velocity_matching_target,
)
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import FlowMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import FlowMatching
from lightning_distill.tangents import TangentMode, tangent, value_and_tangent
from lightning_distill.time_coverage import check_coverage
from lightning_distill.times import LogitNormal, TimeDistribution

__all__ = ["MDTDist"]


class MDTDist(FlowMethod):
    """The transport from any time to the data by a network of one time, which is its own critic.

        f(x, t) = x - t u(x, t),     w = u + t sg du/dt,     du/dt along the teacher's v          (Eq. 12, 14)
        matching        | w(x_t, t) - v(x_t, t) |^2                       on noised data          (Eq. 13)
        distillation    grad_x' = -(1 - t) (w - v)(x'_t, t)               on the student's x'     (Eq. 17)

    At the solution u is the average velocity to 0. Distillation sharpens one-step samples with the velocity w that
    matching has learned, in the place of a fake score.

    Args:
        teacher: the pretrained model.
        guidance: guidance of the teacher in matching. The paper's 3-D models use 40 there and 100 in distillation,
            in the convention (1 + g): 41 and 101 here.
        distillation_guidance: guidance of the teacher in distillation; None for that of ``guidance``.
        norm: c in du/dt / (|du/dt| + c), .1 in the released code; None leaves the derivative as it is.
        distillation_times: distribution of the times of the student's noised samples; None for ``training_times``.
        sampler: ``renoise``, each step a jump to 0.
        tangent: how du/dt is taken; ``one_sided`` differences in the paper.
        tangent_step: h, .01 in the paper.
        **kwargs: see ``FlowMethod``; times are by default logit-normal of mean 1 and width 1. Weights of
            ``student/matching`` and ``student/distillation``: 1.

    Notes:
        With ``norm`` the exact map is not the solution, since |t du/dt| is at most t: the student stays nearer to the
        teacher's velocity. The paper's algorithm has no such division; give ``norm=None`` for it.
        With several steps, distillation sees what a random step of the student's own sampler makes.
        Squared errors are means over elements.
        Distillation has the factor 1 - t of the divergence's gradient, which the released code leaves out, and no
        division of the derivative, which it has there, too.
    """

    paper = "2509.04406"
    learns_from = "teacher, data"
    samplers = ("renoise",)

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        guidance: Guidance | None = None,
        distillation_guidance: Guidance | None = None,
        norm: float | None = 0.1,
        distillation_times: TimeDistribution | None = None,
        sampler: Literal["renoise"] = "renoise",
        tangent: TangentMode = "one_sided",
        tangent_step: float | None = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher, guidance=guidance, sampler=sampler, tangent=tangent, tangent_step=tangent_step, **kwargs
        )
        if norm is not None and norm <= 0.0:
            raise ValueError(f"norm={norm}: give a positive constant, or None to leave the derivative as it is.")
        self.distillation_guidance = distillation_guidance or self.guidance
        self.norm = norm
        self.distillation_times = distillation_times or self.training_times

    def default_times(self) -> TimeDistribution:  # noqa: D102
        return LogitNormal(1.0, 1.0)

    def check_configuration(self) -> None:
        """Guidance and times must be possible, and matching be trained where distillation uses it."""
        super().check_configuration()
        check_guidance(self.require_teacher(), self.distillation_guidance)
        if self._tells_scale and self.distillation_guidance is not self.guidance:
            raise ValueError(
                "this student embeds a guidance scale, which would be another one in distillation; leave out "
                "distillation_guidance, or the embedding."
            )
        if self.tangent != "jvp" and 2.0 * (self.tangent_step or 0.0) >= self._flow_max:
            raise ValueError(
                f"tangent_step={self.tangent_step}: times stay at least two steps above 0, which leaves none below the "
                f"noisiest, {self._flow_max:.3g}; give a small step, .01 in the paper."
            )
        check_coverage(self.distillation_times, self.training_times, FlowMatching())

    def to_clean(self, batch: Batch, scale: Tensor | None) -> Any:
        """u(x, t) in flow-matching coordinates."""

        def u(x: Tensor, t: Tensor) -> Tensor:
            return self.student(*self.native(x, t), batch.cond, guidance=scale).flow_prediction

        return u

    def drawn_times(self, name: str, distribution: TimeDistribution, n: int) -> Tensor:
        """Flow-matching times with room for a difference below them, (n,), float64."""
        room = 0.0 if self.tangent == "jvp" or self.tangent_step is None else self.tangent_step
        t = distribution.quantile(self.draws.uniform(name, n), FlowMatching())
        return t.clamp(max(2.0 * room, self._flow_min), self._flow_max)

    def student_loss(self, batch: Batch) -> Terms:
        """Velocities on noised data, and the distribution of the student's samples."""
        t = self.drawn_times("t", self.training_times, batch.size)
        x, _ = self.flow_state(batch, t)
        velocity = self.teacher_velocity(batch, x, t)
        scale = self.told_scale(self.native(x, t)[1])
        average = self.to_clean(batch, scale)
        u, du = value_and_tangent(average, (x, t), (velocity, 1.0), self.tangent, step=self.tangent_step)
        matching = (u - velocity_matching_target(velocity, du, t, self.norm)).square().mean()
        with nullcontext() if scale is None else telling(self.student, scale):
            made = self.rollout(batch).x0
        own, real, at = self.velocities(batch, made.detach())
        distillation = velocity_distillation(made, own, real, at)
        gap = (own - real).square().mean()
        return Terms({"matching": matching, "distillation": distillation}, {"velocity_gap": gap})

    @torch.no_grad()
    def velocities(self, batch: Batch, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W and v at noised samples of the student, (B, ...) each, and their times (B,)."""
        t = self.drawn_times("distillation/time", self.distillation_times, len(made))
        x = FlowMatching().add_noise(made, self.draws.normal("distillation/noise", made.shape), t)
        at = self.native(x, t)
        u = self.draws.uniform("guidance", batch.size)
        velocity = self.distillation_guidance(self.require_teacher(), *at, batch.cond, u).flow_prediction
        average = self.to_clean(batch, self.told_scale(at[1]))
        own, du = tangent(average, (x, t), (velocity, 1.0), self.tangent, step=self.tangent_step)
        return student_velocity(own, du, t), velocity, t

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update of a one-step student."""
        with_graph = {"jvp": 2, "central": 3, "one_sided": 2, "semi": 4}[self.tangent]
        without = {"jvp": 1, "central": 3, "one_sided": 2, "semi": 4}[self.tangent]
        return {"student": {"student": 1 + with_graph + without, "teacher": 2}}
