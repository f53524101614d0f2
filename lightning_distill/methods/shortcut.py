"""Shortcut models (arXiv:2410.12557)."""

import math
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
from lightning_distill.processes import expand

__all__ = ["Shortcut"]


class Shortcut(TwoTimeMethod):
    """A step of size 2d is two steps of size d, for d = 1/M, 2/M, 4/M, .., 1/2.

        u(x, t, t) = v,     u(x, t, t - 2d) = [ u'(x, t, t - d) + u'(x - d u', t - d, t - 2d) ] / 2             (Eq. 5)

    u' is the student's first average, or the student itself without gradient. No derivative of the network is taken.

    Args:
        teacher: the pretrained model; with ``from_data`` only where the student's weights come from.
        student: None for a copy that is told the step size.
        from_data: v is eps - x0 of the pair instead of the (guided) teacher's velocity.
        most_steps: M, a power of 2.
        equal_share: share of samples with r = t.
        clamp: largest absolute value of the target, 4 in the released code; None for no limit.
        **kwargs: see ``TwoTimeMethod``.

    Notes:
        A step of size 1/M counts as one of size 0, so that the smallest step is the velocity itself (the released code
        trains the velocity at size 1/M instead).
        Times t are drawn from multiples of 2d, as in the paper; for r = t from ``training_times``.
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
        super().__init__(teacher, student=student or TwoTime(input="difference"), **kwargs)
        if most_steps < 2 or most_steps & (most_steps - 1):
            raise ValueError(f"most_steps={most_steps}: give a power of 2, at least 2.")
        if not 0.0 < equal_share < 1.0:
            raise ValueError(f"equal_share={equal_share}: both parts need a share, so give one between 0 and 1.")
        self.from_data, self.asks_teacher = from_data, not from_data
        self.most_steps = most_steps
        self.equal_share = equal_share
        self.clamp = clamp

    def step_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Times t and half steps d of each sample, (n,), float64."""
        sizes = int(math.log2(self.most_steps))
        k = (self.draws.uniform("size", n) * sizes).floor().clamp_max(sizes - 1)
        steps = 2.0**k  # of size 2d
        count = (self.draws.uniform("step", n) * steps).floor().clamp_max(steps - 1) + 1.0
        return count / steps, 0.5 / steps

    def student_loss(self, batch: Batch) -> Terms:
        """The velocity for r = t, one step against two elsewhere."""
        n = batch.size
        t, d = self.step_times(n)
        same = self.draws.uniform("equal", n) < self.equal_share
        t = torch.where(same, self.flow_times("t", n), t.clamp_max(self._flow_max))
        r = torch.where(same, t, (t - 2.0 * d).clamp_min(0.0))
        x, velocity = self.flow_state(batch, t)
        if not self.from_data:
            velocity = self.teacher_velocity(batch, x, t)
        scale = self.told_scale(self.native(x, t)[1])
        predecessor = self.average(self.sampling_network(), batch, scale)

        def smallest(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return predecessor(x, t, torch.where(t - r <= 1.0 / self.most_steps + 1e-9, t, r))

        two = shortcut_target(smallest, x, t, 0.5 * (t - r), self.clamp)
        target = torch.where(expand(same, x).bool(), velocity, two)
        error = (self.average(self.student, batch, scale)(x, t, r) - target).square()
        apart = expand(same.logical_not(), error)
        return Terms({"shortcut": error.mean()}, {"bootstrap": (apart * error.detach()).mean()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        own = 1 if len(self.student_ema) else 3
        return {"student": {"student": own, "teacher": 0 if self.from_data else 1}}
