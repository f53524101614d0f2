"""CMT: mid-training on the teacher's own trajectories (consistency mid-training, arXiv:2509.24526)."""

from typing import Any, Literal, get_args

import torch

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import distance
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_distillation import Metric
from lightning_distill.methods.teacher_paths import TeacherPaths
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import takes_target

__all__ = ["CMT"]


class CMT(TeacherPaths):
    """Regression of the points of the teacher's sampling trajectories onto where these lead; no stop-gradient, no bias.

        consistency    | f(x_i, t_i) - x_N |                                    every state to the end
        flow_map       | u(x_i, t_i, t_j) - (x_i - x_j) / (t_i - t_j) |         every state to a random later one

    A short stage between a diffusion model and any other method of this family, which then starts near its solution.

    Args:
        teacher: the pretrained model.
        form: what the student is; ``flow_map`` needs ``student=TwoTime(...)``.
        sampler: None for ``flow_map`` in the form of that name, else ``renoise``, each step a jump to the end.
        metric: distance, see ``losses.consistency.distance``; None for pseudo-Huber of ends and the mean square of
            chords, as the code of the paper's flow maps has it.
        huber: constant of pseudo-Huber, None for the default.
        **kwargs: see ``TeacherPaths`` and ``TrajectoryMethod``.

    Notes:
        A batch of B noises makes N B training samples, all states of its trajectories.
        The paper's solver is DPM-Solver++, of third order in the released code, and its distance LPIPS.
    """

    paper = "2509.24526"
    learns_from = "teacher alone; or its stored trajectories"
    samplers = ("renoise", "flow_map")

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        form: Literal["consistency", "flow_map"] = "consistency",
        sampler: Literal["renoise", "flow_map"] | None = None,
        metric: Metric | None = None,
        huber: float | None = None,
        **kwargs: Any,
    ) -> None:
        own: Literal["renoise", "flow_map"] = "flow_map" if form == "flow_map" else "renoise"
        super().__init__(teacher, sampler=sampler or own, **kwargs)
        if form not in ("consistency", "flow_map"):
            raise ValueError(f"form={form!r} must be consistency or flow_map.")
        if metric is None:
            metric = "mse" if form == "flow_map" else "pseudo_huber"
        if not callable(metric) and metric not in get_args(Metric):
            raise ValueError(f"metric={metric!r} is unknown; choose one of {', '.join(get_args(Metric))}.")
        self.form = form
        self.metric, self.huber = metric, huber
        self.__dict__["capability"] = "two_time" if form == "flow_map" else "any_step"

    def build_roles(self) -> None:
        """As usual; a flow map jumps."""
        super().build_roles()
        self.student.jumps = self.form == "flow_map"

    def check_configuration(self) -> None:
        """A flow map takes a target time."""
        super().check_configuration()
        if self.form == "flow_map" and not takes_target(self.student):
            raise ValueError(
                f"form='flow_map' trains a network with a target time, and the student "
                f"({type(self.student.network).__name__}) takes one time; give student=TwoTime(role=...)."
            )

    def student_loss(self, batch: Batch) -> Terms:
        """Distance of the student's end from the trajectory's."""
        states, times = self.trajectory(batch)
        steps, n = len(states) - 1, batch.size
        row = torch.arange(n, device=times.device).repeat_interleave(steps)
        start = torch.arange(steps, device=times.device).repeat(n)
        end = torch.full_like(start, steps)
        if self.form == "flow_map":
            u = torch.stack([self.draws.uniform(f"end{i}", n) for i in range(steps)], dim=1).flatten()
            end = (start + 1 + (u * (steps - start)).floor().long()).clamp_max(steps)
        x, t, goal, r = states[start, row], times[start], states[end, row], times[end]
        cond = batch.cond_of(row)
        scale = self.pair_scale(batch, times[:1].expand(n))
        scale = None if scale is None else scale[row]
        if self.form == "consistency":
            made = self.student(x, t, cond, guidance=scale).x0
        else:
            made = self.student(x, t, cond, r=r, guidance=scale).flow_prediction
            goal = self.chord(x, goal, t, r)
        loss = distance(made, goal, self.metric, self.huber).mean()
        return Terms({"regression": loss}, {"mse": (made.detach() - goal).square().mean()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update that solves its trajectories."""
        return {"student": {"student": 1, "teacher": self.solver_calls}}
