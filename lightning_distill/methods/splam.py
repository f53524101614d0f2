"""SPLAM: sub-path linear approximation (arXiv:2404.13903)."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.segments import sub_path
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation, Metric, Pair
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["SPLAM"]


class SPLAM(ConsistencyDistillation):
    """Consistency of all points on the line between two neighbours with the earlier one of them.

        x_r = solver step of the teacher from x_t,     x_gamma = (1 - gamma) x_r + gamma x_t,     gamma ~ U[0, 1]
        L = d( f(x_gamma, gamma, t), sg f'(x_r, 1, r) )

    The interpolation is that of ``losses.segments.sub_path``. The error of a pair grows from 0 at gamma = 0 to that of
    consistency distillation at gamma = 1, so that the student meets targets of every distance.

    Args:
        teacher: the pretrained model.
        intervals: solver steps of the whole grid.
        solver: ``euler`` (DDIM) or ``heun``.
        metric: distance d.
        **kwargs: see ``ConsistencyDistillation``. A student that embeds a scale and the teacher does not
            (``student=TwoTime(kind=None, guidance=True)``) is told gamma, and 1 when it is sampled; one of a teacher
            that embeds guidance is told that of ``guidance`` and no gamma.

    Notes:
        Reconstructed: the paper's network is told gamma and the time t of the grid. Here it is told the time at which
        x_gamma has its own noise level, which the pretrained embedding knows; told gamma beside that, it knows t too.
        The paper's line is linear in sigma / alpha, see ``sub_path``.
        The weight w(t, r) goes with the two ends of the sub-path.
    """

    paper = "2404.13903"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        intervals: int = 50,
        solver: Literal["euler", "heun"] = "euler",
        metric: Metric = "pseudo_huber_elementwise",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, intervals=intervals, solver=solver, metric=metric, **kwargs)
        self._tells_share = False

    def build_roles(self) -> None:
        """The student; a scale that it embeds and the teacher does not is gamma."""
        super().build_roles()
        self._tells_share = self.student.embeds_guidance and not self.require_teacher().embeds_guidance
        if self._tells_share:
            self._tells_scale = False
            self.student.family = replace(self.student.family, guidance_scale=1.0)

    def pair(self, batch: Batch) -> Pair:
        """A point between two neighbours, and the earlier of them."""
        pair = super().pair(batch)
        share = self.draws.uniform("share", batch.size)
        x, s = sub_path(pair.x_t, pair.t, pair.x_r, pair.r, share, self.process)
        told = share if self._tells_share else pair.scale
        return replace(pair, x_t=x, t=s, scale=told, gap=(pair.t, pair.r))

    def ends(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Where f leads from both points; the earlier one is a whole step's."""
        told = pair.scale
        with self.shared_dropout(pair.x_t):
            online = self.function(self.student, pair.batch, told)(pair.x_t, pair.t).x0
        if self._tells_share and told is not None:
            told = torch.ones_like(told)
        return online, self.target(pair.x_r, pair.r, pair.batch, told)
