"""AccVideo: key points of stored trajectories, with a discriminator for each (arXiv:2503.19462)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_distill.batch import Batch
from lightning_distill.losses.adversarial import discriminator_loss, generator_loss
from lightning_distill.losses.consistency import distance
from lightning_distill.methods.base import Terms
from lightning_distill.methods.boss import Straightening
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import FlowMatching, change_process, expand
from lightning_distill.times import t_min

__all__ = ["AccVideo"]


class AccVideo(Straightening):
    """Chords between key points of the teacher's trajectories; each point has discriminator heads of its own.

        student:         | v(x_i, t_i) - (x_i - x_i+1) / (t_i - t_i+1) |^2 + w softplus(-D_i+1(x'_i+1))
        discriminator:   softplus(-D_i+1(x_i+1)) + softplus(D_i+1(x'_i+1)),     x'_i+1 the student's step from x_i

    Real are the teacher's states themselves: no data set, and nothing is noised, whose noise level the teacher's
    trajectory might not meet.

    Args:
        teacher: the pretrained model; its blocks are the discriminators' features.
        gan: taps and loss; ``features`` is ``teacher``.
        discriminator_optimizer: of the heads; None for fused AdamW.
        discriminator_scheduler: stepped once per student update.
        **kwargs: see ``Straightening``; the key points are ``num_steps`` or ``student_times``. Default weight of
            ``student/gan``: .1.

    Raises:
        ValueError: no ``gan``, one of another network than the teacher, with times of its own, or a relativistic one.

    Notes:
        Reconstructed from the paper's description: its trainer is not released. A student step starts from the
        teacher's state, so that both phases see the same x'; the clean end is seen at the smallest training time.
    """

    phases = {"student": ("student",), "discriminator": ("discriminator",)}
    paper = "2503.19462"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/gan": 0.1}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        gan: Adversary | None = None,
        discriminator_optimizer: OptimizerCallable | None = None,
        discriminator_scheduler: LRSchedulerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if gan is None or gan.features != "teacher" or gan.times is not None or gan.kind == "relativistic":
            raise ValueError(
                "AccVideo's discriminators look at the states of trajectories through the teacher; give "
                "gan=Adversary(taps=[...], features='teacher') without times, of another kind than relativistic "
                "(without a game it is Straightening)."
            )
        self.gan = gan
        self.discriminator: nn.ModuleList
        self.optimizer_factories["discriminator"] = discriminator_optimizer
        self.scheduler_factories["discriminator"] = discriminator_scheduler
        self._steps: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def build_roles(self) -> None:
        """Student, and heads for the end of every step."""
        super().build_roles()
        teacher, shape = self.require_teacher(), self.sample_shape
        self.discriminator = nn.ModuleList(self.gan.build(teacher, shape) for _ in self.student_times)

    def logits(self, states: Tensor, times: Tensor, batch: Batch) -> Tensor:
        """Logits of the heads of each step at its end, (K B, n).

        Args:
            states: ends of the steps, (K, B, ...), or (K, 2 B, ...), twice the batch.
            times: their times, (K,); 0 is seen at the smallest training time.
            batch: conditions.
        """
        steps, n = states.shape[:2]
        t = times.clamp_min(t_min(self.process)).repeat_interleave(n)
        cond = batch.cond_of(torch.arange(n, device=t.device).remainder(batch.size).repeat(steps))
        features = self.gan.tapped(self.require_teacher(), states.flatten(0, 1), t, cond)
        parts = [{name: f.unflatten(0, (steps, n))[i] for name, f in features.items()} for i in range(steps)]
        labels = cond["class_labels"].chunk(steps) if "class_labels" in cond else [None] * steps
        return torch.cat([heads(*of_step) for heads, *of_step in zip(self.discriminator, parts, labels)])

    def student_loss(self, batch: Batch) -> Terms:
        """Chords, and the generator's side at the ends of the student's steps."""
        states, grid = self.trajectory(batch)
        rows = self.rows_of_steps(grid)
        states, times = states[rows], grid[rows]
        made, goal = self.chords(batch, states, times)
        ends = self.step_ends(states, times, made)
        self._steps[self.draws.slice_index, self.draws.first] = states[1:], ends.detach(), times[1:]
        terms = Terms({"velocity": distance(made, goal, self.metric, self.huber).mean()})
        terms.losses["gan"] = generator_loss(self.logits(ends, times[1:], batch), self.gan.kind)
        terms.diagnostics["mse"] = (made.detach() - goal).square().mean()
        return terms

    def step_ends(self, states: Tensor, times: Tensor, velocity: Tensor) -> Tensor:
        """Where steps along the given velocities end, (K, B, ...), in the networks' process.

        Args:
            states: where they start, and the end of the last, (K + 1, B, ...).
            times: (K + 1,).
            velocity: in flow-matching coordinates, (K B, ...).
        """
        flow, scale = change_process(times, self.process, FlowMatching())
        start, factor = expand(scale[:-1], states[1:]) * states[:-1], expand(scale[1:], states[1:])
        return (start + expand(flow.diff(), start) * velocity.unflatten(0, start.shape[:2])) / factor

    def discriminator_loss(self, batch: Batch) -> Terms:
        """The discriminators' side, on the student's steps of this cycle."""
        real, fake, times = self._steps.pop((self.draws.slice_index, self.draws.first))
        seen = self.logits(torch.cat([real, fake], dim=1), times, batch)
        true, false = seen.unflatten(0, (len(times), -1)).chunk(2, dim=1)
        game = discriminator_loss(true.flatten(0, 1), false.flatten(0, 1), self.gan.kind)
        return Terms({"gan": game}, {"logit_real": true.detach().mean(), "logit_fake": false.detach().mean()})

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        seen = 1 if self.gan.network_taps else 0
        return {
            "student": {"student": 1, "teacher": self.solver_calls + seen},
            "discriminator": {"student": 0, "teacher": seen},
        }
