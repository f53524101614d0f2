"""TBCM: continuous-time consistency on the teacher's own sampling trajectories (arXiv:2511.20410)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.batch import Batch
from lightning_distill.guidance import RandomGuidance
from lightning_distill.methods.scm import SCM, ContinuousConsistency, Points
from lightning_distill.methods.teacher_paths import pair_scale
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import trigflow_input, trigflow_velocity
from lightning_distill.prediction import Prediction
from lightning_distill.processes import TrigFlow, change_process
from lightning_distill.samplers import transport
from lightning_distill.times import LogNormal, TimeDistribution

__all__ = ["TBCM", "BackwardConsistency"]


class BackwardConsistency(ContinuousConsistency):
    """The term of continuous-time consistency at the states of a solver that starts from noise.

    Attributes:
        solver_steps: states of a trajectory.
    """

    solver_steps: int = 8

    def grid(self, method: TrajectoryMethod, n: int) -> Tensor:
        """Descending TrigFlow times of each trajectory, (solver_steps, n), float64: the noisiest one, then strata.

        One draw from each of K - 1 equal parts of the distribution of times, so that together they have the
        distribution itself.
        """
        strata = self.solver_steps - 1
        u = method.draws.uniform("tau", n)
        part = torch.arange(strata - 1, -1, -1, dtype=torch.float64, device=u.device)
        tau = self.inside(method, self.times.quantile((part[:, None] + u) / max(1, strata), TrigFlow()))
        return torch.cat([self.largest(method, u)[None], tau])

    def as_stored(
        self, method: TrajectoryMethod, batch: Batch, guidance: RandomGuidance
    ) -> tuple[Callable[[Tensor, Tensor], Prediction], Callable[[Tensor], Tensor | None]]:
        """The teacher guided by the scales of stored trajectories instead of drawn ones, and what the student is told.

        A state's direction has to be that of the scale that is told.
        """
        teacher = method.require_teacher()
        u = (batch.predictions["scale"].double() - guidance.low) / (guidance.high - guidance.low)

        def denoise(x: Tensor, t: Tensor) -> Prediction:
            return guidance(teacher, x, t, batch.cond, u)

        return denoise, lambda t: pair_scale(method, batch, t)

    @torch.no_grad()
    def points(self, method: TrajectoryMethod, batch: Batch) -> Points:
        """States of the guided teacher's trajectories, each with the teacher's direction there.

        Args:
            method: with the teacher.
            batch: conditions and size, or stored ``states`` at ``times``.
        """
        sd, process, n = method.student.sigma_data, method.process, batch.size
        stored = batch.states is not None and batch.times is not None
        teacher = method.guided_teacher(batch)
        told_scale: Callable[[Tensor], Tensor | None] = method.told_scale
        if stored and "scale" in batch.predictions and isinstance(method.guidance, RandomGuidance):
            teacher, told_scale = self.as_stored(method, batch, method.guidance)
        if stored:
            times = batch.times.to(batch.states.device, torch.float64)  # type: ignore[union-attr]
            tau = change_process(times, process, TrigFlow(), sd)[0][:, None].expand(-1, n)
            x, native = batch.states[:, 0], times[:, None].expand(-1, n)  # type: ignore[index]
        else:
            tau = self.grid(method, n)
            native = trigflow_input(torch.zeros_like(tau).flatten(), tau.flatten(), process, sd)[1].view_as(tau)
            native = native.clamp_max(process.t_max)
            x = process.prior(method.draws.normal("noise", (n, *method.sample_shape)))
        states, velocities, scales = [], [], []
        for i, t in enumerate(native):
            if stored:
                x = batch.states[:, i]  # type: ignore[index]
            prediction = teacher(x, t)
            states.append(TrigFlow().add_noise(prediction.x0 / sd, prediction.eps, tau[i]))
            velocities.append(trigflow_velocity(prediction, tau[i], sd))
            scales.append(told_scale(t))
            if i + 1 < len(native):
                x = transport(prediction, native[i + 1])
        rows = torch.arange(n, device=tau.device).repeat_interleave(len(tau))
        cond = batch.cond_of(rows)

        def by_sample(parts: Iterable[Tensor]) -> Tensor:
            return torch.stack(list(parts), dim=1).flatten(0, 1)

        told = [s for s in scales if s is not None]
        return Points(by_sample(states), by_sample(tau), by_sample(velocities), cond, by_sample(told) if told else None)

    def __call__(
        self, method: TrajectoryMethod, batch: Batch, log_variance: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As the term it extends, without an effect of the states of pure noise on the weights of times.

        At pi / 2 the tangent and its weight are 0, so that u(pi / 2) would fall without end and take the weights of
        the times beside it along.
        """
        if log_variance is None:
            return super().__call__(method, batch)
        return super().__call__(method, batch, _AwayFromNoise(log_variance))

    def forward_counts(self) -> dict[str, int]:  # noqa: D102
        return {**super().forward_counts(), "teacher": self.solver_steps}


class _AwayFromNoise(nn.Module):
    """A function of TrigFlow times, and the constant 0 at pi / 2."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, tau: Tensor) -> Tensor:
        value: Tensor = self.function(tau)
        return torch.where(TrigFlow().alpha(tau) > 0.0, value, 0.0)


class TBCM(SCM):
    """sCM without images: the states of the teacher's sampler take the place of noised data.

        x_K ~ noise at pi / 2,   x_{k-1} = solver(x_k),   dx/dtau = F_T(x_k, tau_k) of the step that made x_{k-1}
        df/dtau = 0 at (x_k, tau_k) for every k

    The teacher is asked once per state, its sampler and its direction in one; the student is trained where it will be
    asked, and no encoder runs.

    Args:
        teacher: the pretrained model.
        solver_steps: K, states of a trajectory, all of which are trained on.
        times: distribution of TrigFlow times of the states, None for SANA-Sprint's ``LogNormal(.2, 1.6)``, of
            noise on data of standard deviation .5, so that its mean is ln 2 larger here; a trajectory has the noisiest
            time and one time from each of K - 1 equal parts of it.
        warmup_updates: H of the tangent's warm-up.
        **kwargs: see ``SCM``.

    Notes:
        A batch of B noises makes K B training samples. Batches with stored ``states`` (a trajectory store) are used
        instead of solving; the teacher then only gives the directions.
        The released code solves on 16 points shifted by 2.5, with a time drawn within each, and leaves out the first
        state, pure noise, which counts here. After the warm-up it lowers the tangent's share once; here it stays.
    """

    paper = "2511.20410"
    learns_from = "teacher alone; or its stored trajectories"
    term = BackwardConsistency
    consistency: BackwardConsistency

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        solver_steps: int = 8,
        times: TimeDistribution | None = None,
        warmup_updates: int = 4000,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("from_data"):
            raise ValueError("TBCM follows the teacher's own trajectories, so from_data has no place; use SCM for it.")
        super().__init__(
            teacher, times=times or LogNormal(0.2 + math.log(2.0), 1.6), warmup_updates=warmup_updates, **kwargs
        )
        if solver_steps < 2:
            raise ValueError(f"solver_steps={solver_steps}: a trajectory has its noise and at least one more state.")
        self.consistency.solver_steps = solver_steps
