"""rCM: continuous-time consistency with a score regulariser (arXiv:2510.08431)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_distill.batch import Batch
from lightning_distill.methods.added_matching import AddedMatching
from lightning_distill.methods.base import Terms
from lightning_distill.methods.scm import ContinuousConsistency, LogVariance, PriorWeight
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.tangents import TangentMode
from lightning_distill.times import LogNormal, TimeDistribution

__all__ = ["RCM"]


class RCM(TrajectoryMethod, AddedMatching):
    """sCM on data, which covers all modes, and distribution matching on the student's own samples, which sharpens them.

        L = L_sCM(student) + lambda L_DMD(student rollouts)                                                  (Eq. 10)

    Args:
        teacher: the pretrained model.
        times: distribution of the TrigFlow times of sCM, None for ``LogNormal(.7, 1.6)``.
        tangent: ``jvp`` (exact), ``central``, ``one_sided`` or ``semi``.
        tangent_step: step of differences, None for the default.
        warmup_updates: H of the tangent's warm-up.
        matching_from: student update from which the score term counts; the fake score is trained before already.
        prior_weight: weight of a time in sCM: ``one``, ``trig``, 1 / tan(tau), or ``unit``, see
            ``ContinuousConsistency``.
        adaptive: learn the weights of times against each other as ``SCM`` does, which rCM does not; ``prior_weight``
            should be ``unit`` then, and the weight of ``student/consistency`` 1.
        **kwargs: see ``AddedMatching`` (``weight``), ``FakeScoreMethod`` and ``TrajectoryMethod``. Default weights:
            ``student/consistency`` 100, ``student/matching`` 1.

    Notes:
        The mean over elements takes the place of the released code's sum, in both terms. The tangent is normalised per
        sample and the score difference per element, so that their ratio goes with the number of elements: a 2-D problem
        needs 1 where images have 100.
        The critic's error counts in its network's own prediction by default; the released code weights it as EDM does,
        which is ``critic_space="edm"`` with unit data.
    """

    phases = {"student": ("student", "log_variance"), "fake_score": ("fake_score",)}
    paper = "2510.08431"
    learns_from = "teacher, data"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/consistency": 100.0, "student/matching": 1.0}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        times: TimeDistribution | None = None,
        tangent: TangentMode = "jvp",
        tangent_step: float | None = None,
        warmup_updates: int = 1000,
        matching_from: int = 1000,
        prior_weight: PriorWeight = "one",
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, matching_from=matching_from, **kwargs)
        self.consistency = ContinuousConsistency(
            times or LogNormal(0.7, 1.6), False, tangent, tangent_step, warmup_updates, "rcm", weight=prior_weight
        )
        self.log_variance = LogVariance() if adaptive else None

    def student_loss(self, batch: Batch) -> Terms:
        """The tangent's term and, after the start, the score difference."""
        loss, diagnostics = self.consistency(self, batch, self.log_variance)
        return self.add_matching(Terms({"consistency": loss}, diagnostics), batch)

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        return self.consistency.added_counts(super().forward_counts())
