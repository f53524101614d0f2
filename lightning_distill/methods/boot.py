"""BOOT: data-free distillation by bootstrapping in time (arXiv:2306.05544)."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.flow_maps import boot_boundary, boot_target
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import FlowMatching, expand

__all__ = ["BOOT"]


class BOOT(TwoTimeMethod):
    """The signal of the teacher's trajectory from one noise, as a function of time.

        y(eps, t) = (x_t - t eps) / (1 - t),     y(eps, 1) = x0_hat(eps, 1)
        L = | y(eps, t - h) - sg [ y(eps, t) - h dy/dt ] |^2 + boundary,     dy/dt = (y - x0_hat(x_t, t)) / (t (1 - t))

    y(eps, 0) is the sample. Noise is all that is needed; the teacher is asked at the student's own x_t. dy/dt has no
    value at t = 1, so that signals between 1 - 2h and 1 - h, where the recursion begins, are taught by one second-order
    step of the teacher from the noise.

    Args:
        teacher: the pretrained model, pure noise at t_max.
        time_step: h, in flow-matching time.
        sampler: ``flow_map``, the only one of this student.
        **kwargs: see ``TwoTimeMethod``; ``training_times`` are multiplied by 1 - h. The student makes one step from
            t_max; the weight of ``student/boundary`` is 1.

    Notes:
        The student is y(eps, t) = x0 of a two-time network at (eps, t_max, t), so that sampling is its jump to 0; the
        paper's network takes (eps, t). Coefficients are those of flow matching, see ``losses.flow_maps.boot_target``.
        The first step from the noise is not the paper's, whose losses are the recursion and the boundary.
    """

    paper = "2306.05544"
    learns_from = "teacher alone"
    samplers = ("flow_map",)
    capability = "one_step_only"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        time_step: float = 0.04,
        sampler: Literal["flow_map"] = "flow_map",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, sampler=sampler, tangent="jvp", tangent_step=None, **kwargs)
        if not 0.0 < time_step < 0.5:
            raise ValueError(f"time_step={time_step}: a step of flow-matching time lies between 0 and .5.")
        self.time_step = time_step

    def check_configuration(self) -> None:
        """The signal of pure noise must be the teacher's first guess."""
        super().check_configuration()
        if self._flow_max < 1.0:
            raise ValueError(
                f"BOOT starts from pure noise, but {self.process!r} has data left at t_max; use a process with zero "
                "terminal SNR, or FreeFlow, which starts from any time."
            )

    def signal(self, batch: Batch, eps: Tensor, t: Tensor, scale: Tensor | None) -> Tensor:
        """Y(eps, t), t in flow-matching time."""
        start, target = torch.full_like(t, self.process.t_max), self.native(eps, t)[1]
        return self.student(eps, start, batch.cond, r=target, guidance=scale).x0

    def student_loss(self, batch: Batch) -> Terms:
        """One step of the signal's ODE, and its value at pure noise."""
        n, h = batch.size, self.time_step
        eps = self.draws.normal("noise", (n, *self.sample_shape))
        earlier = (1.0 - h) * self.training_times.quantile(self.draws.uniform("t", n), FlowMatching())
        # where a step of h would begin above 1 - h, the teacher's own step begins at 1 and is asked at its end
        begins = earlier > 1.0 - 2.0 * h
        t, one = torch.where(begins, earlier, earlier + h), torch.ones_like(earlier)
        teacher, scale = self.guided_teacher(batch), self.told_scale(self.native(eps, t)[1])
        with torch.no_grad():
            first = teacher(eps, torch.full_like(one, self.process.t_max)).x0
            started = expand(begins, eps).bool()
            y = torch.where(started, first, self.signal(batch, eps, t, scale))
            clean = teacher(*self.native(FlowMatching().add_noise(y, eps, t), t)).x0
            target = torch.where(started, 0.5 * (first + clean), boot_target(y, clean, t, h))
        error = self.signal(batch, eps, earlier, scale) - target
        boundary = boot_boundary(self.signal(batch, eps, one, scale), first)
        return Terms({"bootstrap": error.square().mean(), "boundary": boundary})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        return {"student": {"student": 3, "teacher": 2}}
