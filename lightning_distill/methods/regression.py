"""Regression of a one-step map on stored noise-image pairs, as a part of methods."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_distill.data.pairs import load_pairs
from lightning_distill.metrics.lpips_diversity import PerceptualDistance

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

__all__ = ["PairRegression"]


class PairRegression:
    """Squared or perceptual distance between the student's first step and what the teacher's solver made.

        mean distance( G(sigma z, t_init), x_ref ),     (z, x_ref) from a file

    Args:
        path: safetensors file, see ``data.pairs.load_pairs``.
        distance: perceptual distance; None is the mean squared error.
    """

    def __init__(self, path: str, distance: PerceptualDistance | None = None) -> None:
        self.pairs = load_pairs(path)
        self.distance = distance
        if distance is not None:
            distance.check()

    def loss(self, module: "DistillationModule", n: int) -> Tensor:
        """Mean over n pairs, drawn with replacement by the module's current draws.

        Args:
            module: owner of the student.
            n: number of pairs.
        """
        noise, reference = self.pairs.noise, self.pairs.x0
        assert noise is not None
        assert reference is not None
        rows = (module.draws.uniform("pairs", n) * self.pairs.size).long().clamp_max(self.pairs.size - 1).cpu()
        cond = {k: v[rows].to(module.device) for k, v in self.pairs.cond.items()}
        start = module.process.prior(noise[rows].to(module.device), module.student_times[0])
        t = torch.full((n,), module.student_times[0], dtype=torch.float64, device=module.device)
        x = module.student(start, t, cond).x0
        reference = reference[rows].to(x)
        if self.distance is None:
            return (x - reference).square().mean()
        return self.distance(x, reference).mean()
