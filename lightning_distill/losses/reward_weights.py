"""Weights from rewards: how much each sample, and each of its elements, counts in a matching loss."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MeanValue", "Reward", "exponential_weight", "rewards_of", "saliency_map"]

#: samples (B, ...) and their conditions -> rewards (B,)
Reward = Callable[[Tensor, Mapping[str, Any]], Tensor]


class MeanValue(nn.Module):
    """The mean of a sample, or of one of its channels: the simplest reward there is (brightness).

    Args:
        sign: factor.
        channel: index along the first dimension of a sample; None for all elements.
    """

    def __init__(self, sign: float = 1.0, channel: int | None = None) -> None:
        super().__init__()
        self.sign = sign
        self.channel = channel

    def forward(self, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """Rewards, (B,).

        Args:
            x: samples, (B, C, ...).
            cond: their conditions.
        """
        part = x if self.channel is None else x[:, self.channel : self.channel + 1]
        return self.sign * part.flatten(1).mean(1)


@torch.no_grad()
def rewards_of(reward: Reward, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """R(x), (B,), without graph.

    Args:
        reward: gives one number per sample.
        x: samples, (B, ...).
        cond: their conditions.

    Raises:
        ValueError: it gives anything else.
    """
    rewards = reward(x, cond)
    if rewards.shape != (len(x),):
        raise ValueError(f"the reward gave shape {tuple(rewards.shape)} for {len(x)} samples; it gives one each.")
    return rewards


def exponential_weight(reward: Tensor, beta: float, limit: float = 10.0) -> Tensor:
    """Weight exp(beta R) with |beta R| <= limit (Reward Forcing, arXiv:2512.04678), (B,), without graph.

    Rewards have any origin, and the limit has not: give distances from their mean.

    Args:
        reward: R, (B,).
        beta: inverse temperature; 0 gives 1.
        limit: largest exponent.
    """
    return (beta * reward.detach().float()).clamp(-limit, limit).exp()


def saliency_map(reward: Reward, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """How much the reward depends on each place of a sample: |dR/dx| averaged over channels, of mean 1 per sample.

    Args:
        reward: differentiable.
        x: samples, (B, C, ...).
        cond: their conditions.

    Returns:
        (B, 1, ...), without graph; 1 where the reward does not depend on the sample.
    """
    with torch.enable_grad():
        inputs = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(reward(inputs, cond).sum(), inputs)
    size = slope.abs().mean(1, keepdim=True) if x.ndim > 2 else slope.abs()
    mean = size.flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))
    return torch.where(mean > 0, size / mean.clamp_min(torch.finfo(size.dtype).tiny), torch.ones_like(size))
