"""The score difference beside another objective, from a student update on."""

from typing import Any

from lightning_distill.batch import Batch
from lightning_distill.losses.score_matching import checked_weight
from lightning_distill.methods.base import Terms
from lightning_distill.methods.fake_score import FakeScoreMethod
from lightning_distill.methods.guards import check_schedule
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["AddedMatching"]


class AddedMatching(FakeScoreMethod):
    """Base of methods that add distribution matching on the student's own samples to what they have.

    Args:
        teacher: the pretrained model.
        matching_from: student update from which the score term counts; the fake score is trained before already.
        weight: factor on the score direction, see ``matching_weight``.
        **kwargs: see ``FakeScoreMethod``.

    Raises:
        ValueError: an unknown weight or a negative update.
    """

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        matching_from: int = 0,
        weight: str = "dmd",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if matching_from < 0:
            raise ValueError(f"matching_from={matching_from}: give a student update, 0 for the first.")
        self.matching_from = matching_from
        self.weight = checked_weight(weight)

    def on_fit_start(self) -> None:
        """Say so where the run ends before the score term counts."""
        super().on_fit_start()
        check_schedule(self, "matching_from", self.matching_from + 1, "the score difference has had no say")

    def add_matching(self, terms: Terms, batch: Batch) -> Terms:
        """Put the student term of its own rollout beside what another objective has, once it counts.

        Args:
            terms: of the other objective, which get those of ``matching``.
            batch: conditions and size.

        Returns:
            the same ``terms``.
        """
        if self.draws.update >= self.matching_from:
            x = self.rollout(batch).x0
            added = self.matching(x, self.scores(x, batch), self.weight)
            terms.losses |= added.losses
            terms.diagnostics |= added.diagnostics
        return terms
