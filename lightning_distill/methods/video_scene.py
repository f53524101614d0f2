"""VideoScene: one step from a coarse rendering, by consistency below a leap time (arXiv:2504.01956)."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch, as_batch
from lightning_distill.generation import draw_noise
from lightning_distill.losses.leaps import leap_grid
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation, Pair
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.modes import evaluation_mode
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
        rendering: name of the condition that holds the coarse picture or video, of the samples' shape, which networks
            see as well if they know it; None for ``noise`` of the batch, ``data`` for the samples themselves.
        rendering_share: share of samples that start from the rendering; a large one starves the times near clean data,
            from which consistency spreads.
        intervals: N, steps of the grid of all times, of which those below t_leap are used.
        **kwargs: see ``ConsistencyDistillation``; the student makes one step from t_leap, see ``leap_from``.

    Notes:
        The paper chooses the leap time of each video by a policy network that is trained as a bandit; here it is one
        number. Reconstructed from the abstract: how states below t_leap are made.
        ``sample`` leaps from the rendering if ``cond`` has it; else it starts at t_leap from noise alone, which has no
        layout. Stock pipelines start from noise, so that none is written for ``leap`` below 1.
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

    def check_configuration(self) -> None:
        """The leap lies on the grid, and no stock pipeline is promised, which would start from noise alone."""
        super().check_configuration()
        least = self.solver_grid(self.intervals)[-1]
        if self.leap * self.process.t_max <= least:
            raise ValueError(
                f"leap={self.leap:g} is t={self.leap * self.process.t_max:.3g}, and the grid ends at {least:.3g}; give "
                "a larger one, .6 for example."
            )
        for network in (self.student, *self.student_ema.values()):
            assert isinstance(network, Denoiser)
            network.stands_alone &= self.leap == 1.0

    def grid(self) -> list[float]:
        """Times from t_leap down whose neighbours make pairs."""
        return leap_grid(self.solver_grid(self.intervals), self.leap * self.process.t_max)

    def renderings(self, batch: Batch) -> Tensor:
        """The coarse samples of a batch, (B, ...)."""
        if self.rendering == "data":
            return self.data(batch)
        found = batch.noise if self.rendering is None else batch.cond.get(self.rendering)
        shape = (batch.size, *self.sample_shape) if batch.x0 is None else batch.x0.shape
        if not isinstance(found, Tensor) or found.shape != shape:
            where = "Batch(noise=...)" if self.rendering is None else f"cond[{self.rendering!r}]"
            raise ValueError(
                f"VideoScene starts from a coarse rendering of each sample, and the batch has none of their shape in "
                f"{where}; use a data module that yields it."
            )
        return found

    def seen(self, network: Denoiser, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Conditions for a network: without the rendering, unless it is one that the network knows."""
        known = network.family.cond_keys
        if not known:
            parameters = inspect.signature(network.network.forward).parameters
            known = tuple(str(self.rendering) if p.kind is p.VAR_KEYWORD else p.name for p in parameters.values())
        return {key: value for key, value in cond.items() if key != self.rendering or key in known}

    def pair(self, batch: Batch) -> Pair:
        """Noised renderings at t_leap and noised data below, each with the next point of its trajectory."""
        x0, coarse = self.data(batch), self.renderings(batch)
        grid = torch.tensor(self.grid(), dtype=torch.float64, device=x0.device)
        starts = self.draws.uniform("start", batch.size) < self.rendering_share
        t, r = self.pair_times(batch.size)
        t, r = torch.where(starts, grid[0], t), torch.where(starts, grid[1], r)
        eps = self.draws.normal("noise", x0.shape)
        x_t = self.process.add_noise(torch.where(expand(starts, x0).bool(), coarse, x0), eps, t)
        told = replace(batch, cond=self.seen(self.require_teacher(), batch.cond))
        own = replace(batch, cond=self.seen(self.student, batch.cond))
        return Pair(x_t, t, self.earlier(x_t, t, r, told, eps), r, own, self.told_scale(t))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Samples from the renderings of a batch."""
        batch = as_batch(batch)
        return self.leap_from(self.renderings(batch), batch.cond)

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
        x, t = self.starts(rendering, draw_noise(rendering.shape, generator))
        known = self.seen(network, cond or {})
        with evaluation_mode(network):
            return self.function(network, Batch(cond=known, size=len(x)), None)(x, t).x0

    def starts(self, rendering: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Noised renderings at the leap time, (n, ...), and that time, (n,), float64."""
        t = torch.full((len(rendering),), self.student_times[0], dtype=torch.float64, device=rendering.device)
        return self.process.add_noise(rendering, noise.to(rendering), t), t

    def times_in(self, num_steps: int) -> list[float]:
        """As ``StudentSampling.times_in``, where these are the leap time.

        Raises:
            ValueError: other times, at which the student was never trained.
        """
        times = super().times_in(num_steps)
        if times != self.student_times:
            raise ValueError(
                f"num_steps={num_steps} begins at t={times[0]:g}, and this student makes one step from its leap time, "
                f"{self.student_times[0]:.4g}; leave num_steps out, and give the rendering to leap_from."
            )
        return times

    def sample(
        self,
        n: int,
        cond: Mapping[str, Any] | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        weights: str | None = None,
        **options: Any,
    ) -> Tensor:
        """As ``StudentSampling.sample``: one step from the leap time, from the rendering where ``cond`` has it."""
        if cond is not None and self.rendering in cond:
            coarse = self.renderings(Batch(cond=dict(cond), size=n))
            x, _ = self.starts(coarse, draw_noise(coarse.shape, generator) if noise is None else noise)
            noise = x / self.process.prior_std(self.student_times[0])  # of which samplers make x
            cond = self.seen(self.sampling_network(weights), cond)
        return super().sample(n, cond, generator=generator, noise=noise, weights=weights, **options)
