"""Figures that tell whether a distillation goes well: of scores, guidance, discriminators, gradients, weights, samples.

Notation: x is the student's clean sample, x_t = alpha x + sigma eps, y_T and y_F the x0-predictions of teacher and fake
score at x_t, w the guidance scale in the convention y_u + w (y_c - y_u). All functions are without graph and wait for
no device; they return 0-dim tensors unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

__all__ = [
    "CriticState",
    "GuidanceSplit",
    "LogitStatistics",
    "SampleMoments",
    "critic_state",
    "gradient_cosines",
    "gradient_norms",
    "guidance_split",
    "logit_statistics",
    "oscillation",
    "sample_moments",
    "weight_distance",
]

_TINY = 1e-20


@dataclass(frozen=True)
class CriticState:
    """Fake score and teacher on the same noisy student samples, at one noise level.

    Attributes:
        lag: E|y_F - x|^2 / E|y_T - x|^2. An exact fake score has the smallest error that there is, so this is at most
            1; it equals 1 where student and teacher agree, and exceeds 1 when the critic knows the student's samples
            less well than the teacher does, who never saw them.
        residual: correlation of the fake score's error with the direction, E<x - y_F, y_T - y_F> over the two norms, in
            [-1, 1]. The error of an exact fake score is uncorrelated with every function of x_t, hence 0. Positive:
            the critic is noisy, or the samples have moved on towards the teacher and it stays behind. Negative: it
            resembles the teacher more than the student does. 0 where the predictions agree.
        gap: sqrt(E|y_F - y_T|^2 / E|y_T - x|^2), the score difference in units of the teacher's error. With an exact
            fake score gap^2 = 1 - lag; 0 means that nothing moves the student.
    """

    lag: Tensor
    residual: Tensor
    gap: Tensor


@torch.no_grad()
def critic_state(x: Tensor, real: Tensor, fake: Tensor) -> CriticState:
    """How well the fake score knows the student's samples.

    Args:
        x: student samples, (B, ...).
        real: y_T, the teacher's conditional (unguided) x0-prediction at x_t, same shape.
        fake: y_F, the fake score's at the same x_t, same shape.
    """
    x, real, fake = (part.double() for part in (x, real, fake))
    error_real, error_fake = (real - x).square().mean(), (fake - x).square().mean()
    difference = real - fake
    squared = difference.square().mean()
    residual = ((x - fake) * difference).mean() / (error_fake * squared).sqrt().clamp_min(_TINY)
    scale = error_real.clamp_min(_TINY)
    return CriticState(error_fake / scale, residual, (squared / scale).sqrt())


@dataclass(frozen=True)
class GuidanceSplit:
    """The two parts of a guided direction y_T - y_F (Decoupled DMD).

    Attributes:
        share: |augmentation| / (|augmentation| + |matching|) of the root mean squares, in [0, 1].
        cosine: between the two parts, in [-1, 1]; close to -1 where they hold each other at a fixed point.
    """

    share: Tensor
    cosine: Tensor


@torch.no_grad()
def guidance_split(cond: Tensor, uncond: Tensor, fake: Tensor, scale: float | Tensor) -> GuidanceSplit:
    """What guidance adds to a distribution-matching direction.

        y_u + w (y_c - y_u) - y_F  =  (w - 1) (y_c - y_u)  +  (y_c - y_F)        (augmentation + matching)

    Args:
        cond: y_c, conditional x0-prediction of the teacher, (B, ...).
        uncond: y_u, unconditional, same shape.
        fake: y_F, the fake score's, same shape.
        scale: w, a number or (B,).
    """
    cond, uncond, fake = (part.double().flatten(1) for part in (cond, uncond, fake))
    extra = (scale.to(cond).unsqueeze(1) if isinstance(scale, Tensor) else scale) - 1.0
    augmentation, matching = extra * (cond - uncond), cond - fake
    a, m = augmentation.norm(), matching.norm()
    cosine = (augmentation * matching).sum() / (a * m).clamp_min(_TINY)
    return GuidanceSplit(a / (a + m).clamp_min(_TINY), cosine)


@dataclass(frozen=True)
class LogitStatistics:
    """Logits of a discriminator.

    Attributes:
        real_mean: mean on real samples.
        real_std: standard deviation on real samples.
        fake_mean: mean on student samples.
        fake_std: standard deviation on student samples.
        accuracy: share of right answers: the sign of each logit, or for relativistic losses the order of each pair;
            ties count half.
    """

    real_mean: Tensor
    real_std: Tensor
    fake_mean: Tensor
    fake_std: Tensor
    accuracy: Tensor


@torch.no_grad()
def logit_statistics(real: Tensor, fake: Tensor, kind: str = "logistic") -> LogitStatistics:
    """Mean, spread and accuracy of a discriminator.

    Args:
        real: logits of real samples, (B, ...), high for real.
        fake: logits of student samples, same shape.
        kind: adversarial loss, one of ``losses.adversarial.ADVERSARIAL_KINDS``.
    """
    real, fake = real.double(), fake.double()
    if kind == "relativistic":
        right = torch.sign(real - fake)
    else:
        right = torch.cat([torch.sign(real).flatten(), -torch.sign(fake).flatten()])
    accuracy = 0.5 + 0.5 * right.mean()
    return LogitStatistics(real.mean(), real.std(correction=0), fake.mean(), fake.std(correction=0), accuracy)


# ------------------------------------------------------------------------------------------------ gradients, weights
def gradient_norms(gradients: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Norm of each term's gradient.

    Args:
        gradients: by term, the gradients of the same parameters in the same order.
    """
    return {name: torch.stack(torch._foreach_norm(list(parts))).float().norm() for name, parts in gradients.items()}


@torch.no_grad()
def gradient_cosines(gradients: Mapping[str, Sequence[Tensor]]) -> dict[tuple[str, str], Tensor]:
    """Cosine between the gradients of every two terms; 0 where one of them vanishes.

    Args:
        gradients: by term, the gradients of the same parameters in the same order.
    """
    norms = gradient_norms(gradients)
    cosines = {}
    for a, b in combinations(gradients, 2):
        products = torch._foreach_mul(list(gradients[a]), list(gradients[b]))
        dot = torch.stack([part.float().sum() for part in products]).sum()
        cosines[a, b] = dot / (norms[a] * norms[b]).clamp_min(_TINY)
    return cosines


@torch.no_grad()
def weight_distance(average: Sequence[Tensor], current: Sequence[Tensor]) -> Tensor:
    """|average - current| / |current| over all parameters.

    Args:
        average: parameters of an average; sharded ones on every process at once.
        current: the student's, in the same order, on any device.
    """
    new = [c.detach().to(a.device, a.dtype) for a, c in zip(average, current, strict=True)]
    return _norm(torch._foreach_sub(list(average), new)) / _norm(new).clamp_min(_TINY)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of all numbers together, over all shards where the tensors are sharded."""
    norm = torch.nn.utils.get_total_norm(tensors, foreach=True)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# ------------------------------------------------------------------------------------------------ samples
@dataclass(frozen=True)
class SampleMoments:
    """Moments of a set of samples, in the units of the data.

    Attributes:
        mean: of all numbers (brightness).
        std: of all numbers (contrast).
        channel_spread: standard deviation over the channels, averaged over samples and positions (saturation); None
            for samples without several channels.
        spread: root mean square over positions of the standard deviation between samples; 0 when all samples are the
            same, whatever they look like.
    """

    mean: Tensor
    std: Tensor
    channel_spread: Tensor | None
    spread: Tensor

    def figures(self) -> dict[str, Tensor]:
        """The moments by name, without those that do not exist."""
        return {k: v for k, v in vars(self).items() if v is not None}


@torch.no_grad()
def sample_moments(x: Tensor) -> SampleMoments:
    """Brightness, contrast, saturation and variety of samples.

    Args:
        x: samples, (B, ...); images as (B, C, H, W).
    """
    x = x.double()
    channels = x.std(dim=1, correction=0).mean() if x.ndim == 4 and x.shape[1] > 1 else None
    return SampleMoments(
        x.mean(), x.std(correction=0), channels, x.var(dim=0, correction=min(1, len(x) - 1)).mean().sqrt()
    )


# ------------------------------------------------------------------------------------------------ histories
def oscillation(values: Sequence[float]) -> tuple[float, int]:
    """Size and restlessness of a positive quantity around its mean, on a logarithmic scale.

    Args:
        values: positive, oldest first.

    Returns:
        the standard deviation of ln(value), and how often it crosses its mean.
    """
    logs = torch.tensor([max(v, 1e-12) for v in values], dtype=torch.float64).log()
    centred = logs - logs.mean()
    crossings = int((centred[1:] * centred[:-1] < 0).sum())
    return float(centred.square().mean().sqrt()), crossings
