"""Pairs of noise and sample that the teacher of a run makes at its start."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_distill.batch import Batch
from lightning_distill.data.loader import InMemory
from lightning_distill.data.pairs import single_precision
from lightning_distill.guidance import Guidance, check_guidance
from lightning_distill.times import few_step_times
from lightning_distill.trajectories import SOLVERS, Recipe, trajectory_records

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

__all__ = ["SolvedPairs"]


class SolvedPairs:
    """A few thousand pairs that the run's own teacher solves in its precision, for those who want no store.

    Kept in memory in half precision; classes in turn. A run that is resumed solves them again, the same ones, and every
    process solves all of them: write a store (``lightning-distill trajectories``) where that takes long.

    Args:
        num: number of pairs.
        steps: solver steps per pair.
        solver: name in ``trajectories.SOLVERS``.
        guidance_scale: w; None is the fixed scale of the method's ``guidance``.
        batch_size: pairs solved at once.
        seed: of the noise.

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
    ) -> None:
        if num < 1 or steps < 1 or batch_size < 1:
            raise ValueError(f"SolvedPairs(num={num}, steps={steps}, batch_size={batch_size}): give 1 or more of each.")
        if solver not in SOLVERS:
            raise ValueError(f"SolvedPairs(solver={solver!r}): choose one of {', '.join(SOLVERS)}.")
        self.num, self.steps, self.solver = num, steps, solver
        self.guidance_scale = guidance_scale
        self.batch_size = batch_size
        self.seed = seed

    def check(self, module: "DistillationModule") -> None:
        """The method's teacher can make them.

        Raises:
            ValueError: it needs conditions other than classes, its guidance has no fixed scale, or it cannot be guided.
        """
        check_guidance(module.require_teacher(), Guidance(self._scale(module)))
        if needed := [key for key in module.require_teacher().family.required if key != "class_labels"]:
            raise ValueError(
                f"SolvedPairs knows classes, and the teacher needs {', '.join(needed)}; write a store with "
                "'lightning-distill trajectories --cond ...' and give its folder as regression_pairs."
            )

    def solve(self, module: "DistillationModule") -> InMemory:
        """All pairs, as a ``Source``.

        Args:
            module: owner of the teacher.
        """
        teacher, scale = module.require_teacher(), self._scale(module)
        recipe = Recipe(
            "pairs",
            tuple(few_step_times(teacher.process, self.steps)),
            self.solver,
            (scale, scale),
            seed=self.seed,
            bf16=torch.is_autocast_enabled(module.device.type),
        )
        rank_zero_info(f"the teacher solves {self.num} pairs in {self.steps} steps")
        made = [
            trajectory_records(teacher, recipe, first, min(self.batch_size, self.num - first), module.sample_shape)
            for first in range(0, self.num, self.batch_size)
        ]
        with torch.autocast("cpu", enabled=False):  # which joins no float16
            whole = {key: torch.cat([part[key] for part in made]) for key in made[0]}
        pairs = Batch(x0=whole.pop("x0"), noise=whole.pop("noise"), cond=whole)
        return InMemory(pairs, transform=single_precision)

    def _scale(self, module: "DistillationModule") -> float:
        guidance = getattr(module, "guidance", None)
        if self.guidance_scale is not None or guidance is None:
            return 1.0 if self.guidance_scale is None else self.guidance_scale
        if type(guidance) is not Guidance:
            raise ValueError(
                f"{type(guidance).__name__} has no fixed scale; give SolvedPairs(guidance_scale=...) that of its pairs."
            )
        return guidance.scale
