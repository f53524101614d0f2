"""Configuration of a method's adversarial term: which features, at which times, with which loss."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_distill.generation import default_cond
from lightning_distill.losses.adversarial import ADVERSARIAL_KINDS
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.discriminators import (
    INPUT_TAP,
    DiscriminatorHeads,
    tap_shapes,
    tapped_features,
)
from lightning_distill.times import TimeDistribution

__all__ = ["Adversary"]


class Adversary:
    """An adversarial term on features of the fake score or of the teacher.

    Args:
        taps: blocks whose outputs the heads read, for example ``["mid_block"]``; ``input`` is the noisy sample itself.
        features: network that computes them: ``fake_score`` (DMD2, trained along with the heads) or ``teacher``
            (frozen).
        times: distribution of the noise levels; None means the critic's, and fake features then come out of the
            critic's own forward for free.
        kind: ``logistic``, ``hinge`` or ``relativistic``.
        width: channels inside the heads, None for those of the feature.
        classes: tell the heads the class of a sample, for features that do not know it, such as ``input``; None tells
            them where the network has classes.
        seed: of the heads' initial weights.
    """

    def __init__(
        self,
        taps: Sequence[str] = ("mid_block",),
        features: str = "fake_score",
        times: TimeDistribution | None = None,
        kind: str = "logistic",
        width: int | None = None,
        classes: bool | None = False,
        seed: int = 0,
    ) -> None:
        if features not in ("fake_score", "teacher"):
            raise ValueError(f"Adversary(features={features!r}): choose fake_score or teacher.")
        if kind not in ADVERSARIAL_KINDS:
            raise ValueError(f"Adversary(kind={kind!r}): choose one of {', '.join(ADVERSARIAL_KINDS)}.")
        self.taps = tuple(taps)
        self.features = features
        self.times = times
        self.kind = kind
        self.width = width
        self.classes = classes
        self.seed = seed

    def build(self, network: Denoiser, shape: Sequence[int]) -> DiscriminatorHeads:
        """Heads for the features of ``network`` at samples of ``shape``."""
        cond = {k: v.to(network.device) for k, v in default_cond(network, 1).items()}
        return self.heads(tap_shapes(network, shape, self.taps, cond), network)

    def heads(self, shapes: Mapping[str, Sequence[int]], network: Denoiser) -> DiscriminatorHeads:
        """Heads on features of these shapes.

        Args:
            shapes: without the batch dimension, by tap.
            network: whose classes they are told.

        Raises:
            ValueError: heads that are told classes of a network without.
        """
        if self.classes and network.num_classes is None:
            raise ValueError(
                f"{type(self).__name__}(classes=True): {type(network.network).__name__} has no classes that heads "
                "could be told; leave classes out."
            )
        told = network.num_classes if self.classes or self.classes is None else None
        return DiscriminatorHeads(shapes, width=self.width, num_classes=told, seed=self.seed)

    def tapped(self, network: Denoiser, x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> dict[str, Tensor]:
        """Features of ``x_t``; blocks behind the last tap are not run."""
        return tapped_features(network, x_t, t, cond, self.taps)

    @property
    def network_taps(self) -> tuple[str, ...]:
        """Taps that are blocks of the network."""
        return tuple(tap for tap in self.taps if tap != INPUT_TAP)

    def in_passing(self, x_t: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same features, from a forward that has already collected ``network_taps``."""
        return {tap: x_t if tap == INPUT_TAP else features[tap] for tap in self.taps}
