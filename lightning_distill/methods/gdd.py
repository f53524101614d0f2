"""GDD and GDD-I: distillation by a GAN against data alone (arXiv:2405.20750)."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lightning_distill.methods.ladd import LADD
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.frozen_features import FrozenFeatures, ImageAdversary
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.times import TimeDistribution, Uniform

__all__ = ["GDD", "GDDI"]


class GDD(LADD):
    """GAN distillation at the level of distributions: the diffusion model is only where the generator starts from.

        student:         softplus(-D(x, c)),     x = G(sigma_max z, c)
        discriminator:   softplus(-D(real, c)) + softplus(D(x, c)) + w_r R1

    D is a projected discriminator: heads at several depths of a frozen network that was trained on images for something
    else. Neither the teacher's predictions nor its noise levels play a part after initialisation.

    Args:
        teacher: the pretrained model, the student's initial weights.
        features: the frozen network and its taps.
        kind: adversarial loss.
        width: channels inside the heads, None for those of the features.
        classes: tell D the class; None where the teacher has classes.
        freeze: regular expressions; parameters of the student whose name one of them matches are not trained.
        r1: gradient penalty on real samples, see ``LADD``.
        **kwargs: see ``LADD`` and ``DistillationModule``.

    Notes:
        Samples are compared at the process' smallest noise level, below what images resolve.
        The paper computes R1 every few updates with a larger weight; here it is computed at each. Both sides of the
        game are means over the batch, of which the released code takes the sum; its penalty is that of the sum of n
        heads' logits, here that of their mean, n^2 times smaller.
        The network of ``features`` must not be one that evaluates the samples.
        D is told the class, as a projection discriminator is (the released code begins with vectors of the classes that
        a classifier has learned, here they are random). It cannot be told a prompt: a student of prompts may ignore
        them, since all that is asked of it is the distribution of all pictures together.
    """

    of_samples_alone = True
    paper = "2405.20750"
    learns_from = "data"
    default_freeze: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        features: FrozenFeatures | None = None,
        kind: str = "logistic",
        width: int | None = None,
        classes: bool | None = None,
        freeze: Sequence[str] | None = None,
        r1: Literal["none", "exact", "approximate"] = "exact",
        **kwargs: Any,
    ) -> None:
        if features is None:
            raise ValueError(
                f"{type(self).__name__} needs features=FrozenFeatures(network, taps), a network that was trained on "
                "images."
            )
        super().__init__(teacher, gan=ImageAdversary(features, kind, width, classes), r1=r1, **kwargs)
        self.features = features
        self.frozen_patterns = list(self.default_freeze if freeze is None else freeze)

    def build_roles(self) -> None:
        """Student with its frozen part, and heads on the features of its samples."""
        super().build_roles()
        network = self.student.network
        matched = [
            name for name, _ in network.named_parameters() if any(re.search(p, name) for p in self.frozen_patterns)
        ]
        if self.frozen_patterns and not matched:
            raise ValueError(f"freeze={self.frozen_patterns} matches no parameter of {type(network).__name__}.")
        for name in matched:
            network.get_parameter(name).requires_grad_(False)
        if not any(p.requires_grad for p in self.student.parameters()):
            raise ValueError(f"freeze={self.frozen_patterns} leaves nothing of the student to train.")

    @property
    def gan_times(self) -> TimeDistribution:
        """The smallest noise level."""
        return Uniform(0.0, 1e-12)


class GDDI(GDD):
    """GDD whose student keeps its convolutions: what is between them is enough to become a one-step generator.

    Args:
        teacher: the pretrained model.
        **kwargs: see ``GDD``; ``freeze`` is the blocks' convolutions and the projections behind attention by default.

    Notes:
        As in the released code the first and the last convolution, shortcuts, and what brings time and class into a
        block are trained.
    """

    default_freeze = (r"(^|\.)(conv\d*|proj|to_out)\.",)
