"""Flash-DMD: matching where the student's steps are noisy, a GAN where they are clean (arXiv:2511.20549)."""

from typing import Any

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.methods.dmd2 import DMD2
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import expand

__all__ = ["FlashDMD"]


class FlashDMD(DMD2):
    """Each step of the student has one of DMD2's two terms, by the noise level t at which it starts.

        t >= tau:   matching, which settles what a sample shows
        t <  tau:   the GAN, which settles how real it looks

    Args:
        teacher: the pretrained model.
        switch: tau as a share of t_max; 0 leaves matching alone.
        **kwargs: see ``DMD2``; ``gan`` is needed where a step starts below the switch. ``taps: [input]`` makes it a GAN
            on the samples themselves.

    Notes:
        Reconstructed from the paper's description; its times and weights were not at hand.
        The paper's discriminator sees decoded images without noise; this one is ``gan``'s.
        Its second stage, preference optimisation of the distilled student, is not part of this method.
        Factors are 1 within their half, so that the two terms keep the weights of ``loss_weights``.
    """

    paper = "2511.20549"
    learns_from = "teacher, data"

    def __init__(self, teacher: DenoiserSpec | Denoiser | None = None, *, switch: float = 0.5, **kwargs: Any) -> None:
        super().__init__(teacher, **kwargs)
        if not 0.0 <= switch <= 1.0:
            raise ValueError(f"switch={switch}: give a share of t_max between 0 and 1.")
        self.switch = switch

    def check_configuration(self) -> None:
        """Every step must have a term."""
        super().check_configuration()
        if self.gan is None and self.student_times[-1] < self.switch * self.process.t_max:
            raise ValueError(
                f"the student's step at t={self.student_times[-1]:g} lies below switch={self.switch} and would learn "
                "nothing; give gan=Adversary(...), or switch=0."
            )

    def noisy_half(self, batch: Batch) -> Tensor:
        """1 for samples whose step starts at the switch or above, 0 for the others, (B,)."""
        t = self.rollout(batch, grad=False).prediction.t
        return (t >= self.switch * self.process.t_max).float()

    def sample_factor(self, x: Tensor, batch: Batch) -> Tensor | float:
        """Matching in the noisy half."""
        return expand(self.noisy_half(batch), x)

    def gan_weight(self, batch: Batch) -> Tensor | None:
        """The game in the clean half."""
        return 1.0 - self.noisy_half(batch)
