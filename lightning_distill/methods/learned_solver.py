"""The teacher itself with the best few steps: what every distillation has to beat."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_distill.batch import Batch
from lightning_distill.ema import EMAProfile
from lightning_distill.guidance import Guidance, is_told
from lightning_distill.losses.consistency import distance
from lightning_distill.methods.base import Terms
from lightning_distill.methods.boss import BOSS
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Role, with_network
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import Capability
from lightning_distill.processes import FlowMatching, NoiseProcess, VariancePreserving, change_process
from lightning_distill.samplers import adams_coefficients, adams_direction

__all__ = ["LearnedSolver", "StepSizes"]


Coefficients = Literal["none", "differences", "all"]


class StepSizes(nn.Module):
    """Falling times from a start to 0 whose differences are positive and free otherwise, and coefficients of the steps.

        t_i = start (1 - p_1 - .. - p_i),     p = softmax(logits)

    Args:
        count: number of steps, >= 1.
        start: first time, in flow matching.
        process: of the native times; None for flow matching.
        learned: coefficients of ``samplers.adams`` that are trained beside the times: ``none`` (they are those of
            Euler), ``differences`` (d_i) or ``all`` (f_i and d_i).
    """

    def __init__(
        self, count: int, start: float, process: NoiseProcess | None = None, learned: Coefficients = "none"
    ) -> None:
        super().__init__()
        self.start = start
        self.process = process or FlowMatching()
        self.logits = nn.Parameter(torch.zeros(count))
        self.factors = nn.Parameter(torch.ones(count), requires_grad=learned == "all")
        self.differences = nn.Parameter(torch.zeros(count), requires_grad=learned != "none")

    def coefficients(self) -> Tensor:
        """Factors f and d of every step, (2, count), float64."""
        return torch.stack([self.factors, self.differences]).double()

    @torch.no_grad()
    def native_times(self) -> list[float]:
        """The times without the final 0 in the process' own time; those of a scheduler are its timesteps."""
        times = change_process(self()[:-1].cpu(), FlowMatching(), self.process)[0]
        if isinstance(self.process, VariancePreserving):
            n = self.process.num_train_timesteps
            steps = (times * n).round()
            # falling, and none of them 0: each at least one above all that follow
            least = torch.arange(len(steps), 0, -1, dtype=steps.dtype)
            steps = (steps - least).clamp_min(0).flip(0).cummax(0).values.flip(0) + least
            times = torch.minimum(steps, n - torch.arange(len(steps), dtype=steps.dtype)) / n
        found: list[float] = times.clamp_max(self.process.t_max).tolist()
        return found

    def coefficients_at(self, times: Sequence[float]) -> Tensor | None:
        """The coefficients, where ``times`` are ``native_times``; None for others, which they were not learned for."""
        return self.coefficients() if list(times) == self.native_times() else None

    def forward(self) -> Tensor:
        """Flow-matching times, (count + 1,), float64; the first is ``start``, the last 0."""
        shares = self.logits.double().softmax(0)
        inner = 1.0 - shares.cumsum(0)[:-1]
        return self.start * torch.cat([inner.new_ones(1), inner, inner.new_zeros(1)])

    @torch.no_grad()
    def place(self, times: Sequence[float]) -> None:
        """Set the flow-matching times, without the final 0."""
        grid = torch.tensor([*times, 0.0], dtype=torch.float64)
        steps = -grid.diff()
        self.logits.copy_((steps / steps.sum()).log())
        if self.differences.requires_grad:
            self.differences.copy_(adams_coefficients(grid)[1])


class LearnedSolver(BOSS):
    """The times and coefficients of the teacher's own few steps, learned through them; no weight changes.

        min over t_1 > .. > t_K-1, f, d of  D( Solver(eps; t, f, d), ODE_T(eps) ),
        Solver: x'_{i+1} = x'_i + (t_i+1 - t_i) [ f_i v_i + d_i (v_i - v_i-1) ]      (``samplers.adams``)

    They start at Bellman's knots (``BOSS``), which add up the errors of single jumps, and then follow the gradient of
    the error that counts, that of the end point. Without coefficients the steps are Euler's (DDIM) and the result is a
    list of times for a stock scheduler: export as usual. With them the same calls come much closer.

    Args:
        teacher: the pretrained model.
        solver_steps: intervals of the accurate solver.
        solver: of the accurate trajectories.
        coefficients: what is learned beside the times: ``none``, ``differences`` (d_i, from Adams-Bashforth's on), or
            ``all`` (f_i as well).
        student: not taken, as ``ema``: the network is the teacher's.
        ema: see ``student``.
        metric: distance of end points, see ``losses.consistency.distance``.
        **kwargs: see ``BOSS``; ``student_times`` are where learning starts. The default rate is .01.

    Notes:
        The network needs its guidance when it is sampled as well, two calls a step: ``sample`` sees to it, and exports
        state the scale beside the times, as arguments of the call. Coefficients have no place in stock schedulers.
        In variance-preserving processes the learned times are rounded to the scheduler's timesteps when they are used.
        Stored pairs say nothing of the way between, so that learning then starts at the uniform grid.
        Factors f_i and step sizes are what learnable sampler distillation (LSD) learns of a discrete model's sampler;
        the differences d_i are what makes continuous solvers second order.
    """

    phases: ClassVar[dict[str, tuple[str, ...]]] = {"student": ("schedule",)}
    paper = ""
    learns_from = "teacher alone; or its stored pairs"
    default_lr = 1e-2
    samplers: ClassVar[tuple[str, ...]] = ("ode", "adams")
    #: the teacher's network, which knows all times
    capability: ClassVar[Capability | None] = None

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        solver_steps: int = 50,
        solver: Literal["euler", "heun"] = "heun",
        coefficients: Coefficients = "none",
        student: Role | None = None,
        ema: list[EMAProfile] | None = None,
        **kwargs: Any,
    ) -> None:
        if student is not None or ema:
            raise ValueError("LearnedSolver leaves the teacher's weights as they are; leave out student and ema.")
        if coefficients not in get_args(Coefficients):
            raise ValueError(f"coefficients={coefficients!r}: choose none, differences or all.")
        super().__init__(
            teacher,
            solver_steps=solver_steps,
            solver=solver,
            ema=[],
            sampler="ode" if coefficients == "none" else "adams",
            **kwargs,
        )
        self.coefficients: Coefficients = coefficients
        self.schedule: StepSizes | None = None

    def setup(self, stage: str) -> None:
        """As usual; a handful of numbers is not sharded."""
        super().setup(stage)
        from lightning_distill.strategies import RoleFSDP2  # which imports methods

        if stage == "fit" and isinstance(self.trainer.strategy, RoleFSDP2):
            raise ValueError(
                "LearnedSolver trains one number per step, which RoleFSDP2 does not shard; use one process or "
                "strategy=role_ddp."
            )

    def build_roles(self) -> None:
        """The teacher's network, and the step sizes."""
        source = self.require_teacher()
        self.student = with_network(source, source.network)
        # times are learned through the network's, which a rounded one has no derivative in
        self.student.family = replace(self.student.family, integer_time=False)
        self._tells_scale = False
        end = torch.tensor(self.process.t_max, dtype=torch.float64)
        self._flow_max = float(change_process(end, self.process, FlowMatching())[0])
        start = BOSS.student_times.fget(self)  # type: ignore[attr-defined]
        schedule = StepSizes(len(start), self._flow_time(start[:1])[0], self.process, self.coefficients)
        schedule.place(self._flow_time(start))
        self.schedule = schedule
        scale = change_process(torch.tensor(start[0], dtype=torch.float64), self.process, FlowMatching())[1]
        # all samples start there, whatever is learned
        self._start = float(scale) * self.process.prior_std(start[0])
        if self.coefficients != "none":
            self.student.coefficients = schedule.coefficients_at
        if self.guidance.needs_null and is_told(source) and type(self.guidance) is Guidance:
            self.student.family = replace(self.student.family, guidance_scale=self.guidance.scale)
        elif self.guidance.needs_null:
            self.student.sampling_guidance = self.guidance

    def _flow_time(self, times: Sequence[float]) -> list[float]:
        native = torch.tensor(list(times), dtype=torch.float64)
        return change_process(native, self.process, FlowMatching())[0].tolist()

    @property
    def student_times(self) -> list[float]:
        """The learned times."""
        return super().student_times if self.schedule is None else self.schedule.native_times()

    def _place_knots(self, states: Tensor, times: Tensor) -> None:
        super()._place_knots(states, times)
        assert self.schedule is not None
        assert self._given_times is not None
        self.schedule.place(self._flow_time(self._given_times))

    def student_loss(self, batch: Batch) -> Terms:
        """Distance of where the few steps end from where the accurate solver does."""
        assert self.schedule is not None
        if batch.states is not None:
            self.trajectory(batch)  # the first one decides where learning starts
        noise, x0 = self.pairs(batch)
        times, u = self.schedule(), self.draws.uniform("guidance", batch.size)
        x, previous = self._start * noise, None
        for (t, r), (factor, difference) in zip(pairwise(times), self.schedule.coefficients().unbind(1)):
            seen, native = self.native(x, t.expand(batch.size))
            v = self.guidance(self.student, seen, native, batch.cond, u).flow_prediction
            x = x + (r - t).to(x) * adams_direction(v, v if previous is None else previous, factor, difference)
            previous = v
        loss = distance(x, x0, self.metric, self.huber).mean()
        return Terms({"end": loss}, {"mse": (x.detach() - x0).square().mean()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update that makes its pairs."""
        steps = len(self.student_times)
        return {"student": {"student": steps, "teacher": self.solver_calls}}
