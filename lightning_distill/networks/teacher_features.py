"""A perceptual distance that needs no other network: the teacher's own features."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.discriminators import INPUT_TAP, tapped_features
from lightning_distill.times import TimeDistribution, bounded

__all__ = ["TeacherFeatures", "feature_distance"]


def feature_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of the directions of two feature maps, as in LPIPS (arXiv:1801.03924, Eq. 1 with w = 1).

    Args:
        a: features, maps (B, C, H, W) or (B, C, T, H, W), tokens (B, L, D) or vectors (B, D); float32 inside.
        b: the same of the other samples.

    Returns:
        mean over positions of | a / |a| - b / |b| |^2, from 0 to 4, (B,), float32 or float64.
    """
    channels = 1 if a.ndim > 3 else -1
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    directions = [torch.nn.functional.normalize(x.to(wide), dim=channels, eps=1e-8) for x in (a, b)]
    return (directions[0] - directions[1]).square().sum(channels, keepdim=True).flatten(1).mean(1)


class TeacherFeatures:
    """Distance of two samples in the features that the frozen teacher computes of them, both noised alike.

        d(a, b) = sum over taps of  feature_distance( phi(a_t, t), phi(b_t, t) ),     a_t = alpha_t a + sigma_t eps

    Takes the place of ``PerceptualDistance`` where its weights are missing or say nothing of the samples (latents,
    small images, video).

    Args:
        taps: blocks of the teacher; those behind the last one are not run.
        times: distribution of the noise levels, None for uniform ones from .02 to .5 of the range (on Karras' scale in
            EDM).

    Notes:
        LPIPS has learned weights of channels, which are 1 here, and features of clean images; a denoiser has seen
        none, so that a little noise is added, the same to both.
    """

    def __init__(self, taps: Sequence[str] = ("mid_block",), times: TimeDistribution | None = None) -> None:
        self.taps = tuple(taps)
        self.times = times
        if not self.taps or INPUT_TAP in self.taps:
            raise ValueError(
                f"TeacherFeatures(taps={list(taps)}): name blocks of the teacher, such as ['mid_block']; the sample "
                "itself is what the other terms compare."
            )

    def __call__(
        self, teacher: Denoiser, made: Tensor, goal: Tensor, cond: Mapping[str, Any], u: Tensor, noise: Tensor
    ) -> Tensor:
        """Distance per sample, (B,), with a graph to ``made``.

        Args:
            teacher: the frozen network.
            made: samples, (B, ...).
            goal: what they should be, (B, ...).
            cond: conditioning of the samples.
            u: one uniform number per sample, (B,), for the noise level.
            noise: unit noise for both, (B, ...).
        """
        times, add_noise = self.times or bounded(teacher.process, 0.02, 0.5), teacher.process.add_noise
        t = times.quantile(u, teacher.process)
        seen = tapped_features(teacher, add_noise(made, noise, t), t, cond, self.taps)
        with torch.no_grad():
            wanted = tapped_features(teacher, add_noise(goal, noise, t), t, cond, self.taps)
        return torch.stack([feature_distance(seen[tap], wanted[tap]) for tap in self.taps]).sum(0)
