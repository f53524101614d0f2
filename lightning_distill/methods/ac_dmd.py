"""AC-DMD: ambient-consistent distribution matching, the distillation stage of RTDMD (arXiv:2605.26108)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.score_matching import score_difference
from lightning_distill.losses.subinterval import cps_step
from lightning_distill.methods.base import Terms
from lightning_distill.methods.subinterval import SubintervalMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.prediction import Prediction
from lightning_distill.processes import expand
from lightning_distill.times import t_min

__all__ = ["ACDMD"]


class ACDMD(SubintervalMethod):
    """Distribution matching where the student's step ends, with a fake score that agrees with its own future.

        x_u = end of the step,   x_t = A x_u + S n,   t in (u, t_max)
        s_T, s_F = one stochastic step from x_t back to u by teacher and fake score, with the same noise
        grad_theta = E[ (s_F - s_T) / mean |x_u - s_T| dx_u/dtheta ]
        fake score:  score of x_t from n,  and  w E[ (h_1 - h)(h_2 - h) ]

    h is the fake score's x0 at x_t, h_1 and h_2 at two independent points a little less noisy that its own prediction
    leads to: a product of two independent samples, so that only the mean defect counts.

    Args:
        teacher: the pretrained model.
        eta: randomness of the steps back, 0 deterministic, 1 renoising.
        consistency_span: largest step of h_1 and h_2, as a share of t_max.
        fake_score_steps: critic updates per student update.
        **kwargs: see ``SubintervalMethod``, ``FakeScoreMethod`` and ``DistillationModule``. The default weight of
            ``fake_score/consistency`` is .01.

    Notes:
        The paper's student is sampled with eta = .9; here it is sampled by ``sampler``, and eta concerns the scores.
        The released code weighs the critic's error by ``critic_weight="clamped"``.
        Reward stages follow with other methods.
    """

    paper = "2605.26108"
    learns_from = "teacher alone"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"fake_score/consistency": 0.01}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        eta: float = 0.9,
        consistency_span: float = 0.2,
        fake_score_steps: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, fake_score_steps=fake_score_steps, **kwargs)
        if not 0.0 <= eta <= 1.0 or not 0.0 < consistency_span <= 1.0:
            raise ValueError(f"eta={eta} and consistency_span={consistency_span} are shares between 0 and 1.")
        self.eta = eta
        self.consistency_span = consistency_span

    def student_loss(self, batch: Batch) -> Terms:
        """Difference of the two steps back to u."""
        rollout = self.rollout(batch)
        x_u, u = self.where_it_ends(rollout)
        x_t, t, _ = self.noised(x_u.detach(), u, rollout, self.matching_times, "matching")
        scores = self.scores(rollout.x0, batch, noisy=(x_t, t))
        with torch.no_grad():
            n = self.draws.normal("back/noise", x_t.shape)
            real, fake = (
                cps_step(Prediction.from_x0(y, x_t, t, self.process), u, self.eta, n)
                for y in (scores.real, scores.fake)
            )
            scale = (x_u - real).abs().flatten(1).mean(1).clamp_min(1e-6)
        loss = score_difference(x_u, real, fake, expand(1.0 / scale, x_u))
        return Terms({"matching": loss}, {"score_gap": scores.gap, "sample_std": x_u.detach().std()})

    def fake_score_loss(self, batch: Batch) -> Terms:
        """Denoising, and consistency with two independent continuations."""
        terms, prediction = self.critic_denoising(batch)
        _, u = self.where_it_ends(self.rollout(batch, grad=False))
        terms.losses["consistency"] = self.consistency(prediction, u, batch)
        return terms

    def consistency(self, prediction: Prediction, u: Tensor, batch: Batch) -> Tensor:
        """Mean of (h_1 - h)(h_2 - h).

        Args:
            prediction: the fake score's at x_t, with graph.
            u: lowest times, (B,).
            batch: conditions.
        """
        t = prediction.t
        v = self.draws.uniform("consistency/time", len(t))
        r = t - v * torch.minimum(t - u, torch.full_like(t, self.consistency_span * self.process.t_max))
        r = torch.minimum(r.clamp_min(t_min(self.process)), t)
        own = Prediction.from_x0(prediction.x0.detach(), prediction.x_t, t, self.process)
        defects = []
        for i in range(2):
            x_r = cps_step(own, r, self.eta, self.draws.normal(f"consistency/noise{i}", own.raw.shape))
            # the same conditions dropped and the same guidance as in ``prediction``: draws of a name are equal
            defects.append(self.criticised(x_r, r, batch.cond).x0 - prediction.x0)
        return (defects[0] * defects[1]).mean()

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        counts["fake_score"]["fake_score"] += 2
        return counts
