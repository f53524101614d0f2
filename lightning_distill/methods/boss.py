"""BOSS: step sizes by dynamic programming, and trajectories straightened between them (arXiv:2312.16414)."""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.collectives import mean_over_processes
from lightning_distill.losses.consistency import distance
from lightning_distill.losses.rectified import best_knots, jump_costs
from lightning_distill.methods.base import Terms
from lightning_distill.methods.teacher_paths import TeacherPaths
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import Capability
from lightning_distill.processes import FlowMatching, change_process, expand

__all__ = ["BOSS", "Straightening"]


class Straightening(TeacherPaths):
    """The student's velocity at each of its times is regressed onto the chord to the next one.

        L = sum_i | v(x_i, t_i) - (x_i - x_i+1) / (t_i - t_i+1) |^2,     x_i on the teacher's trajectory

    Args:
        teacher: the pretrained model.
        metric: distance of velocities, see ``losses.consistency.distance``.
        huber: constant of pseudo-Huber, None for the default.
        solver: of the teacher's trajectories.
        sampler: ``ode``, the only one of this student.
        **kwargs: see ``TeacherPaths`` and ``TrajectoryMethod``. ``student_times`` are the knots.
    """

    learns_from = "teacher alone; or its stored trajectories"
    samplers: ClassVar[tuple[str, ...]] = ("ode",)
    capability: ClassVar[Capability | None] = "own_times"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "mse",
        huber: float | None = None,
        sampler: Literal["ode"] = "ode",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, sampler=sampler, **kwargs)
        self.metric, self.huber = metric, huber

    @property
    def edges(self) -> list[float]:  # type: ignore[override]
        """Each of its times leads to the next one."""
        return self.student_times

    def solver_times(self) -> list[float]:
        """The solver's grid with the student's times in it."""
        return self.grid_with_steps()

    def chords(self, batch: Batch, states: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """The student's velocities at its times and those of the chords, (K B, ...) each.

        Args:
            batch: conditions.
            states: at the student's times and at the end, (K + 1, B, ...).
            times: these times and 0, (K + 1,).
        """
        steps, n = len(states) - 1, states.shape[1]
        t, r = times[:-1].repeat_interleave(n), times[1:].repeat_interleave(n)
        row = torch.arange(n, device=t.device).repeat(steps)
        scale = self.pair_scale(batch, t[:n])
        scale = None if scale is None else scale[row]
        x = states[:-1].flatten(0, 1)
        made = self.student(x, t, batch.cond_of(row), guidance=scale).flow_prediction
        return made, self.chord(x, states[1:].flatten(0, 1), t, r)

    def student_loss(self, batch: Batch) -> Terms:
        """Distance of velocities from chords, at all knots."""
        states, times = self.trajectory(batch)
        rows = self.rows_of_steps(times)
        made, goal = self.chords(batch, states[rows], times[rows])
        loss = distance(made, goal, self.metric, self.huber).mean()
        return Terms({"velocity": loss}, {"mse": (made.detach() - goal).square().mean()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update that solves its trajectories."""
        return {"student": {"student": 1, "teacher": self.solver_calls}}


class BOSS(Straightening):
    """Bellman optimal step sizes, found on the first batch, and the flow straightened between them.

    The cost of a jump is what an Euler step misses the teacher's trajectory by (``jump_costs``); dynamic programming
    finds the ``num_steps`` jumps whose costs have the smallest sum. They are the student's times from then on, and kept
    in checkpoints.

    Args:
        teacher: the pretrained model.
        solver_steps: intervals of the fine grid of which the knots are points.
        solver: of the fine trajectories; ``euler``, whose velocities are those of the costs.
        **kwargs: see ``Straightening``; with ``student_times`` nothing is searched.

    Notes:
        The paper measures costs on 100 noises; here it is the batch of the first update, of all processes.
        Jumps are taken in flow-matching coordinates, and the first knot is the noisiest time.
    """

    paper = "2312.16414"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        solver_steps: int = 100,
        solver: Literal["euler", "heun"] = "euler",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, solver_steps=solver_steps, solver=solver, **kwargs)
        if self._num_steps > solver_steps:
            raise ValueError(
                f"solver_steps={solver_steps} is the grid from which {self._num_steps} knots are chosen; give more."
            )
        self.knots: Tensor
        self.register_buffer("knots", torch.full((self._num_steps,), math.nan, dtype=torch.float64))
        self._searched = self._given_times is None

    def solver_times(self) -> list[float]:
        """The fine grid; knots lie on it."""
        return self.grid_with_steps() if not self._searched else TeacherPaths.solver_times(self)

    def trajectory(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As usual; the first one decides the knots."""
        states, times = super().trajectory(batch)
        if self._searched and self._given_times is None:
            self._place_knots(states, times)
        return states, times

    @torch.no_grad()
    def _place_knots(self, states: Tensor, times: Tensor) -> None:
        flow, scale = change_process(times, self.process, FlowMatching())
        points = expand(scale, states) * states
        # an Euler trajectory says its velocities itself
        slopes = points.diff(dim=0) / expand(flow.diff(), points[1:])
        costs = jump_costs(points, slopes, flow)
        finite = costs.isfinite()
        costs = mean_over_processes(costs.where(finite, 0.0)).where(finite, math.inf)
        found = [float(times[k]) for k in best_knots(costs, self._num_steps)[:-1]]
        self.knots.copy_(torch.tensor(found, dtype=torch.float64))
        self._given_times = found

    def after_weights_loaded(self) -> None:
        """The knots come back as the student's times."""
        super().after_weights_loaded()
        if self._searched and bool(self.knots.isfinite().all()):
            self._given_times = self.knots.tolist()
