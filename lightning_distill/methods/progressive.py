"""Progressive distillation (arXiv:2202.00512)."""

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.ema import renew_copy
from lightning_distill.losses.consistency import progressive_target
from lightning_distill.methods.base import Terms
from lightning_distill.methods.guards import check_schedule
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.roles import averaged_copy
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import Capability
from lightning_distill.processes import EDM, FlowMatching, NoiseProcess, VariancePreserving, expand
from lightning_distill.samplers import transport

__all__ = ["ProgressiveDistillation", "middle_time"]


def middle_time(t: float, r: float, process: NoiseProcess) -> float:
    """Native time half way between two, on the scale on which the process' few-step grids are even.

    In EDM that scale ends at ``sigma_min``, which stands for clean data.

    Args:
        t: later time.
        r: earlier time, 0 for clean data.
        process: of the times.
    """
    if isinstance(process, EDM):
        end = max(r, process.sigma_min) if t > process.sigma_min else r
        return float((0.5 * (t ** (1 / 7) + end ** (1 / 7))) ** 7)
    if isinstance(process, FlowMatching):
        back = FlowMatching(1.0 / process.shift)  # the inverse of the shift
        even = [float(back.warp(torch.tensor(s, dtype=torch.float64))) for s in (t, r)]
        return float(process.warp(torch.tensor(0.5 * sum(even), dtype=torch.float64)))
    if isinstance(process, VariancePreserving):
        n = process.num_train_timesteps
        return max(1, round(0.5 * (t + r) * n)) / n
    return 0.5 * (t + r)


class ProgressiveDistillation(TrajectoryMethod):
    """A student whose one step is two steps of its predecessor, stage by stage.

        x_s = DDIM(x_t, y(x_t)),   x_r = DDIM(x_s, y(x_s)),   x0_target: one DDIM step from x_t with it ends at x_r
        L = max(alpha_t^2 / sigma_t^2, 1) |x0(x_t) - x0_target|^2                                        (Alg. 2, Eq. 9)

    y is the (guided) teacher in the first stage; then the student of the stage before, which has taken guidance in.

    Args:
        teacher: the pretrained model.
        stages: halvings of the number of steps, ending at ``num_steps``: the first stage has num_steps 2^(stages - 1).
        stage_updates: student updates of a stage; the last goes on until the run ends.
        **kwargs: see ``TrajectoryMethod``; the student is sampled by ``ode``.

    Notes:
        The next teacher is the student's first average where there is one, and the student goes on from its own
        weights.
        Grids are made from the student's own times by halving their intervals, so that they are nested exactly; those
        of the default times are ``few_step_times`` of all numbers of steps, to rounding.
    """

    paper = "2202.00512"
    learns_from = "teacher, data"
    samplers = ("ode",)
    capability: ClassVar[Capability | None] = "own_times"
    targets = ("source",)

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        stages: int = 3,
        stage_updates: int = 50_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, sampler="ode", **kwargs)
        if stages < 1 or stage_updates < 1:
            raise ValueError(f"stages={stages} and stage_updates={stage_updates} must be 1 or more.")
        self.stages, self.stage_updates = stages, stage_updates
        self._grids: dict[int, list[float]] = {}
        self.source: Denoiser

    def build_roles(self) -> None:
        """The student, and its predecessor."""
        super().build_roles()
        if isinstance(self.student, AdapterDenoiser):
            raise ValueError(
                "the predecessor of a progressive student is a copy of it, which an adapter on the teacher's backbone "
                "has not; give student=Copy()."
            )
        self.source = averaged_copy(self.student, "source")

    @property
    def edges(self) -> list[float]:  # type: ignore[override]
        """Each of its times leads to the next one."""
        return self.student_times

    def check_configuration(self) -> None:
        """The teacher's grid must have different times."""
        super().check_configuration()
        grid = self.grid(self.stages)
        if any(r >= t for t, r in pairwise(grid)):
            raise ValueError(
                f"the first stage of {self.stages} takes {len(grid) - 1} steps of the teacher, more than "
                f"{self.process!r} can tell apart; give fewer stages, or fewer or other student times."
            )

    def on_fit_start(self) -> None:
        """Say so where the run ends before the last stage."""
        super().on_fit_start()
        before = (self.stages - 1) * self.stage_updates
        consequence = "the student has not learned steps as long as those with which it is sampled"
        check_schedule(self, "stage_updates", before + 1, consequence)

    def train(self, mode: bool = True) -> "ProgressiveDistillation":
        """As usual; the predecessor stays in eval mode."""
        super().train(mode)
        if self._built:
            self.source.eval()
        return self

    # ------------------------------------------------------------------------------------------------ stages
    def stage(self) -> int:
        """Stage of this update, from 0."""
        return min(self.draws.update // self.stage_updates, self.stages - 1)

    def grid(self, halvings: int) -> list[float]:
        """The student's times and the final 0, each interval halved so many times."""
        if halvings == 0:
            return [*self.student_times, 0.0]
        if halvings not in self._grids:
            times = self.grid(halvings - 1)
            between = [middle_time(t, r, self.process) for t, r in pairwise(times)]
            self._grids[halvings] = [*(time for pair in zip(times, between) for time in pair), times[-1]]
        return self._grids[halvings]

    @torch.no_grad()
    def after_phase(self, phase: str) -> None:
        """At the end of a stage its student becomes the next one's teacher."""
        super().after_phase(phase)
        done, ends = divmod(self.draws.update + 1, self.stage_updates)
        if ends == 0 and done < self.stages:
            renew_copy(self.source, self.sampling_network())

    # ------------------------------------------------------------------------------------------------ loss
    @torch.no_grad()
    def two_steps(self, x: Tensor, times: tuple[Tensor, Tensor, Tensor], batch: Batch, scale: Tensor | None) -> Tensor:
        """Where two deterministic steps of the predecessor lead."""
        teacher = self.guided_teacher(batch)
        for t, r in pairwise(times):
            made = teacher(x, t) if self.stage() == 0 else self.source(x, t, batch.cond, guidance=scale)
            x = transport(made, r)
        return x

    def student_loss(self, batch: Batch) -> Terms:
        """One step against two."""
        x0 = self.data(batch)
        fine = torch.tensor(self.grid(self.stages - self.stage()), dtype=torch.float64, device=x0.device)
        steps = (len(fine) - 1) // 2
        index = (self.draws.uniform("step", batch.size) * steps).long().clamp_max(steps - 1)
        t, middle, r = fine[2 * index], fine[2 * index + 1], fine[2 * index + 2]
        x_t = self.process.add_noise(x0, self.draws.normal("noise", x0.shape), t)
        scale = self.told_scale(t)
        end = self.two_steps(x_t, (t, middle, r), batch, scale)
        target = progressive_target(x_t, end, t, r, self.process)
        error = (self.student(x_t, t, batch.cond, guidance=scale).x0 - target).square()
        weight = (self.process.alpha(t) / self.process.sigma(t)).square().clamp_min(1.0)
        return Terms({"progressive": (expand(weight, error) * error).mean()}, {"steps": torch.full((), float(steps))})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update of the first stage."""
        return {"student": {"student": 1, "teacher": 2}}
