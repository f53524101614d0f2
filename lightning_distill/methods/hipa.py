"""HiPA: one step by an adapter that restores high frequencies (arXiv:2311.18158)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_distill.losses.high_frequency import high_frequency_distance
from lightning_distill.methods.knowledge_distillation import InstaFlow
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Lora, Role
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["HiPA"]


class HiPA(InstaFlow):
    """A low-rank adapter learns the teacher's samples in one step, the fine detail with a weight of its own.

        L = d( x0_S(eps), x0 ) + w_h | H (x0_S(eps) - x0) |^2,     H removes low spatial frequencies

    A diffusion model's single step has the low frequencies of an image already; the rest is little enough for an
    adapter.

    Args:
        teacher: the pretrained model.
        student: None for ``Lora(rank=8)`` on the teacher's own weights.
        radius: of H, in cycles per pixel, see ``losses.high_frequency.high_pass``.
        metric: see ``InstaFlow``. The distance of the high frequencies is a mean over elements, and so is ``mse``; the
            norm of the whole vector (``pseudo_huber``) is sqrt(D) times as heavy.
        **kwargs: see ``InstaFlow``; default weight of ``student/high_frequency``: 1.

    Notes:
        Reconstructed from a summary of the paper: the filter is a sharp cut in the Fourier transform, of latents where
        the student makes latents; its distance of edges is left out. Give ``perceptual`` for its spatial term.
    """

    paper = "2311.18158"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/high_frequency": 1.0}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        student: Role | None = None,
        radius: float = 0.1,
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "mse",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, student=student or Lora(rank=8), metric=metric, **kwargs)
        if not 0.0 < radius < 0.5 * 2**0.5:
            raise ValueError(f"radius={radius}: give cycles per pixel, above 0 and below .707.")
        self.radius = radius

    def check_configuration(self) -> None:
        """Only images have spatial frequencies."""
        super().check_configuration()
        if len(self.sample_shape) != 3:
            raise ValueError(
                f"HiPA compares spatial frequencies of images (C, H, W), and samples have the shape "
                f"{self.sample_shape}; use InstaFlow with student=Lora(...)."
            )

    def terms_of(self, made: Tensor, goal: Tensor, cond: Mapping[str, Any], n: int) -> dict[str, Tensor]:
        """The distances, that of the high frequencies among them."""
        return {
            **super().terms_of(made, goal, cond, n),
            "high_frequency": high_frequency_distance(made, goal, self.radius).mean(),
        }
