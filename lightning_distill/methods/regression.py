"""Regression of a one-step map on stored noise-image pairs, as a part of methods."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_distill.data.pairs import open_pairs
from lightning_distill.data.trajectories import StoredTrajectories, check_teacher
from lightning_distill.methods.perceiving import Perceptual, check_perceptual, perceived
from lightning_distill.metrics.lpips_diversity import PerceptualDistance

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

__all__ = ["PairRegression"]


class PairRegression:
    """Squared or perceptual distance between the student's first step and what the teacher's solver made.

        mean distance( G(sigma z, t_init), x_ref ),     (z, x_ref) from a store or a file

    Args:
        path: store of ``lightning-distill trajectories``, or safetensors file, see ``data.pairs.load_pairs``.
        distance: LPIPS, as in DMD; that of the teacher's features is added to the mean squared error; None is the
            mean squared error alone.
        conditions: store of the embeddings with which the teacher made the pairs, for text models.
        allow_other_teacher: accept a store whose teacher is not the method's.
    """

    def __init__(
        self,
        path: str,
        distance: Perceptual | None = None,
        conditions: str | None = None,
        allow_other_teacher: bool = False,
    ) -> None:
        self.path = path
        self.pairs = open_pairs(path, conditions)
        self.distance = distance
        self._teacher_known = allow_other_teacher
        if isinstance(distance, PerceptualDistance):
            distance.check()

    def check(self, module: "DistillationModule") -> None:
        """The distance can be computed.

        Raises:
            ValueError: its weights or blocks are missing.
        """
        check_perceptual(self.distance, module)

    def loss(self, module: "DistillationModule", n: int) -> Tensor:
        """Mean over n pairs, drawn with replacement by the module's current draws.

        Args:
            module: owner of the student.
            n: number of pairs.

        Raises:
            ValueError: the pairs of a store were made by another teacher.
        """
        if not self._teacher_known:  # at the first update: the networks exist now
            if isinstance(self.pairs, StoredTrajectories):
                check_teacher(self.pairs.key, module, self.path)
            self._teacher_known = True
        total = len(self.pairs)
        rows = (module.draws.uniform("pairs", n) * total).long().clamp_max(total - 1).cpu()
        pairs = self.pairs.gather(rows, 0)
        assert pairs.noise is not None
        assert pairs.x0 is not None
        cond = {k: v.to(module.device) for k, v in pairs.cond.items()}
        start = module.process.prior(pairs.noise.to(module.device), module.student_times[0])
        t = torch.full((n,), module.student_times[0], dtype=torch.float64, device=module.device)
        x = module.student(start, t, cond).x0
        reference = pairs.x0.to(x)
        if isinstance(self.distance, PerceptualDistance):
            return self.distance(x, reference).mean()
        error = (x - reference).square().mean()
        if self.distance is None:
            return error
        return error + perceived(self.distance, module, x, reference, cond).mean()
