"""DMD2: improved distribution matching distillation (arXiv:2405.14867)."""

from typing import Any

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.score_matching import checked_weight
from lightning_distill.methods.adversarial import AdversarialMethod
from lightning_distill.methods.base import Terms
from lightning_distill.methods.grouped import Grouped
from lightning_distill.methods.perceiving import Perceptual
from lightning_distill.methods.regression import PairRegression
from lightning_distill.methods.rollout import Rollout
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["DMD2"]


class DMD2(AdversarialMethod):
    """Distribution matching distillation with a two time-scale fake score and a GAN term.

    The student x = G(z) is moved along the difference of two scores, the frozen teacher's and that of a critic trained
    on the student's own samples; at the optimum both agree at every noise level. Data-free without ``gan``.

        grad_theta = E_t[ lambda_t (y_F(x_t) - y_T(x_t)) dx/dtheta ],   x_t = alpha_t x + sigma_t eps      (Eq. 1)
        student:      matching + w_g softplus(-D(x_s))                                                    (Section 4.3)
        fake score:   |F(x_t) - x|^2 + w_d [softplus(D(x_s)) + softplus(-D(real_s))]

    Multi-step students are trained on their own backward simulation (Section 4.5): a random step of the time list, the
    steps before it without graph.

    Args:
        teacher: the pretrained model.
        weight: factor lambda on the direction; ``dmd`` is 1 / mean |x - y_T| per sample (see ``matching_weight``).
        gan_at_scores: the student's adversarial term reads the noisy samples at which scores are compared, and its
            features come out of a score's own forward: one network call less. Otherwise it has times and noise of its
            own.
        gan_every: the discriminator is trained in every k-th critic update only, k times as heavily (lazy as in
            arXiv:1912.04958, Appendix B).
        regression_pairs: store of ``lightning-distill trajectories`` (or safetensors file) with noise and teacher
            outputs, for a warm-up by regression; or ``SolvedPairs``, made at the start of the run.
        regression_conditions: store of the embeddings with which they were made, for text models.
        regression_allow_other_teacher: accept a store that another teacher than ``teacher`` made.
        regression_verify: compare the shards of these stores with their checksums before training; each is read once
            per machine, and again when its file has changed.
        regression_distance: LPIPS, or the squared error with the distance of the teacher's own features; None is the
            mean squared error alone.
        regression_steps: student updates of that warm-up. The critic and its schedule wait: it starts from the
            teacher, to whose distribution the warm-up leads.
        **kwargs: see ``AdversarialMethod`` (``gan``; default weights 1e-3 for ``student/gan`` and 1e-2 for
            ``fake_score/gan``), ``FakeScoreMethod`` and ``DistillationModule``.

    Notes:
        The fake score of a multi-step student is not told which step made a sample, as in the paper; it then matches
        the mixture of all steps' outputs.
        The real images of the GAN term are noised with the same times as the fakes and independent noise.
    """

    paper = "2405.14867"
    learns_from = "teacher alone; data for gan"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        weight: str = "dmd",
        gan_at_scores: bool = False,
        gan_every: int = 1,
        regression_pairs: str | SolvedPairs | None = None,
        regression_conditions: str | None = None,
        regression_allow_other_teacher: bool = False,
        regression_verify: bool = True,
        regression_distance: Perceptual | None = None,
        regression_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if regression_steps and regression_pairs is None:
            raise ValueError(
                f"regression_steps={regression_steps} needs regression_pairs, a store or file of noise-image pairs, or "
                "SolvedPairs."
            )
        if regression_pairs is not None and regression_steps < 1:
            raise ValueError(
                f"regression_steps={regression_steps} leaves regression_pairs without use; give regression_steps, the "
                "number of student updates of the warm-up, or leave out regression_pairs."
            )
        if ((gan_at_scores or gan_every != 1) and self.gan is None) or gan_every < 1:
            raise ValueError(
                f"gan_at_scores={gan_at_scores} and gan_every={gan_every} say how the game of gan=Adversary(...) is "
                "played; give gan, and gan_every of 1 or more."
            )
        if gan_at_scores and self.gan is not None and self.gan.times is not None:
            raise ValueError(
                "gan_at_scores plays the game at the matching times, and gan has times of its own; leave one out."
            )
        self.weight = checked_weight(weight)
        self.gan_at_scores = gan_at_scores
        self.gan_every = gan_every
        self.regression_steps = regression_steps
        self.regression = None
        if regression_pairs is not None:
            self.regression = PairRegression(
                regression_pairs,
                regression_distance,
                regression_conditions,
                regression_allow_other_teacher,
                regression_verify,
            )

    def prepare_data(self) -> None:
        """Refuse damaged pairs; called in one process per machine."""
        if self.regression is not None:
            self.regression.prepare()

    def check_configuration(self) -> None:
        """Samples in groups have a game of their own."""
        super().check_configuration()
        if self.regression is not None:
            self.regression.check(self)
        if self.gan_at_scores and isinstance(self, Grouped):
            raise ValueError(
                f"{type(self).__name__} compares scores within groups and plays its game elsewhere; leave out "
                "gan_at_scores."
            )

    def phase_plan(self) -> list[tuple[str, int]]:
        """The warm-up trains the student alone."""
        plan, done = super().phase_plan(), 0 if self._trainer is None else self.trainer.global_step
        return plan if done >= self.regression_steps else plan[:1]

    def student_loss(self, batch: Batch) -> Terms:
        """Score difference at a random time, and the generator's side of the GAN."""
        if self.regression is not None and self.draws.update < self.regression_steps:  # Section 4.1, one-step VP
            return Terms({"regression": self.regression.loss(self, batch.size)})
        return self.rollout_terms(self.rollout(batch), batch)

    def rollout_terms(self, rollout: Rollout, batch: Batch) -> Terms:
        """Both terms of a rollout with graph."""
        x, logits = rollout.x0, None
        if self.gan_at_scores:
            scores, logits = self.scores_and_logits(x, batch)
        else:
            scores = self.scores(x, batch)
        terms = self.matching(x, scores, self.weight, self.sample_factor(x, batch))
        weight = self.gan_weight(batch)
        terms.losses |= (
            self.gan_term(x, batch, weight) if logits is None else self.generator_term(logits, scores.t, batch, weight)
        )
        return terms

    def sample_factor(self, x: Tensor, batch: Batch) -> Tensor | float:
        """Further weight of the matching term, broadcastable to the student's samples ``x``; 1 here."""
        return 1.0
