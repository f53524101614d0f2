"""The adversarial term of a method: heads on a network's features, and both sides of the game."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.adversarial import generator_loss
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.discriminators import DiscriminatorHeads
from lightning_distill.times import TimeDistribution

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

    _Base = DistillationModule
else:
    _Base = object

__all__ = ["Discriminating"]


class Discriminating(_Base):
    """What a method with an ``Adversary`` does with it; the method says which network has the features."""

    gan: Adversary | None
    discriminator: DiscriminatorHeads | None

    @property
    def feature_network(self) -> Denoiser:
        """The network whose features the discriminator reads; the teacher unless overridden."""
        return self.require_teacher()

    @property
    def gan_times(self) -> TimeDistribution:
        """Noise levels of the game."""
        assert self.gan is not None
        assert self.gan.times is not None
        return self.gan.times

    def heads(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits of the discriminator heads, (B, n)."""
        assert self.discriminator is not None
        return self.discriminator(features)

    def logits(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """Logits at noisy samples, (B, n), by a forward of the feature network up to its last tap."""
        assert self.gan is not None
        return self.heads(self.gan.tapped(self.feature_network, x_t, t, cond))

    def gan_term(self, x: Tensor, batch: Batch, weight: Tensor | None = None) -> dict[str, Tensor]:
        """The generator's side at a noise level of its own; nothing without ``gan``.

        Args:
            x: student samples with graph, (B, ...).
            batch: their conditions; data for the relativistic loss.
            weight: factor per sample, (B,).
        """
        if self.gan is None:
            return {}
        x_s, s, _ = self.renoise(x, self.gan_times, "gan")
        real = self.real_logits(batch, s) if self.gan.kind == "relativistic" else None
        return {"gan": generator_loss(self.logits(x_s, s, batch.cond), self.gan.kind, real=real, weight=weight)}

    def real_noisy(self, batch: Batch, t: Tensor) -> Tensor:
        """The batch's data at the given times, with noise independent of the student's, (B, ...)."""
        if batch.x0 is None:
            raise ValueError(
                "the GAN term compares student samples with real data, but the loader yields batches without x0; use a "
                "data module with images (for example FashionMNIST), or remove gan for data-free training."
            )
        return self.process.add_noise(batch.x0, self.draws.normal("gan/real_noise", batch.x0.shape), t)

    def real_logits(self, batch: Batch, t: Tensor) -> Tensor:
        """Logits of the batch's data at the given times, (B, n)."""
        return self.logits(self.real_noisy(batch, t), t, batch.cond)
