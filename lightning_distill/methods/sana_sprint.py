"""SANA-Sprint: continuous-time consistency with latent adversarial distillation (arXiv:2503.09641)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.methods.base import Terms
from lightning_distill.methods.ladd import LADD
from lightning_distill.methods.rollout import Rollout
from lightning_distill.methods.scm import ContinuousConsistency, LogVariance, PriorWeight
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import trigflow_input
from lightning_distill.processes import TrigFlow, expand
from lightning_distill.tangents import TangentMode
from lightning_distill.times import LogNormal, TimeDistribution

__all__ = ["SANASprint"]


class SANASprint(TrajectoryMethod, LADD):
    """sCM, and a discriminator on the teacher's features at what the student makes of noised data.

        L = L_sCM + .5 L_adv(x0(x_tau)),     tau = pi / 2 for half of the samples of L_adv                   (Eq. 9-11)

    Args:
        teacher: a model whose time derivative is of order one (the paper tunes SANA for it first).
        times: distribution of TrigFlow times of both terms, None for the paper's, ``LogNormal(.893, 1.6)`` for data of
            unit std (its mean .2 is that of data of std .5).
        largest_share: share of the adversarial samples that start from pure noise.
        tangent: ``jvp`` (exact), ``central``, ``one_sided`` or ``semi``.
        tangent_step: step of differences, None for the default.
        warmup_updates: H of the tangent's warm-up.
        adaptive: learn the weight of a time, see ``SCM``.
        weight: prior weight of a time, see ``SCM``: the paper's is ``trig``.
        constant: c of the tangent's normalisation, in units of data of unit std (.1 of the released code in its own).
        **kwargs: see ``LADD`` (``gan``) and ``TrajectoryMethod``; the paper embeds guidance scales of 4 to 5:
            ``student=TwoTime(kind=None, guidance=True)`` and ``guidance=RandomGuidance(4, 5)``. Default weight of
            ``student/gan``: .5.

    Notes:
        Student and discriminator share their samples within a cycle instead of taking turns from step to step.
        Captions rolled against their images as further fakes are left out.
    """

    phases = {"student": ("student", "log_variance"), "discriminator": ("discriminator",)}
    paper = "2503.09641"
    learns_from = "teacher, data"
    default_loss_weights: ClassVar[Mapping[str, float]] = {**LADD.default_loss_weights, "student/gan": 0.5}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        times: TimeDistribution | None = None,
        largest_share: float = 0.5,
        tangent: TangentMode = "jvp",
        tangent_step: float | None = None,
        warmup_updates: int = 4000,
        weight: PriorWeight = "unit",
        adaptive: bool = True,
        constant: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if not 0.0 <= largest_share <= 1.0:
            raise ValueError(f"largest_share={largest_share}: give a share from 0 to 1.")
        self.consistency = ContinuousConsistency(
            times or LogNormal(0.2 + math.log(2.0), 1.6),
            False,
            tangent,
            tangent_step,
            warmup_updates,
            constant=constant,
            weight=weight,
        )
        self.log_variance = LogVariance() if adaptive else None
        self.largest_share = largest_share

    def simulate_student(self, batch: Batch, grad: bool) -> Rollout:
        """What the student makes of noised data, half of it pure noise."""
        x0 = self.data(batch)
        draws, n, sd = self.draws.of_slice(), batch.size, self.student.sigma_data
        tau = self.consistency.times.quantile(draws.uniform("tau", n), TrigFlow())
        largest = draws.uniform("largest", n) < self.largest_share
        tau = self.consistency.inside(self, torch.where(largest, TrigFlow.t_max, tau))
        noise = draws.normal("noise", x0.shape)
        seen, t = trigflow_input(TrigFlow().add_noise(x0 / sd, noise, tau), tau, self.process, sd)
        # without zero terminal SNR the noisiest data have a trace of the picture, and samples begin without it
        seen = torch.where(expand(largest, seen) > 0, self.process.prior(noise), seen)
        with torch.set_grad_enabled(grad):
            prediction = self.student(seen, t, batch.cond, guidance=self.slice_scale(t))
            return Rollout(prediction.x0, 0, prediction, torch.zeros_like(t))

    def slice_scale(self, t: Tensor) -> Tensor | None:
        """As ``told_scale``, equal for all phases that share the samples."""
        draws, self.draws = self.draws, self.draws.of_slice()
        try:
            return self.told_scale(t)
        finally:
            self.draws = draws

    def student_loss(self, batch: Batch) -> Terms:
        """The tangent's term, and LADD's."""
        loss, diagnostics = self.consistency(self, batch, self.log_variance)
        terms = super().student_loss(batch)
        terms.losses["consistency"] = loss
        terms.diagnostics |= diagnostics
        return terms

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        return self.consistency.added_counts(super().forward_counts())
