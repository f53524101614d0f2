"""Methods with a fake score: a critic that tracks the student's distribution by denoising its samples."""

import math
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.losses.score_matching import denoising_loss
from lightning_distill.methods.base import DistillationModule, Terms
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy, Role
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.times import TimeDistribution, bounded, check_coverage

__all__ = ["FakeScoreMethod"]


class FakeScoreMethod(DistillationModule):
    """Base of the distribution-matching family: roles, the two time-scale cycle and the critic's denoising loss.

    A cycle is one student update followed by ``fake_score_steps`` critic updates. The first critic update uses the
    samples of the student phase, detached, as DMD2 does (one student forward less); with ``updates_per_sample`` u, u
    critic updates in a row share samples and draw only new times and noise, which stays on-policy because the student
    does not move.

    Args:
        teacher: the pretrained model.
        fake_score: how the fake score is realised.
        guidance: classifier-free guidance inside the teacher's prediction; the fake score is never guided.
        fake_score_steps: critic updates per student update.
        updates_per_sample: critic updates that share one batch of student samples.
        matching_times: distribution of the times at which scores are compared; None is uniform on [.02, .98] of
            t_max, on the Karras scale for EDM.
        critic_times: distribution of the critic's training times; must cover ``matching_times``; None is the
            same over the whole range.
        critic_space: space of the critic's squared error (see ``denoising_loss``); None is the network's own type, or
            ``edm`` for a network with a process of its own.
        fake_score_optimizer: optimizer of the critic (and of discriminator heads); None for fused AdamW.
        fake_score_scheduler: learning-rate schedule of the critic, stepped once per student update.
        **kwargs: see ``DistillationModule``.
    """

    phases = {"student": ("student",), "fake_score": ("fake_score",)}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        fake_score: Role | None = None,
        guidance: Guidance | None = None,
        fake_score_steps: int = 5,
        updates_per_sample: int = 1,
        matching_times: TimeDistribution | None = None,
        critic_times: TimeDistribution | None = None,
        critic_space: str | None = None,
        fake_score_optimizer: OptimizerCallable | None = None,
        fake_score_scheduler: LRSchedulerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if fake_score_steps < 1 or updates_per_sample < 1:
            raise ValueError(
                f"fake_score_steps={fake_score_steps} and updates_per_sample={updates_per_sample} must be 1 or more."
            )
        self._fake_score_role = fake_score or Copy()
        self._fake_score_role.check()
        self.guidance = guidance or Guidance(1.0)
        self.fake_score_steps = fake_score_steps
        self.updates_per_sample = updates_per_sample
        self._given_matching_times = matching_times
        self._given_critic_times = critic_times
        self.critic_space = critic_space
        self.optimizer_factories["fake_score"] = fake_score_optimizer
        self.scheduler_factories["fake_score"] = fake_score_scheduler
        self.fake_score: Denoiser
        self.matching_times: TimeDistribution
        self.critic_times: TimeDistribution

    def build_roles(self) -> None:
        """Student and fake score, both from the teacher."""
        super().build_roles()
        self.fake_score = self._fake_score_role.build(self.require_teacher(), "fake_score")
        self.matching_times = self._given_matching_times or bounded(self.process, 0.02, 0.98)
        self.critic_times = self._given_critic_times or bounded(self.process, 0.0, 1.0)

    def check_configuration(self) -> None:
        """Guidance must be possible, and the critic must be trained where scores are compared."""
        super().check_configuration()
        teacher = self.require_teacher()
        others = set(teacher.family.null) - {"class_labels"}
        if self.guidance.needs_null and teacher.num_classes is None and not others:
            raise ValueError(
                f"guidance scale {self.guidance.scale:g} needs an unconditional branch, but the teacher "
                f"({type(teacher.network).__name__}) has no null class; give null_class=... of the teacher, or use "
                "Guidance(1)."
            )
        check_coverage(self.matching_times, self.critic_times, self.process)

    @property
    def slices_per_cycle(self) -> int:
        """Batches of fresh student samples in a cycle."""
        return math.ceil(self.fake_score_steps / self.updates_per_sample)

    def phase_plan(self) -> list[tuple[str, int]]:
        """Student first; its slice is the critic's first."""
        critic = [("fake_score", k // self.updates_per_sample) for k in range(self.fake_score_steps)]
        return [("student", 0), *critic]

    def critic_denoising(self, batch: Batch, taps: tuple[str, ...] = ()) -> tuple[Terms, Any]:
        """Denoising loss of the fake score on detached student samples, and the prediction it came from."""
        x = self.rollout(batch, grad=False).x0
        x_t, t, eps = self.renoise(x, self.critic_times, "critic")
        prediction = self.fake_score(x_t, t, batch.cond, taps=taps)
        space = self.critic_space or ("edm" if self.fake_score.network_process is not None else None)
        loss = denoising_loss(prediction, x, eps, space, self.fake_score.data_scale)
        return Terms({"denoising": loss}), prediction

    def fake_score_loss(self, batch: Batch) -> Terms:
        """Denoising on student samples."""
        return self.critic_denoising(batch)[0]
