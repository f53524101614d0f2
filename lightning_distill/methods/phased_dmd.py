"""Phased DMD: distribution matching within intervals of noise levels (arXiv:2510.27684)."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from lightning_distill.batch import Batch
from lightning_distill.losses.score_matching import checked_weight, matching_weight, score_difference
from lightning_distill.methods.base import Terms
from lightning_distill.methods.subinterval import SubintervalMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import TimeExperts, experts_at
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import expand

__all__ = ["PhasedDMD"]


class PhasedDMD(SubintervalMethod):
    """The student goes from noise to data in intervals; within each, its samples x_u at the interval's end are matched.

        x_u = alpha_u x0_S + sigma_u eps,     x_t = A x_u + S n,     t in (u, t_max)
        grad_theta = E[ lambda (y_F(x_t) - y_T(x_t)) dx_u/dtheta ]
        fake score:   score of x_t from n                                     (``losses.subinterval``)

    Only the last interval makes data. Intervals are trained one after the other, each on the samples of those before
    it, which suits a student of several experts (``networks.experts.Experts``), one per interval.

    Args:
        teacher: the pretrained model.
        subintervals: number of student steps in each interval, noise first; None for one step each.
        subinterval_updates: student updates of each interval but the last, which has the rest; None trains all at
            once, at a random step.
        weight: lambda; ``dmd`` is 1 / mean |x0_S - y_T| and ``kl`` alpha_t^2 / (alpha_u sigma_t^2), the exact gradient
            in x_u (see ``matching_weight``).
        **kwargs: see ``SubintervalMethod``, ``FakeScoreMethod`` and ``DistillationModule``.

    Notes:
        The paper has a fake score for each interval; here one is told the step (``critic_condition_on``), or is
        given experts of its own by ``fake_score``.
        Several steps in an interval are trained as in DMD2: a random step of it is followed by the jump to its end.
        With one interval it is DMD2.
    """

    paper = "2510.27684"
    learns_from = "teacher alone"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        subintervals: Sequence[int] | None = None,
        subinterval_updates: Sequence[int] | None = None,
        weight: str = "dmd",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        self._given_subintervals = None if subintervals is None else list(subintervals)
        self.subinterval_updates = None if subinterval_updates is None else list(subinterval_updates)
        self.weight = checked_weight(weight)

    @property
    def subintervals(self) -> list[int]:
        """Number of student steps in each interval."""
        return self._given_subintervals or [1] * len(self.student_times)

    def check_configuration(self) -> None:
        """Intervals must hold the student's steps, updates belong to intervals, and experts to one of them."""
        parts, updates = self.subintervals, self.subinterval_updates
        if min(parts) < 1 or sum(parts) != len(self.student_times):
            raise ValueError(
                f"subintervals={parts} must be positive and add up to the student's {len(self.student_times)} steps."
            )
        if updates is not None and (len(updates) != len(parts) - 1 or min(updates, default=1) < 1):
            raise ValueError(
                f"subinterval_updates={updates} gives the updates of each interval but the last; with "
                f"{len(parts)} intervals it has {len(parts) - 1} positive entries."
            )
        super().check_configuration()
        self._check_experts()

    def _check_experts(self) -> None:
        """Raise where a later interval would train an expert of an earlier one again, beside experts of its own."""
        if self.subinterval_updates is None or not isinstance(self.student.network, TimeExperts):
            return
        times, ends = self.student_times, list(accumulate(self.subintervals))
        owners = experts_at(self.student, times)
        used = [set(owners[first:end]) for first, end in zip([0, *ends], ends)]
        if all(a == b or not a & b for a, b in pairwise(used)):
            return
        middles = [f"{0.5 * (times[end - 1] + times[end]) / self.process.t_max:.4g}" for end in ends[:-1]]
        raise ValueError(
            f"steps of the intervals {self.subintervals} go to the experts {owners}, so that an interval would train "
            "an expert of the one before it again (a boundary belongs to the noisier side); give "
            f"Experts(boundaries=[{', '.join(middles)}]), one expert per interval."
        )

    def step_ends(self) -> list[float]:
        """Each step jumps to the end of its interval."""
        ends = list(accumulate(self.subintervals))
        times = [*self.student_times, 0.0]
        return [times[next(end for end in ends if k < end)] for k in range(len(self.student_times))]

    def stops(self) -> list[int] | None:
        """Steps of the interval that is trained at this update."""
        if self.subinterval_updates is None:
            return None
        index = sum(self.draws.update >= until for until in accumulate(self.subinterval_updates))
        ends = [0, *accumulate(self.subintervals)]
        return list(range(ends[index], ends[index + 1]))

    def student_loss(self, batch: Batch) -> Terms:
        """Score difference above the end of the interval."""
        rollout = self.rollout(batch)
        x_u, u = self.where_it_ends(rollout)
        x_t, t, _ = self.noised(x_u.detach(), u, rollout, self.matching_times, "matching")
        scores = self.scores(rollout.x0, batch, noisy=(x_t, t))
        weight = matching_weight(self.weight, rollout.x0, scores.real, t, self.process)
        if self.weight == "kl":
            weight = weight / expand(self.process.alpha(u), x_u)
        loss = score_difference(x_u, scores.real, scores.fake, weight)
        return Terms({"matching": loss}, {"score_gap": scores.gap, "sample_std": x_u.detach().std()})
