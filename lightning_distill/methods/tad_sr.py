"""TAD-SR: score distillation at small noise with a discriminator on the teacher's features (arXiv:2408.07476)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.residual_shift import trajectory_matching
from lightning_distill.methods.ladd import LADD
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.prediction import Prediction
from lightning_distill.samplers import ode
from lightning_distill.times import TimeDistribution, bounded, few_step_times

__all__ = ["TADSR"]


class TADSR(LADD):
    """A one-step student whose samples look to the teacher, after a little noise, as the teacher's own samples do.

        x = G(z, low),   x_T = ODE_T(z, low),     x moves along  [ y_T(x_t) - y_T(x_T,t) ] / mean |x - x_T|,    t small
        + w_g loss_G(D(x_s, s)),                  D on the teacher's features, at all noise levels s

    Both are noised to the same small time with the same noise, at which the teacher's prediction is about fine detail.
    Unlike a difference of scores at x alone it vanishes where x is x_T.

    Args:
        teacher: the conditional model; its blocks are the discriminator's features, which know the noise level.
        solver_steps: steps of the teacher's sample (DDIM) from the student's noise.
        small: largest time of the comparison, as a share of the process' range.
        **kwargs: see ``LADD``. Default weights: ``student/distillation`` 1, ``student/gan`` .02.

    Notes:
        Reconstructed from the abstract: weights, the range of times and the normalisation (CTMSR's) are open there.
        Real samples of the game are the data of the batch.
    """

    paper = "2408.07476"
    learns_from = "teacher, data"
    default_loss_weights: ClassVar[Mapping[str, float]] = {
        "student/distillation": 1.0,
        "student/gan": 0.02,
        "discriminator/r1": 1e-4,
    }

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        solver_steps: int = 8,
        small: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if solver_steps < 1 or not 0.0 < small <= 1.0:
            raise ValueError(
                f"solver_steps={solver_steps} and small={small}: the teacher makes at least one step, and the largest "
                "time is a share of the range, above 0 and at most 1."
            )
        self.solver_steps, self.small = solver_steps, small

    def check_configuration(self) -> None:
        """One step, from the noise that the teacher starts from."""
        super().check_configuration()
        if len(self.student_times) != 1 or self.student_times[0] != few_step_times(self.process, 1)[0]:
            raise ValueError(
                "TADSR compares one step of the student with the teacher's sample of the same noise; leave num_steps=1 "
                "and student_times as they are."
            )

    @property
    def small_times(self) -> TimeDistribution:
        """Times at which the two samples are compared."""
        return bounded(self.process, 0.0, self.small)

    @torch.no_grad()
    def teacher_sample(self, batch: Batch) -> Tensor:
        """What the guided teacher's solver makes of the noise of the student's rollout, (B, ...)."""
        teacher, u = self.require_teacher(), self.draws.uniform("guidance", batch.size)

        def denoise(x: Tensor, t: Tensor) -> Prediction:
            return self.guidance(teacher, x, t.expand(len(x)) if t.ndim == 0 else t, batch.cond, u)

        times = few_step_times(self.process, self.solver_steps)
        noise = self.draws.of_slice().normal("start", (batch.size, *self.sample_shape))
        return ode(denoise, self.process.prior(noise, times[0]), times, self.process)

    def distillation(self, x: Tensor, batch: Batch) -> Tensor:
        """The comparison at small times; its gradient reaches x alone."""
        goal = self.teacher_sample(batch)
        t = self.times("distillation/time", self.small_times, len(x))
        noise = self.draws.normal("distillation/noise", x.shape)
        teacher, u = self.require_teacher(), self.draws.uniform("guidance", len(x))
        with torch.no_grad():
            noisy = (self.process.add_noise(sample, noise, t) for sample in (x.detach(), goal))
            own, true = (self.guidance(teacher, x_t, t, batch.cond, u).x0 for x_t in noisy)
        return trajectory_matching(x, own, true, goal)

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """As LADD's, with the teacher's sample and two predictions in place of one."""
        counts = super().forward_counts()
        if self.loss_weights["student/distillation"]:
            counts["student"]["teacher"] += self.solver_steps + 1
        return counts
