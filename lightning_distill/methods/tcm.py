"""Truncated consistency models (arXiv:2410.14895)."""

from typing import Any

import torch

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import distance, ect_target, pair_weight
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_training import ECT
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import expand
from lightning_distill.time_coverage import restricted

__all__ = ["TCM"]


class TCM(ECT):
    """Second stage of consistency training: the noisy times alone, held at t' by the frozen model of the first.

        f(x, t) = f_1(x, t) for t < t',   f_student(x, t) else
        L = E_{t > t'} w(t, r) d( f(x_t, t), sg f(x_r, r) ) + w_b w(t', r') d( f(x_t', t'), f_1(x_r', r') )     (Eq. 8)

    The student spends no capacity on denoising; without the boundary term it could forget the data.

    Args:
        teacher: the consistency model of the first stage (``RunDenoiser``, a checkpoint), f_1.
        boundary: t' in native time; None is where sigma / alpha = 1.
        boundary_share: share of the samples at t'; both terms are means over their own samples.
        training_times: distribution of t before it is cut off below t', see ``ECT``.
        first_stage: stage of the schedule of r(t), high from the start.
        **kwargs: see ``ECT``. The default weight w_b of ``student/boundary`` is .1; the student's times must not lie
            below t'.

    Notes:
        At t' the pair is one like the others, whose earlier time r' = r(t') is the first stage's, as in the released
        code (NVlabs/TCM, b132239).
        The paper draws log t from a Student t distribution.
    """

    paper = "2410.14895"
    default_loss_weights = {"student/boundary": 0.1}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        boundary: float | None = None,
        boundary_share: float = 0.25,
        first_stage: int = 7,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, first_stage=first_stage, **kwargs)
        if not 0.0 <= boundary_share < 1.0:
            raise ValueError(f"boundary_share={boundary_share}: give a share from 0 to below 1.")
        self._given_boundary = boundary
        self.boundary_share = boundary_share

    def check_configuration(self) -> None:
        """The student is trained at noisy times alone."""
        super().check_configuration()
        equal = self.process.t_from_log_snr(torch.zeros((), dtype=torch.float64))
        #: t' in native time
        self.boundary_time = float(equal) if self._given_boundary is None else self._given_boundary
        if self.student_times[-1] < self.boundary_time:
            raise ValueError(
                f"the student is trained for times of at least {self.boundary_time:.4g} and would be sampled at "
                f"{self.student_times[-1]:.4g}; give student_times above it, or a lower boundary."
            )

    def student_loss(self, batch: Batch) -> Terms:
        """Consistency above t', and agreement with the first stage at t'."""
        x0, n = self.data(batch), batch.size
        edge = torch.full((n,), self.boundary_time, dtype=torch.float64, device=x0.device)
        top = torch.full_like(edge, self.process.t_max)
        t = restricted(self.training_times, self.draws.uniform("t", n), edge, top, self.process)
        at_edge = self.draws.uniform("edge", n) < self.boundary_share
        t = torch.where(at_edge, edge, t)
        r = self.earlier_times(t)
        eps = self.draws.normal("noise", x0.shape)
        x_t, x_r = self.process.add_noise(x0, eps, t), self.process.add_noise(x0, eps, r)
        with self.shared_dropout(x_t):
            online = self.function(self.student, batch, None)(x_t, t).x0
        own = self.target(x_r, r, batch, None)
        with torch.no_grad():
            first = ect_target(self.function(self.require_teacher(), batch, None)(x_r, r).x0, x0, r)
        frozen = r < edge  # always at the edge itself
        target = torch.where(expand(frozen, x0).bool(), first, own)
        value = distance(online, target, self.metric, self.huber)
        value = value * pair_weight(self.weight, t, r, self.process, self.student.sigma_data).to(value)
        zero, share = torch.zeros_like(value), self.boundary_share
        terms = {"consistency": torch.where(at_edge, zero, value).mean() / (1.0 - share)}
        if share:
            terms["boundary"] = torch.where(at_edge, value, zero).mean() / share
        return Terms(terms, {"mse": (online.detach() - target).square().mean(), "frozen": frozen.float().mean()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        return {"student": {"student": 2 if self.target_name is None else 1, "teacher": 1}}
