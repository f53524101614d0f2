"""Methods with a fake score and, if asked for, an adversarial term on features of the fake score or of the teacher."""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.guidance import is_told
from lightning_distill.losses.adversarial import discriminator_loss
from lightning_distill.methods.base import Terms
from lightning_distill.methods.discriminating import Discriminating
from lightning_distill.methods.fake_score import FakeScoreMethod, Scores
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.discriminators import DiscriminatorHeads
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.time_coverage import check_coverage
from lightning_distill.times import TimeDistribution

__all__ = ["AdversarialMethod", "RatioMethod"]


class AdversarialMethod(Discriminating, FakeScoreMethod):
    """Base of methods that may add a GAN (DMD2, arXiv:2405.14867, Section 4.3).

        student:      w_g softplus(-D(x_s))
        fake score:   w_d [softplus(D(x_s)) + softplus(-D(real_s))]          (logistic; see ``losses.adversarial``)

    The heads are trained together with the fake score, whose features they read unless ``gan`` says otherwise.

    Args:
        teacher: the pretrained model.
        gan: the adversarial term; None for data-free training.
        **kwargs: see ``FakeScoreMethod`` and ``DistillationModule``.
    """

    phases = {"student": ("student",), "fake_score": ("fake_score", "discriminator")}
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/gan": 1e-3, "fake_score/gan": 1e-2}
    #: critic updates per game; see DMD2
    gan_every: int = 1
    #: whether the generator's side is played at the noisy samples of the scores; see DMD2
    gan_at_scores: bool = False

    def __init__(
        self, teacher: DenoiserSpec | Denoiser | None = None, *, gan: Adversary | None = None, **kwargs: Any
    ) -> None:
        super().__init__(teacher, **kwargs)
        self.gan = gan
        self.discriminator: DiscriminatorHeads | None = None

    def build_roles(self) -> None:
        """Student, fake score and, with ``gan``, discriminator heads."""
        super().build_roles()
        if self.gan is not None:
            self.discriminator = self.gan.build(self.feature_network, self.sample_shape)

    @property
    def feature_network(self) -> Denoiser:
        """The network whose features the discriminator reads."""
        assert self.gan is not None
        return self.fake_score if self.gan.features == "fake_score" else self.require_teacher()

    @property
    def gan_times(self) -> TimeDistribution:
        """Noise levels of the game: the critic's unless ``gan`` has its own."""
        assert self.gan is not None
        return self.gan.times or self.critic_times

    def logits(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """As usual; a fake score that is told the student's step is told it here."""
        assert self.gan is not None
        with self.told_step() if self.gan.features == "fake_score" else nullcontext():
            return super().logits(x_t, t, cond)

    # ------------------------------------------------------------------------------------------------ student
    @property
    def scores_share_forward(self) -> bool:
        """Whether the forward of a score has the features of the noisy samples at which scores are compared."""
        gan = self.gan
        if gan is None or not gan.network_taps:
            return False
        if gan.features == "fake_score":
            return not self.fake_guidance.needs_null
        # a network that is told the scale has other features at it than where it judges real samples
        told = self.guidance.needs_null and is_told(self.feature_network)
        return self.gan_at_scores and self.real_score() is self.feature_network and not told

    def scores_and_logits(self, x: Tensor, batch: Batch) -> tuple[Scores, Tensor]:
        """Both scores and the discriminator's logits (B, n) at the same noisy samples."""
        assert self.gan is not None
        if not self.scores_share_forward:
            scores = self.scores(x, batch)
            return scores, self.logits(scores.x_t, scores.t, batch.cond)
        scores = self.scores(x, batch, self.gan.network_taps, tapped=self.gan.features)
        return scores, self.heads(self.gan.in_passing(scores.x_t, scores.features), batch.cond)

    # ------------------------------------------------------------------------------------------------ critic
    def gan_weight(self, batch: Batch) -> Tensor | None:
        """Factor on the game of each of the slice's samples, (B,); None for none."""
        return None

    @property
    def shares_forward(self) -> bool:
        """Whether the critic's own forward has the features of the fake samples."""
        gan = self.gan
        return gan is not None and gan.features == "fake_score" and gan.times is None and self.critic_is_plain

    @property
    def game_is_due(self) -> bool:
        """Whether the critic update that runs is one of those with a game."""
        if self.gan_every == 1:
            return True
        repeat = re.fullmatch(r"fake_score(\d+)", self.draws.phase)  # losses outside of an update have other draws
        update = self.draws.update * self.fake_score_steps + (int(repeat[1]) if repeat else 0)
        return update % self.gan_every == 0

    def fake_score_loss(self, batch: Batch) -> Terms:
        """Denoising of student samples, and the discriminator's side of the GAN."""
        if self.gan is None:
            return self.critic_denoising(batch)[0]
        if not self.game_is_due:
            terms = self.critic_denoising(batch)[0]
            terms.losses["denoising"] = terms.losses["denoising"] + self.idle_heads()
            return terms
        terms, prediction = self.critic_denoising(batch, self.gan.network_taps if self.shares_forward else ())
        if self.shares_forward:
            features, t = self.gan.in_passing(prediction.x_t, prediction.features), prediction.t
            fake = self.heads(features, batch.cond)
        else:
            x_s, t, _ = self.renoise(self.rollout(batch, grad=False).x0, self.gan_times, "gan")
            fake = self.logits(x_s, t, batch.cond)
        real = self.real_logits(batch, t)
        game = discriminator_loss(real, fake, self.gan.kind, weight=self.gan_weight(batch))
        terms.losses["gan"] = self.gan_every * game
        terms.diagnostics["logit_real"], terms.diagnostics["logit_fake"] = real.mean(), fake.mean()
        return terms

    # ------------------------------------------------------------------------------------------------ counts
    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        if self.gan is not None and self.gan.network_taps:
            source = self.gan.features
            counts["student"][source] += 2 if self.gan.kind == "relativistic" else 1
            if self.gan_at_scores and self.scores_share_forward:
                unconditional = source == "teacher" and self.guidance.needs_null  # a call of its own
                counts["student"][source] += unconditional - 1
            counts["fake_score"][source] += 1 if self.shares_forward else 2
        return counts


class RatioMethod(AdversarialMethod):
    """Base of methods that need the density ratio p_T,t / p_S,t where they compare scores.

    A logistic discriminator gives it (see ``losses.f_divergences.log_ratio``), so ``gan`` is not optional, and its
    term of the student uses the same noisy samples as the scores.

    Args:
        teacher: the pretrained model.
        **kwargs: see ``AdversarialMethod``.
    """

    def check_configuration(self) -> None:
        """There must be a logistic discriminator that is trained where ratios are wanted."""
        super().check_configuration()
        name = type(self).__name__
        if self.gan is None:
            raise ValueError(f"{name} reads density ratios from a discriminator; give gan=Adversary(taps=[...]).")
        if self.gan.kind != "logistic":
            raise ValueError(
                f"{name} needs gan=Adversary(kind='logistic'), whose best logit is the log density ratio; the "
                f"{self.gan.kind} loss has no such reading."
            )
        if self.gan.times is not None:
            check_coverage(self.matching_times, self.gan.times, self.process)

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        if self.scores_share_forward:
            counts["student"]["fake_score"] -= 1
        return counts
