"""SlimFlow: rectified flow for students that are smaller than their teacher (arXiv:2407.12718)."""

from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import distance
from lightning_distill.losses.rectified import Annealing, annealed_noise, annealing
from lightning_distill.methods.base import Terms
from lightning_distill.methods.guards import check_schedule
from lightning_distill.methods.knowledge_distillation import InstaFlow
from lightning_distill.methods.perceiving import perceiving_calls
from lightning_distill.methods.reflow import Reflow
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import FlowMatching

__all__ = ["SlimFlow", "SlimFlowDistillation"]


class SlimFlow(Reflow):
    """Reflow that begins as plain flow matching, since a smaller network cannot begin as the teacher.

        L = E_t | v(x_t, t) - (eps' - x0) |^2,     eps' = sqrt(1 - r^2) eps + r eps_new,     r from 1 to 0

    Args:
        teacher: the larger model that made the pairs.
        annealing_updates: student updates until r is 0.
        annealing_kind: how r falls.
        flip: share of pairs whose noise and data are both mirrored left to right (images only).
        **kwargs: see ``Reflow``; ``student=Explicit(...)`` is the smaller network.

    Notes:
        The exponential share reaches 0 at its last update; the released code's, e^(-k / total), never does. Pairs are
        mirrored one by one, there a batch at once.
    """

    paper = "2407.12718"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        annealing_updates: int = 50_000,
        annealing_kind: Annealing = "linear",
        flip: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if annealing_updates < 0 or not 0.0 <= flip <= 1.0:
            raise ValueError(
                f"annealing_updates={annealing_updates} must not be negative, and flip={flip} is a share from 0 to 1."
            )
        annealing(0, annealing_updates, annealing_kind)
        self.annealing_updates = annealing_updates
        self.annealing_kind: Annealing = annealing_kind
        self.flip = flip

    def check_configuration(self) -> None:
        """Only images have a left and a right."""
        super().check_configuration()
        if self.flip and len(self.sample_shape) != 3:
            raise ValueError(
                f"flip={self.flip:g} mirrors images (C, H, W), and samples have the shape {self.sample_shape}; set "
                "flip=0."
            )

    def on_fit_start(self) -> None:
        """Say so where the run ends before pairs are what is learned."""
        super().on_fit_start()
        check_schedule(self, "annealing_updates", self.annealing_updates, "noise and data are paired anew till the end")

    def coupled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's pairs with a share of fresh noise."""
        noise, x0 = self.pairs(batch)
        share = annealing(self.draws.update, self.annealing_updates, self.annealing_kind)
        if share:
            noise = annealed_noise(noise, self.draws.normal("fresh", noise.shape), share)
        if self.flip:
            mirrored = (self.draws.uniform("flip", batch.size) < self.flip)[:, None, None, None]
            noise, x0 = (torch.where(mirrored, x.flip(-1), x) for x in (noise, x0))
        return noise, x0


class SlimFlowDistillation(InstaFlow):
    """One step from a straightened flow, which also says what it makes of the student's own jumps.

        L = d( x0_S(eps), x0 ) + d( x0_S(z), sg x0_T(x_t, t) ),     x_t = (1 - t) x0_S(z) + t z,   t in [.2, .8]

    The second term has fresh noise z at every update, so that a few stored pairs are not learned by heart.

    Args:
        teacher: the straightened flow, the student of ``SlimFlow`` or ``Reflow`` (``RunDenoiser(path)``).
        **kwargs: see ``InstaFlow``; the weight of the second term is ``student/guidance``, 1 by default.

    Notes:
        The released code takes one step of the teacher from a point of the student's line to data and compares
        velocities eps - x0; here the end points are compared, whose difference is the same.
    """

    paper = "2407.12718"

    def student_loss(self, batch: Batch) -> Terms:
        """Pairs, and the teacher's correction of jumps from fresh noise."""
        terms = super().student_loss(batch)
        n = batch.size
        z = self.draws.normal("fresh", (n, *self.sample_shape))
        start = torch.full((n,), self.student_times[0], dtype=torch.float64, device=z.device)
        scale = self.told_scale(start)  # that of the guided teacher below, not the pairs'
        made = self.student(self.process.prior(z, self.student_times[0]), start, batch.cond, guidance=scale).x0
        t = 0.2 + 0.6 * self.draws.uniform("t", n).double()
        x = FlowMatching().add_noise(made.detach(), z, t)
        target = self.guided_teacher(batch)(*self.native(x, t)).x0
        terms.losses["guidance"] = distance(made, target, self.metric, self.huber).mean()
        return terms

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        return {"student": {"student": 2, "teacher": self.solver_calls + 1 + perceiving_calls(self.perceptual)}}
