"""Phased consistency models (arXiv:2405.18407), and the game that is played at the ends of pairs."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import PairWeight, phase_edges
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation, Metric, Pair
from lightning_distill.methods.end_game import EndGame, Ends
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import SegmentMap, segment_end, segment_start
from lightning_distill.processes import expand
from lightning_distill.samplers import transport
from lightning_distill.times import t_min

__all__ = ["PCM"]


class PCM(EndGame, ConsistencyDistillation):
    """Consistency within phases: every point of a phase is carried to the phase's own end, deterministically.

        f_m(x, t) = DDIM(x, x0(x, t), t -> s_m),     L = d( f_m(x_t, t), sg f'_m(x_r, r) ),   s_m <= r < t     (Eq. 5-6)

    Args:
        teacher: the pretrained model.
        num_steps: M, the number of phases and of the student's steps.
        intervals: solver steps of all phases together.
        solver: ``euler`` (DDIM) or ``heun``.
        metric: distance d.
        weight: w(t, r).
        **kwargs: see ``EndGame`` (``gan``, the adversarial consistency loss, of weight .1), ``ConsistencyDistillation``
            and ``DistillationModule``; times and sampler follow from the phases.

    Notes:
        f_m is the identity at s_m by construction; in the target it is set by hand, as in the released code, there and
        at the end of the grid.
        The last phase ends in clean data, in the released code at the scheduler's timestep 0.
        With ``gan`` student and discriminator are both updated in every cycle; the released code alternates. Its
        student minimises relu(1 - D), which is the hinge loss -D here while D < 1.
    """

    paper = "2405.18407"
    samplers: ClassVar[tuple[str, ...]] = ("ode",)
    capability = "segments"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/gan": 0.1}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        num_steps: int = 4,
        intervals: int = 40,
        solver: Literal["euler", "heun"] = "euler",
        metric: Metric = "pseudo_huber_elementwise",
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

    def training_edges(self) -> list[float]:
        """Edges of the phases at this update."""
        assert self.edges is not None
        return self.edges

    def ends(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Both points carried to the end of their phase; the second without graph."""
        edges = self.training_edges()
        end = segment_end(pair.t, edges)
        with self.shared_dropout(pair.x_t):
            online = transport(SegmentMap(self.student, edges, pair.batch.cond, pair.scale)(pair.x_t, pair.t), end)
        with torch.no_grad():
            return online, self.carried(pair.x_r, pair.r, end, pair.batch, pair.scale)

    def compare(self, pair: Pair, online: Tensor, target: Tensor) -> Terms:
        """Distance of the two ends within their phase, and the game."""
        terms = super().compare(pair, online, target)
        if self.gan is not None:
            terms.losses |= self.play(self.game_ends(pair, online, target))
        return terms

    def game_ends(self, pair: Pair, online: Tensor, target: Tensor) -> Ends:
        """What the discriminator compares: both sides at the end of the phase."""
        end, top = (edge(pair.t, self.training_edges()) for edge in (segment_end, segment_start))
        return Ends(online, self.real_ends(pair.batch, target, end), end, top, pair.batch)

    def carried(self, x_r: Tensor, r: Tensor, end: Tensor, batch: Batch, scale: Tensor | None) -> Tensor:
        """The target: x_r carried to the end of the phase, or x_r where it is there."""
        network = self.student if self.target_name is None else self.sampling_network(self.target_name)
        moved = transport(network(x_r, r, batch.cond, guidance=scale), end)
        inside = (r > end) & (r > t_min(self.process))
        return torch.where(expand(inside, x_r).bool(), moved, x_r)
