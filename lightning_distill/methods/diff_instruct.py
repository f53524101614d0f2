"""Diff-Instruct: integral KL minimisation (arXiv:2305.18455)."""

from typing import Any

from lightning_distill.batch import Batch
from lightning_distill.losses.score_matching import checked_weight
from lightning_distill.methods.base import Terms
from lightning_distill.methods.fake_score import FakeScoreMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import EDM
from lightning_distill.times import LogNormal

__all__ = ["DiffInstruct"]


class DiffInstruct(FakeScoreMethod):
    """Integral KL divergence between the student's and the teacher's noisy samples; data-free.

        L(theta) = int w(t) KL(p_S,t || p_T,t) dt,     grad = E_t[ lambda_t (y_F(x_t) - y_T(x_t)) dx/dtheta ]

    with lambda_t = w(t) alpha_t^2 / sigma_t^2. One noise level serves both losses of the paper's code.

    Args:
        teacher: the pretrained model.
        weight: lambda; ``one`` as in the released code, ``kl`` for w = 1 (see ``matching_weight``).
        fake_score_steps: critic updates per student update.
        **kwargs: see ``FakeScoreMethod`` and ``DistillationModule``. For EDM both times are ``LogNormal(-1.2, 1.2)``
            unless given.

    Notes:
        The paper updates the critic before the student, on samples of its own; here a cycle begins with the student,
        and the critic's first update uses the student's samples.
    """

    paper = "2305.18455"
    learns_from = "teacher alone"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        weight: str = "one",
        fake_score_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, fake_score_steps=fake_score_steps, **kwargs)
        self.weight = checked_weight(weight)

    def build_roles(self) -> None:
        """Student and fake score, and the paper's times on its own process."""
        super().build_roles()
        if isinstance(self.process, EDM):
            self.matching_times = self._given_matching_times or LogNormal()
            self.critic_times = self._given_critic_times or LogNormal()

    def student_loss(self, batch: Batch) -> Terms:
        """Score difference at a random time."""
        x = self.rollout(batch).x0
        return self.matching(x, self.scores(x, batch), self.weight)
