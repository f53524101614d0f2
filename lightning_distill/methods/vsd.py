"""Variational score distillation, ProlificDreamer's loss, for generators (arXiv:2305.16213)."""

from typing import Any

from lightning_distill.batch import Batch
from lightning_distill.losses.score_matching import checked_weight
from lightning_distill.methods.base import Terms
from lightning_distill.methods.fake_score import FakeScoreMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Lora, Role
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["VSD"]


class VSD(FakeScoreMethod):
    """Variational score distillation: the guided teacher against a LoRA that learns the student's samples; data-free.

        grad_theta = E_t[ w(t) (eps_T(x_t) - eps_F(x_t)) dx/dtheta ],     w(t) = sigma_t^2                       (Eq. 9)

    which is lambda = alpha_t sigma_t on y_F - y_T. The critic denoises in noise space.

    Args:
        teacher: the pretrained model.
        fake_score: None for ``Lora(rank=8)`` on the teacher's backbone.
        weight: lambda, see ``matching_weight``.
        fake_score_steps: critic updates per student update.
        fresh_samples: see ``FakeScoreMethod``; in the paper the critic gets the student's samples (Algorithm 1).
        critic_space: space of the critic's squared error.
        **kwargs: see ``FakeScoreMethod`` and ``DistillationModule``. The paper's teacher has ``guidance`` 7.5.

    Notes:
        The paper moves a set of 3-D scenes and narrows the matching times to [.02, .5] half-way; here a student network
        takes the place of the scenes, and the times stay as they are given.
        The paper has SDS as the special case eps_F = eps; the library does not offer it, because it has no spread.
    """

    paper = "2305.16213"
    learns_from = "teacher alone"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        fake_score: Role | None = None,
        weight: str = "vsd",
        fake_score_steps: int = 1,
        fresh_samples: bool | None = False,
        critic_space: str | None = "epsilon",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            fake_score=fake_score or Lora(rank=8),
            fake_score_steps=fake_score_steps,
            fresh_samples=fresh_samples,
            critic_space=critic_space,
            **kwargs,
        )
        self.weight = checked_weight(weight)

    def student_loss(self, batch: Batch) -> Terms:
        """Score difference at a random time."""
        x = self.rollout(batch).x0
        return self.matching(x, self.scores(x, batch), self.weight)
