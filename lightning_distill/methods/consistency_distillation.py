"""Consistency distillation (arXiv:2303.01469)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.ema import EMAProfile, check_horizon
from lightning_distill.losses.consistency import PairWeight, consistency_loss, pair_weight, solver_step
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import ConsistencyFunction
from lightning_distill.processes import expand
from lightning_distill.times import t_min

__all__ = ["ConsistencyDistillation", "Metric", "Pair", "PairMethod"]


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


class PairMethod(TrajectoryMethod):
    """Base of discrete consistency: f is the same at both ends of a pair of times on one trajectory.

        L = w(t, r) d( f(x_t, t), sg f'(x_r, r) ),     r < t,     f(x, t_min) = x              (arXiv:2303.01469, Eq. 7)

    Args:
        teacher: the pretrained model.
        boundary: how f is made of the network: ``plain``, its x0, or ``lcm`` (see ``ConsistencyFunction``).
        metric: distance d of ``losses.consistency.distance``.
        huber: constant of pseudo-Huber, None for the default.
        weight: w(t, r), see ``losses.consistency.pair_weight``.
        target_ema: profile of the average f' (.95 in the paper); None is the student itself without gradient.
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
        target_ema: EMAProfile | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        self.boundary: Literal["plain", "lcm"] = boundary
        self.metric: Metric = metric
        self.huber, self.weight = huber, weight
        self.target_name = None if target_ema is None else target_ema.name
        self._sampled = list(self.ema_profiles)
        if target_ema is not None and target_ema.name not in {profile.name for profile in self.ema_profiles}:
            self.ema_profiles.append(target_ema)

    def on_fit_start(self) -> None:
        """Averages to sample from should forget the teacher; that of the target may be as slow as it likes."""
        check_horizon(self._sampled, self.trainer.max_steps)

    # ------------------------------------------------------------------------------------------------ parts
    def function(self, network: Denoiser, batch: Batch, scale: Tensor | None) -> ConsistencyFunction:
        """The consistency function f of a network."""
        return ConsistencyFunction(network, batch.cond, self.boundary, guidance=scale)

    def grid(self) -> list[float]:
        """Descending times whose neighbours make pairs."""
        raise NotImplementedError

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
