"""GNDM: distribution matching normalised within groups (R_dm, the reward view of DMD)."""

from typing import Any, Literal

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.score_matching import score_difference
from lightning_distill.methods.adversarial import AdversarialMethod
from lightning_distill.methods.base import Terms
from lightning_distill.methods.fake_score import Scores
from lightning_distill.methods.grouped import Grouped
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import expand

__all__ = ["GNDM"]


class GNDM(Grouped, AdversarialMethod):
    """DMD2 with one normaliser for all samples of a prompt, as group-relative policy optimisation has one for rewards.

        grad_theta = E[ (y_F - y_T) / m(group) dx/dtheta ],     m = mean over the group of |x - y_T| or of |y_F - y_T|

    ln p_T - ln p_S at x_t is a reward whose gradient is y_T - y_F. A normaliser of each sample's own makes all rewards
    of a prompt equally large; that of the group keeps their proportions.

    Args:
        teacher: the pretrained model.
        group_size: consecutive samples that share a prompt, that of the first, and a noise level.
        statistic: ``distance`` is |x - y_T|, DMD's; ``direction`` is |y_F - y_T|, which makes the update independent of
            its scale.
        **kwargs: see ``AdversarialMethod``, ``FakeScoreMethod`` and ``DistillationModule``.

    Notes:
        Reconstructed from the paper's idea; its exact normaliser was not at hand. External rewards are those of
        ``RewardedDMD``.
        With groups of one sample and ``distance`` it is DMD2.
    """

    learns_from = "teacher alone; data for gan"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        group_size: int = 4,
        statistic: Literal["distance", "direction"] = "distance",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if statistic not in ("distance", "direction"):
            raise ValueError(f"statistic={statistic!r} is unknown; choose distance or direction.")
        self.group_size = group_size
        self.check_group_size()
        self.statistic = statistic

    def student_loss(self, batch: Batch) -> Terms:
        """Score difference over the group's normaliser, and the generator's side of the GAN."""
        batch = self.grouped(batch)
        x = self.rollout(batch).x0
        scores = self.scores(x, batch, noisy=self.group_noisy(x, "matching"))
        loss = score_difference(x, scores.real, scores.fake, 1.0 / self.normaliser(x, scores))
        terms = Terms({"matching": loss}, {"score_gap": scores.gap, "sample_std": x.detach().std()})
        terms.losses |= self.gan_term(x, batch)
        return terms

    def normaliser(self, x: Tensor, scores: Scores) -> Tensor:
        """M of each sample's group, (B, 1, ...)."""
        other = x.detach() if self.statistic == "distance" else scores.fake.detach()
        size = (other - scores.real).abs().flatten(1).mean(1)
        return expand(self.group_mean(size).clamp_min(1e-6), x)

    def fake_score_loss(self, batch: Batch) -> Terms:
        """As usual, on the grouped conditions."""
        return super().fake_score_loss(self.grouped(batch))
