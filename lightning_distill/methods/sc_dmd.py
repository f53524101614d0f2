"""SC-DMD: distribution matching with self-consistency of endpoints (Salt, arXiv:2604.03118)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.methods.base import Terms
from lightning_distill.methods.dmd2 import DMD2
from lightning_distill.methods.rollout import Rollout
from lightning_distill.networks.modes import evaluation_mode
from lightning_distill.processes import expand
from lightning_distill.samplers import transport

__all__ = ["SCDMD"]


class SCDMD(DMD2):
    """DMD2 whose student's long step ends where two short ones do.

        SC = mean | Phi(t -> s) x_t - sg[ Phi(m -> s) Phi(t -> m) x_t ] |^2,     t > m > s

    Phi is the deterministic step of the student. m is the next time of the student's list and s the one after it, so
    that any sub-list of the list is a good schedule. The last step has nothing to be consistent with.

    All settings are those of ``DMD2``; the default weight of ``student/consistency`` is .1.

    Notes:
        Reconstructed from the paper's description: the weight and the choice of times are ours, the paper's were not
        at hand. The rollout's own prediction is the long step; the two short ones have no dropout.
        Its cache-aware features for video are not part of this method.
    """

    paper = "2604.03118"
    learns_from = "teacher alone; data for gan"
    default_loss_weights: ClassVar[Mapping[str, float]] = {**DMD2.default_loss_weights, "student/consistency": 0.1}

    def rollout_terms(self, rollout: Rollout, batch: Batch) -> Terms:
        """DMD2's terms and the defect of composition."""
        terms = super().rollout_terms(rollout, batch)
        terms.losses["consistency"] = self.defect(rollout, batch)
        return terms

    def defect(self, rollout: Rollout, batch: Batch) -> Tensor:
        """SC of a rollout with graph."""
        times = torch.tensor([*self.student_times, 0.0, 0.0], dtype=torch.float64, device=rollout.x0.device)
        middle, end = times[rollout.steps + 1], times[rollout.steps + 2]
        divided = middle > 0
        # a step of length 0 for the last, which is not divided: every update costs the same
        middle = torch.where(divided, middle, rollout.prediction.t)
        with torch.no_grad(), self.told_student(), evaluation_mode(self.student):
            x_m = transport(rollout.prediction, middle)
            composed = transport(self.student(x_m, middle, batch.cond), end)
        defect = transport(rollout.prediction, end) - composed
        return (expand(divided.to(defect), defect) * defect.square()).mean()

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        counts["student"]["student"] += 1
        return counts
