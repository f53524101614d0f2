"""Shortcut models (arXiv:2410.12557)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.flow_maps import shortcut_target
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Role
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import FlowMatching, VariancePreserving, change_process, expand

__all__ = ["Shortcut"]


class Shortcut(TwoTimeMethod):
    """A step of size 2d is two steps of size d, for d = 1/M, 2/M, 4/M, .., 1/2.

        u(x, t, t) = v,     u(x, t, t - 2d) = [ u'(x, t, t - d) + u'(x - d u', t - d, t - 2d) ] / 2             (Eq. 5)

    u' is the student's first average, or the student itself without gradient. No derivative of the network is taken.

    Args:
        teacher: the pretrained model; with ``from_data`` only where the student's weights come from.
        student: None for a copy that is told the step size.
        from_data: v is eps - x0 of the pair instead of the (guided) teacher's velocity.
        most_steps: M, a power of 2. Students make 1, 2, 4, .. or M / 2 steps.
        equal_share: share of samples with r = t.
        clamp: largest absolute value of the target, 4 in the released code; None for no limit.
        **kwargs: see ``TwoTimeMethod``. The student's steps are even in flow-matching time, whatever the shift of the
            process.

    Notes:
        A step of size 1/M counts as one of size 0, so that the smallest step is the velocity itself (the released code
        trains the velocity at size 1/M instead).
        Times t are drawn from multiples of 2d, as in the paper; for r = t from ``training_times``. No other pair is
        trained, so that others are not sampled. Where the process ends below time 1, sizes are shares of its end.
        The released code also limits the point between the two steps to [-4, 4], and leaves 1e-5 of the noise in data.
    """

    paper = "2410.12557"
    learns_from = "teacher, data; data alone with from_data"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        student: Role | None = None,
        from_data: bool = False,
        most_steps: int = 128,
        equal_share: float = 0.75,
        clamp: float | None = 4.0,
        **kwargs: Any,
    ) -> None:
        role = student or TwoTime(input="difference")
        super().__init__(teacher, student=role, tangent="jvp", tangent_step=None, **kwargs)
        if most_steps < 2 or most_steps & (most_steps - 1):
            raise ValueError(f"most_steps={most_steps}: give a power of 2, at least 2.")
        if not 0.0 < equal_share < 1.0:
            raise ValueError(f"equal_share={equal_share}: both parts need a share, so give one between 0 and 1.")
        self.from_data, self.asks_teacher = from_data, not from_data
        self.most_steps = most_steps
        if self._given_times is None and self.sampler != "ode":
            self.check_number(self._num_steps)
        self.equal_share = equal_share
        self.clamp = clamp

    # ------------------------------------------------------------------------------------------------ sampling
    @property
    def student_times(self) -> list[float]:
        """The student's descending time list, without the final 0: given, or even in flow-matching time."""
        return self._given_times or self.times_in(self._num_steps)

    def check_number(self, num_steps: int) -> None:
        """Refuse a number of even steps whose size is not trained.

        Raises:
            ValueError: it is no power of 2, or more than half of ``most_steps``.
        """
        if not num_steps or num_steps < 1 or num_steps & (num_steps - 1) or num_steps > self.most_steps // 2:
            raise ValueError(
                f"num_steps={num_steps}: a shortcut model of most_steps={self.most_steps} has learned steps whose "
                f"sizes are powers of 1/2, from 1 to {2 / self.most_steps:g}; give a power of 2 up to "
                f"{self.most_steps // 2}, or sampler='ode', which follows the velocity in any number of steps."
            )

    def times_in(self, num_steps: int) -> list[float]:
        """Native times of steps that are even in flow-matching time; the process' own grid for sampler ``ode``.

        Args:
            num_steps: a power of 2 within the trained range.

        Returns:
            descending times without the final 0; in variance-preserving processes timesteps, where these are apart.
        """
        if self.sampler == "ode":
            return super().times_in(num_steps)
        self.check_number(num_steps)
        flow = self._flow_max * (1.0 - torch.arange(num_steps, dtype=torch.float64) / num_steps)
        times = change_process(flow, FlowMatching(), self.process)[0]
        if isinstance(self.process, VariancePreserving):
            total = self.process.num_train_timesteps
            whole = (times * total).round() / total
            times = whole if bool((whole.diff() < 0.0).all() and whole[-1] > 0.0) else times
        return [self.process.t_max, *times[1:].tolist()]

    def check_times(self, times: Sequence[float]) -> None:
        """As ``StudentSampling.check_times``; each jump of the sampler has a size and a place of training."""
        super().check_times(times)
        if self.sampler == "ode":
            return
        native = torch.tensor([*times, 0.0], dtype=torch.float64)
        flow = change_process(native, self.process, FlowMatching())[0] / self._flow_max
        starts, ends = flow[:-1], torch.zeros_like(flow[1:]) if self.sampler == "renoise" else flow[1:]
        sizes = (2.0 ** (starts - ends).log2().round()).clamp(2.0 / self.most_steps, 1.0)
        places = (starts / sizes).round() * sizes
        wrong = self._apart(starts, places) | self._apart(ends, places - sizes)
        if bool(wrong.any()):
            k = int(wrong.int().argmax())
            remedy = "leave student_times out"
            if self.sampler == "renoise":
                remedy = "use sampler='flow_map', or renoise in one step or two"
            raise ValueError(
                f"sampler {self.sampler!r} jumps from {float(starts[k]):.3g} to {float(ends[k]):.3g} of flow-matching "
                f"time, but a shortcut model of most_steps={self.most_steps} has learned steps whose sizes are powers "
                f"of 1/2, from 1 to {2 / self.most_steps:g}, between multiples of their size; {remedy}."
            )

    def _apart(self, flow: Tensor, other: Tensor) -> Tensor:
        """Whether shares of the largest flow-matching time differ, by more than the timesteps of schedulers do."""
        if not isinstance(self.process, VariancePreserving):
            return (flow - other).abs() > 1e-3
        native = [change_process(self._flow_max * t, FlowMatching(), self.process)[0] for t in (flow, other)]
        return (native[0] - native[1]).abs() > 0.51 / self.process.num_train_timesteps

    def check_configuration(self) -> None:
        """The student is sampled by steps that it is trained for."""
        super().check_configuration()
        self.check_times(self.student_times)

    # ------------------------------------------------------------------------------------------------ loss
    def step_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Times t and half steps d of each sample, (n,), float64."""
        sizes = int(math.log2(self.most_steps))
        k = (self.draws.uniform("size", n) * sizes).floor().clamp_max(sizes - 1)
        steps = 2.0**k  # of size 2d
        count = (self.draws.uniform("step", n) * steps).floor().clamp_max(steps - 1) + 1.0
        return self._flow_max * count / steps, self._flow_max * 0.5 / steps

    def student_loss(self, batch: Batch) -> Terms:
        """The velocity for r = t, one step against two elsewhere."""
        n = batch.size
        t, d = self.step_times(n)
        same = self.draws.uniform("equal", n) < self.equal_share
        t = torch.where(same, self.flow_times("t", n), t)
        r = torch.where(same, t, (t - 2.0 * d).clamp_min(0.0))
        x, velocity = self.flow_state(batch, t)
        if not self.from_data:
            velocity = self.teacher_velocity(batch, x, t)
        scale = self.told_scale(self.native(x, t)[1])
        predecessor = self.average(self.sampling_network(), batch, scale)

        def smallest(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return predecessor(x, t, torch.where(t - r <= self._flow_max / self.most_steps + 1e-9, t, r))

        two = shortcut_target(smallest, x, t, 0.5 * (t - r), self.clamp)
        target = torch.where(expand(same, x).bool(), velocity, two)
        error = (self.average(self.student, batch, scale)(x, t, r) - target).square()
        apart = expand(same.logical_not(), error)
        return Terms({"shortcut": error.mean()}, {"bootstrap": (apart * error.detach()).mean()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        own = 1 if len(self.student_ema) else 3
        return {"student": {"student": own, "teacher": 0 if self.from_data else 1}}
