"""SwiftBrush: one-step text-to-image by variational score distillation (arXiv:2312.05239)."""

from typing import Any

from lightning_distill.guidance import Guidance
from lightning_distill.methods.vsd import VSD
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["SwiftBrush"]


class SwiftBrush(VSD):
    """Variational score distillation of a generator, with the same guidance of teacher and fake score; prompts only.

        grad_theta = E_t[ sigma_t^2 (eps_T^w(x_t) - eps_F^w(x_t)) dx/dtheta ],     eps^w = eps_u + w (eps_c - eps_u)

    The critic minimises |alpha_t (eps_F - eps)|^2, its condition dropped now and then so that it can be guided. With
    ``guidance=RandomGuidance(low, high)`` both scales are one random number per sample (PG-SB of SNOOPI,
    arXiv:2412.02687).

    Args:
        teacher: the pretrained model.
        guidance: of teacher and fake score; the released code has 7.5.
        fake_guidance: of the fake score, None for that of the teacher (``Guidance(1)`` makes it VSD's).
        critic_space: space of the critic's squared error.
        critic_dropout: share of dropped conditions in the critic's training, where the fake score is guided.
        **kwargs: see ``VSD``, ``FakeScoreMethod`` and ``DistillationModule``.
    """

    paper = "2312.05239"
    learns_from = "teacher alone"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        guidance: Guidance | None = None,
        fake_guidance: Guidance | None = None,
        critic_space: str | None = "scaled_epsilon",
        critic_dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        fake_guidance = fake_guidance or guidance
        guided = fake_guidance is not None and fake_guidance.needs_null
        super().__init__(
            teacher,
            guidance=guidance,
            fake_guidance=fake_guidance,
            critic_space=critic_space,
            critic_dropout=critic_dropout if guided else 0.0,
            **kwargs,
        )
