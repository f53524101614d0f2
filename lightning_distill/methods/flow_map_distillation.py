"""Distillation into a flow map by its Lagrangian, Eulerian or semigroup identity (arXiv:2406.07507)."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.flow_maps import (
    eulerian_residual,
    flow_jump,
    lagrangian_residual,
    mean_flow_directions,
    semigroup_target,
)
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import FlowMatching, expand
from lightning_distill.tangents import tangent, value_and_tangent

__all__ = ["FlowMapDistillation"]

Objective = Literal["lagrangian", "eulerian", "progressive"]


class FlowMapDistillation(TwoTimeMethod):
    """The map X_{t->r} of the teacher's flow from one of the three identities that define it.

        lagrangian    | d_r X_{t->r}(x) - sg v(X_{t->r}(x), r) |^2                      LMD, LSD: derivative in r alone
        eulerian      | (d_t + v . grad) X_{t->r}(x) |^2                                EMD, ESD: MeanFlow's, plain L2
        progressive   | u(x, t, r) - sg (average of the jumps t -> s -> r) |^2          PFMM, PSD: no derivative

    For r = t each is | u(x, t, t) - v(x, t) |^2.

    Args:
        teacher: the pretrained model.
        objective: which identity.
        equal_share: share of samples with r = t.
        middle: how ``progressive`` chooses s: ``random`` in [r, t], or ``half`` way.
        **kwargs: see ``TwoTimeMethod``.

    Notes:
        v is the teacher's everywhere; the papers' self-distillation has u(x, t, t) in its place.
        In ``eulerian`` the derivative of the student has no gradient, as in MeanFlow and ESD.
        The learned weight of pairs of times is left out.
    """

    paper = "2406.07507"
    learns_from = "teacher, data"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        objective: Objective = "lagrangian",
        equal_share: float = 0.25,
        middle: Literal["random", "half"] = "random",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if objective not in ("lagrangian", "eulerian", "progressive"):
            raise ValueError(f"objective={objective!r} is unknown; choose lagrangian, eulerian or progressive.")
        if middle not in ("random", "half"):
            raise ValueError(f"middle={middle!r} is unknown; choose random or half.")
        if not 0.0 <= equal_share < 1.0:
            raise ValueError(f"equal_share={equal_share}: give a share from 0 to below 1.")
        if objective == "progressive" and equal_share == 0.0:
            raise ValueError("the progressive objective learns the teacher where r = t alone; give equal_share > 0.")
        self.objective: Objective = objective
        self.equal_share = equal_share
        self.middle = middle

    def ordered_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Flow-matching times t >= r of each sample, (n,), float64; targets r may lie below all known times."""
        one, other = (self.training_times.quantile(self.draws.uniform(name, n), FlowMatching()) for name in ("t", "r"))
        t = torch.maximum(one, other).clamp(self._flow_min, self._flow_max)
        return t, torch.minimum(torch.minimum(one, other), t)

    def student_loss(self, batch: Batch) -> Terms:
        """Mean squared residual of the identity."""
        n = batch.size
        t, r = self.ordered_times(n)
        r = torch.where(self.draws.uniform("equal", n) < self.equal_share, t, r)
        x, _ = self.flow_state(batch, t)
        residual = getattr(self, f"_{self.objective}")(batch, x, t, r)
        return Terms({self.objective: residual.square().mean()}, {"residual": residual.detach().square().mean()})

    def _student(self, batch: Batch, x: Tensor, t: Tensor) -> Any:
        return self.average(self.student, batch, self.told_scale(self.native(x, t)[1]))

    def _lagrangian(self, batch: Batch, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u = self._student(batch, x, t)

        def jump(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return flow_jump(x, u(x, t, r), t, r)

        end, rate = tangent(jump, (x, t, r), (None, None, 1.0), self.tangent, step=self.tangent_step)
        return lagrangian_residual(rate, self.teacher_velocity(batch, end.detach(), r))

    def _eulerian(self, batch: Batch, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        velocity, average = self.teacher_velocity(batch, x, t), self._student(batch, x, t)
        directions = mean_flow_directions(velocity)
        u, du = value_and_tangent(average, (x, t, r), directions, self.tangent, step=self.tangent_step)
        return eulerian_residual(velocity, u, du, t, r)

    def _progressive(self, batch: Batch, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u = self._student(batch, x, t)
        share = self.draws.uniform("middle", len(t)) if self.middle == "random" else 0.5
        two = semigroup_target(u, x, t, r + share * (t - r), r)
        # where r = t the identity says nothing, and the teacher takes its place
        target = torch.where(expand((t == r).double(), x).bool(), self.teacher_velocity(batch, x, t), two)
        return u(x, t, r) - target

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        calls = {"jvp": 1, "central": 3, "one_sided": 2, "semi": 3}
        if self.objective == "eulerian":  # which takes the value by itself, and moves the sample as well
            calls |= {"jvp": 2, "semi": 4}
        return {"student": {"student": 3 if self.objective == "progressive" else calls[self.tangent], "teacher": 1}}
