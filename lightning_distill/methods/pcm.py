"""Phased consistency models (arXiv:2405.18407)."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import PairWeight, consistency_loss, pair_weight, phase_edges
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import SegmentMap, segment_end
from lightning_distill.processes import expand
from lightning_distill.samplers import transport
from lightning_distill.times import t_min

__all__ = ["PCM"]


class PCM(ConsistencyDistillation):
    """Consistency within phases: every point of a phase is carried to the phase's own end, deterministically.

        f_m(x, t) = DDIM(x, x0(x, t), t -> s_m),     L = d( f_m(x_t, t), sg f'_m(x_r, r) ),   s_m <= r < t     (Eq. 5-6)

    Args:
        teacher: the pretrained model.
        num_steps: M, the number of phases and of the student's steps.
        intervals: solver steps of all phases together.
        solver: ``euler`` (DDIM) or ``heun``.
        metric: distance d.
        weight: w(t, r).
        **kwargs: see ``ConsistencyDistillation`` and ``DistillationModule``; times and sampler follow from the phases.

    Notes:
        f_m is the identity at s_m by construction; in the target it is set by hand, as in the released code, there and
        at the end of the grid.
        The adversarial consistency loss is left out.
    """

    paper = "2405.18407"
    samplers = ("ode",)
    capability = "segments"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        num_steps: int = 4,
        intervals: int = 40,
        solver: Literal["euler", "heun"] = "euler",
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "pseudo_huber_elementwise",
        weight: PairWeight = "one",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            intervals=intervals,
            solver=solver,
            metric=metric,
            weight=weight,
            num_steps=num_steps,
            student_times=None,
            sampler="ode",
            boundary="plain",
            **kwargs,
        )

    def build_roles(self) -> None:
        """The student; its times are the edges of the phases."""
        super().build_roles()
        self.edges = self._given_times = phase_edges(self.grid()[:-1], self._num_steps)

    def student_loss(self, batch: Batch) -> Terms:
        """Distance of the two ends of a pair within its phase."""
        assert self.edges is not None
        x0 = self.data(batch)
        t, r = self.pair_times(batch.size)
        eps = self.draws.normal("noise", x0.shape)
        x_t = self.process.add_noise(x0, eps, t)
        end, scale = segment_end(t, self.edges), self.told_scale(t)
        x_r = self.earlier(x_t, t, r, batch, eps)
        online = transport(SegmentMap(self.student, self.edges, batch.cond, scale)(x_t, t), end)
        with torch.no_grad():
            target = self.carried(x_r, r, end, batch, scale)
        weight = pair_weight(self.weight, t, r, self.process, self.student.sigma_data)
        loss = consistency_loss(online, target, weight, self.metric, self.huber)
        return Terms({"consistency": loss}, {"mse": (online.detach() - target).square().mean()})

    def carried(self, x_r: Tensor, r: Tensor, end: Tensor, batch: Batch, scale: Tensor | None) -> Tensor:
        """The target: x_r carried to the end of the phase, or x_r where it is there."""
        network = self.student if self.target_name is None else self.sampling_network(self.target_name)
        moved = transport(network(x_r, r, batch.cond, guidance=scale), end)
        inside = (r > end) & (r > t_min(self.process))
        return torch.where(expand(inside, x_r).bool(), moved, x_r)
