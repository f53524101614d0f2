"""Rewarded DMD: samples with a high reward count more (Reward Forcing, arXiv:2512.04678)."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.batch import Batch
from lightning_distill.losses.reward_weights import exponential_weight, rewards_of, saliency_map
from lightning_distill.methods.dmd2 import DMD2
from lightning_distill.methods.running import RunningMeans
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import expand

__all__ = ["RewardedDMD"]


class RewardedDMD(RunningMeans, DMD2):
    """DMD2 whose matching term is weighted by exp(beta R(x)) / E exp(beta R), without gradient through the reward.

        grad_theta = E_t[ w(x) lambda_t (y_F(x_t) - y_T(x_t)) dx/dtheta ],     w = exp(beta (R(x) - R_mean)) / mean

    Args:
        teacher: the pretrained model.
        reward: module, called with the student's samples (B, ...) and their conditions, that gives (B,); for latent
            students it decodes by itself.
        beta: inverse temperature; 0 is DMD2.
        saliency: share of |dR/dx|, a map of mean 1 per sample, in the weight of each element (Stream-R1's idea).
        reward_decay: factor on the weight of past samples per update in both means, in [0, 1).
        **kwargs: see ``DMD2``.

    Notes:
        A weight on the loss does not move its fixed point: where student and teacher agree the gradient is zero for
        every sample. It decides what is learned first, and what a student without the capacity for all learns at all.
        To reach the teacher's distribution tilted by exp(beta R), the reward must enter the target.
        The paper's weight is exp(beta R), which changes the learning rate and depends on the origin of R; here it is
        taken from the mean reward, so that a constant added to all rewards changes nothing, and has mean 1 over the
        samples of past updates. The first two updates, which only see what the means are, have weight 1.
    """

    paper = "2512.04678"
    learns_from = "teacher, a reward; data for gan"

    reward_state: Tensor

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        reward: nn.Module | None = None,
        beta: float = 2.0,
        saliency: float = 0.0,
        reward_decay: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if reward is None:
            raise ValueError("RewardedDMD needs reward=..., a module that gives a number for each sample.")
        if not 0.0 <= saliency <= 1.0 or not 0.0 <= reward_decay < 1.0:
            raise ValueError(f"saliency={saliency} is a share from 0 to 1, and reward_decay={reward_decay} below 1.")
        self.reward = reward.requires_grad_(False).eval()
        self.beta = beta
        self.saliency = saliency
        self.add_running("reward", 2, reward_decay, made_up=False)

    def train(self, mode: bool = True) -> "RewardedDMD":
        """As usual; the reward stays in eval mode."""
        super().train(mode)
        self.reward.eval()
        return self

    def sample_factor(self, x: Tensor, batch: Batch) -> Tensor | float:
        """exp(beta (R - mean R)) over its mean, times the map of the saliency."""
        samples = x.detach()
        reward = rewards_of(self.reward, samples, batch.cond)
        centre, mean = self.running_means("reward")
        weight = exponential_weight(reward - centre, self.beta)
        known = ~centre.isnan()
        sums = torch.stack([reward.sum(), torch.where(known, weight.sum(), 0.0)])
        self.note("reward", sums, len(reward) * torch.stack([torch.ones_like(known), known]).to(sums))
        factor = expand(torch.where(mean.isnan(), 1.0, weight / mean), x)
        if self.saliency:
            factor = factor * (1.0 + self.saliency * (saliency_map(self.reward, samples, batch.cond) - 1.0))
        return factor
