"""Uni-Instruct: any f-divergence through its expansion along the diffusion (arXiv:2505.20755)."""

from typing import Any

from lightning_distill.batch import Batch
from lightning_distill.losses.f_divergences import divergence as find_divergence
from lightning_distill.losses.f_divergences import expanded_divergence_loss, log_ratio
from lightning_distill.losses.score_matching import checked_weight
from lightning_distill.losses.sid import FISHER_WEIGHTS, fisher_weight
from lightning_distill.methods.adversarial import RatioMethod
from lightning_distill.methods.base import Terms
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["UniInstruct"]


class UniInstruct(RatioMethod):
    """An f-divergence of the clean samples, written as an integral of weighted Fisher divergences over noise levels.

        D_f(p_T || p_S) = int g_t^2 / 2 E_{p_S,t}[ h(r) |score_F - score_T|^2 ] dt,     r = p_T,t / p_S,t
        student:      mean c ( (h - h')/2 |d|^2 + h d (x - y_F) ),     d = y_F - y_T,     h' = dh / d ln r

    and h = r^2 f''. Gradients pass through x, x_t, both scores and the ratio, which a discriminator on features gives.
    The reverse KL is SiD with alpha = 1/2.

    Args:
        teacher: the pretrained model.
        divergence: one of rkl, kl, js, softened_rkl, neyman, hellinger, jeffreys, pearson.
        weight: c; ``dmd`` is 1 / mean |x - y_T|, ``divergence`` that of the integral, for uniform times (see
            ``fisher_weight``).
        through_ratio: let gradients pass through h as well; False is cheaper and an approximation.
        ratio_limit: largest |ln r|.
        fake_score_steps: critic updates per student update.
        **kwargs: see ``AdversarialMethod`` (``gan``, needed here), ``FakeScoreMethod`` and ``DistillationModule``.

    Notes:
        The student's loss is derived here from the expansion and verified against it; the paper writes the gradient as
        a weighted sum of those of Diff-Instruct and score implicit matching.
        The discriminator serves the ratio only: the student has no adversarial term.
    """

    paper = "2505.20755"
    learns_from = "teacher, data"
    differentiates_scores = True

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        divergence: str = "kl",
        weight: str = "dmd",
        through_ratio: bool = True,
        ratio_limit: float = 3.0,
        fake_score_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, fake_score_steps=fake_score_steps, **kwargs)
        find_divergence(divergence)
        if not ratio_limit > 0:
            raise ValueError(f"ratio_limit={ratio_limit}: the largest |ln r| must be positive.")
        self.divergence = divergence
        self.weight = checked_weight(weight, FISHER_WEIGHTS)
        self.through_ratio = through_ratio
        self.ratio_limit = ratio_limit

    def student_loss(self, batch: Batch) -> Terms:
        """The expanded divergence at a random time."""
        x = self.rollout(batch).x0
        scores, logits = self.scores_and_logits(x, batch)
        u = log_ratio(logits if self.through_ratio else logits.detach(), self.ratio_limit)
        weight = fisher_weight(self.weight, x, scores.real, scores.t, self.process)
        loss = expanded_divergence_loss(x, scores.real, scores.fake, u, weight, self.divergence)
        diagnostics = {"score_gap": scores.gap, "sample_std": x.detach().std(), "logit": logits.detach().mean()}
        return Terms({"expansion": loss}, diagnostics)
