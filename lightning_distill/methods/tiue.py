"""TiUE: one call with one encoder pass and several decoders, by variational score distillation (arXiv:2505.21960)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.methods.base import Terms
from lightning_distill.methods.swiftbrush import SwiftBrush
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Lora, Role
from lightning_distill.networks.shared_encoder import NOISES, SharedEncoder, SharedEncoderDenoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import Capability

__all__ = ["TiUE", "standard_normal_kl"]


def standard_normal_kl(noises: Tensor) -> Tensor:
    """KL( N(m, s^2) || N(0, 1) ) = (m^2 + s^2 - 1 - ln s^2) / 2 of the moments of each predicted noise.

    Zero where a noise has mean 0 and variance 1 over its elements, positive elsewhere.

    Args:
        noises: (B, K, ...), more than one element each.

    Returns:
        scalar: summed over the K noises of a sample, averaged over samples.
    """
    flat = noises.flatten(2)
    mean, variance = flat.mean(2), flat.var(2, correction=0)
    return 0.5 * (mean.square() + variance - 1.0 - variance.log()).sum(1).mean()


class TiUE(SwiftBrush):
    """SwiftBrush for a student that encodes its noise once and decodes at K times in parallel; prompts only.

        grad_theta = E_t[ sigma_t^2 (eps_T^w(x_t) - eps_F^w(x_t)) dx/dtheta ],   x = end of the chain of K decoders
        + .1 sum_k KL( N(mean, var of eps_k) || N(0, 1) )

    Both scores are guided by the same w. One network call and about one network's latency, with K steps' quality.

    Args:
        teacher: the pretrained UNet.
        student: None for ``SharedEncoder(decoders=4)``.
        fake_score: None for ``Lora(rank=64, alpha=108)`` on the teacher's backbone; the released code adapts ``to_q``
            and ``to_v`` alone.
        guidance: w of teacher and fake score, None for 4.5.
        **kwargs: see ``SwiftBrush`` and ``FakeScoreMethod``; default weight of ``student/kl``: .1. The paper's learning
            rates are 1e-6 for the student and 1e-3 for the fake score.

    Notes:
        The paper's decoder times are those of the DDIM scheduler, which begin below t_max; here they begin at t_max.
        The released code sums the KL over the batch of a device (8) and mixes conditions per batch where the critic's
        are dropped; here the KL is a mean over samples, and conditions are dropped per sample.
        The CLIP term, switched off in the paper's runs, is left out.
    """

    paper = "2505.21960"
    learns_from = "teacher alone"
    capability: ClassVar[Capability | None] = "one_step_only"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/kl": 0.1}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        student: Role | None = None,
        fake_score: Role | None = None,
        guidance: Guidance | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            student=student or SharedEncoder(),
            fake_score=fake_score or Lora(rank=64, alpha=108.0),
            guidance=guidance or Guidance(4.5),
            **kwargs,
        )

    def check_configuration(self) -> None:
        """The student is one call from t_max."""
        super().check_configuration()
        if not isinstance(self.student, SharedEncoderDenoiser):
            raise ValueError(
                "TiUE trains a UNet whose encoder is shared by several decoders; give student=SharedEncoder(...), or "
                "use SwiftBrush for a student of another kind."
            )
        if self.student_times != self.student.decoder_times[:1]:
            raise ValueError(
                f"a TiUE student is one call at {self.student.decoder_times[0]:g}, but student_times are "
                f"{self.student_times}; leave num_steps and student_times out and give SharedEncoder(decoders=...)."
            )

    def student_loss(self, batch: Batch) -> Terms:
        """Score difference at a random time, and the moments of the predicted noises."""
        rollout = self.rollout(batch)
        terms = self.matching(rollout.x0, self.scores(rollout.x0, batch), self.weight)
        terms.losses["kl"] = standard_normal_kl(rollout.prediction.features[NOISES])
        return terms
