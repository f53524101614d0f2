"""Consistency distillation (arXiv:2303.01469)."""

from bisect import bisect_left
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.ema import EMAProfile
from lightning_distill.losses.consistency import PairWeight, consistency_loss, pair_weight, solver_step
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import ConsistencyFunction
from lightning_distill.processes import expand
from lightning_distill.randomness import replayed
from lightning_distill.times import t_min

__all__ = ["ConsistencyDistillation", "Metric", "Pair", "PairMethod", "target_profile"]


Metric = Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"]


@dataclass
class Pair:
    """Two points of one trajectory for each sample, and what goes with them.

    Attributes:
        x_t: later (noisier) points, (B, ...).
        t: their native times, (B,), float64.
        x_r: earlier points, same shape.
        r: their times, (B,), below ``t``.
        batch: conditions of the B samples.
        scale: what a student with an embedded scale is told, (B,); None where it embeds none.
        gap: the times whose gap the weight goes with, where they are not ``t`` and ``r``.
    """

    x_t: Tensor
    t: Tensor
    x_r: Tensor
    r: Tensor
    batch: Batch
    scale: Tensor | None = None
    gap: tuple[Tensor, Tensor] | None = None


def target_profile(
    given: EMAProfile | Literal["none"] | None, default: EMAProfile | None = None, needed: bool = False
) -> EMAProfile | None:
    """Profile of a method's target; None is the student itself without gradient.

    Args:
        given: a profile, ``none`` for the student itself, or None for the default.
        default: of the method.
        needed: the method has no target but an average.

    Raises:
        ValueError: anything else was given.
    """
    if given is None:
        return default
    if isinstance(given, EMAProfile):
        return given
    if given == "none" and not needed:
        return None
    known = "a profile such as ConstantEMA(0.95)" + ("" if needed else ", or 'none' for the student itself")
    raise ValueError(f"target_ema={given!r} is no average of the student; give {known}.")


class PairMethod(TrajectoryMethod):
    """Base of discrete consistency: f is the same at both ends of a pair of times on one trajectory.

        L = w(t, r) d( f(x_t, t), sg f'(x_r, r) ),     r < t,     f(x, t_min) = x              (arXiv:2303.01469, Eq. 7)

    Args:
        teacher: the pretrained model.
        boundary: how f is made of the network: ``plain``, its x0, or ``lcm`` (see ``ConsistencyFunction``).
        metric: distance d of ``losses.consistency.distance``.
        huber: constant of pseudo-Huber, from 0 on; None for the default.
        weight: w(t, r), see ``losses.consistency.pair_weight``.
        target_ema: profile of the average f' (.95 in the paper); None or ``none`` is the student itself without
            gradient, whose two passes have the same dropout.
        **kwargs: see ``TrajectoryMethod``. Students of several steps are sampled by ``renoise``.

    Notes:
        f is x_r itself where r is the end of the grid, whatever the parameterisation: the paper's boundary condition.
        With ``ema=[]`` the average f' is also what ``sample`` uses.
    """

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        boundary: Literal["plain", "lcm"] = "plain",
        metric: Metric = "pseudo_huber",
        huber: float | None = None,
        weight: PairWeight = "one",
        target_ema: EMAProfile | Literal["none"] | None = None,
        **kwargs: Any,
    ) -> None:
        average = target_profile(target_ema)
        super().__init__(teacher, **kwargs)
        if isinstance(metric, str) and metric not in get_args(Metric):
            raise ValueError(f"metric={metric!r} is unknown; choose one of {', '.join(get_args(Metric))}.")
        if huber is not None and (metric not in ("pseudo_huber", "pseudo_huber_elementwise") or not huber >= 0.0):
            raise ValueError(
                f"huber={huber} is the constant of pseudo-Huber, 0 or more, and the metric is {metric!r}; leave it "
                "out, or give metric='pseudo_huber' or 'pseudo_huber_elementwise'."
            )
        self.boundary: Literal["plain", "lcm"] = boundary
        self.metric: Metric = metric
        self.huber, self.weight = huber, weight
        self.target_name = None if average is None else average.name
        self._sampled = list(self.ema_profiles)
        if average is not None and average.name not in {profile.name for profile in self.ema_profiles}:
            self.ema_profiles.append(average)

    @property
    def sampled_profiles(self) -> list[EMAProfile]:
        """Without that of the target, which may be as slow as it likes."""
        return self._sampled

    # ------------------------------------------------------------------------------------------------ parts
    def function(self, network: Denoiser, batch: Batch, scale: Tensor | None) -> ConsistencyFunction:
        """The consistency function f of a network."""
        return ConsistencyFunction(network, batch.cond, self.boundary, guidance=scale)

    def grid(self) -> list[float]:
        """Descending times whose neighbours make pairs."""
        raise NotImplementedError

    def finest_grid(self, most: int) -> int:
        """The largest number of intervals, up to ``most``, whose grid falls strictly to its end; 0 if none does."""

        def fails(intervals: int) -> bool:
            try:
                grid = self.solver_grid(intervals)
            except ValueError:  # more than a process of timesteps can tell apart
                return True
            return any(r >= t for t, r in pairwise(grid))

        return bisect_left(range(1, most + 1), True, key=fails)

    def check_grid(self, name: str, intervals: int) -> None:
        """Refuse a grid with pairs of equal times.

        Args:
            name: of the setting.
            intervals: its value.

        Raises:
            ValueError: the process has no such grid.
        """
        if (finest := self.finest_grid(intervals)) < intervals:
            raise ValueError(
                f"{name}={intervals} is a finer grid than {self.process!r} has above its least time, "
                f"{t_min(self.process):g}; give at most {finest}."
            )

    def shared_dropout(self, x: Tensor) -> AbstractContextManager[None]:
        """For the online pass: a target by the student itself, which follows, then has its dropout.

        Two masks would differ by more than two neighbours of a fine grid do. Averages have no dropout.

        Args:
            x: what the student sees, (B, ...).
        """
        drops = self.student.training or self.student.network.training
        return replayed([x]) if self.target_name is None and drops else nullcontext()

    def pair_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Times t > r of each sample, (n,), float64: neighbours on the grid."""
        grid = torch.tensor(self.grid(), dtype=torch.float64, device=self.device)
        later = (self.draws.uniform("interval", n) * (len(grid) - 1)).long().clamp_max(len(grid) - 2)
        return grid[later], grid[later + 1]

    def earlier(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch, eps: Tensor) -> Tensor:
        """The point at r of the trajectory through x_t, (B, ...)."""
        raise NotImplementedError

    @torch.no_grad()
    def target(self, x_r: Tensor, r: Tensor, batch: Batch, scale: Tensor | None) -> Tensor:
        """f'(x_r, r), and x_r where r is the end of the grid."""
        network = self.student if self.target_name is None else self.sampling_network(self.target_name)
        consistent = self.function(network, batch, scale)(x_r, r).x0
        return torch.where(expand(r > t_min(self.process), x_r).bool(), consistent, x_r)

    def pair(self, batch: Batch) -> Pair:
        """Noised data, and the earlier point of its trajectory."""
        x0 = self.data(batch)
        t, r = self.pair_times(batch.size)
        eps = self.draws.normal("noise", x0.shape)
        x_t = self.process.add_noise(x0, eps, t)
        return Pair(x_t, t, self.earlier(x_t, t, r, batch, eps), r, batch, self.told_scale(t))

    def ends(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Where f leads from both points, (B, ...) each; the second without graph."""
        with self.shared_dropout(pair.x_t):
            online = self.function(self.student, pair.batch, pair.scale)(pair.x_t, pair.t).x0
        return online, self.target(pair.x_r, pair.r, pair.batch, pair.scale)

    def compare(self, pair: Pair, online: Tensor, target: Tensor) -> Terms:
        """The loss of two ends of a pair."""
        t, r = pair.gap or (pair.t, pair.r)
        weight = pair_weight(self.weight, t, r, self.process, self.student.sigma_data)
        loss = consistency_loss(online, target, weight, self.metric, self.huber)
        return Terms({"consistency": loss}, {"mse": (online.detach() - target).square().mean()})

    def pair_loss(self, batch: Batch) -> Terms:
        """Distance of the two ends of a pair's trajectory."""
        pair = self.pair(batch)
        return self.compare(pair, *self.ends(pair))

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        return {"student": {"student": 2 if self.target_name is None else 1, "teacher": 0}}


class ConsistencyDistillation(PairMethod):
    """A function that is the same at two neighbouring points of the teacher's trajectory, hence its end at all of them.

        x_t = alpha_t x0 + sigma_t eps,     x_r = one solver step of the teacher from t to r                   (Alg. 2)

    Args:
        teacher: the pretrained model.
        intervals: N, steps of the grid from t_max to t_min (Karras' in EDM, the trailing one elsewhere); pairs are its
            neighbours.
        solver: ``euler`` (DDIM) or ``heun``.
        **kwargs: see ``PairMethod`` for the loss.
    """

    paper = "2303.01469"
    learns_from = "teacher, data"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        intervals: int = 40,
        solver: Literal["euler", "heun"] = "heun",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if intervals < 1:
            raise ValueError(f"intervals={intervals}: a grid has at least one.")
        if solver not in ("euler", "heun"):
            raise ValueError(f"solver={solver!r} is unknown; choose euler or heun.")
        self.intervals = intervals
        self.solver: Literal["euler", "heun"] = solver

    def grid(self) -> list[float]:
        """Descending times whose neighbours make pairs."""
        return self.solver_grid(self.intervals)

    def build_roles(self) -> None:
        """The student; the times of the grid must differ."""
        super().build_roles()
        self.check_grid("intervals", self.intervals)

    def earlier(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch, eps: Tensor) -> Tensor:
        """One solver step of the guided teacher."""
        return solver_step(self.guided_teacher(batch), x_t, t, r, self.solver, self.process)

    def student_loss(self, batch: Batch) -> Terms:
        """Distance of the two ends of a pair's trajectory."""
        return self.pair_loss(batch)

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        counts["student"]["teacher"] = 2 if self.solver == "heun" else 1
        return counts
