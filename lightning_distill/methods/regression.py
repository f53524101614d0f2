"""Regression of a one-step map on stored noise-image pairs, as a part of methods."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.data.checksums import verify_stores
from lightning_distill.data.loader import Source
from lightning_distill.data.pairs import open_pairs
from lightning_distill.data.store import Store
from lightning_distill.data.trajectories import StoredTrajectories, check_teacher
from lightning_distill.guidance import is_told
from lightning_distill.methods.perceiving import Perceptual, check_perceptual, perceived
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.metrics.lpips_diversity import PerceptualDistance

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

__all__ = ["PairRegression"]


class PairRegression:
    """Squared or perceptual distance between the student's first step and what the teacher's solver made.

        mean distance( G(sigma z, t_init), x_ref ),     (z, x_ref) from a store or a file

    Args:
        source: store of ``lightning-distill trajectories``, or safetensors file, see ``data.pairs.load_pairs``; or
            what the teacher is to solve.
        distance: LPIPS, as in DMD; that of the teacher's features is added to the mean squared error; None is the
            mean squared error alone.
        conditions: store of the embeddings with which the teacher made the pairs, for text models.
        allow_other_teacher: accept a store whose teacher is not the method's.
        verify: compare the shards of stores with their checksums before training.
    """

    def __init__(
        self,
        source: str | SolvedPairs,
        distance: Perceptual | None = None,
        conditions: str | None = None,
        allow_other_teacher: bool = False,
        verify: bool = True,
    ) -> None:
        self.source = source
        self.verify = verify
        self._pairs: Source | None = None if isinstance(source, SolvedPairs) else open_pairs(source, conditions)
        self.distance = distance
        self._teacher_known = allow_other_teacher
        if isinstance(distance, PerceptualDistance):
            distance.check()

    def check(self, module: "DistillationModule") -> None:
        """The distance can be computed, and pairs that are not stored can be solved.

        Raises:
            ValueError: weights or blocks of the distance are missing, or the teacher cannot make pairs.
        """
        if isinstance(self.source, SolvedPairs):
            self.source.check(module)
        check_perceptual(self.distance, module)

    def prepare(self) -> None:
        """Refuse damaged shards; for one process per machine, before training.

        Raises:
            ValueError: a shard of the pairs or of their conditions does not match its checksum.
        """
        stores: list[Store] = []
        if isinstance(self._pairs, StoredTrajectories):
            stores = self._pairs.stores
        elif isinstance(self.source, SolvedPairs) and self.source.conditions is not None:
            stores = [Store(self.source.conditions)]
        if self.verify:
            verify_stores(stores, "regression_verify=false")

    def pairs(self, module: "DistillationModule") -> Source:
        """All pairs; solved, or their teacher compared, at the first call: the networks exist then."""
        if self._pairs is None:
            assert isinstance(self.source, SolvedPairs)
            self._pairs = self.source.solve(module)
        if not self._teacher_known:
            if isinstance(self._pairs, StoredTrajectories):
                check_teacher(self._pairs.key, module, str(self.source), "regression_allow_other_teacher")
            self._teacher_known = True
        return self._pairs

    def loss(self, module: "DistillationModule", n: int) -> Tensor:
        """Mean over n pairs, drawn with replacement by the module's current draws.

        Args:
            module: owner of the student.
            n: number of pairs.

        Raises:
            ValueError: the pairs of a store were made by another teacher.
        """
        source = self.pairs(module)
        total = len(source)
        rows = (module.draws.uniform("pairs", n) * total).long().clamp_max(total - 1).cpu()
        pairs = source.gather(rows, 0)
        assert pairs.noise is not None
        assert pairs.x0 is not None
        cond = {k: v.to(module.device) for k, v in pairs.cond.items()}
        start = module.process.prior(pairs.noise.to(module.device), module.student_times[0])
        t = torch.full((n,), module.student_times[0], dtype=torch.float64, device=module.device)
        x = module.student(start, t, cond, guidance=self._scale(module, pairs, n)).x0
        reference = pairs.x0.to(x)
        if isinstance(self.distance, PerceptualDistance):
            return perceived(self.distance, module, x, reference, cond).mean()
        error = (x - reference).square().mean()
        if self.distance is None:
            return error
        return error + perceived(self.distance, module, x, reference, cond).mean()

    def _scale(self, module: "DistillationModule", pairs: Batch, n: int) -> Tensor | None:
        """Scales with which the pairs were made, (n,), for a student that embeds one; None for its default."""
        if not module.student.embeds_guidance:
            return None
        if isinstance(self.source, SolvedPairs):
            if not getattr(module, "_tells_scale", True):  # nor is it told one where it is sampled
                return None
            scale = self.source.scale(module)
            if scale == 1.0 and is_told(module.require_teacher()):  # which was told its default
                return None
            return torch.full((n,), scale, dtype=torch.float64, device=module.device)
        stored = pairs.predictions.get("scale")
        return None if stored is None else stored.to(module.device, torch.float64)
