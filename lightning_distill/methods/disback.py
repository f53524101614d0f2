"""DisBack: distribution backtracking along the way from the student back to the teacher (arXiv:2408.15991)."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill.batch import Batch
from lightning_distill.ema import renew_copy
from lightning_distill.methods.base import Terms
from lightning_distill.methods.dmd2 import DMD2
from lightning_distill.methods.step_aware import Scores
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import averaged_copy
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["DisBack"]


class DisBack(DMD2):
    """DMD2 with targets that are never far from the student: degraded teachers, the last of them the teacher itself.

        degradation:    the student stands still; the fake score learns its samples, from the teacher to theta_N
        backtracking:   targets theta_(N-1), .., theta_1 in turn, then the teacher;  the fake score goes on from theta_N

    The fake score of the first stage is exactly what the paper degrades, and what it starts the second stage's from;
    snapshots on its way are the targets. With ``blend`` the target is the teacher whose weights lean towards the fake
    score's, less and less: such a path without storage (DMDR, arXiv:2511.13649).

    Args:
        teacher: the pretrained model.
        waypoints: number of snapshots, 0 for none.
        degradation_updates: student updates of the first stage, in which the student's weights do not change; it counts
            towards ``max_steps``.
        backtracking_updates: updates of each snapshot as the target.
        blend: share c of the fake score in the target's weights at first, 0 for none.
        blend_updates: student updates in which c falls to 0, along a cosine.
        **kwargs: see ``DMD2``.

    Notes:
        The released code never reaches the true teacher unless its counter ends there; here the list ends with it.
        Snapshots are copies of the fake score, so that a shared backbone with adapters is refused.
        With neither snapshots nor blend it is DMD2.
    """

    paper = "2408.15991"
    learns_from = "teacher alone; data for gan"
    targets = ("waypoints",)

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        waypoints: int = 0,
        degradation_updates: int = 0,
        backtracking_updates: int = 1000,
        blend: float = 0.0,
        blend_updates: int = 10_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if waypoints < 0 or (waypoints and degradation_updates <= waypoints) or backtracking_updates < 1:
            raise ValueError(
                f"waypoints={waypoints} snapshots need more degradation_updates than that, not {degradation_updates}, "
                f"and backtracking_updates={backtracking_updates} must be positive."
            )
        if not 0.0 <= blend < 1.0 or blend_updates < 1:
            raise ValueError(f"blend={blend} is a share from 0 to below 1, and blend_updates={blend_updates} positive.")
        if waypoints and self.regression_steps:
            raise ValueError(
                f"DisBack degrades the teacher in its first updates, so that regression_steps={self.regression_steps} "
                "has no place there; leave it out, or set waypoints=0."
            )
        self.num_waypoints = waypoints
        self.degradation_updates = degradation_updates if waypoints else 0
        self.backtracking_updates = backtracking_updates
        self.blend, self.blend_updates = blend, blend_updates
        self.waypoints = nn.ModuleList()
        self.blended: Denoiser | None = None

    def build_roles(self) -> None:
        """As usual, and the moving targets."""
        super().build_roles()
        shared = self.fake_score.network is self.require_teacher().network
        if (self.num_waypoints or self.blend) and shared:
            raise ValueError(
                "DisBack keeps copies of the fake score, which here is an adapter on the teacher's backbone; give "
                "fake_score=Copy(), or FromCheckpoint(..., merge=True)."
            )
        for index in range(self.num_waypoints):
            self.waypoints.append(averaged_copy(self.fake_score, f"waypoint{index}"))
        self.blended = averaged_copy(self.fake_score, "blended") if self.blend else None

    def check_configuration(self) -> None:
        """A blend needs a fake score of the teacher's architecture."""
        super().check_configuration()
        if self.blended is not None:
            shapes = [[p.shape for p in d.network.parameters()] for d in (self.require_teacher(), self.blended)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    "blend mixes the weights of teacher and fake score, but the two networks differ; give "
                    "fake_score=Copy(), or blend=0."
                )

    def train(self, mode: bool = True) -> "DisBack":
        """As usual; targets stay in eval mode."""
        super().train(mode)
        for target in [*self.waypoints, self.blended]:
            if target is not None:
                target.eval()
        return self

    # ------------------------------------------------------------------------------------------------ the target
    @property
    def degrading(self) -> bool:
        """Whether the current update belongs to the first stage."""
        return self.draws.update < self.degradation_updates

    def target_index(self) -> int | None:
        """Snapshot that is the target at this update, None for the teacher, which it is while there are none yet."""
        passed = (self.draws.update - self.degradation_updates) // self.backtracking_updates
        index = self.num_waypoints - 1 - passed
        return index if index >= 0 and not self.degrading else None

    def blend_share(self) -> float:
        """C at this update."""
        progress = min(1.0, max(0, self.draws.update - self.degradation_updates) / self.blend_updates)
        return 0.5 * self.blend * (1.0 + math.cos(math.pi * progress))

    @torch.no_grad()
    def real_score(self) -> Denoiser:
        """The target of this update."""
        index = self.target_index()
        if index is not None:
            target = self.waypoints[index]
            assert isinstance(target, Denoiser)
            return target
        share = self.blend_share() if self.blended is not None else 0.0
        if self.blended is None or share == 0.0:
            return self.require_teacher()
        ends = (self.require_teacher().network.parameters(), self.fake_score.network.parameters())
        for mixed, real, fake in zip(self.blended.network.parameters(), *ends):
            mixed.copy_(torch.lerp(real.to(mixed.dtype), fake.to(mixed.dtype), share))
        return self.blended

    def scores(
        self,
        x: Tensor,
        batch: Batch,
        taps: tuple[str, ...] = (),
        noisy: tuple[Tensor, Tensor] | None = None,
        tapped: str = "fake_score",
    ) -> Scores:
        """As usual; targets made of a fake score that knows the student's step are told it, too."""
        index = self.target_index()
        if index is not None:
            snapshot = self.waypoints[index]
            assert isinstance(snapshot, Denoiser)
            told = self.told_to(snapshot, snapshot)
        elif self.blended is not None and (share := self.blend_share()):
            told = self.told_to(self.blended, self.fake_score, share)  # the teacher's share knows no steps
        else:
            told = nullcontext()
        with told:
            return super().scores(x, batch, taps, noisy, tapped)

    @property
    def scores_share_forward(self) -> bool:
        """As usual; the first stage compares no scores, and its target is not that of the next one."""
        return super().scores_share_forward and not self.degrading

    # ------------------------------------------------------------------------------------------------ the stages
    def student_loss(self, batch: Batch) -> Terms:
        """DMD2's, or nothing while the teacher is degraded."""
        if not self.degrading:
            return super().student_loss(batch)
        x = self.rollout(batch).x0
        return Terms({"matching": 0.0 * x.sum()}, {"sample_std": x.detach().std()})

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """As usual; a student that stands still has no gradients, so that nothing decays either."""
        super().on_before_optimizer_step(optimizer)
        if self.degrading and self._stepping[0] == list(self.phases).index("student"):
            for parameter in self.role_parameters("student"):
                parameter.grad = None

    @torch.no_grad()
    def after_phase(self, phase: str) -> None:
        """Take the snapshots, at equal distances within the first stage."""
        super().after_phase(phase)
        if phase != "fake_score" or not self.degrading:
            return
        done = self.draws.update + 1
        for index, waypoint in enumerate(self.waypoints):
            if done == round((index + 1) * self.degradation_updates / (self.num_waypoints + 1)):
                renew_copy(waypoint, self.fake_score)

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """As usual, while the target is not the teacher itself."""
        counts = super().forward_counts()
        if self.num_waypoints or self.blended is not None:
            counts["student"]["teacher"] -= 1
        return counts
