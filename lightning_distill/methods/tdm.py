"""TDM: trajectory distribution matching (arXiv:2503.06674)."""

from typing import Any, Literal

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.score_matching import checked_weight
from lightning_distill.losses.subinterval import importance_weight
from lightning_distill.methods.base import Terms
from lightning_distill.methods.rollout import Rollout
from lightning_distill.methods.subinterval import SubintervalMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.prediction import Prediction

__all__ = ["TDM"]


class TDM(SubintervalMethod):
    """The points of a deterministic trajectory are matched to the teacher's distribution at their noise level.

        x_u = alpha_u x0_S + sigma_u eps_S,     x_t = A x_u + S n,     t within the student's step
        grad_theta = E[ lambda (y_F(x_t) - y_T(x_t)) dx0_S/dtheta ]

    The gradient passes through x0_S only. Each sample has a step of its own, and the fake score knows it.

    Args:
        teacher: the pretrained model.
        critic_target: ``ambient`` learns the score of x_t; ``x0`` regresses on x0_S, as the paper's objective reads;
            ``x0_is`` does so with importance weights, which is the score of noised x0_S instead of x_u. Their mean is 1
            over each micro-batch, at least 2 samples; the fewer, the nearer it is to ``x0``.
        times_within: ``step`` compares between the two ends of the step, ``all`` up to t_max.
        weight: lambda, see ``matching_weight``.
        sampler: how steps are chained; the paper's is deterministic.
        rollout_step: see ``FakeScoreMethod``.
        fake_score_steps: critic updates per student update.
        **kwargs: see ``SubintervalMethod``, ``FakeScoreMethod`` and ``DistillationModule``.

    Notes:
        The regression on x0_S at an x_t that was noised from x_u is no posterior mean: for a Gaussian the three targets
        have slopes .0699 (``x0``), .0056 (``x0_is``) and .1129 (``ambient``), and only the last is that of the matched
        law. It is the default here. The released code weights by the mean of the log-ratio over the elements, which is
        1 up to rounding for images.
        The paper's denoising weight min(SNR, 5) is ``critic_space``'s here (``epsilon`` where it is below 5), and its
        student may be told the target time; this one is not.
        With one step it is DMD2.
    """

    paper = "2503.06674"
    learns_from = "teacher alone"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        critic_target: Literal["ambient", "x0", "x0_is"] = "ambient",
        times_within: Literal["step", "all"] = "step",
        weight: str = "dmd",
        sampler: Literal["renoise", "ode"] = "ode",
        rollout_step: Literal["batch", "sample"] = "sample",
        fake_score_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher, sampler=sampler, rollout_step=rollout_step, fake_score_steps=fake_score_steps, **kwargs
        )
        if critic_target not in ("ambient", "x0", "x0_is"):
            raise ValueError(f"critic_target={critic_target!r} is unknown; choose ambient, x0 or x0_is.")
        if times_within not in ("step", "all"):
            raise ValueError(f"times_within={times_within!r} is unknown; choose step or all.")
        self.critic_target = critic_target
        self.times_within = times_within
        self.weight = checked_weight(weight)

    def highest(self, rollout: Rollout) -> Tensor:  # noqa: D102
        return super().highest(rollout) if self.times_within == "all" else rollout.prediction.t

    def student_loss(self, batch: Batch) -> Terms:
        """Score difference on the way from the end of the step back to its start."""
        rollout = self.rollout(batch)
        x_u, u = self.where_it_ends(rollout)
        x_t, t, _ = self.noised(x_u.detach(), u, rollout, self.matching_times, "matching")
        return self.matching(rollout.x0, self.scores(rollout.x0, batch, noisy=(x_t, t)), self.weight)

    def critic_samples(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """See ``critic_target``."""
        if self.critic_target == "ambient":
            return super().critic_samples(rollout)
        x_u, u = self.where_it_ends(rollout)
        x_t, t, n = self.noised(x_u, u, rollout, self.critic_times, "critic")
        eps = Prediction.from_x0(rollout.x0, x_t, t, self.process).eps
        weight = None
        if self.critic_target == "x0_is":
            if len(x_t) == 1:
                raise ValueError(
                    "critic_target='x0_is' weighs the samples of a micro-batch against each other, and this one has 1, "
                    "whose weight is always 1; give a larger batch, fewer accumulate_grad_batches, or another "
                    "critic_target."
                )
            weight = importance_weight(x_t, rollout.x0, n, t, self.process)
        return x_t, t, rollout.x0, eps, weight
