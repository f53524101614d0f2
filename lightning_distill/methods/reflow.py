"""Reflow: a flow trained on the pairs that another flow made is straighter (rectified flow, arXiv:2209.03003)."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import distance
from lightning_distill.losses.rectified import straightness
from lightning_distill.methods.base import Terms
from lightning_distill.methods.perceiving import Perceptual, perceived, perceiving_calls
from lightning_distill.methods.teacher_paths import TeacherPaths
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import Capability
from lightning_distill.processes import FlowMatching
from lightning_distill.times import TimeDistribution, Uniform

__all__ = ["Reflow"]


class Reflow(TeacherPaths):
    """The student's velocity is regressed onto the chord of the teacher's pair of noise and sample.

        L = E_t | v(x_t, t) - (eps - x0) |^2,     x_t = (1 - t) x0 + t eps,     x0 = ODE_T(eps)    (Eq. 1)

    Pairs of a deterministic map do not cross as independent pairs do, so that the student's trajectories are nearly
    straight and few Euler steps are enough. Guidance is that of the pairs, and the student needs none.

    Args:
        teacher: the pretrained model, of any process; the loss is in flow-matching coordinates, exactly.
        times: distribution of flow-matching times.
        metric: distance of velocities, see ``losses.consistency.distance``.
        huber: constant of pseudo-Huber, None for the default.
        time_weight: factor on it: ``one``, or ``data``, 1 - t.
        perceptual: further distance of the predicted sample from x0, with the weight ``student/perceptual``: LPIPS, or
            that of the teacher's own features; None for none.
        perceptual_weight: its factor: ``one``, or ``inverse``, 1 / t.
        sampler: ``ode`` (Euler), ``heun``, or ``start_noise``, which adds the starting noise to every prediction.
        **kwargs: see ``TeacherPaths`` and ``TrajectoryMethod``.

    Notes:
        Pairs that are solved in training cost ``solver_steps`` teacher calls each; stored ones are made once by
        ``lightning-distill trajectories``.
        The start of a process without zero terminal SNR is taken for pure noise, as its samplers do. With Stable
        Diffusion's betas, where x_T has a share of .064 of x0, the exact student's sample in one step lacks 2 % of its
        scale, and each further round as much again; a teacher in flow matching lacks nothing.
    """

    paper = "2209.03003"
    learns_from = "teacher's pairs, stored or made from noise"
    samplers = ("ode", "heun", "start_noise")
    capability: ClassVar[Capability | None] = None

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        times: TimeDistribution | None = None,
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "mse",
        huber: float | None = None,
        time_weight: Literal["one", "data"] = "one",
        perceptual: Perceptual | None = None,
        perceptual_weight: Literal["one", "inverse"] = "one",
        sampler: Literal["ode", "heun", "start_noise"] = "ode",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, sampler=sampler, **kwargs)
        if time_weight not in ("one", "data") or perceptual_weight not in ("one", "inverse"):
            raise ValueError(
                f"time_weight={time_weight!r} must be one or data, and perceptual_weight={perceptual_weight!r} one or "
                "inverse."
            )
        self.training_times = times or Uniform(1e-3, 1.0)
        self.metric, self.huber = metric, huber
        self.time_weight = time_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight

    def coupled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise and data of the training pairs, (B, ...) each; the teacher's own here."""
        return self.pairs(batch)

    def student_loss(self, batch: Batch) -> Terms:
        """Distance of the velocity from the chord."""
        noise, x0 = self.coupled(batch)
        u = self.draws.uniform("t", batch.size)
        t = self.training_times.quantile(u, FlowMatching()).clamp(self._flow_min, self._flow_max)
        x, time = self.native(FlowMatching().add_noise(x0, noise, t), t)
        prediction = self.student(x, time, batch.cond, guidance=self.pair_scale(batch, time))
        velocity = prediction.flow_prediction
        error = distance(velocity, noise - x0, self.metric, self.huber)
        weight = 1.0 - t if self.time_weight == "data" else torch.ones_like(t)
        terms = Terms({"velocity": (weight.to(error) * error).mean()})
        if self.perceptual is not None:
            seen = perceived(self.perceptual, self, prediction.x0, x0, batch.cond)
            factor = 1.0 / t if self.perceptual_weight == "inverse" else torch.ones_like(t)
            terms.losses["perceptual"] = (factor.to(seen) * seen).mean()
        terms.diagnostics["straightness"] = straightness(velocity.detach(), noise, x0).mean()
        return terms

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update whose pairs are made in training."""
        return {"student": {"student": 1, "teacher": self.solver_calls + perceiving_calls(self.perceptual)}}
