"""GNDM: distribution matching normalised within groups (R_dm, the reward view of DMD)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_distill.batch import Batch
from lightning_distill.losses.reward_weights import exponential_weight, rewards_of
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

    External rewards enter in the same way: with A the reward's advantage, its distance from the group's mean in units
    of the group's spread, each sample counts exp(beta A) over the group's mean of it. Better samples of a prompt are
    moved further, and prompts count alike whatever the scale of their rewards.

    Args:
        teacher: the pretrained model.
        group_size: consecutive samples that share a prompt, that of the first, and a noise level.
        statistic: ``distance`` is |x - y_T|, DMD's; ``direction`` is |y_F - y_T|, which makes the update independent of
            its scale.
        reward: module, called with the student's samples (B, ...) and their conditions, that gives (B,); None for none.
        beta: inverse temperature of the reward's advantage; 0 is without reward.
        **kwargs: see ``AdversarialMethod``, ``FakeScoreMethod`` and ``DistillationModule``.

    Notes:
        Reconstructed from the paper's idea; its exact normaliser and its combination with rewards were not at hand.
        A weight on the loss does not move its fixed point, see ``RewardedDMD``, whose rewards are compared between
        prompts.
        With groups of one sample and ``distance`` it is DMD2.
    """

    learns_from = "teacher alone; data for gan"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        group_size: int = 4,
        statistic: Literal["distance", "direction"] = "distance",
        reward: nn.Module | None = None,
        beta: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if statistic not in ("distance", "direction"):
            raise ValueError(f"statistic={statistic!r} is unknown; choose distance or direction.")
        self.group_size = group_size
        self.check_group_size()
        self.statistic = statistic
        self.reward = None if reward is None else reward.requires_grad_(False).eval()
        self.beta = beta

    def train(self, mode: bool = True) -> "GNDM":
        """As usual; the reward stays in eval mode."""
        super().train(mode)
        if self.reward is not None:
            self.reward.eval()
        return self

    def student_loss(self, batch: Batch) -> Terms:
        """Score difference over the group's normaliser, and the generator's side of the GAN."""
        batch = self.grouped(batch)
        x = self.rollout(batch).x0
        scores = self.scores(x, batch, noisy=self.group_noisy(x, "matching"))
        loss = score_difference(x, scores.real, scores.fake, self.reward_weight(x, batch) / self.normaliser(x, scores))
        terms = Terms({"matching": loss}, {"score_gap": scores.gap, "sample_std": x.detach().std()})
        terms.losses |= self.gan_term(x, batch)
        return terms

    def normaliser(self, x: Tensor, scores: Scores) -> Tensor:
        """M of each sample's group, (B, 1, ...)."""
        other = x.detach() if self.statistic == "distance" else scores.fake.detach()
        size = (other - scores.real).abs().flatten(1).mean(1)
        return expand(self.group_mean(size).clamp_min(1e-6), x)

    @torch.no_grad()
    def reward_weight(self, x: Tensor, batch: Batch) -> Tensor | float:
        """exp(beta A) of mean 1 in each group, (B, 1, ...)."""
        if self.reward is None:
            return 1.0
        weight = exponential_weight(self.group_advantage(rewards_of(self.reward, x.detach(), batch.cond)), self.beta)
        return expand(weight / self.group_mean(weight), x)

    def fake_score_loss(self, batch: Batch) -> Terms:
        """As usual, on the grouped conditions."""
        return super().fake_score_loss(self.grouped(batch))
