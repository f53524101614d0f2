"""AnyFlow: a flow map for any number of steps, and its distillation on its own samples (arXiv:2605.13724)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.flow_maps import balance_weight
from lightning_distill.methods.added_matching import AddedMatching
from lightning_distill.methods.base import Terms
from lightning_distill.methods.mean_flow import MeanFlow
from lightning_distill.methods.rollout import Rollout
from lightning_distill.methods.running import RunningMeans
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Role
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.parameterisations import TrajectoryMap
from lightning_distill.prediction import Prediction
from lightning_distill.samplers import transport
from lightning_distill.tangents import TangentMode
from lightning_distill.times import Shifted, TimeDistribution, few_step_times

__all__ = ["AnyFlow", "AnyFlowOnPolicy", "flow_map_simulation"]


class AnyFlow(RunningMeans, MeanFlow):
    """The first stage: MeanFlow by differences, with a share of the samples for each kind of gap.

        r = t (half of the samples),   r = 0 (a quarter),   any r < t (a quarter)
        u_target = v - (t - r) [u(x + h v, t + h, r) - u(x - h v, t - h, r)] / 2h
        L = |u - sg u_target|^2, times the mean error at r = t over the sample's own where r < t

    Args:
        teacher: the pretrained model; with ``from_data`` only where the student's weights come from.
        student: None for a copy with a gated copy of its time embedding.
        from_data: v is eps - x0 of the pair (the paper) instead of the (guided) teacher's velocity, whose differences
            are free of noise.
        equal_share: share of samples with r = t.
        end_share: share of samples with r = 0.
        balance: weigh samples with r < t by ``balance_weight``; else all count the same.
        balance_decay: factor on the weight of past samples in the mean error at r = t, per update.
        tangent: how the derivative is taken.
        tangent_step: h, .005 in the paper.
        **kwargs: see ``MeanFlow`` and ``TwoTimeMethod``; times are by default uniform and shifted by 5, the paper's for
            Wan.

    Notes:
        The mean error at r = t is that of past updates, so that a batch may be split over ranks; the paper gathers the
        batch. Its further weights of times and its guidance inside the prediction are left out: distil a guided
        teacher with ``from_data=False``.
        Each sample draws which kind of gap it has; the paper counts them off over all ranks.
    """

    paper = "2605.13724"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        student: Role | None = None,
        from_data: bool = True,
        equal_share: float = 0.5,
        end_share: float = 0.25,
        balance: bool = True,
        balance_decay: float = 0.9,
        tangent: TangentMode = "central",
        tangent_step: float | None = 5e-3,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("power", 1.0) != 1.0 or kwargs.get("constant", 1e-2) != 1e-2:
            raise ValueError("AnyFlow weighs errors by balance=True or False; power and constant are MeanFlow's.")
        super().__init__(
            teacher,
            student=student,
            from_data=from_data,
            equal_share=equal_share,
            end_share=end_share,
            tangent=tangent,
            tangent_step=tangent_step,
            **kwargs,
        )
        if balance and equal_share == 0.0:
            raise ValueError("balance=True compares errors with those at r = t; give equal_share > 0.")
        if not 0.0 <= balance_decay < 1.0:
            raise ValueError(f"balance_decay={balance_decay}: give a factor from 0 to below 1.")
        self.balance = balance
        self.add_running("diffusion_error", 1, balance_decay)

    def default_times(self) -> TimeDistribution:  # noqa: D102
        return Shifted(5.0)

    def default_role(self) -> Role:  # noqa: D102
        return TwoTime(kind="gated_copy")

    def error(self, u: Tensor, target: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Mean squared error, with the samples of r < t balanced against those of r = t."""
        error, equal = (u - target).square().flatten(1).mean(1), t == r
        if not self.balance:
            return error.mean()
        of_equal = torch.where(equal, error.detach(), 0.0)
        self.note("diffusion_error", of_equal.sum()[None], equal.sum()[None].to(error))
        return (balance_weight(error, self.running_means("diffusion_error")[0], equal) * error).mean()


def flow_map_simulation(
    student: TrajectoryMap, start: Tensor, times: Sequence[float], interval: int
) -> tuple[Prediction, Tensor]:
    """A sample of N steps by at most three jumps: to step g, over it, and to the end (arXiv:2605.13724).

        T -> t_g,     t_g -> t_{g+1},     t_{g+1} -> 0

    For an exact map it is the N-step sample; each jump has its graph where the caller keeps one.

    Args:
        student: a two-time student.
        start: samples at ``times[0]``, (B, ...).
        times: descending native times of the N steps without the final 0.
        interval: g, from 0 to N - 1.

    Returns:
        the prediction of the last jump, and the clean samples.
    """
    stops = [times[0], times[interval], *times[interval + 1 : interval + 2], 0.0]
    path = [a for a, b in pairwise(stops) if a != b] + [0.0]
    x = start
    for t, r in pairwise(path):
        at, to = (torch.full((len(x),), s, dtype=torch.float64, device=x.device) for s in (t, r))
        prediction = student(x, at, to)
        x = transport(prediction, to)
    return prediction, x


class AnyFlowOnPolicy(AnyFlow, AddedMatching):
    """The second stage: distribution matching on what the flow map makes in a random number of steps.

        N from a list,  g from 0 .. N - 1,  x = jumps T -> t_g -> t_{g+1} -> 0
        L = L_flow_map(data) + L_DMD(x)

    The error of a few long jumps is trained where it arises, and the map for any number of steps is kept by the first
    stage's loss beside it.

    Args:
        teacher: the pretrained model, whose distribution is matched.
        rollout_steps: numbers of steps N to choose from, None for 2, 4, 8, 16 and 50.
        fake_score_steps: critic updates per student update.
        fresh_samples: see ``FakeScoreMethod``; a sample takes several jumps here, which are made once.
        **kwargs: see ``AnyFlow`` (default weight of ``student/mean_flow``: 1), ``FakeScoreMethod`` and
            ``AddedMatching``: ``matching_from=0`` suits the first stage's student,
            ``student=TwoTime(FromCheckpoint(..), kind="gated_copy")``.

    Notes:
        The gradient passes through all jumps, as in the released code.
        ``guidance`` is that of the teacher in the score difference; with ``from_data=False`` also in its velocity.
    """

    learns_from = "teacher, data"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        rollout_steps: list[int] | None = None,
        fake_score_steps: int = 1,
        fresh_samples: bool | None = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, fake_score_steps=fake_score_steps, fresh_samples=fresh_samples, **kwargs)
        rollout_steps = [2, 4, 8, 16, 50] if rollout_steps is None else list(rollout_steps)
        if not rollout_steps or min(rollout_steps) < 1:
            raise ValueError(f"rollout_steps={rollout_steps}: give at least one number of steps, each 1 or more.")
        if self.critic_condition_on != "none" or self.rollout_step != "batch":
            raise ValueError(
                "the simulated samples of AnyFlowOnPolicy come from grids of several lengths, one for the batch; leave "
                "critic_condition_on at none and rollout_step at batch."
            )
        self.rollout_steps = rollout_steps
        self.asks_teacher = True  # for its score

    def simulate_student(self, batch: Batch, grad: bool) -> Rollout:
        """Flow-map backward simulation; N and g are the same for the batch and on all ranks."""
        draws = self.draws.of_slice()
        number = self.rollout_steps[draws.integer("steps", len(self.rollout_steps))]
        interval = draws.integer("interval", number)
        times = few_step_times(self.process, number)
        start = self.process.prior(draws.normal("start", (batch.size, *self.sample_shape)), times[0])
        told = self.told_scale(torch.full((batch.size,), times[0], dtype=torch.float64, device=start.device))
        with torch.set_grad_enabled(grad):
            student = TrajectoryMap(self.student, batch.cond, told)
            prediction, x = flow_map_simulation(student, start, times, interval)
        end = torch.zeros(batch.size, dtype=torch.float64, device=x.device)
        return Rollout(x, interval, prediction, end)

    def student_loss(self, batch: Batch) -> Terms:
        """The flow map's loss on data and, after the start, the score difference on its samples."""
        return self.add_matching(super().student_loss(batch), batch)

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of a cycle with as many jumps as ``rollout_steps`` allow."""
        own = super().forward_counts()["student"]
        jumps = min(3, max(self.rollout_steps))
        return {
            "student": {"student": own["student"] + jumps, "teacher": own["teacher"] + 1, "fake_score": 1},
            "fake_score": {"student": jumps * self.fresh_samples, "teacher": 0, "fake_score": 1},
        }
