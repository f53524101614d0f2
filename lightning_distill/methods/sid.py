"""SiD: score identity distillation in one and in few steps (arXiv:2404.04057, arXiv:2505.12674)."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.batch import Batch
from lightning_distill.guidance import is_told
from lightning_distill.losses.score_matching import checked_weight
from lightning_distill.losses.sid import FISHER_WEIGHTS, fisher_loss, fisher_weight
from lightning_distill.methods.adversarial import AdversarialMethod
from lightning_distill.methods.base import Terms
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.oracle import OracleNetwork
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import EDM
from lightning_distill.times import bounded

__all__ = ["SiD"]


class SiD(AdversarialMethod):
    """Score identity distillation: the Fisher divergence, with gradients through teacher and fake score; data-free.

        student:      mean c (y_T - y_F) ((y_T - x) - alpha (y_T - y_F)),     c = 1 / mean |x - y_T|
        fake score:   |F(x_t) - x|^2

    Gradients pass through x, x_t and both networks' inputs. A few-step student draws one of its steps per update, so
    that the fake score learns the uniform mixture of all steps' outputs. Text-to-image recipes (w in the convention of
    ``guidance.py``):

        =================  ============  ==================  ====================
        recipe             ``guidance``  ``fake_guidance``   ``critic_guidance``
        =================  ============  ==================  ====================
        long-short (LSG)   w             w                   w (1.5 to 2)
        Zero-CFG           1             0                   0
        Anti-CFG           1             below 0             1, some dropout
        =================  ============  ==================  ====================

    A ``fake_guidance`` of other than 1 without ``critic_guidance`` and ``critic_dropout`` reads a branch of the fake
    score that nothing trains, of which a warning tells.

    Args:
        teacher: the pretrained model.
        alpha: 1/2 is the exact gradient of the Fisher divergence, 1 that with fixed samples, 1.2 the paper's choice.
        weight: c; ``dmd`` or another of ``fisher_weight``.
        noise_scale: gamma, factor on the fresh noise between the steps of ``sample()``; below 1 trades diversity for
            fidelity (protein backbones).
        fake_score_steps: critic updates per student update.
        **kwargs: see ``AdversarialMethod`` (``gan`` as in SiDA, arXiv:2410.14919), ``FakeScoreMethod`` and
            ``DistillationModule``.

    Notes:
        Losses are means over elements, where the released code sums over them and multiplies by 100.
        The paper updates the critic first, on samples of its own; here a cycle begins with the student, and the
        critic's first update uses the student's samples.
        The critic's times cover the whole range (the paper's critic has lognormal ones, which hardly reach its noisiest
        matching times).
        ``noise_scale`` changes sampling and evaluation, not training; no stock scheduler has it, so export refuses it.
        The discriminator of ``gan`` has heads of its own, where SiDA averages the channels of a feature.
    """

    paper = "2404.04057"
    learns_from = "teacher alone; data for gan"
    differentiates_scores = True

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        alpha: float = 1.2,
        weight: str = "dmd",
        noise_scale: float = 1.0,
        fake_score_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, fake_score_steps=fake_score_steps, **kwargs)
        if noise_scale < 0:
            raise ValueError(f"noise_scale={noise_scale}: the factor on the fresh noise is 0 or more.")
        if noise_scale != 1.0 and self.sampler != "renoise":
            raise ValueError(f"noise_scale={noise_scale} needs sampler='renoise'; the ode sampler adds no noise.")
        self.alpha = alpha
        self.weight = checked_weight(weight, FISHER_WEIGHTS)
        self.noise_scale = noise_scale

    def build_roles(self) -> None:
        """As usual; on EDM the matching times are the lower 80 % of the Karras scale."""
        super().build_roles()
        if isinstance(self.process, EDM):
            self.matching_times = self._given_matching_times or bounded(self.process, 0.0, 0.8)

    def check_configuration(self) -> None:
        """As usual; warns where the fake score is read without conditions and never trained without them."""
        super().check_configuration()
        learns = self.critic_dropout or self.critic_guidance.needs_null or is_told(self.fake_score)
        if self.fake_guidance.needs_null and not learns and not isinstance(self.fake_score.network, OracleNetwork):
            rank_zero_warn(
                f"fake_guidance={self.fake_guidance.scale:g} reads the fake score without conditions, but with "
                "critic_guidance=1 and critic_dropout=0 nothing trains it so: give critic_guidance (Zero-CFG, LSG) or "
                "critic_dropout (Anti-CFG)."
            )

    def student_loss(self, batch: Batch) -> Terms:
        """The Fisher term at a random time, and the generator's side of the GAN."""
        x = self.rollout(batch).x0
        scores = self.scores(x, batch)
        weight = fisher_weight(self.weight, x, scores.real, scores.t, self.process)
        terms = Terms({"fisher": fisher_loss(x, scores.real, scores.fake, weight, self.alpha)})
        terms.diagnostics |= {"score_gap": scores.gap, "sample_std": x.detach().std()}
        terms.losses |= self.gan_term(x, batch)
        return terms
