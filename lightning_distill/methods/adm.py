"""ADM: adversarial distribution matching, the loss of DMDX (arXiv:2507.18569)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.adversarial import discriminator_loss, generator_loss
from lightning_distill.methods.adversarial import AdversarialMethod
from lightning_distill.methods.base import Terms
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.samplers import transport
from lightning_distill.times import t_min

__all__ = ["ADM"]


class ADM(AdversarialMethod):
    """A discriminator tells the teacher's next point from the fake score's, in the place of their difference.

        x_t = alpha_t x + sigma_t eps
        x^T, x^F = one deterministic step of length dt from x_t by teacher and fake score
        student:          loss_G(D(x^F)),   with graph through the fake score's input into x
        discriminator:    loss_D(D(x^T), D(x^F))
        fake score:       |F(x_t) - x|^2

    The divergence between the two distributions is learned instead of being the reverse KL. Data-free.

    Args:
        teacher: the pretrained model.
        gan: the discriminator on noisy points; ``features`` is ``teacher``, the paper's loss ``hinge``. It has no times
            of its own: it judges where steps from the ``matching_times`` end.
        step_share: dt as a share of t_max.
        **kwargs: see ``AdversarialMethod``, ``FakeScoreMethod`` and ``DistillationModule``; ``guidance`` is that of the
            teacher's step. Default weights of ``student/gan`` and ``fake_score/gan`` are 1.

    Notes:
        Reconstructed from the paper's description; its released settings were not at hand.
        Fake score and heads are trained in one phase; the paper has a rate for each.
        Where the fake score is wrong the discriminator may see that rather than the student; ``fake_score_steps`` keeps
        it close.
        The paper's first stage, an adversarial warm-up on stored teacher samples, is ``LADD`` on a store.
    """

    paper = "2507.18569"
    learns_from = "teacher alone"
    differentiates_scores = True
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/gan": 1.0, "fake_score/gan": 1.0}

    def __init__(
        self, teacher: DenoiserSpec | Denoiser | None = None, *, step_share: float = 1 / 64, **kwargs: Any
    ) -> None:
        super().__init__(teacher, **kwargs)
        if self.gan is None or self.gan.features != "teacher" or self.gan.kind == "relativistic":
            raise ValueError(
                "ADM learns from a discriminator on the teacher's features; give gan=Adversary(taps=[...], "
                "features='teacher', kind='hinge') or logistic."
            )
        if self.gan.times is not None:
            raise ValueError(
                "ADM's discriminator judges steps that begin at the matching times; leave out gan.times, and give "
                "matching_times instead."
            )
        if not 0.0 < step_share < 1.0:
            raise ValueError(f"step_share={step_share}: give a share of t_max between 0 and 1.")
        self.step_share = step_share

    def earlier(self, t: Tensor) -> Tensor:
        """T - dt, at least half of t and within the times that networks know, (B,)."""
        r = torch.maximum(t - self.step_share * self.process.t_max, 0.5 * t)
        return torch.minimum(r.clamp_min(t_min(self.process)), t)

    def student_loss(self, batch: Batch) -> Terms:
        """The generator's side at the point that the fake score's step leads to."""
        assert self.gan is not None
        x = self.rollout(batch).x0
        x_t, t, _ = self.renoise(x, self.matching_times, "matching")
        r = self.earlier(t)
        u = self.draws.uniform("guidance", len(x))
        with self.told_step():
            fake = self.fake_guidance(self.fake_score, x_t, t, batch.cond, u)
        logits = self.logits(transport(fake, r), r, batch.cond)
        diagnostics = {"sample_std": x.detach().std(), "logit": logits.detach().mean()}
        return Terms({"gan": generator_loss(logits, self.gan.kind)}, diagnostics)

    def fake_score_loss(self, batch: Batch) -> Terms:
        """Denoising, and the discriminator's side."""
        assert self.gan is not None
        terms, _ = self.critic_denoising(batch)
        x = self.rollout(batch, grad=False).x0
        x_t, t, _ = self.renoise(x, self.matching_times, "gan")
        r, u = self.earlier(t), self.guidance_draw(len(x))
        with torch.no_grad():
            real = self.guidance(self.require_teacher(), x_t, t, batch.cond, u)
            with self.told_step():
                fake = self.fake_guidance(self.fake_score, x_t, t, batch.cond, u)
        on_real, on_fake = (self.logits(transport(p, r), r, batch.cond) for p in (real, fake))
        terms.losses["gan"] = discriminator_loss(on_real, on_fake, self.gan.kind)
        terms.diagnostics |= {"logit_real": on_real.detach().mean(), "logit_fake": on_fake.detach().mean()}
        return terms

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        assert self.gan is not None
        seen = 1 if self.gan.network_taps else 0
        return {
            "student": {"student": 1, "teacher": seen, "fake_score": 1},
            "fake_score": {"student": 0, "teacher": 1 + 2 * seen, "fake_score": 2},
        }
