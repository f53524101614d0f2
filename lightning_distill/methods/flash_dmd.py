"""Flash-DMD: matching where the student's steps are noisy, a GAN where they are clean (arXiv:2511.20549)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.methods.dmd2 import DMD2
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import expand
from lightning_distill.times import bounded

__all__ = ["FlashDMD"]


class FlashDMD(DMD2):
    """Each step of the student has one of DMD2's two terms, by the noise level t at which it starts.

        t >= tau:   matching, which settles what a sample shows
        t <  tau:   the GAN, which settles how real it looks

    Args:
        teacher: the pretrained model.
        switch: tau as a share of t_max, on EDM of its Karras scale (see ``times.bounded``); 0 leaves matching alone.
        **kwargs: see ``DMD2``; ``gan`` is needed where a step starts below the switch. ``taps: [input]`` makes it a GAN
            on the samples themselves.

    Notes:
        Reconstructed from the paper's description; its times and weights were not at hand.
        The paper's discriminator sees decoded images without noise; this one is ``gan``'s.
        Its second stage, preference optimisation of the distilled student, is not part of this method.
        Factors are 1 within their half, so that the two terms keep the weights of ``loss_weights``. The game is alone
        in its half, so that its default weights are 1 and not DMD2's.
    """

    paper = "2511.20549"
    learns_from = "teacher, data"
    default_loss_weights: ClassVar[Mapping[str, float]] = {
        **DMD2.default_loss_weights,
        "student/gan": 1.0,
        "fake_score/gan": 1.0,
    }

    def __init__(self, teacher: DenoiserSpec | Denoiser | None = None, *, switch: float = 0.5, **kwargs: Any) -> None:
        super().__init__(teacher, **kwargs)
        if not 0.0 <= switch <= 1.0:
            raise ValueError(f"switch={switch}: give a share of t_max between 0 and 1.")
        self.switch = switch
        #: native time of the switch
        self.tau = 0.0

    def build_roles(self) -> None:
        """As usual; then the process is known, and the time of the switch."""
        super().build_roles()
        if self.switch:
            share = torch.tensor(self.switch, dtype=torch.float64)
            # of steps at the switch, rounding must not decide
            self.tau = (1.0 - 1e-9) * float(bounded(self.process, 0.0, 1.0).quantile(share, self.process))

    def check_configuration(self) -> None:
        """Every step must have a term."""
        super().check_configuration()
        if self.gan is None and self.student_times[-1] < self.tau:
            raise ValueError(
                f"the student's step at t={self.student_times[-1]:g} lies below switch={self.switch} and would learn "
                "nothing; give gan=Adversary(...), or switch=0."
            )

    def noisy_half(self, batch: Batch) -> Tensor:
        """1 for samples whose step starts at the switch or above, 0 for the others, (B,)."""
        t = self.rollout(batch, grad=False).prediction.t
        return (t >= self.tau).float()

    def sample_factor(self, x: Tensor, batch: Batch) -> Tensor | float:
        """Matching in the noisy half."""
        return expand(self.noisy_half(batch), x)

    def gan_weight(self, batch: Batch) -> Tensor | None:
        """The game in the clean half."""
        return 1.0 - self.noisy_half(batch)
