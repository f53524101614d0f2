"""DMD: one-step diffusion with distribution matching distillation (arXiv:2311.18828)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_distill.batch import Batch
from lightning_distill.losses.score_matching import checked_weight
from lightning_distill.methods.base import Terms
from lightning_distill.methods.fake_score import FakeScoreMethod
from lightning_distill.methods.perceiving import Perceptual, perceiving_calls
from lightning_distill.methods.regression import PairRegression
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["DMD"]


class DMD(FakeScoreMethod):
    """Distribution matching of a one-step student, held to its teacher's ODE by regression on stored pairs.

        grad_theta = E_t[ lambda_t (y_F(x_t) - y_T(x_t)) dx/dtheta ],   lambda_t = alpha_t / mean |x - y_T|   (Eq. 7, 8)
        student:      matching + .25 distance( G(z_ref), x_ref )                                                 (Eq. 9)

    Args:
        teacher: the pretrained model.
        regression_pairs: store of ``lightning-distill trajectories`` (or safetensors file) of noise and what the
            teacher's deterministic sampler made of it, with the guidance of ``guidance``; or ``SolvedPairs``, made at
            the start of the run.
        regression_conditions: store of the embeddings with which the pairs were made, for text models.
        regression_allow_other_teacher: accept a store that another teacher than ``teacher`` made.
        regression_verify: compare the shards of these stores with their checksums before training; each is read once
            per machine, and again when its file has changed.
        regression_distance: LPIPS as in the paper (of images, or of latents with a decoder), or the squared error with
            the distance of the teacher's own features; None is the mean squared error alone.
        weight: lambda, see ``matching_weight``.
        fake_score_steps: critic updates per student update.
        fresh_samples: see ``FakeScoreMethod``; in the paper the critic gets the student's samples (Algorithm 1).
        **kwargs: see ``FakeScoreMethod`` and ``DistillationModule``. The default weight of ``student/regression`` is
            .25.

    Notes:
        The paper draws z for matching and regression from one batch; here pairs are drawn on their own, as many as the
        batch has samples.
        LPIPS of latent students needs ``PerceptualDistance(decoder=PixelDecoder(...))``.
    """

    paper = "2311.18828"
    learns_from = "teacher, stored or solved pairs"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/regression": 0.25}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        regression_pairs: str | SolvedPairs | None = None,
        regression_conditions: str | None = None,
        regression_allow_other_teacher: bool = False,
        regression_verify: bool = True,
        regression_distance: Perceptual | None = None,
        weight: str = "dmd_v1",
        fake_score_steps: int = 1,
        fresh_samples: bool | None = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, fake_score_steps=fake_score_steps, fresh_samples=fresh_samples, **kwargs)
        if regression_pairs is None:
            raise ValueError(
                "DMD learns from stored pairs; give regression_pairs=PATH, a store or safetensors file with noise and "
                "x0, or SolvedPairs, or use DMD2, which needs none."
            )
        self.weight = checked_weight(weight)
        self.regression = PairRegression(
            regression_pairs,
            regression_distance,
            regression_conditions,
            regression_allow_other_teacher,
            regression_verify,
        )

    def prepare_data(self) -> None:
        """Refuse damaged pairs; called in one process per machine."""
        self.regression.prepare()

    def check_configuration(self) -> None:
        """Pairs lead from noise to data in one step."""
        super().check_configuration()
        self.regression.check(self)
        if len(self.student_times) > 1:
            raise ValueError(
                f"DMD distils into one step, but the student has {len(self.student_times)}; use DMD2 for several."
            )

    def student_loss(self, batch: Batch) -> Terms:
        """Score difference at a random time, and regression on pairs."""
        x = self.rollout(batch).x0
        terms = self.matching(x, self.scores(x, batch), self.weight)
        terms.losses["regression"] = self.regression.loss(self, batch.size)
        return terms

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        counts["student"]["student"] += 1
        counts["student"]["teacher"] += perceiving_calls(self.regression.distance)
        return counts
