"""FreeFlow: a flow map from noise alone, by the generating velocity (arXiv:2511.19428)."""

from typing import Any, Literal

import torch

from lightning_distill.batch import Batch
from lightning_distill.losses.flow_maps import flow_jump, free_flow_target
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.tangents import value_and_tangent

__all__ = ["FreeFlow"]


class FreeFlow(TwoTimeMethod):
    """The average velocity from pure noise over every duration, which only asks the teacher where the student goes.

        X = eps - d u(eps, 1, 1 - d),     u_target = v(X, 1 - d) - d du/dd,     L = |u - sg u_target|^2

    No data, no noised samples and no derivative in x: the one in the scalar d is exact enough by differences, too.

    Args:
        teacher: the pretrained model.
        **kwargs: see ``TwoTimeMethod``; ``training_times`` is that of 1 - d. The student makes one step from t_max.

    Notes:
        The paper's second term, which corrects the generated marginals by score differences, is left out: it is
        distribution matching, and DMD2 continues a student of one step.
    """

    paper = "2511.19428"
    learns_from = "teacher alone"
    samplers = ("flow_map",)
    capability = "one_step_only"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        sampler: Literal["flow_map"] = "flow_map",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, sampler=sampler, **kwargs)

    def student_loss(self, batch: Batch) -> Terms:
        """Regression onto the generating velocity."""
        n = batch.size
        r = self.flow_times("r", n)
        t = torch.full_like(r, self._flow_max)
        x = self._flow_max * self.draws.normal("noise", (n, *self.sample_shape))
        average = self.average(self.student, batch, self.told_scale(self.native(x, t)[1]))
        along = (None, None, -1.0)
        u, du = value_and_tangent(average, (x, t, r), along, self.tangent, step=self.tangent_step)
        end = flow_jump(x, u.detach(), t, r)
        target = free_flow_target(self.teacher_velocity(batch, end, r), du, t - r)
        loss = (u - target).square().mean()
        return Terms({"free_flow": loss}, {"derivative": du.square().mean().sqrt()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        calls = {"jvp": 2, "central": 3, "one_sided": 2, "semi": 4}[self.tangent]
        return {"student": {"student": calls, "teacher": 1}}
