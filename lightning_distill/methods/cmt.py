"""CMT: mid-training on the teacher's own trajectories (consistency mid-training, arXiv:2509.24526)."""

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import distance
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import average_velocity, takes_target
from lightning_distill.processes import FlowMatching, change_process, expand
from lightning_distill.samplers import heun_step, transport
from lightning_distill.times import few_step_times

__all__ = ["CMT"]


class CMT(TrajectoryMethod):
    """Regression of the points of the teacher's sampling trajectories onto where these lead; no stop-gradient, no bias.

        consistency    | f(x_i, t_i) - x_N |                                    every state to the end
        flow_map       | u(x_i, t_i, t_j) - (x_i - x_j) / (t_i - t_j) |         every state to a random later one

    A short stage between a diffusion model and any other method of this family, which then starts near its solution.

    Args:
        teacher: the pretrained model.
        form: what the student is; ``flow_map`` needs ``student=TwoTime(...)`` and sampler ``flow_map``.
        solver_steps: N of the trajectories that are solved in training from noise alone; batches with stored
            ``states`` are used instead.
        solver: ``euler`` (DDIM) or ``heun``.
        metric: distance, see ``losses.consistency.distance``.
        huber: constant of pseudo-Huber, None for the default.
        **kwargs: see ``TrajectoryMethod``.

    Notes:
        A batch of B noises makes N B training samples, all states of its trajectories.
        The paper's solver is DPM-Solver++(2M) and its distance LPIPS.
    """

    paper = "2509.24526"
    learns_from = "teacher alone; or its stored trajectories"
    samplers = ("renoise", "flow_map")

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        form: Literal["consistency", "flow_map"] = "consistency",
        sampler: Literal["renoise", "flow_map"] = "renoise",
        solver_steps: int = 16,
        solver: Literal["euler", "heun"] = "heun",
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "pseudo_huber",
        huber: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, sampler=sampler, **kwargs)
        if form not in ("consistency", "flow_map") or solver not in ("euler", "heun"):
            raise ValueError(f"form={form!r} must be consistency or flow_map, and solver={solver!r} euler or heun.")
        if solver_steps < 1:
            raise ValueError(f"solver_steps={solver_steps}: a trajectory has at least one step.")
        self.form, self.solver = form, solver
        self.solver_steps = solver_steps
        self.metric, self.huber = metric, huber
        self.__dict__["capability"] = "two_time" if form == "flow_map" else "any_step"

    def check_configuration(self) -> None:
        """A flow map takes a target time."""
        super().check_configuration()
        if self.form == "flow_map" and not takes_target(self.student):
            raise ValueError(
                f"form='flow_map' trains a network with a target time, and the student "
                f"({type(self.student.network).__name__}) takes one time; give student=TwoTime(role=...)."
            )

    @torch.no_grad()
    def trajectory(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States (N + 1, B, ...) from noise to clean data, and their times (N + 1,), float64."""
        if batch.states is not None and batch.times is not None:
            clean = self.data(batch)
            times = torch.cat([batch.times.double(), batch.times.new_zeros(1).double()])
            return torch.cat([batch.states.transpose(0, 1), clean[None]]), times.to(clean.device)
        teacher, process = self.guided_teacher(batch), self.process
        grid = [*few_step_times(process, self.solver_steps), 0.0]
        times = torch.tensor(grid, dtype=torch.float64, device=self.device)
        states = [process.prior(self.draws.normal("noise", (batch.size, *self.sample_shape)), grid[0])]
        for t, r in pairwise(times):
            # the step to clean data is first order, as in the samplers: there is no noise to predict at its end
            second = self.solver == "heun" and len(states) < self.solver_steps
            x = states[-1]
            states.append(heun_step(teacher, x, t, r, process) if second else transport(teacher(x, t), r))
        return torch.stack(states), times

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
        cond = {k: v[row] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.cond.items()}
        scale = self.told_scale(times[:1].expand(n))
        scale = None if scale is None else scale[row]
        if self.form == "consistency":
            made = self.student(x, t, cond, guidance=scale).x0
        else:
            made = self.student(x, t, cond, r=r, guidance=scale).flow_prediction
            goal = self.chord(x, goal, t, r)
        loss = distance(made, goal, self.metric, self.huber).mean()
        return Terms({"regression": loss}, {"mse": (made.detach() - goal).square().mean()})

    def chord(self, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Average velocity between two states, in flow-matching coordinates."""
        (flow_t, scale_t), (flow_r, scale_r) = (change_process(s, self.process, FlowMatching()) for s in (t, r))
        return average_velocity(expand(scale_t, x_t) * x_t, expand(scale_r, x_r) * x_r, flow_t, flow_r)

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update that solves its trajectories."""
        calls = 2 * self.solver_steps - 1 if self.solver == "heun" else self.solver_steps
        return {"student": {"student": 1, "teacher": calls}}
