"""Pairs of noise and sample that the teacher of a run makes at its start."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.data.loader import InMemory, Source
from lightning_distill.data.pairs import single_precision
from lightning_distill.data.trajectories import StoredConditions
from lightning_distill.guidance import Guidance, check_guidance
from lightning_distill.times import few_step_times
from lightning_distill.trajectories import SOLVERS, Recipe, trajectory_records

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

__all__ = ["SolvedPairs"]


class SolvedPairs:
    """A few thousand pairs that the run's own teacher solves in its precision, for those who want no store.

    Kept in memory in half precision; classes, or the conditions of a store, in turn. A run that is resumed solves them
    again, the same ones, and every process solves all of them: write a store (``lightning-distill trajectories``) where
    that takes long.

    Args:
        num: number of pairs.
        steps: solver steps per pair.
        solver: name in ``trajectories.SOLVERS``.
        guidance_scale: w; None is the fixed scale of the method's ``guidance``.
        batch_size: pairs solved at once.
        seed: of the noise.
        conditions: store of ``lightning-distill cache``, for text models; None for classes.
        cond_keys: conditions to take from it; None is all that the teacher knows.

    Raises:
        ValueError: a number out of range, or an unknown solver.
    """

    def __init__(
        self,
        num: int = 2000,
        steps: int = 16,
        solver: str = "euler",
        guidance_scale: float | None = None,
        batch_size: int = 100,
        seed: int = 0,
        conditions: str | None = None,
        cond_keys: Sequence[str] | None = None,
    ) -> None:
        if num < 1 or steps < 1 or batch_size < 1:
            raise ValueError(f"SolvedPairs(num={num}, steps={steps}, batch_size={batch_size}): give 1 or more of each.")
        if solver not in SOLVERS:
            raise ValueError(f"SolvedPairs(solver={solver!r}): choose one of {', '.join(SOLVERS)}.")
        self.num, self.steps, self.solver = num, steps, solver
        self.guidance_scale = guidance_scale
        self.batch_size = batch_size
        self.seed = seed
        self.conditions, self.cond_keys = conditions, cond_keys

    def check(self, module: "DistillationModule") -> None:
        """The method's teacher can make them.

        Raises:
            ValueError: it needs conditions other than classes, its guidance has no fixed scale, or it cannot be guided.
        """
        teacher, stored = module.require_teacher(), self._conditions(module)
        check_guidance(teacher, Guidance(self.scale(module)))
        known = ["class_labels"] if stored is None else stored.names
        if needed := [key for key in teacher.family.required if key not in known]:
            raise ValueError(
                f"SolvedPairs knows {', '.join(known)}, and the teacher needs {', '.join(needed)}; give "
                "SolvedPairs(conditions=...), a store of 'lightning-distill cache' that holds them."
            )

    def solve(self, module: "DistillationModule") -> Source:
        """All pairs, as a ``Source``.

        Args:
            module: owner of the teacher.
        """
        teacher, scale, stored = module.require_teacher(), self.scale(module), self._conditions(module)
        recipe = Recipe(
            "pairs",
            tuple(few_step_times(teacher.process, self.steps)),
            self.solver,
            (scale, scale),
            seed=self.seed,
            bf16=torch.is_autocast_enabled(module.device.type),
        )
        rank_zero_info(f"the teacher solves {self.num} pairs in {self.steps} steps")
        made = []
        for first in range(0, self.num, self.batch_size):
            n = min(self.batch_size, self.num - first)
            cond = None if stored is None else stored.gather(torch.arange(first, first + n))
            made.append(trajectory_records(teacher, recipe, first, n, module.sample_shape, cond))
        with torch.autocast("cpu", enabled=False):  # which joins no float16
            whole = {key: torch.cat([part[key] for part in made]) for key in made[0]}
        pairs = Batch(x0=whole.pop("x0"), noise=whole.pop("noise"), cond=whole)
        solved = InMemory(pairs, transform=single_precision)
        return solved if stored is None else _Conditioned(solved, stored)

    def _conditions(self, module: "DistillationModule") -> StoredConditions | None:
        if self.conditions is None:
            return None
        return StoredConditions.chosen(self.conditions, self.cond_keys, module.require_teacher().family.cond_keys)

    def scale(self, module: "DistillationModule") -> float:
        """Guidance scale w of the pairs; 1 is none, or the default of a teacher that embeds one."""
        guidance = getattr(module, "guidance", None)
        if self.guidance_scale is not None or guidance is None:
            return 1.0 if self.guidance_scale is None else self.guidance_scale
        if type(guidance) is not Guidance:
            raise ValueError(
                f"{type(guidance).__name__} has no fixed scale; give SolvedPairs(guidance_scale=...) that of its pairs."
            )
        return guidance.scale


class _Conditioned:
    """Pairs in memory, and their conditions from a store."""

    def __init__(self, pairs: InMemory, conditions: StoredConditions) -> None:
        self.pairs, self.conditions = pairs, conditions

    def __len__(self) -> int:
        return len(self.pairs)

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        return replace(self.pairs.gather(indices, epoch), cond=self.conditions.gather(indices))
