"""Adversarial losses on logits.

With the logistic loss the best discriminator is the log density ratio, D = log p_real / p_fake
(arXiv:1406.2661, Prop. 1); the hinge and relativistic losses have no such reading. All functions take logits
of any shape (B, ...) and average over all of them, so that the weight of a loss does not depend on the
number of discriminator heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ADVERSARIAL_KINDS", "approximate_r1", "discriminator_loss", "generator_loss", "r1_penalty"]

ADVERSARIAL_KINDS = ("logistic", "hinge", "relativistic")


def generator_loss(
    fake: Tensor, kind: str = "logistic", *, real: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """What the student minimises to be taken for real.

        logistic        softplus(-D(fake))                  (non-saturating; DMD2, arXiv:2405.14867)
        hinge           -D(fake)                            (arXiv:1802.05957, Eq. 17)
        relativistic    softplus(-(D(fake) - D(real)))      (arXiv:1807.00734; R3GAN, arXiv:2501.05441, Eq. 2)

    Args:
        fake: logits of student samples, (B, ...), with graph to the student.
        kind: one of ``ADVERSARIAL_KINDS``.
        real: logits of real samples, same shape; needed by ``relativistic`` only.
        weight: factor per sample, (B,); None for none.

    Returns:
        scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: unknown kind, or real logits missing or of another shape for ``relativistic``.
    """
    fake = _wide(fake)
    if kind == "logistic":
        return _mean(F.softplus(-fake), weight)
    if kind == "hinge":
        return -_mean(fake, weight)
    return _mean(F.softplus(-_difference(fake, real, kind)), weight)


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "logistic", *, weight: Tensor | None = None) -> Tensor:
    """What the discriminator minimises.

        logistic        softplus(-D(real)) + softplus(D(fake))
        hinge           relu(1 - D(real)) + relu(1 + D(fake))
        relativistic    softplus(-(D(real) - D(fake)))

    Zero logits give 2 ln 2, 2 and ln 2.

    Args:
        real: logits of real (or teacher) samples, (B, ...).
        fake: logits of student samples, (B', ...), without graph to the student.
        kind: one of ``ADVERSARIAL_KINDS``.
        weight: factor per sample, (B,), on the real and the fake one of each pair; None for none.

    Returns:
        scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: unknown kind, or differing shapes for ``relativistic``.
    """
    real, fake = _wide(real), _wide(fake)
    if kind == "logistic":
        return _mean(F.softplus(-real), weight) + _mean(F.softplus(fake), weight)
    if kind == "hinge":
        return _mean(F.relu(1.0 - real), weight) + _mean(F.relu(1.0 + fake), weight)
    return _mean(F.softplus(_difference(fake, real, kind)), weight)


def approximate_r1(logits: Tensor, perturbed: Tensor, noise_std: float = 1.0) -> Tensor:
    """Finite-difference R1: how much the logits of real samples move under small noise.

    APT, arXiv:2501.08316:

        mean ((D(x + s n) - D(x)) / s)^2,   n ~ N(0, I)

    For small s its mean is E |grad D(x)|^2, the R1 penalty, without a second derivative of the feature
    network.

    Args:
        logits: D(x) on real samples, (B, ...).
        perturbed: D(x + s n) on the same samples, same shape.
        noise_std: s > 0; 1 leaves the difference undivided, as APT does with s = 0.01 inside a large weight.

    Returns:
        scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: differing shapes or a non-positive ``noise_std``.
    """
    if not noise_std > 0:
        raise ValueError(f"approximate_r1(noise_std={noise_std}): the noise added to real samples must be positive.")
    if logits.shape != perturbed.shape:
        raise ValueError(
            f"approximate_r1 compares logits of the same samples, but got shapes {tuple(logits.shape)} and "
            f"{tuple(perturbed.shape)}."
        )
    return ((_wide(perturbed) - _wide(logits)) / noise_std).square().mean()


def r1_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """Exact R1: squared input gradient of each sample's mean logit, mean over samples (arXiv:1801.04406, Eq. 9).

    The factor gamma / 2 is left to the loss weight. With n heads the penalty of their summed logits is n^2 times as
    large. Slopes of heads that disagree cancel here, and do not in ``approximate_r1``.

    Args:
        logits: D(x) on real samples, (B, ...), with graph to ``inputs``.
        inputs: x with ``requires_grad``, (B, ...).

    Returns:
        scalar with graph to the discriminator's parameters.
    """
    (gradient,) = torch.autograd.grad(_wide(logits).flatten(1).mean(1).sum(), inputs, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over samples and heads, of weighted samples if there is a weight."""
    return values.mean() if weight is None else (values.flatten(1).mean(1) * weight.to(values)).mean()


def _difference(fake: Tensor, real: Tensor | None, kind: str) -> Tensor:
    """D(fake) - D(real), pairwise."""
    if kind != "relativistic":
        raise ValueError(f"adversarial loss {kind!r} is unknown; choose one of {', '.join(ADVERSARIAL_KINDS)}.")
    if real is None or real.shape != fake.shape:
        shape = None if real is None else tuple(real.shape)
        raise ValueError(
            f"the relativistic loss pairs real and fake logits of equal shape, but got {shape} and {tuple(fake.shape)}."
        )
    return fake - _wide(real)
