"""The adversarial term of a method: heads on a network's features, and both sides of the game."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, combined, is_told
from lightning_distill.losses.adversarial import generator_loss
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser, per_sample
from lightning_distill.networks.discriminators import DiscriminatorHeads
from lightning_distill.times import TimeDistribution

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

    _Base = DistillationModule
else:
    _Base = object

__all__ = ["Discriminating", "graph_until", "score_with_features"]


@contextmanager
def graph_until(network: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Within it one forward of a network has a graph up to the last of some blocks, and none behind it.

    Gradients of their outputs reach the input; activations of the blocks behind them are not kept.

    Args:
        network: the module that is called.
        blocks: names of its submodules.
    """
    left = set(blocks)

    def ran(name: str) -> Any:
        def hook(*_: Any) -> None:
            left.discard(name)
            if not left:
                torch.set_grad_enabled(False)

        return hook

    with torch.enable_grad(), ExitStack() as stack:  # which restores the caller's mode at its end
        for name in blocks:
            stack.callback(network.get_submodule(name).register_forward_hook(ran(name)).remove)
        yield


def score_with_features(
    policy: Guidance,
    network: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Mapping[str, Any],
    u: Tensor,
    taps: Sequence[str],
    differentiable: bool = False,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """A guided x0-prediction, and features out of the forward with the conditions that it needs anyway.

    The features have a graph to ``x_t``; the prediction has one if ``differentiable``. With taps the unconditional
    branch is a call of its own, so that features of it are neither computed with a graph nor differentiated.

    Args:
        policy: classifier-free guidance.
        network: teacher or fake score.
        x_t: noisy samples, (B, ...).
        t: native times, (B,).
        cond: conditioning by keyword.
        u: one uniform number per sample, (B,), for random guidance.
        taps: blocks whose outputs are wanted; none for the prediction alone.
        differentiable: whether the prediction keeps its graph.

    Returns:
        y (B, ...) and the features by name.
    """
    if not taps:
        return policy(network, x_t, t, cond, u).x0, {}
    w = policy.scales(t, u)
    told = per_sample(w, x_t) if policy.needs_null and is_told(network) else None
    with nullcontext() if differentiable else graph_until(network.network, taps):
        prediction = network(x_t, t, cond, taps=taps, guidance=told)
    x0 = prediction.x0 if differentiable else prediction.x0.detach()
    if policy.needs_null and told is None:
        without = network(x_t, t, network.null_cond(cond)).x0
        x0 = combined(x0, without, w)
    return x0, prediction.features


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

    def heads(self, features: Mapping[str, Tensor], cond: Mapping[str, Any]) -> Tensor:
        """Logits of the discriminator heads, (B, n).

        Args:
            features: by tap, each (B, ...).
            cond: conditioning by keyword, of which heads may be told the class.
        """
        assert self.discriminator is not None
        told = getattr(self.discriminator, "num_classes", None) is not None  # heads of a subclass may know of none
        return self.discriminator(features, cond.get("class_labels")) if told else self.discriminator(features)

    def idle_heads(self) -> Tensor:
        """Zero, with zero gradients for the heads: their optimizer steps alike on one process and on many."""
        assert self.discriminator is not None
        like = next(self.discriminator.parameters())
        shapes = self.discriminator.shapes.items()
        features = {tap: torch.zeros(1, *shape).to(like) for tap, shape in shapes}
        return 0.0 * self.heads(features, {"class_labels": torch.zeros(1, dtype=torch.long, device=like.device)}).sum()

    def logits(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """Logits at noisy samples, (B, n), by a forward of the feature network up to its last tap."""
        assert self.gan is not None
        return self.heads(self.gan.tapped(self.feature_network, x_t, t, cond), cond)

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
        return self.generator_term(self.logits(x_s, s, batch.cond), s, batch, weight)

    def generator_term(
        self, logits: Tensor, s: Tensor, batch: Batch, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The generator's side, of logits that are there.

        Args:
            logits: of student samples at times ``s``, (B, n), with graph.
            s: native times, (B,).
            batch: conditions; data for the relativistic loss.
            weight: factor per sample, (B,).
        """
        assert self.gan is not None
        real = self.real_logits(batch, s) if self.gan.kind == "relativistic" else None
        return {"gan": generator_loss(logits, self.gan.kind, real=real, weight=weight)}

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
