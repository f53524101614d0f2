"""CDM: continuous-time distribution matching (arXiv:2605.06376)."""

from typing import Any, Literal

import torch
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.methods.base import Terms
from lightning_distill.methods.decoupled_dmd import DecoupledDMD
from lightning_distill.methods.rollout import Rollout, backward_simulation
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.samplers import transport
from lightning_distill.time_coverage import restricted
from lightning_distill.times import bounded

__all__ = ["CDM"]


class CDM(DecoupledDMD):
    """Decoupled DMD at all times of the student's trajectories, and beside them.

        rollout:      ODE steps on a random list of times; x0_S = G(x_t, t) at a random one of them
        student:      matching(x0_S) + engine(x0_S) + matching(G(x_r, r)),     r below t
        x_r = alpha_r x0_S + sigma_r eps_S

    x_r lies on the student's own velocity from x_t, off its trajectory; a student that is good there may be sampled on
    any list of times. After each critic update the fake score is moved a little towards the student.

    Args:
        teacher: the pretrained model.
        random_steps: largest number of steps of a random list, drawn uniformly; 0 for the student's own list.
        random_low: lowest of its times, as a share of the range.
        random_high: highest of its times but the first, as a share of the range.
        critic_pull: share by which the critic's weights move to the student's after each of its updates.
        weight: lambda of all parts; here 1 / max(.1, mean |x - y_T|).
        sampler: how steps are chained.
        fake_score_steps: critic updates per student update.
        **kwargs: see ``DecoupledDMD`` (``guidance``), ``FakeScoreMethod`` and ``DistillationModule``.

    Notes:
        The paper's losses are means without the factor 1/2, twice as large. Its guidance term is 7 (y_c - y_u), which
        is w = 8 here.
        ``critic_pull`` needs a critic of the student's architecture and ``alpha``; for others set it to 0.
    """

    paper = "2605.06376"
    learns_from = "teacher alone; data for gan"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        random_steps: int = 28,
        random_low: float = 0.25,
        random_high: float = 0.95,
        critic_pull: float = 1e-3,
        weight: str = "dmd_clamped",
        sampler: Literal["renoise", "ode"] = "ode",
        fake_score_steps: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, weight=weight, sampler=sampler, fake_score_steps=fake_score_steps, **kwargs)
        if random_steps < 0 or not 0.0 < random_low < random_high < 1.0:
            raise ValueError(
                f"random_steps={random_steps} is 0 or more, and random_low={random_low} below "
                f"random_high={random_high}, both between 0 and 1."
            )
        if not 0.0 <= critic_pull < 1.0:
            raise ValueError(f"critic_pull={critic_pull}: give a share from 0 to below 1.")
        self.random_steps = random_steps
        self.random_low, self.random_high = random_low, random_high
        self.critic_pull = critic_pull

    def check_configuration(self) -> None:
        """A pulled critic has the student's weights; random lists have no step indices."""
        super().check_configuration()
        shapes = [[p.shape for p in parameters] for parameters in self._pulled()]
        # equal adapters of another alpha are another function
        scales = [d.config.lora_alpha for d in (self.fake_score, self.student) if isinstance(d, AdapterDenoiser)]
        if self.critic_pull and (shapes[0] != shapes[1] or len(set(scales)) > 1):
            raise ValueError(
                "critic_pull moves the critic's weights to the student's, but the two networks differ (in "
                "their weights, or in the alpha of their adapters); give both the same role, or critic_pull=0."
            )
        if self.random_steps and self.critic_condition_on == "step":
            raise ValueError("critic_condition_on='step' needs a fixed time list; use interval, or random_steps=0.")

    def simulate_student(self, batch: Batch, grad: bool) -> Rollout:
        """As in other methods, on a list of times that is new in every slice and the same on all ranks."""
        if not self.random_steps:
            return super().simulate_student(batch, grad)
        draws = self.draws.of_slice()
        n = draws.integer("list/length", self.random_steps)
        grains = 1 << 20
        u = torch.tensor([draws.integer(f"list/{i}", grains) for i in range(n)], dtype=torch.float64) / grains
        inner = bounded(self.process, self.random_low, self.random_high).quantile(u, self.process)
        first = self.student_times[0]
        times = [first, *sorted({t for t in inner.tolist() if t < first}, reverse=True)]
        shape = (batch.size, *self.sample_shape)
        per_sample = self.rollout_step == "sample"
        return backward_simulation(
            self.student, batch.cond, shape, times, self.sampler, draws, grad, per_sample=per_sample
        )

    def student_loss(self, batch: Batch) -> Terms:
        """Both parts on the trajectory, and matching beside it."""
        rollout = self.rollout(batch)
        terms = self.both_parts(rollout, batch)
        step = self.beside(rollout, batch)
        with self.other_steps(step):
            terms.losses["continuous"] = self.matched(step.x0, batch, "continuous").losses["matching"]
        terms.losses |= self.gan_term(rollout.x0, batch)
        return terms

    def beside(self, rollout: Rollout, batch: Batch) -> Rollout:
        """The student's step, with graph, from a point that its velocity reaches from the trajectory.

        The step ends where the rollout's does, or at 0 if it begins below that.
        """
        v = self.draws.uniform("beside/time", batch.size)
        top = rollout.prediction.t
        r = restricted(bounded(self.process, 0.0, 1.0), v, torch.zeros_like(top), top, self.process)
        x_r = transport(rollout.detached().prediction, r)
        with self.told_student():
            prediction = self.student(x_r, r, batch.cond)
        return Rollout(prediction.x0, rollout.step, prediction, torch.where(rollout.end < r, rollout.end, 0.0))

    @torch.no_grad()
    def after_phase(self, phase: str) -> None:
        """Pull the critic, unless its step was skipped."""
        super().after_phase(phase)
        if phase == "fake_score" and self.critic_pull:
            share = self.critic_pull * (1.0 - self._skipped)
            for own, other in zip(*self._pulled()):
                own.lerp_(other.to(own.dtype), share.to(own.dtype))

    def _pulled(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Weights of the critic, without what it is told, and the student's."""
        critic = [p for name, p in self.fake_score.named_parameters() if not name.startswith("step_condition.")]
        return critic, list(self.student.parameters())

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        for role in ("student", "teacher", "fake_score"):
            counts["student"][role] += 1
        return counts
