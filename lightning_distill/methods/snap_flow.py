"""SnapFlow: one-step students by self-distillation of a flow's own marginal velocities (arXiv:2604.05656)."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.flow_maps import euler_slope
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import expand

__all__ = ["SnapFlow"]


class SnapFlow(TwoTimeMethod):
    """A network that is told r = t for its velocity and r = 0 for its own Euler steps to the end, in one.

        r = t:   u(x_t, t, t) = eps - x0
        r = 0:   u(x_t, t, 0) = sg [ v(x_t, t) + v(x_t - t/2 v, t/2) ] / 2,     v(x, t) = u(x, t, t)

    v is the mean over all pairs through a point: the velocity of one pair would lead off the trajectory. The target
    time enters by an embedding that starts at zero, so that the first one-step student is the model's Euler step.

    Args:
        teacher: the pretrained model; with ``from_data`` only where the student's weights come from.
        from_data: the velocity at r = t is eps - x0 of the pair; else the (guided) teacher's.
        euler_steps: N, steps of the target; 2 in the paper, and the student is no better than these steps.
        shortcut_share: share of samples with r = 0.
        sampler: ``renoise``, the only one of this student.
        **kwargs: see ``TwoTimeMethod``. Students of several steps add fresh noise between them.

    Notes:
        Reconstructed from the abstract: the paper's shares and weights of the two terms are not known here. They are
        drawn half and half, and count alike (``student/shortcut``, ``student/flow``).
    """

    paper = "2604.05656"
    learns_from = "data, teacher's weights; teacher, data without from_data"
    samplers = ("renoise",)
    capability = "any_step"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        from_data: bool = True,
        euler_steps: int = 2,
        shortcut_share: float = 0.5,
        sampler: Literal["renoise"] = "renoise",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, sampler=sampler, tangent="jvp", tangent_step=None, **kwargs)
        if euler_steps < 1:
            raise ValueError(f"euler_steps={euler_steps}: the target is made of at least one step.")
        if not 0.0 < shortcut_share < 1.0:
            raise ValueError(
                f"shortcut_share={shortcut_share}: velocities and shortcuts both need samples, so give a share between "
                "0 and 1."
            )
        self.from_data, self.asks_teacher = from_data, not from_data
        self.euler_steps, self.shortcut_share = euler_steps, shortcut_share

    def student_loss(self, batch: Batch) -> Terms:
        """The velocity for r = t, the model's own Euler steps for r = 0."""
        n = batch.size
        t = self.flow_times("t", n)
        far = self.draws.uniform("far", n) < self.shortcut_share
        r = torch.where(far, 0.0, t)
        x, velocity = self.flow_state(batch, t)
        if not self.from_data:
            velocity = self.teacher_velocity(batch, x, t)
        average = self.average(self.student, batch, self.told_scale(self.native(x, t)[1]))

        def own(x: Tensor, t: Tensor) -> Tensor:
            t = t.clamp_min(self._flow_min)
            return average(x, t, t)

        slope = euler_slope(own, x, t, self.euler_steps)
        error = (average(x, t, r) - torch.where(expand(far, x).bool(), slope, velocity)).square()
        share = expand(far, error)
        return Terms({"flow": ((1.0 - share) * error).mean(), "shortcut": (share * error).mean()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        return {"student": {"student": 1 + self.euler_steps, "teacher": 0 if self.from_data else 1}}
