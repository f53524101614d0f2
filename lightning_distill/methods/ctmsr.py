"""CTMSR: one-step super-resolution by consistency training from noisy low-resolution pictures (arXiv:2503.20349)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.ema import renew_copy
from lightning_distill.losses.residual_shift import trajectory_matching
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_distillation import Metric
from lightning_distill.methods.consistency_training import ConsistencyTraining
from lightning_distill.methods.guards import check_schedule
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import averaged_copy
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import FlowMatching, ResidualShift
from lightning_distill.times import TimeDistribution, Uniform, few_step_times

__all__ = ["CTMSR"]


class CTMSR(ConsistencyTraining):
    """Consistency training on the path from a picture to its noisy low-resolution version, then trajectory matching.

        z_t = x0 + t (low - x0) + sigma_t n,     f(z_t, t, low) = f(z_r, r, low) = x0 at r = 0
        L = d( f(z_t), sg f(z_r) ) + 1.6 DTM,     DTM moves x = f(z_t) along  [ f'(x_s) - f'(x0_s) ] / mean |x - x0|

    No teacher is asked. x_s and x0_s are the restored and the true picture, brought to the same time with the same
    noise; f' is a frozen copy of the student, which stands for the score of the data and of its own pictures both.

    Args:
        teacher: where the student's weights come from, mostly a fresh network (``ConcatenatedDenoiser`` with
            ``residual_shift``); its process is ``ResidualShift``, or ``FlowMatching``.
        schedule: see ``ConsistencyTraining``.
        first_intervals: N at the start of a schedule that grows.
        last_intervals: N.
        metric: see ``PairMethod``; the default is Charbonnier's.
        trajectory_from: update from which the DTM term counts; None for never.
        proxy_updates: the frozen copy is renewed from the student every so many updates after that one.
        trajectory_times: distribution of its times s; None for uniform between .1 and .5.
        **kwargs: see ``ConsistencyTraining``. Default weight of ``student/trajectory``: 1.6.

    Notes:
        Terms, weights and times are those of the released code, in which sigma_t = t: ``ResidualShift(1, "linear")``.
        Its metric is Charbonnier's and LPIPS by halves, in both terms; here the first has ``metric``, the second a
        squared distance. Its time s is one step of the grid, here a continuum, and each sample has times of its own.
        Samples are carried without the known shift t low (see ``ResidualShift``), so that ``sample`` starts from noise
        and every sampler applies.
    """

    paper = "2503.20349"
    learns_from = "data with low-resolution pictures"
    targets = ("proxy",)
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/trajectory": 1.6}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        schedule: Literal["sqrt", "doubling", "fixed"] = "fixed",
        first_intervals: int = 1,
        last_intervals: int = 4,
        metric: Metric = "pseudo_huber_elementwise",
        trajectory_from: int | None = None,
        proxy_updates: int = 1000,
        trajectory_times: TimeDistribution | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            schedule=schedule,
            first_intervals=first_intervals,
            last_intervals=last_intervals,
            metric=metric,
            **kwargs,
        )
        if proxy_updates < 1 or (trajectory_from is not None and trajectory_from < 0):
            raise ValueError(
                f"trajectory_from={trajectory_from} and proxy_updates={proxy_updates}: the second stage begins at an "
                "update from 0 on, and its copy lasts at least one."
            )
        self.trajectory_from, self.proxy_updates = trajectory_from, proxy_updates
        self.trajectory_times = trajectory_times or Uniform(0.1, 0.5)
        self.proxy: Denoiser | None = None

    def build_roles(self) -> None:
        """The student, and a copy of it for the second stage."""
        super().build_roles()
        self.proxy = None if self.trajectory_from is None else averaged_copy(self.student, "proxy")

    def check_configuration(self) -> None:
        """The path must end in the low-resolution picture."""
        super().check_configuration()
        if not isinstance(self.process, (ResidualShift, FlowMatching)):
            raise ValueError(
                f"CTMSR's path leads from a picture to its noisy low-resolution version, and the network works with "
                f"{self.process!r}; give it ResidualShift(kappa)."
            )

    def train(self, mode: bool = True) -> "CTMSR":
        """As usual; the frozen copy stays in eval mode."""
        super().train(mode)
        if self.proxy is not None:
            self.proxy.eval()
        return self

    def on_fit_start(self) -> None:
        """Say so where the run ends before the second term counts."""
        super().on_fit_start()
        check_schedule(self, "trajectory_from", (self.trajectory_from or 0) + 1, "the second term never counts")

    def grid(self) -> list[float]:
        """Descending times of this update, down to the picture itself."""
        return [*few_step_times(self.process, self.current_intervals()), 0.0]

    # ------------------------------------------------------------------------------------------------ second stage
    @property
    def matches_trajectories(self) -> bool:
        """Whether the second term counts at this update."""
        return self.trajectory_from is not None and self.draws.update >= self.trajectory_from

    @torch.no_grad()
    def after_phase(self, phase: str) -> None:
        """Renew the frozen copy, first at the beginning of the second stage."""
        super().after_phase(phase)
        if self.proxy is None or self.trajectory_from is None:
            return
        passed = self.draws.update + 1 - self.trajectory_from
        if passed >= 0 and passed % self.proxy_updates == 0:
            renew_copy(self.proxy, self.student)

    def trajectory_term(self, x: Tensor, batch: Batch) -> Tensor:
        """The second term for restored pictures with graph, (B, ...)."""
        assert self.proxy is not None
        x0 = self.data(batch)
        s = self.times("trajectory/time", self.trajectory_times, len(x))
        noise = self.draws.normal("trajectory/noise", x.shape)
        with torch.no_grad():
            f = self.function(self.proxy, batch, self.told_scale(s))
            own, true = (f(self.process.add_noise(picture, noise, s), s).x0 for picture in (x.detach(), x0))
        return trajectory_matching(x, own, true, x0)

    def student_loss(self, batch: Batch) -> Terms:
        """Consistency, and in the second stage the trajectories of its restored pictures."""
        pair = self.pair(batch)
        online, target = self.ends(pair)
        terms = self.compare(pair, online, target)
        if self.matches_trajectories:
            terms.losses["trajectory"] = self.trajectory_term(online, batch)
        return terms
