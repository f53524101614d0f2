"""TwinFlow: a flow map that is its own critic (arXiv:2512.05150)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.flow_maps import flow_jump, rcgm_target
from lightning_distill.losses.rcgm import fake_flow_loss, rectification, robust_loss
from lightning_distill.methods.base import Terms
from lightning_distill.methods.fake_branch import FakeBranch, NegativeTime
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Role
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import FlowMatching, expand
from lightning_distill.randomness import replayed
from lightning_distill.time_coverage import check_coverage
from lightning_distill.times import TimeDistribution, Uniform

__all__ = ["TwinFlow"]


class TwinFlow(TwoTimeMethod):
    """Average velocities by the recursive target, and a twin branch that knows the student's own samples.

        flow map       u(x, t, r) <- u - clamp( [ (t - r) u - h v - jumps of the student on to r ] / h )
        fake           u(x'_s, -s) <- eps' - x',     x' = eps - u(eps, 1, 0),   x'_s = (1 - s) x' + s eps'
        matching       u(eps, 1, 0) <- u - clamp( u(x'_s, -s) - u(x'_s, s, s) )

    The last term is distribution matching with the difference of the two branches as that of scores; one network holds
    student, real and fake score.

    Args:
        teacher: the pretrained model; with ``from_data`` only where the student's weights come from.
        fake_branch: what tells the branches apart; None for ``NegativeTime()``.
        from_data: v is eps - x0 of the pair (the paper) instead of the (guided) teacher's velocity.
        order: N of the recursion, jumps of the student that follow the first step.
        step: h of the recursion, the length of that step.
        spacing: of the jumps, ``near`` or ``even``, see ``losses.flow_maps.rcgm_target``.
        clamp: limit of both changes, 1 in the released code; None for none.
        robust: c of the robust loss of the flow map; None for the squared error.
        whole_share: share of the flow map's samples with t at its largest and r = 0.
        near_share: share with r from .95 t to t.
        matching_times: distribution of the times s of the last term, in flow matching; None is uniform on [.02, .98].
            The fake branch is trained at ``training_times``, which have to cover them.
        **kwargs: see ``TwoTimeMethod``. Default weight of ``student/matching``: .5.

    Notes:
        Every sample takes part in all three terms; the released code cuts the batch into quarters.
        Where there is no room for the steps, r = t and the target is v (the released code keeps r and moves u towards v
        by the limit at most).
        The jumps of the recursion are the student's own. The released code takes them from an average, with ``even``
        spacing, which without ``clamp`` diverges from two jumps on.
        The fake branch has the plain squared error: its targets are single pairs, and ``robust`` would go to their
        median. The same holds for ``robust`` and ``clamp`` beside ``from_data`` in few dimensions. Matching has half
        the gradient of a squared error; the released code weighs both terms robustly, too.
        Guidance added to v of ``from_data`` is left out: distil a guided teacher.
    """

    paper = "2512.05150"
    learns_from = "data alone; teacher, data without from_data"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/matching": 0.5}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        fake_branch: FakeBranch | None = None,
        from_data: bool = True,
        order: int = 2,
        step: float = 0.01,
        spacing: Literal["near", "even"] = "near",
        clamp: float | None = 1.0,
        robust: float | None = 1e-3,
        whole_share: float = 0.25,
        near_share: float = 0.25,
        matching_times: TimeDistribution | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, tangent="jvp", tangent_step=None, **kwargs)
        if order < 1 or not 0.0 < order * step < 0.5:
            raise ValueError(f"order={order} and step={step}: give at least one step, together shorter than .5.")
        if spacing not in ("near", "even"):
            raise ValueError(f"spacing={spacing!r} is unknown; choose near or even.")
        if whole_share < 0.0 or near_share < 0.0 or whole_share + near_share > 1.0:
            raise ValueError(f"whole_share={whole_share} and near_share={near_share} add up to at most 1.")
        for name, value in (("clamp", clamp), ("robust", robust)):
            if value is not None and value <= 0.0:
                raise ValueError(f"{name}={value}: give a positive number, or None to leave it out.")
        self.fake_branch = fake_branch or self.default_branch()
        self.from_data, self.asks_teacher = from_data, not from_data
        self.order, self.step, self.clamp, self.robust = order, step, clamp, robust
        self.spacing: Literal["near", "even"] = spacing
        self.whole_share, self.near_share = whole_share, near_share
        self.matching_times = matching_times or Uniform(0.02, 0.98)

    def default_branch(self) -> FakeBranch:
        """What tells the branches apart where nothing is given."""
        return NegativeTime()

    def default_role(self) -> Role:  # noqa: D102
        return TwoTime(kind="scaled_difference")

    def check_configuration(self) -> None:
        """The student can be told the branches apart, and the fake one is trained where it is used."""
        super().check_configuration()
        check_coverage(self.matching_times, self.training_times, FlowMatching())
        self.fake_branch.check(self.student, self.activation_checkpointing)

    # ------------------------------------------------------------------------------------------------ flow map
    def pair_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Flow-matching times t >= r of each sample, (n,), float64; at least the steps apart, or equal."""
        part, u = self.draws.uniform("part", n), self.draws.uniform("r", n)
        t = self.flow_times("t", n)
        near = part > 1.0 - self.near_share
        r = torch.where(near, (0.95 + 0.05 * u) * t, u * t)
        whole = part < self.whole_share
        t = torch.where(whole, self._flow_max, t)
        r = torch.where(whole, 0.0, r)
        room = self.step * (self.order if self.spacing == "near" else 1)
        return t, torch.where(t - r < room, t, r)

    def flow_map_term(self, batch: Batch) -> Tensor:
        """Regression on the recursive target."""
        t, r = self.pair_times(batch.size)
        x, velocity = self.flow_state(batch, t)
        if not self.from_data:
            velocity = self.teacher_velocity(batch, x, t)
        average = self.average(self.student, batch, self.told_scale(self.native(x, t)[1]))
        with replayed([x]):  # the jumps of the target have the same dropout
            u = average(x, t, r)
        target = rcgm_target(average, u.detach(), x, velocity, t, r, self.step, self.order, self.clamp, self.spacing)
        target = torch.where(expand(t == r, x).bool(), velocity, target)
        return robust_loss(u, target, t, r, self.robust)

    # ------------------------------------------------------------------------------------------------ twin
    def fake_velocity(self, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
        """The velocity of the student's samples, by its fake branch."""
        with self.fake_branch.chosen(self.student, batch.cond) as cond:
            scale = self.told_scale(self.native(x, t)[1])
            return self.average(self.student, replace(batch, cond=cond), scale)(x, t, t)

    def generated(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One-step samples x' and the average velocity u that made them, (B, ...) each, with graph."""
        start = self._flow_start * self.draws.normal("start", (batch.size, *self.sample_shape))
        top = torch.full((batch.size,), self._flow_max, dtype=torch.float64, device=start.device)
        end = torch.zeros_like(top)
        u = self.average(self.student, batch, self.told_scale(self.native(start, top)[1]))(start, top, end)
        return flow_jump(start, u, top, end), u

    def noised(self, made: Tensor, name: str, s: Tensor) -> tuple[Tensor, Tensor]:
        """Student samples at flow-matching times s, and their noise."""
        eps = self.draws.normal(f"{name}/noise", made.shape)
        return FlowMatching().add_noise(made, eps, s), eps

    def student_loss(self, batch: Batch) -> Terms:
        """The flow map, the fake branch on what it makes, and the difference of the branches there."""
        flow_map = self.flow_map_term(batch)
        made, u = self.generated(batch)
        made = made.detach()
        s = self.flow_times("fake/time", batch.size)
        x, eps = self.noised(made, "fake", s)
        fake = fake_flow_loss(self.fake_velocity(batch, x, s), made, eps)
        with torch.no_grad():
            s = self.matching_times.quantile(self.draws.uniform("matching/time", batch.size), FlowMatching())
            s = s.clamp_max(self._flow_max)
            x, _ = self.noised(made, "matching", s)
            own = self.fake_velocity(batch, x, s)
            real = self.average(self.student, batch, self.told_scale(self.native(x, s)[1]))(x, s, s)
        matching = rectification(u, own, real, self.clamp)
        gap = (own - real).square().mean()
        return Terms({"flow_map": flow_map, "fake": fake, "matching": matching}, {"branch_gap": gap})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        return {"student": {"student": self.order + 5, "teacher": 0 if self.from_data else 1}}
