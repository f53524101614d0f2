"""MeanFlow: average velocities in one stage (arXiv:2505.13447), from data or from a teacher."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.flow_maps import mean_flow_directions, mean_flow_loss, mean_flow_target
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import FlowMatching, change_process, expand
from lightning_distill.tangents import value_and_tangent
from lightning_distill.times import LogitNormal, TimeDistribution

__all__ = ["MeanFlow"]


class MeanFlow(TwoTimeMethod):
    """The average velocity between two times from its derivative along the trajectory.

        u_target = v - (t - r) (d_t + v . grad) u(x, t, r),     u(x, t, t) = v                              (Eq. 10-11)
        L = e / sg(e + eps)^p,     e = |u(x, t, r) - sg u_target|^2                                       (Eq. 9, 22)

    Args:
        teacher: the pretrained model; with ``from_data`` only where the student's weights come from.
        from_data: v is eps - x0 of the pair, right in the mean, instead of the (guided) teacher's velocity.
        equal_share: share of samples with r = t.
        end_share: share of samples with r = 0.
        power: p; 0 is the plain squared error, better where targets are free of noise.
        constant: eps.
        max_gap: largest t - r (restricted MeanFlow, for students of a few steps); None for none. One step then needs
            as many jumps as there are gaps.
        one_pass: take the exact derivative out of the pass of the value: a forward pass less for more memory, see
            ``tangents.value_and_tangent``.
        **kwargs: see ``TwoTimeMethod``; times are by default logit-normal of mean -.4 and width 1.

    Notes:
        Classifier-free guidance inside the velocity of ``from_data`` is left out: distil a guided teacher.
    """

    paper = "2505.13447"
    learns_from = "teacher, data; data alone with from_data"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        from_data: bool = False,
        equal_share: float = 0.75,
        end_share: float = 0.0,
        power: float = 1.0,
        constant: float = 1e-2,
        max_gap: float | None = None,
        one_pass: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if not 0.0 <= equal_share < 1.0:
            raise ValueError(f"equal_share={equal_share}: give a share from 0 to below 1.")
        if end_share < 0.0 or equal_share + end_share > 1.0 or (end_share and max_gap is not None):
            raise ValueError(
                f"end_share={end_share} beside equal_share={equal_share} and max_gap={max_gap}: both shares add up to "
                "at most 1, and r = 0 for a share of the samples needs gaps of every size."
            )
        if max_gap is not None and not 0.0 < max_gap <= 1.0:
            raise ValueError(f"max_gap={max_gap}: a gap of flow-matching times lies in (0, 1].")
        self.from_data, self.asks_teacher = from_data, not from_data
        self.equal_share, self.end_share = equal_share, end_share
        self.power, self.constant = power, constant
        self.max_gap = max_gap
        if one_pass and self.tangent != "jvp":
            raise ValueError(f"one_pass=True is for the exact derivative; leave it out with tangent={self.tangent!r}.")
        self.one_pass = one_pass

    def default_times(self) -> TimeDistribution:  # noqa: D102
        return LogitNormal(-0.4, 1.0)

    def check_configuration(self) -> None:
        """A restricted student is sampled within its gaps."""
        super().check_configuration()
        self.check_times(self.student_times)

    def check_times(self, times: Sequence[float]) -> None:
        """As ``StudentSampling.check_times``; no jump of the sampler is wider than those of training."""
        super().check_times(times)
        if self.max_gap is None or self.sampler == "ode":
            return
        flow = change_process(torch.tensor([*times, 0.0], dtype=torch.float64), self.process, FlowMatching())[0]
        # each step of renoise is a jump to 0
        widest = float(flow[0] if self.sampler == "renoise" else (flow[:-1] - flow[1:]).max())
        if widest > self.max_gap + 1e-9:
            remedy = "give more num_steps, or a larger max_gap"
            if self.sampler == "renoise":
                remedy = "use sampler='flow_map' with num_steps enough, or a larger max_gap"
            raise ValueError(
                f"max_gap={self.max_gap:g} trains no jump as wide as the {widest:.3g} of the student's {len(times)} "
                f"steps by sampler {self.sampler!r}; {remedy}."
            )

    def pair_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Flow-matching times t >= r of each sample, (n,), float64."""
        one, other = (self.training_times.quantile(self.draws.uniform(name, n), FlowMatching()) for name in ("t", "r"))
        t = torch.maximum(one, other).clamp(self._flow_min, self._flow_max)
        r = torch.minimum(torch.minimum(one, other), t)  # a target may lie below all times that networks know
        if self.max_gap is not None:
            r = torch.maximum(r, t - self.max_gap)
        part = self.draws.uniform("equal", n)
        r = torch.where(part > 1.0 - self.end_share, 0.0, r)
        return t, torch.where(part < self.equal_share, t, r)

    def error(self, u: Tensor, target: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The weighted squared error, scalar; (B, ...) and flow-matching times (B,)."""
        return mean_flow_loss(u, target, self.power, self.constant)

    def student_loss(self, batch: Batch) -> Terms:
        """Regression onto v - (t - r) du/dt."""
        t, r = self.pair_times(batch.size)
        x, velocity = self.flow_state(batch, t)
        if not self.from_data:
            velocity = self.teacher_velocity(batch, x, t)
        average = self.average(self.student, batch, self.told_scale(self.native(x, t)[1]))
        directions = mean_flow_directions(velocity)
        u, du = value_and_tangent(
            average, (x, t, r), directions, self.tangent, step=self.tangent_step, one_pass=self.one_pass
        )
        target = mean_flow_target(velocity, du, t, r)
        loss = self.error(u, target, t, r)
        apart = expand((t > r).double(), x)
        return Terms(
            {"mean_flow": loss},
            {"mse": (u.detach() - target).square().mean(), "derivative": (apart * du).square().mean().sqrt()},
        )

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        calls = {"jvp": 2 - self.one_pass, "central": 3, "one_sided": 2, "semi": 4}[self.tangent]
        return {"student": {"student": calls, "teacher": 0 if self.from_data else 1}}
