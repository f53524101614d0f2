"""Methods with a fake score: a critic that tracks the student's distribution by denoising its samples."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.generation import default_cond
from lightning_distill.guidance import Guidance, check_guidance, is_told
from lightning_distill.losses.score_matching import checked_space, denoising_loss, matching_weight, score_difference
from lightning_distill.methods.base import DistillationModule, Terms
from lightning_distill.methods.critic_schedule import ScheduledCritic, UpdateSchedule
from lightning_distill.methods.discriminating import score_with_features
from lightning_distill.methods.dropping import drop_conditions
from lightning_distill.methods.rollout import Rollout, rollout_key
from lightning_distill.methods.step_aware import Scores, StepAware
from lightning_distill.methods.told_scale import ToldScale
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.modes import evaluation_mode
from lightning_distill.networks.oracle import OracleNetwork
from lightning_distill.networks.roles import Copy, Role
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.networks.step_condition import CONDITIONS, build_step_condition, take_over_steps
from lightning_distill.time_coverage import check_coverage
from lightning_distill.times import TimeDistribution, bounded

__all__ = ["FakeScoreMethod", "Scores"]


class FakeScoreMethod(ScheduledCritic, ToldScale, StepAware, DistillationModule):
    """Base of the distribution-matching family: roles, the two time-scale cycle and the critic's denoising loss.

    A cycle is one student update followed by ``fake_score_steps`` critic updates. The first critic update of several
    uses the samples of the student phase, detached, as DMD2 does (one student forward less); the only one has
    ``fresh_samples``. With ``updates_per_sample`` u, u critic updates in a row share samples and draw only new times
    and noise, which stays on-policy because the student does not move.

    Args:
        teacher: the pretrained model.
        fake_score: how the fake score is realised.
        guidance: classifier-free guidance inside the teacher's prediction. Roles that embed a scale are told that of
            each sample: ``TwoTime(kind=None, guidance=True)`` for student and fake score, with ``RandomGuidance``.
        fake_score_steps: critic updates per student update.
        critic_schedule: sets that number from the critic's measured lag instead; None for a fixed one.
        updates_per_sample: critic updates that share one batch of student samples.
        fresh_samples: the critic's first samples are those that the student makes of the same noise after its update,
            which costs a student forward. Otherwise the fake score is one update behind the student when it is asked,
            which a single critic update per cycle does not make up for. None is True there (with ``critic_schedule``
            in the cycles that have one), and False with several.
        matching_times: distribution of the times at which scores are compared; None is uniform on [.02, .98] of
            t_max, on the Karras scale for EDM.
        critic_times: distribution of the critic's training times; must cover ``matching_times``; None is the
            same over the whole range.
        critic_space: space of the critic's squared error (see ``denoising_loss``); None is the network's own type, or
            ``edm`` for a network with a process of its own.
        fake_guidance: guidance of the fake score where scores are compared; None for none, as in most methods. A fake
            score that is told the samples' scales is told no others: it is ``guidance`` or None there.
        critic_guidance: guidance of the fake score in its own training: its guided prediction then denoises; None for
            none.
        critic_dropout: share of samples whose condition is dropped in the fake score's training, which keeps an
            unconditional branch alive for ``fake_guidance``.
        critic_condition_on: what the fake score of a multi-step student is told about the step that made a sample:
            ``none``, the ``step`` itself or its time ``interval``. With ``none`` it learns the mixture of all steps,
            and the steps need not have the teacher's distribution one by one (see ``networks.step_condition``).
        rollout_step: whether the random step of a rollout is one per ``batch`` or one per ``sample``.
        fake_score_optimizer: optimizer of the critic (and of discriminator heads); None for fused AdamW without
            momentum, betas (0, .999), the student's default here, too: each is a moving target for the other, and
            averages of old gradients point at where it was.
        fake_score_scheduler: learning-rate schedule of the critic, stepped once per cycle with critic updates.
        **kwargs: see ``DistillationModule``.
    """

    phases = {"student": ("student",), "fake_score": ("fake_score",)}
    default_betas: ClassVar[tuple[float, float]] = (0.0, 0.999)
    #: the student's loss differentiates teacher and fake score with respect to their inputs
    differentiates_scores: ClassVar[bool] = False

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        fake_score: Role | None = None,
        guidance: Guidance | None = None,
        fake_score_steps: int = 5,
        critic_schedule: UpdateSchedule | None = None,
        updates_per_sample: int = 1,
        fresh_samples: bool | None = None,
        matching_times: TimeDistribution | None = None,
        critic_times: TimeDistribution | None = None,
        critic_space: str | None = None,
        fake_guidance: Guidance | None = None,
        critic_guidance: Guidance | None = None,
        critic_dropout: float = 0.0,
        critic_condition_on: Literal["none", "step", "interval"] = "none",
        rollout_step: Literal["batch", "sample"] = "batch",
        fake_score_optimizer: OptimizerCallable | None = None,
        fake_score_scheduler: LRSchedulerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if fake_score_steps < 1 or updates_per_sample < 1:
            raise ValueError(
                f"fake_score_steps={fake_score_steps} and updates_per_sample={updates_per_sample} must be 1 or more."
            )
        if not 0.0 <= critic_dropout < 1.0:
            raise ValueError(f"critic_dropout={critic_dropout}: give a share between 0 and 1.")
        if critic_condition_on not in CONDITIONS or rollout_step not in ("batch", "sample"):
            raise ValueError(
                f"critic_condition_on={critic_condition_on!r} must be one of {', '.join(CONDITIONS)}, and "
                f"rollout_step={rollout_step!r} batch or sample."
            )
        self._fake_score_role = fake_score or Copy()
        self._fake_score_role.check()
        self.guidance = guidance or Guidance(1.0)
        self.fake_score_steps = fake_score_steps
        self.add_schedule(critic_schedule)
        self.updates_per_sample = updates_per_sample
        self._fresh_if_single = fresh_samples is None
        self.fresh_samples = self.fake_score_steps == 1 if fresh_samples is None else fresh_samples
        self._given_matching_times = matching_times
        self._given_critic_times = critic_times
        self.critic_space = checked_space(critic_space)
        self.fake_guidance = fake_guidance or Guidance(1.0)
        self.critic_guidance = critic_guidance or Guidance(1.0)
        self.critic_dropout = critic_dropout
        self.critic_condition_on = critic_condition_on
        self.rollout_step = rollout_step
        self.optimizer_factories["fake_score"] = fake_score_optimizer
        self.scheduler_factories["fake_score"] = fake_score_scheduler
        self._remembered: set[tuple[int, ...]] = set()
        self.fake_score: Denoiser
        self.matching_times: TimeDistribution
        self.critic_times: TimeDistribution

    def build_roles(self) -> None:
        """Student and fake score, both from the teacher."""
        super().build_roles()
        self.fake_score = self._fake_score_role.build(self.require_teacher(), "fake_score")
        self.matching_times = self._given_matching_times or bounded(self.process, 0.02, 0.98)
        self.critic_times = self._given_critic_times or bounded(self.process, 0.0, 1.0)
        told = None
        if self.critic_condition_on != "none":
            cond = {k: v.to(self.fake_score.device) for k, v in default_cond(self.fake_score, 1).items()}
            how = (self.critic_condition_on, len(self.student_times))
            told = build_step_condition(self.fake_score, self.sample_shape, cond, *how)
            self.fake_score.add_module("step_condition", told)
        take_over_steps(told, self._fake_score_role.learned_steps())
        self.find_told()

    def check_configuration(self) -> None:
        """Guidance must be possible, and the critic must be trained where scores are compared."""
        super().check_configuration()
        check_guidance(self.require_teacher(), self.guidance, self.fake_guidance, self.critic_guidance)
        check_coverage(self.matching_times, self.critic_times, self.process)
        self._check_dropout()
        self.check_schedule()
        self.check_told()

    def _check_dropout(self) -> None:
        """What is dropped must have a null value, as guidance's second branch."""
        if not self._drops_conditions:
            return
        network = self.fake_score
        labels = [] if set(network.family.null) - {"class_labels"} else ["class_labels"]
        if missing := network.missing_null([*network.family.required, *labels]):
            what = "null_class=..." if missing[0] == "class_labels" else f"null_cond={{{missing[0]!r}: ...}}"
            raise ValueError(
                f"critic_dropout={self.critic_dropout:g} puts an unconditional value in the place of {missing[0]!r}, "
                f"and the fake score ({type(network.network).__name__}) has none; give {what} of the teacher, or leave "
                "critic_dropout out."
            )

    @property
    def slices_per_cycle(self) -> int:
        """Batches of fresh student samples in a cycle."""
        return math.ceil(self.fake_score_steps / self.updates_per_sample)

    def losses_of(self, phase: str) -> Callable[[Batch], Terms]:
        """As usual; the student meets the fake score without the dropout with which it is trained."""
        losses = super().losses_of(phase)
        if phase != "student" or not self.fake_score.training:
            return losses

        def without_dropout(batch: Batch) -> Terms:
            with evaluation_mode(self.fake_score):
                return losses(batch)

        return without_dropout

    def phase_plan(self) -> list[tuple[str, int]]:
        """Student first; its slice is the critic's first."""
        critic = [("fake_score", k // self.updates_per_sample) for k in range(self.critic_updates)]
        return [("student", 0), *critic]

    def after_phase(self, phase: str) -> None:
        """As usual; samples of the student before its update are forgotten where the critic is to have fresh ones."""
        super().after_phase(phase)
        single = self._fresh_if_single and self.critic_updates == 1  # of a schedule, in this cycle
        if phase == "student" and (self.fresh_samples or single):
            self._rollouts.clear()

    # ------------------------------------------------------------------------------------------------ student
    def real_score(self) -> Denoiser:
        """The network whose score the student is to have: the teacher, unless the target moves."""
        return self.require_teacher()

    def scores(
        self,
        x: Tensor,
        batch: Batch,
        taps: tuple[str, ...] = (),
        noisy: tuple[Tensor, Tensor] | None = None,
        tapped: str = "fake_score",
    ) -> Scores:
        """Teacher and fake score at the student's samples, noised to a random matching time.

        Both have a graph to ``x`` where the method differentiates scores; tapped features always have one.

        Args:
            x: student samples, (B, ...).
            batch: their conditions.
            taps: blocks whose outputs are wanted, from the forward with the conditions.
            noisy: x_t and t, where they are not ``x`` noised to a matching time.
            tapped: whose blocks, ``teacher`` or ``fake_score``.
        """
        x_t, t = noisy or self.renoise(x, self.matching_times, "matching")[:2]
        u = self.scale_draw(len(x))
        at, whole = (x_t, t, batch.cond, u), self.differentiates_scores
        of_teacher, of_fake = (taps, ()) if tapped == "teacher" else ((), taps)
        with nullcontext() if whole else torch.no_grad():
            real, seen = score_with_features(self.guidance, self.real_score(), *at, of_teacher, whole)
            with self.told_step():
                fake, own = score_with_features(self.fake_guidance, self.fake_score, *at, of_fake, whole)
        return Scores(x_t, t, real, fake, {**seen, **own})

    def matching(self, x: Tensor, scores: Scores, kind: str, factor: Tensor | float = 1.0) -> Terms:
        """The student term of distribution matching, along factor * lambda * (y_T - y_F).

        Args:
            x: student samples with graph, (B, ...).
            scores: at these samples.
            kind: lambda, see ``matching_weight``.
            factor: further weight without graph, broadcastable to ``x``.
        """
        weight = factor * matching_weight(kind, x, scores.real, scores.t, self.process)
        loss = score_difference(x, scores.real, scores.fake, weight)
        return Terms({"matching": loss}, {"score_gap": scores.gap, "sample_std": x.detach().std()})

    # ------------------------------------------------------------------------------------------------ critic
    def critic_denoising(self, batch: Batch, taps: tuple[str, ...] = ()) -> tuple[Terms, Any]:
        """Denoising loss of the fake score on detached student samples, and the prediction it came from."""
        rollout = self.rollout(batch, grad=False)
        x_t, t, x, eps, weight = self.critic_samples(rollout)
        prediction = self.criticised(x_t, t, batch.cond, taps)
        loss = self.critic_error(prediction, x, eps, weight)
        self.remember_prediction(batch.cond, prediction, x, eps, weight)
        if isinstance(self.fake_score.network, OracleNetwork) and not self._remember(rollout, batch):
            loss = 0.0 * loss  # samples of its own bank say nothing about its blur
        return Terms({"denoising": loss}, self.schedule_diagnostics()), prediction

    def _remember(self, rollout: Rollout, batch: Batch) -> bool:
        """Samples of all ranks enter the bank of an oracle once, after it was judged on them; whether they are new."""
        key = (self.draws.update, *rollout_key(self.draws)[1:])
        if key in self._remembered:
            return False
        self._remembered = {known for known in self._remembered if known[0] == self.draws.update} | {key}
        held: dict[str, Any] = {"x0": rollout.x0, **batch.cond}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: Any = self.all_gather(held)
            held = {k: v.flatten(0, 1) for k, v in gathered.items()}
        self.fake_score.network.observe(held.pop("x0"), held)  # type: ignore[operator]
        return True

    def critic_samples(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What the fake score learns from: x_t, t, its targets x0 and eps, and a weight (B,) or None.

        Args:
            rollout: student samples without graph.
        """
        x_t, t, eps = self.renoise(rollout.x0, self.critic_times, "critic")
        return x_t, t, rollout.x0, eps, None

    @property
    def critic_is_plain(self) -> bool:
        """Whether the fake score is trained on its unguided prediction with the batch's own conditions."""
        return not self._critic_policy.needs_null and not self.critic_dropout

    @property
    def _critic_policy(self) -> Guidance:
        """Guidance of the fake score in its own training; one that is told a scale learns at those it is asked for."""
        asked = self.fake_guidance.needs_null and is_told(self.fake_score)
        return self.fake_guidance if asked and not self.critic_guidance.needs_null else self.critic_guidance

    @property
    def _drops_conditions(self) -> bool:
        """Whether there is an unconditional branch to train: a fake score that is told a scale is guided by it."""
        asked = self._critic_policy.needs_null and is_told(self.fake_score)
        return self.critic_dropout > 0.0 and not asked and not self.tells_fake_score

    def criticised(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any], taps: tuple[str, ...] = ()) -> Any:
        """The fake score's prediction in its own training."""
        with self.told_step():
            if self.critic_is_plain:
                return self.fake_score(x_t, t, cond, taps=taps)
            policy = self._critic_policy
            if cond and self._drops_conditions:
                u = self.draws.uniform("critic/dropout", len(x_t))
                cond = drop_conditions(self.fake_score, cond, u, self.critic_dropout)
            return policy(self.fake_score, x_t, t, cond, self.draws.uniform("critic/guidance", len(x_t)))

    def critic_error(self, prediction: Any, x0: Tensor, eps: Tensor, weight: Tensor | None) -> Tensor:
        """The fake score's squared error, in its space; arguments as ``denoising_loss``."""
        return denoising_loss(prediction, x0, eps, self.error_space(), self.fake_score.data_scale, weight)

    def error_space(self) -> str:
        """Space of the fake score's squared error: the one asked for, else the network's own."""
        own = "edm" if self.fake_score.network_process is not None else self.fake_score.prediction_type
        return self.critic_space or own

    def fake_score_loss(self, batch: Batch) -> Terms:
        """Denoising on student samples."""
        return self.critic_denoising(batch)[0]

    # ------------------------------------------------------------------------------------------------ counts
    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls per phase of a one-step student (first critic update); early-exit feature calls included."""
        return {
            "student": {"student": 1, "teacher": 1, "fake_score": 1},
            "fake_score": {"student": int(self.fresh_samples), "teacher": 0, "fake_score": 1},
        }
