"""Decoupled DMD: guidance and distribution matching at noise levels of their own (arXiv:2511.22677)."""

from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.guidance import unguided_and_guided
from lightning_distill.losses.score_matching import checked_weight, matching_weight, surrogate
from lightning_distill.methods.adversarial import AdversarialMethod
from lightning_distill.methods.base import Terms
from lightning_distill.methods.fake_score import Scores
from lightning_distill.methods.rollout import Rollout
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.time_coverage import restricted
from lightning_distill.times import TimeDistribution

__all__ = ["DecoupledDMD"]


class DecoupledDMD(AdversarialMethod):
    """DMD2's direction taken apart: guidance drives the student, distribution matching keeps it in bounds.

        y_T^w - y_F = (y_c - y_F) + (w - 1)(y_c - y_u)
                       matching        engine

    Each part has noise levels, noise and a normaliser of its own. The engine's lie below the noise level t of the
    student's step: what noisier levels decide is decided already.

    Args:
        teacher: the pretrained model.
        weight: lambda of both parts, see ``matching_weight``.
        engine_times: distribution of the engine's times, cut off at the student's t; None for ``matching_times``.
        engine_below_step: whether it is cut off.
        coincide: compute both parts at one x_t with one normaliser, which is DMD2.
        **kwargs: see ``AdversarialMethod``, ``FakeScoreMethod`` and ``DistillationModule``; ``guidance`` is w.

    Notes:
        The paper counts time from noise to data; its tau > t is tau below t here.
        The engine alone has no fixed point: samples drift along the guidance without limit.
        Without guidance (w = 1) it is DMD2.
    """

    paper = "2511.22677"
    learns_from = "teacher alone; data for gan"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        weight: str = "dmd",
        engine_times: TimeDistribution | None = None,
        engine_below_step: bool = True,
        coincide: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        self.weight = checked_weight(weight)
        self.engine_times = engine_times
        self.engine_below_step = engine_below_step
        self.coincide = coincide

    def check_configuration(self) -> None:
        """The engine needs times below every step of the student."""
        super().check_configuration()
        if self.guidance.needs_null and self.engine_below_step and not self.coincide:
            zero = torch.zeros(1, dtype=torch.float64)
            lowest = float((self.engine_times or self.matching_times).quantile(zero, self.process))
            if lowest >= self.student_times[-1]:
                raise ValueError(
                    f"the engine's times begin at {lowest:g}, above the student's last step at "
                    f"t={self.student_times[-1]:g}; give engine_times with a lower end, or engine_below_step=false."
                )

    def student_loss(self, batch: Batch) -> Terms:
        """Both parts, and the generator's side of the GAN."""
        rollout = self.rollout(batch)
        terms = self.both_parts(rollout, batch)
        terms.losses |= self.gan_term(rollout.x0, batch)
        return terms

    def both_parts(self, rollout: Rollout, batch: Batch) -> Terms:
        """Matching and engine terms of a rollout with graph."""
        x = rollout.x0
        if self.coincide and self.guidance.needs_null:
            return self._at_one_level(x, batch)
        terms = self.matched(x, batch, "matching")
        if self.guidance.needs_null:
            v = self.draws.uniform("engine/time", len(x))
            times, top = self.engine_times or self.matching_times, rollout.prediction.t
            if self.engine_below_step:
                s = restricted(times, v, torch.zeros_like(top), top, self.process)
            else:
                s = times.quantile(v, self.process)
            x_s = self.process.add_noise(x.detach(), self.draws.normal("engine/noise", x.shape), s)
            with torch.no_grad():
                with_cond, push, _ = self._push(x_s, s, batch)
                direction = matching_weight(self.weight, x, with_cond, s, self.process) * push
            terms.losses["engine"] = surrogate(x, -direction)
        return terms

    def matched(self, x: Tensor, batch: Batch, name: str) -> Terms:
        """The matching part, unguided.

        Args:
            x: student samples with graph, (B, ...).
            batch: their conditions.
            name: of the draws.
        """
        x_t, t, _ = self.renoise(x, self.matching_times, name)
        with torch.no_grad():
            real = self.require_teacher()(x_t, t, batch.cond).x0
            fake = self._fake(x_t, t, batch)
        return self.matching(x, Scores(x_t, t, real, fake), self.weight)

    def _fake(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        u = self.draws.uniform("guidance", len(x_t))
        with self.told_step():
            return self.fake_guidance(self.fake_score, x_t, t, batch.cond, u).x0

    def _push(self, x_t: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """y_c, the guided prediction's distance from it, (w - 1)(y_c - y_u), and the guided prediction."""
        scale = self.guidance.scales(t, self.draws.uniform("guidance", len(x_t)))
        with_cond, whole = unguided_and_guided(self.require_teacher(), x_t, t, batch.cond, scale)
        return with_cond, whole - with_cond, whole

    def _at_one_level(self, x: Tensor, batch: Batch) -> Terms:
        x_t, t, _ = self.renoise(x, self.matching_times, "matching")
        with torch.no_grad():
            real, push, whole = self._push(x_t, t, batch)
            fake = self._fake(x_t, t, batch)
            weight = matching_weight(self.weight, x, whole, t, self.process)
        gap = Scores(x_t, t, real, fake).gap
        losses = {"matching": surrogate(x, weight * (fake - real)), "engine": surrogate(x, -weight * push)}
        return Terms(losses, {"score_gap": gap, "sample_std": x.detach().std()})

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        if self.guidance.needs_null and not self.coincide:
            counts["student"]["teacher"] += 1
        return counts
