"""FreeFlow: a flow map from noise alone, by the generating velocity, and its correction (arXiv:2511.19428)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from lightning_distill.batch import Batch
from lightning_distill.losses.flow_maps import flow_jump, free_flow_target
from lightning_distill.methods.added_matching import AddedMatching
from lightning_distill.methods.any_flow import flow_map_simulation
from lightning_distill.methods.base import Terms
from lightning_distill.methods.rollout import Rollout
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import TrajectoryMap
from lightning_distill.processes import FlowMatching
from lightning_distill.tangents import value_and_tangent

__all__ = ["CorrectedFreeFlow", "FreeFlow"]


class FreeFlow(TwoTimeMethod):
    """The average velocity from pure noise over every duration, which only asks the teacher where the student goes.

        X = eps - d u(eps, 1, 1 - d),     u_target = v(X, 1 - d) - d du/dd,     L = |u - sg u_target|^2

    No data, no noised samples and no derivative in x: the one in the scalar d is exact enough by differences, too.

    Args:
        teacher: the pretrained model.
        sampler: ``flow_map``, the only one of this student.
        **kwargs: see ``TwoTimeMethod``; ``training_times`` is that of 1 - d. The student makes one step from t_max.

    Notes:
        This is the paper's prediction; its correction is in ``CorrectedFreeFlow``.
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
        r = self.training_times.quantile(self.draws.uniform("r", n), FlowMatching()).clamp_max(self._flow_max)
        t = torch.full_like(r, self._flow_max)
        x = self._flow_start * self.draws.normal("noise", (n, *self.sample_shape))
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


class CorrectedFreeFlow(FreeFlow, AddedMatching):
    """FreeFlow with its correction: the samples' noised distribution is to have the teacher's velocity as well.

        L = L_FreeFlow + w L_DMD(X),     X = eps - u(eps, 1, 0)

    The error of a long jump is made of those of all shorter ones. A difference of scores sees only where the samples
    lie, so that it corrects what has piled up, and still nothing but noise goes in.

    Args:
        teacher: the pretrained model.
        fake_score_steps: critic updates per student update.
        **kwargs: see ``FreeFlow``, ``AddedMatching``, ``FakeScoreMethod``. Default weight of ``student/matching``: .1.

    Notes:
        Velocities at equal x_t differ by the clean samples' difference over t, so that the paper's difference of
        velocities is the score direction with another weight of times. The released code holds no training: how the
        two terms are balanced is chosen here.
    """

    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/matching": 0.1}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        fake_score_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, fake_score_steps=fake_score_steps, **kwargs)

    def simulate_student(self, batch: Batch, grad: bool) -> Rollout:
        """The jump from noise to data."""
        times = self.student_times
        start = self.process.prior(self.draws.of_slice().normal("start", (batch.size, *self.sample_shape)), times[0])
        told = self.told_scale(torch.full((batch.size,), times[0], dtype=torch.float64, device=start.device))
        with torch.set_grad_enabled(grad):
            prediction, x = flow_map_simulation(TrajectoryMap(self.student, batch.cond, told), start, times, 0)
        return Rollout(x, 0, prediction, torch.zeros(batch.size, dtype=torch.float64, device=x.device))

    def student_loss(self, batch: Batch) -> Terms:
        """The prediction's loss and, after the start, the score difference."""
        return self.add_matching(super().student_loss(batch), batch)

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of a cycle."""
        own = super().forward_counts()["student"]
        return {
            "student": {"student": own["student"] + 1, "teacher": own["teacher"] + 1, "fake_score": 1},
            "fake_score": {"student": int(self.fresh_samples), "teacher": 0, "fake_score": 1},
        }
