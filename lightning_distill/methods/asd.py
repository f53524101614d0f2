"""ASD: adversarial self-distillation, from n steps to n + 1 (arXiv:2511.01419)."""

from typing import Any

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.methods.dmd2 import DMD2
from lightning_distill.methods.rollout import Rollout, backward_simulation
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import EDM, VariancePreserving
from lightning_distill.times import few_step_times

__all__ = ["ASD"]


class ASD(DMD2):
    """One student for every number of steps: what it makes in n is held against what it makes in n + 1.

        n uniform in 1 .. N - 1;   x_n = student in n steps, graph on the last
        student:      matching(x_n) + w_g loss_G(D(x_n))
        fake score:   denoising of x_n + w_d loss_D(D(x_(n+1)), D(x_n))

    The gap between n and n + 1 steps is small, so the game is well matched where one against the data would not be. No
    data: "real" are the student's own better samples.

    Args:
        teacher: the pretrained model.
        most_steps: N, at least 2.
        **kwargs: see ``DMD2``; ``gan`` is needed. ``num_steps``, at most N, is the number of steps of ``sample()`` and
            of evaluation alone; ``student_times`` may have the first time only.

    Notes:
        Reconstructed from the paper's description; its weights were not at hand.
        All lists of times are trailing grids (see ``few_step_times``) from the student's first time, wherever that is.
        Every number of steps below N is trained alike; that of N is what N - 1 is compared with, and the paper is after
        the smallest, so that one step is sampled by default.
        The paper's video part, more steps for the first frames, is a matter of sampling.
    """

    paper = "2511.01419"
    learns_from = "teacher alone"

    def __init__(self, teacher: DenoiserSpec | Denoiser | None = None, *, most_steps: int = 4, **kwargs: Any) -> None:
        super().__init__(teacher, **kwargs)
        if self.gan is None:
            raise ValueError("ASD is a game between its student's samples; give gan=Adversary(taps=[...]).")
        if most_steps < 2:
            raise ValueError(f"most_steps={most_steps}: give 2 or more, n steps are compared with n + 1.")
        if self.critic_condition_on == "step":
            raise ValueError("critic_condition_on='step' needs one list of times; ASD has several, use interval.")
        if self._given_times is not None and len(self._given_times) > 1:
            raise ValueError(
                f"student_times={self._given_times}: ASD trains its own lists of times, one for each number of steps; "
                "give the first time alone, or leave it out, and num_steps for the number that is sampled."
            )
        if self._given_times is None and self._num_steps > most_steps:
            raise ValueError(f"num_steps={self._num_steps} is above most_steps={most_steps}, the most that ASD runs.")
        if self.rollout_step == "sample":
            raise ValueError("rollout_step='sample' has no place in ASD, whose rollouts run to their last step.")
        self.most_steps = most_steps

    def times_of(self, n: int) -> list[float]:
        """The student's times in n steps: the trailing grid, from the student's first time on."""
        process, first = self.process, self.student_times[0]
        if isinstance(process, EDM):
            return few_step_times(EDM(process.sigma_min, first), n)
        later = [first / process.t_max * t for t in few_step_times(process, n)[1:]]
        if isinstance(process, VariancePreserving):  # whose times are the scheduler's
            later = [round(t * process.num_train_timesteps) / process.num_train_timesteps for t in later]
        return [first, *later]

    def length(self) -> int:
        """N of the current slice, the same on all ranks."""
        return 1 + self.draws.of_slice().integer("length", self.most_steps - 1)

    def simulate_student(self, batch: Batch, grad: bool) -> Rollout:
        """The student's sample in n steps."""
        return self._in_steps(self.length(), batch, grad)

    def _in_steps(self, n: int, batch: Batch, grad: bool) -> Rollout:
        times, shape = self.times_of(n), (batch.size, *self.sample_shape)
        stops = [len(times) - 1]
        draws = self.draws.of_slice()
        return backward_simulation(self.student, batch.cond, shape, times, self.sampler, draws, grad, stops=stops)

    def real_noisy(self, batch: Batch, t: Tensor) -> Tensor:
        """The student's samples in n + 1 steps from the same noise, at the given times, (B, ...)."""
        with self.told_student():
            better = self._in_steps(self.length() + 1, batch, grad=False).x0
        return self.process.add_noise(better, self.draws.normal("gan/real_noise", better.shape), t)

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """As usual, for n = 1."""
        counts = super().forward_counts()
        assert self.gan is not None
        counts["fake_score"]["student"] += 2
        counts["student"]["student"] += 2 if self.gan.kind == "relativistic" else 0
        return counts
