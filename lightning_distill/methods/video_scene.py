"""VideoScene: one step from a coarse rendering, by consistency below a leap time (arXiv:2504.01956)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.generation import draw_noise
from lightning_distill.losses.leaps import leap_grid
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation, Pair
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import expand

__all__ = ["VideoScene"]


class VideoScene(ConsistencyDistillation):
    """Leap flow: the trajectory begins at a noised rendering, which has the layout already, instead of pure noise.

        x_leap = alpha x_render + sigma eps:     L = d( f(x_t, t), sg f(x_r, r) ),     r < t <= t_leap

    A share of the samples are such starts at t_leap, where the student will be asked; the others are noised data below.

    Args:
        teacher: the pretrained model.
        leap: t_leap as a share of t_max.
        rendering: name of the condition that holds the coarse picture or video, of the samples' shape; None for
            ``noise`` of the batch, ``data`` for the samples themselves.
        rendering_share: share of samples that start from the rendering; a large one starves the times near clean data,
            from which consistency spreads.
        intervals: N, steps of the grid of all times, of which those below t_leap are used.
        **kwargs: see ``ConsistencyDistillation``; the student makes one step from t_leap, see ``leap_from``.

    Notes:
        The paper chooses the leap time of each video by a policy network that is trained as a bandit; here it is one
        number. Reconstructed from the abstract: how states below t_leap are made.
        ``sample`` without a rendering starts at t_leap from noise alone, which has no layout.
    """

    paper = "2504.01956"
    learns_from = "teacher, data, renderings"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        leap: float = 0.6,
        rendering: str | None = None,
        rendering_share: float = 0.25,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if not 0.0 < leap <= 1.0:
            raise ValueError(f"leap={leap}: give a share of t_max above 0, at most 1.")
        if not 0.0 < rendering_share <= 1.0:
            raise ValueError(
                f"rendering_share={rendering_share}: the student is asked at renderings, so give a share above 0."
            )
        if self._given_times is not None or self._num_steps != 1:
            raise ValueError("VideoScene makes one step from its leap time; give leap=... instead of times or steps.")
        self.leap, self.rendering, self.rendering_share = leap, rendering, rendering_share

    def build_roles(self) -> None:
        """The student; its one time is that of the leap."""
        super().build_roles()
        self._given_times = [self.leap * self.process.t_max]

    def grid(self) -> list[float]:
        """Times from t_leap down whose neighbours make pairs."""
        return leap_grid(self.solver_grid(self.intervals), self.leap * self.process.t_max)

    def renderings(self, batch: Batch) -> Tensor:
        """The coarse samples of a batch, (B, ...)."""
        if self.rendering == "data":
            return self.data(batch)
        found = batch.noise if self.rendering is None else batch.cond.get(self.rendering)
        if not isinstance(found, Tensor) or found.shape != self.data(batch).shape:
            where = "Batch(noise=...)" if self.rendering is None else f"cond[{self.rendering!r}]"
            raise ValueError(
                f"VideoScene starts from a coarse rendering of each sample, and the batch has none of their shape in "
                f"{where}; use a data module that yields it."
            )
        return found

    def pair(self, batch: Batch) -> Pair:
        """Noised renderings at t_leap and noised data below, each with the next point of its trajectory."""
        x0, coarse = self.data(batch), self.renderings(batch)
        grid = torch.tensor(self.grid(), dtype=torch.float64, device=x0.device)
        starts = self.draws.uniform("start", batch.size) < self.rendering_share
        t, r = self.pair_times(batch.size)
        t, r = torch.where(starts, grid[0], t), torch.where(starts, grid[1], r)
        eps = self.draws.normal("noise", x0.shape)
        x_t = self.process.add_noise(torch.where(expand(starts, x0).bool(), coarse, x0), eps, t)
        return Pair(x_t, t, self.earlier(x_t, t, r, batch, eps), r, batch, self.told_scale(t))

    @torch.no_grad()
    def leap_from(
        self,
        rendering: Tensor,
        cond: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        weights: str | None = None,
    ) -> Tensor:
        """Samples from coarse renderings, by one network call.

        Args:
            rendering: (n, *shape).
            cond: conditions, n rows.
            generator: of the noise.
            weights: which network; see ``sampling_network``.

        Returns:
            (n, *shape).
        """
        network = self.sampling_network(weights)
        t = torch.full((len(rendering),), self.student_times[0], dtype=torch.float64, device=rendering.device)
        x = self.process.add_noise(rendering, draw_noise(rendering.shape, generator).to(rendering), t)
        return self.function(network, Batch(cond=dict(cond or {}), size=len(x)), None)(x, t).x0
