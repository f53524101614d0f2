"""What methods share that learn from the teacher's own trajectories, stored or solved in training."""

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.methods.perceiving import Perceptual, check_perceptual
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import average_velocity
from lightning_distill.processes import FlowMatching, change_process, expand
from lightning_distill.samplers import heun_step, transport
from lightning_distill.times import few_step_times

__all__ = ["TeacherPaths", "pair_scale"]


def pair_scale(method: TrajectoryMethod, batch: Batch, t: Tensor) -> Tensor | None:
    """Guidance scales of the batch's trajectories as the student is told them, (B,); None where it embeds none.

    Args:
        method: with the student.
        batch: with a stored scale, if its trajectories have one each.
        t: native times, (B,).
    """
    told = method.told_scale(t)
    stored = batch.predictions.get("scale")
    return stored.double() if told is not None and stored is not None else told


class TeacherPaths(TrajectoryMethod):
    """Base of methods that learn where the teacher's solver leads.

    Args:
        teacher: the pretrained model.
        solver_steps: N of the trajectories that are solved in training, from noise alone; batches of stored
            trajectories (``Trajectories``, ``Pairs``) are used instead.
        solver: of those: ``euler`` (DDIM) or ``heun``.
        **kwargs: see ``TrajectoryMethod``.
    """

    learns_from = "teacher alone; or its stored trajectories"
    #: distance of samples beside the method's own, of methods that take one
    perceptual: Perceptual | None = None

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        solver_steps: int = 16,
        solver: Literal["euler", "heun"] = "heun",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if solver not in ("euler", "heun"):
            raise ValueError(f"solver={solver!r} must be euler or heun.")
        if solver_steps < 1:
            raise ValueError(f"solver_steps={solver_steps}: a trajectory has at least one step.")
        self.solver: Literal["euler", "heun"] = solver
        self.solver_steps = solver_steps
        self._grid: list[float] = []

    def check_configuration(self) -> None:
        """The perceptual distance has its weights, or finds its blocks."""
        super().check_configuration()
        check_perceptual(self.perceptual, self)

    @property
    def solver_calls(self) -> int:
        """Teacher calls of a trajectory that is solved in training."""
        steps = len(self.solver_times())
        return 2 * steps - 1 if self.solver == "heun" else steps

    def solver_times(self) -> list[float]:
        """Native times of the trajectories that are solved in training, without the final 0."""
        return few_step_times(self.process, self.solver_steps)

    def grid_with_steps(self) -> list[float]:
        """The solver's grid with the student's times in it."""
        own = self.student_times
        return sorted({*own, *(t for t in few_step_times(self.process, self.solver_steps) if t < own[0])}, reverse=True)

    def rows_of_steps(self, times: Tensor) -> list[int]:
        """Rows of a trajectory at the student's times, and its last one.

        Args:
            times: of the trajectory, with the final 0, (N + 1,).

        Raises:
            ValueError: it has no state at one of the student's times.
        """
        if len(self._grid) != len(times):
            self._grid = times.tolist()  # once: the trajectories of a run have one grid
        grid, rows = self._grid, []
        for t in self.student_times:
            nearest = min(range(len(grid)), key=lambda i: abs(grid[i] - t))
            if abs(grid[nearest] - t) > 1e-6 * self.process.t_max:
                raise ValueError(
                    f"the trajectories have no state at the student's time {t:.6g}, only at "
                    f"{[round(g, 4) for g in grid[:-1]]}; set student_times to some of these, or store states at "
                    "the student's times with 'lightning-distill trajectories --records points'."
                )
            rows.append(nearest)
        return [*rows, len(grid) - 1]

    # ------------------------------------------------------------------------------------------------ trajectories
    @torch.no_grad()
    def trajectory(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States (N + 1, B, ...) from noise to clean data, and their times (N + 1,), float64.

        Raises:
            ValueError: the batch holds stored pairs, which have no states on the way.
        """
        if batch.noise is not None and batch.states is None:
            raise ValueError(
                f"{type(self).__name__} learns from states on the way from noise to data, and the loader yields pairs "
                "without them; store states with 'lightning-distill trajectories --records points', or give Prior for "
                "trajectories that are solved in training."
            )
        if batch.states is not None and batch.times is not None:
            clean = self.data(batch)
            times = torch.cat([batch.times.double(), batch.times.new_zeros(1).double()])
            return torch.cat([batch.states.transpose(0, 1), clean[None]]), times.to(clean.device)
        noise = self.draws.normal("noise", (batch.size, *self.sample_shape))
        return self.solve(batch, noise, self.solver_times())

    @torch.no_grad()
    def solve(self, batch: Batch, noise: Tensor, grid: list[float]) -> tuple[Tensor, Tensor]:
        """As ``trajectory``, of given noise.

        Args:
            batch: conditions.
            noise: unit starting noise, (B, ...).
            grid: descending native times without the final 0.
        """
        teacher, process = self.guided_teacher(batch), self.process
        times = torch.tensor([*grid, 0.0], dtype=torch.float64, device=self.device)
        states = [process.prior(noise, grid[0])]
        for t, r in pairwise(times):
            # the step to clean data is first order, as in the samplers: there is no noise to predict at its end
            second = self.solver == "heun" and len(states) < len(grid)
            x = states[-1]
            states.append(heun_step(teacher, x, t, r, process) if second else transport(teacher(x, t), r))
        return torch.stack(states), times

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit noise and what the teacher made of it, (B, ...) each: stored, or solved now.

        Raises:
            ValueError: the batch has data that came from no noise.
        """
        if batch.noise is not None:
            return batch.noise, self.data(batch)
        if batch.x0 is not None:
            raise ValueError(
                f"{type(self).__name__} learns from pairs of noise and what the teacher made of it, but the loader "
                "yields data without noise; give Trajectories(path=...) or Pairs(path=...), or Prior for pairs that "
                "are made in training."
            )
        states, _ = self.trajectory(batch)
        return states[0] / self.process.prior_std(float(self.solver_times()[0])), states[-1]

    def pair_scale(self, batch: Batch, t: Tensor) -> Tensor | None:
        """As the function ``pair_scale``."""
        return pair_scale(self, batch, t)

    def chord(self, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Average velocity between two states, in flow-matching coordinates."""
        (flow_t, scale_t), (flow_r, scale_r) = (change_process(s, self.process, FlowMatching()) for s in (t, r))
        return average_velocity(expand(scale_t, x_t) * x_t, expand(scale_r, x_r) * x_r, flow_t, flow_r)
