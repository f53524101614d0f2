"""Consistency training from data: CT (arXiv:2303.01469), iCT (arXiv:2310.14189) and ECT (arXiv:2406.14548)."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.ema import EMAProfile
from lightning_distill.losses.consistency import (
    PairWeight,
    cm_ema_decay,
    cm_steps,
    ect_target,
    ect_time,
    ict_probabilities,
    ict_steps,
)
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_distillation import PairMethod
from lightning_distill.methods.guards import check_schedule
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import EDM, VariancePreserving
from lightning_distill.times import LogNormal, TimeDistribution, Uniform, t_min

__all__ = ["ECT", "ICT", "ConsistencyTraining", "ScheduledEMA"]


class ScheduledEMA(EMAProfile):
    """Decay of the target of consistency training: grows with the number of times (arXiv:2303.01469, Appendix C).

    Args:
        total_updates: K.
        s0: number of times at the start.
        s1: at the end there are s1 + 1.
        mu0: decay at the start.
    """

    def __init__(self, total_updates: int, s0: int = 2, s1: int = 150, mu0: float = 0.9) -> None:
        self.total_updates, self.s0, self.s1, self.mu0 = total_updates, s0, s1, mu0
        self.name = f"scheduled_{mu0:g}".replace(".", "_")

    def beta(self, update: int, samples_per_update: int) -> float:  # noqa: D102
        return cm_ema_decay(cm_steps(update - 1, self.total_updates, self.s0, self.s1), self.s0, self.mu0)


class ConsistencyTraining(PairMethod):
    """Consistency of the two ends of a pair that shares data and noise; no teacher is asked.

        x_t = alpha_t x0 + sigma_t eps,     x_r = alpha_r x0 + sigma_r eps,    L = w(t, r) d( f(x_t, t), sg f'(x_r, r) )

    The direction from x_t to x_r is right in the mean; the closer the two times are, the less the difference matters.

    Args:
        teacher: where the student's weights come from: a diffusion model to be tuned, or a fresh network
            (``NewDenoiser``).
        schedule: how the N intervals of the grid grow with updates: ``sqrt`` (CT), ``doubling`` (iCT), or ``fixed``.
        total_updates: K of the schedule.
        first_intervals: s0.
        last_intervals: s1, also N of ``fixed``.
        interval_distribution: ``uniform``, or ``lognormal`` in the noise level (mean -1.1, std 2; iCT).
        **kwargs: see ``PairMethod`` for the loss.
    """

    paper = "2303.01469"
    learns_from = "data"
    asks_teacher = False

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        schedule: Literal["sqrt", "doubling", "fixed"] = "sqrt",
        total_updates: int = 100_000,
        first_intervals: int = 2,
        last_intervals: int = 150,
        interval_distribution: Literal["uniform", "lognormal"] = "uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if schedule not in ("sqrt", "doubling", "fixed") or interval_distribution not in ("uniform", "lognormal"):
            raise ValueError(
                f"schedule={schedule!r} must be sqrt, doubling or fixed, and "
                f"interval_distribution={interval_distribution!r} uniform or lognormal."
            )
        if not 1 <= first_intervals <= last_intervals or total_updates < 1:
            raise ValueError(
                f"first_intervals={first_intervals}, last_intervals={last_intervals}, total_updates={total_updates}: "
                "intervals grow from at least 1, over at least one update."
            )
        self.schedule = schedule
        self.total_updates = total_updates
        self.first_intervals, self.last_intervals = first_intervals, last_intervals
        self.interval_distribution = interval_distribution

    def build_roles(self) -> None:
        """The student; the process must have the grid of the last stage."""
        super().build_roles()
        self.check_last_grid()

    def check_last_grid(self) -> None:
        """Refuse a last stage with pairs of equal times."""
        self.check_grid("last_intervals", self.last_intervals)

    def on_fit_start(self) -> None:
        """Say so where the run ends before the grid is at its finest."""
        super().on_fit_start()
        if self.schedule != "fixed":
            check_schedule(self, "total_updates", self.total_updates, "the grid has not become as fine as it should")

    def current_intervals(self) -> int:
        """N at this update."""
        if self.schedule == "fixed":
            return self.last_intervals
        count = cm_steps if self.schedule == "sqrt" else ict_steps
        return max(1, count(self.draws.update, self.total_updates, self.first_intervals, self.last_intervals) - 1)

    def grid(self) -> list[float]:
        """Descending times of this update."""
        return self.solver_grid(self.current_intervals())

    def pair_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Neighbours on the grid of this update."""
        if self.interval_distribution == "uniform":
            return super().pair_times(n)
        ascending = torch.tensor(self.grid(), dtype=torch.float64).flip(0)
        levels = self.process.sigma(ascending) / self.process.alpha(ascending)
        cdf = ict_probabilities(levels).cumsum(0).to(self.device)
        u = self.draws.uniform("interval", n)
        index = torch.searchsorted(cdf, u.contiguous()).clamp_max(len(cdf) - 1)
        ascending = ascending.to(self.device)
        return ascending[index + 1], ascending[index]

    def earlier(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch, eps: Tensor) -> Tensor:
        """The same data with the same noise, less of it."""
        return self.process.add_noise(self.data(batch), eps, r)

    def student_loss(self, batch: Batch) -> Terms:
        """Distance of the two ends of a pair."""
        return self.pair_loss(batch)


class ICT(ConsistencyTraining):
    """Improved consistency training: no average, pseudo-Huber, w = 1 / (t - r), doubling, log-normal noise levels.

    Args:
        teacher: where the student's weights come from.
        schedule: see ``ConsistencyTraining``.
        first_intervals: s0.
        last_intervals: s1; None is the paper's 1280, halved until the process has that many times.
        interval_distribution: see ``ConsistencyTraining``.
        weight: w(t, r); None is the paper's 1 / (t - r) in EDM, whose gaps grow with the noise, and ``inverse_c_out``
            in processes whose grids are even.
        **kwargs: see ``ConsistencyTraining``; the metric is ``pseudo_huber`` with c = .00054 sqrt(D).
    """

    paper = "2310.14189"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        schedule: Literal["sqrt", "doubling", "fixed"] = "doubling",
        first_intervals: int = 10,
        last_intervals: int | None = None,
        interval_distribution: Literal["uniform", "lognormal"] = "lognormal",
        weight: PairWeight | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            schedule=schedule,
            first_intervals=first_intervals,
            last_intervals=1280 if last_intervals is None else last_intervals,
            interval_distribution=interval_distribution,
            weight=weight or "inverse_gap",
            **kwargs,
        )
        self._default_weight, self._default_last = weight is None, last_intervals is None

    def build_roles(self) -> None:
        """As usual; the default weight depends on the process."""
        super().build_roles()
        if self._default_weight and not isinstance(self.process, EDM):
            self.weight = "inverse_c_out"

    def check_last_grid(self) -> None:
        """As usual; by default it is made one that the process has."""
        if self._default_last:
            self.check_grid("first_intervals", self.first_intervals)
            finest = self.finest_grid(self.last_intervals)
            while self.last_intervals > finest:
                self.last_intervals = max(self.last_intervals // 2, self.first_intervals)
        super().check_last_grid()


class ECT(ConsistencyTraining):
    """Easy consistency tuning: from denoising (r = 0) to consistency in stages of shrinking relative gaps.

        r = max(0, t (1 - (1 + k sigmoid(-b t)) / q^(stage + 1))),     w = 1 / (t - r)

    Args:
        teacher: the diffusion model that is tuned.
        training_times: distribution of t, None for ``LogNormal(-1.1, 2)`` in EDM and the uniform one elsewhere.
        q: decay of the gap per stage.
        stage_updates: student updates of a stage, 0 for a run in the stage ``first_stage`` alone.
        first_stage: stage at the start.
        weight: w(t, r).
        **kwargs: see ``ConsistencyTraining`` (its grid and schedule are not used).

    Notes:
        r(t) is written in the process' own time, which is the paper's noise level in EDM alone; in flow matching the
        first stage is denoising at all times. Before the first timestep of a variance-preserving model, which its
        network does not know, r is 0.
    """

    paper = "2406.14548"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        training_times: TimeDistribution | None = None,
        q: float = 2.0,
        stage_updates: int = 0,
        first_stage: int = 0,
        weight: PairWeight = "inverse_gap",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, weight=weight, **kwargs)
        if not q > 1.0 or stage_updates < 0 or first_stage < 0:
            raise ValueError(
                f"q={q} must exceed 1, stage_updates={stage_updates} and first_stage={first_stage} be >= 0."
            )
        self._given_training_times = training_times
        self.training_times: TimeDistribution
        self.q, self.stage_updates, self.first_stage = q, stage_updates, first_stage

    def build_roles(self) -> None:
        """As usual; the default times depend on the process."""
        super().build_roles()
        default = LogNormal(-1.1, 2.0) if isinstance(self.process, EDM) else Uniform(0.0, 1.0)
        self.training_times = self._given_training_times or default

    def check_last_grid(self) -> None:
        """Nothing to check: its pairs lie on no grid."""

    def on_fit_start(self) -> None:
        """Say so where the run ends in its first stage."""
        PairMethod.on_fit_start(self)  # whose schedule of a grid is not used
        if self.stage_updates:
            consequence = "its pairs are as far apart as at the beginning"
            check_schedule(self, "stage_updates", self.stage_updates + 1, consequence)

    def stage(self) -> int:
        """Stage of this update."""
        return self.first_stage + (self.draws.update // self.stage_updates if self.stage_updates else 0)

    def earlier_times(self, t: Tensor) -> Tensor:
        """r(t) at this stage, native times; 0 is clean data."""
        r = ect_time(t, self.stage(), self.q)
        return torch.where(r < t_min(self.process), 0.0, r) if isinstance(self.process, VariancePreserving) else r

    def pair_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Times of ``training_times`` and r(t)."""
        t = self.training_times.quantile(self.draws.uniform("t", n), self.process)
        return t, self.earlier_times(t)

    @torch.no_grad()
    def target(self, x_r: Tensor, r: Tensor, batch: Batch, scale: Tensor | None) -> Tensor:
        """f'(x_r, r), and the clean sample where r = 0."""
        network = self.student if self.target_name is None else self.sampling_network(self.target_name)
        return ect_target(self.function(network, batch, scale)(x_r, r).x0, self.data(batch), r)
