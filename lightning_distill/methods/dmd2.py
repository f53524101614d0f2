"""DMD2: improved distribution matching distillation (arXiv:2405.14867)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.adversarial import discriminator_loss, generator_loss
from lightning_distill.losses.score_matching import matching_weight, score_difference
from lightning_distill.methods.base import Terms
from lightning_distill.methods.fake_score import FakeScoreMethod
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.discriminators import DiscriminatorHeads
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["DMD2"]


class DMD2(FakeScoreMethod):
    """Distribution matching distillation with a two time-scale fake score and a GAN term.

    The student x = G(z) is moved along the difference of two scores, the frozen teacher's and that of a critic trained
    on the student's own samples; at the optimum both agree at every noise level. Data-free without ``gan``.

        grad_theta = E_t[ lambda_t (y_F(x_t) - y_T(x_t)) dx/dtheta ],   x_t = alpha_t x + sigma_t eps      (Eq. 1)
        student:      matching + w_g softplus(-D(x_s))                                                    (Section 4.3)
        fake score:   |F(x_t) - x|^2 + w_d [softplus(D(x_s)) + softplus(-D(real_s))]

    Multi-step students are trained on their own backward simulation (Section 4.5): a random step of the time list, the
    steps before it without graph.

    Args:
        teacher: the pretrained model.
        weight: factor lambda on the direction; ``dmd`` is 1 / mean |x - y_T| per sample (see ``matching_weight``).
        gan: adversarial term on features of the fake score or of the teacher; None for data-free training. Default
            weights 1e-3 (``student/gan``) and 1e-2 (``fake_score/gan``).
        regression_pairs: safetensors file of noise and teacher outputs for a warm-up by regression.
        regression_steps: student updates of that warm-up.
        **kwargs: see ``FakeScoreMethod`` and ``DistillationModule``.

    Notes:
        The fake score of a multi-step student is not told which step made a sample, as in the paper; it then matches
        the mixture of all steps' outputs.
        The real images of the GAN term are noised with the same times as the fakes and independent noise.
    """

    paper = "2405.14867"
    learns_from = "teacher alone; data for gan"
    phases = {"student": ("student",), "fake_score": ("fake_score", "discriminator")}
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/gan": 1e-3, "fake_score/gan": 1e-2}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        weight: str = "dmd",
        gan: Adversary | None = None,
        regression_pairs: str | None = None,
        regression_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if regression_steps and regression_pairs is None:
            raise ValueError(
                f"regression_steps={regression_steps} needs regression_pairs, a file of noise-image pairs."
            )
        self.weight = weight
        self.gan = gan
        self.regression_steps = regression_steps
        self._pairs: Batch | None = None
        if regression_pairs is not None:
            from lightning_distill.data.pairs import load_pairs

            self._pairs = load_pairs(regression_pairs)
        self.discriminator: DiscriminatorHeads | None = None

    def build_roles(self) -> None:
        """Student, fake score and, with ``gan``, discriminator heads."""
        super().build_roles()
        if self.gan is not None:
            self.discriminator = self.gan.build(self.feature_network, self.sample_shape)

    @property
    def feature_network(self) -> Denoiser:
        """The network whose features the discriminator reads."""
        assert self.gan is not None
        return self.fake_score if self.gan.features == "fake_score" else self.require_teacher()

    # ------------------------------------------------------------------------------------------------ student
    def student_loss(self, batch: Batch) -> Terms:
        """Score difference at a random time, and the generator's side of the GAN."""
        if self.draws.update < self.regression_steps:
            return self._regression(batch.size)
        x = self.rollout(batch).x0
        x_t, t, _ = self.renoise(x, self.matching_times, "matching")
        with torch.no_grad():
            u = self.draws.uniform("guidance", len(x))
            real = self.guidance(self.require_teacher(), x_t, t, batch.cond, u).x0
            fake = self.fake_score(x_t, t, batch.cond).x0
        terms = {"matching": score_difference(x, real, fake, matching_weight(self.weight, x, real, t, self.process))}
        if self.gan is not None:
            x_s, s, _ = self.renoise(x, self.gan.times or self.critic_times, "gan")
            terms["gan"] = generator_loss(self._logits(x_s, s, batch.cond), self.gan.kind)
        return Terms(terms, {"score_gap": (fake - real).square().mean(), "sample_std": x.detach().std()})

    def _regression(self, n: int) -> Terms:
        """Regression of the one-step map on stored pairs (Section 4.1; needed for one-step VP students)."""
        assert self._pairs is not None
        pairs = self._pairs
        assert pairs.noise is not None
        assert pairs.x0 is not None
        rows = (self.draws.uniform("pairs", n) * pairs.size).long().clamp_max(pairs.size - 1).cpu()
        cond = {k: v[rows].to(self.device) for k, v in pairs.cond.items()}
        start = self.process.prior(pairs.noise[rows].to(self.device), self.student_times[0])
        t = torch.full((n,), self.student_times[0], dtype=torch.float64, device=self.device)
        x = self.student(start, t, cond).x0
        return Terms({"regression": (x - pairs.x0[rows].to(x)).square().mean()})

    # ------------------------------------------------------------------------------------------------ critic
    def fake_score_loss(self, batch: Batch) -> Terms:
        """Denoising of student samples, and the discriminator's side of the GAN."""
        if self.gan is None:
            return self.critic_denoising(batch)[0]
        if batch.x0 is None:
            raise ValueError(
                "the GAN term compares student samples with real data, but the loader yields batches without x0; use a "
                "data module with images (for example FashionMNIST), or remove gan for data-free training."
            )
        shared = self.gan.features == "fake_score" and self.gan.times is None
        terms, prediction = self.critic_denoising(batch, self.gan.network_taps if shared else ())
        if shared:  # the critic's own forward already has the fake features
            fake, t = self.heads(self.gan.in_passing(prediction.x_t, prediction.features)), prediction.t
        else:
            x_s, t, _ = self.renoise(self.rollout(batch, grad=False).x0, self.gan.times or self.critic_times, "gan")
            fake = self._logits(x_s, t, batch.cond)
        eps = self.draws.normal("gan/real_noise", batch.x0.shape)
        real = self._logits(self.process.add_noise(batch.x0, eps, t), t, batch.cond)
        terms.losses["gan"] = discriminator_loss(real, fake, self.gan.kind)
        terms.diagnostics["logit_real"], terms.diagnostics["logit_fake"] = real.mean(), fake.mean()
        return terms

    def heads(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits of the discriminator heads, (B, n)."""
        assert self.discriminator is not None
        return self.discriminator(features)

    def _logits(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        assert self.gan is not None
        return self.heads(self.gan.tapped(self.feature_network, x_t, t, cond))

    # ------------------------------------------------------------------------------------------------ counts
    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls per phase of a one-step student (first critic update); early-exit feature calls included."""
        student = {"student": 1, "teacher": 1, "fake_score": 1}
        critic = {"student": 0, "teacher": 0, "fake_score": 1}
        if self.gan is not None and self.gan.network_taps:
            source = self.gan.features
            student[source] += 1
            critic[source] += 1 if source == "fake_score" and self.gan.times is None else 2
        return {"student": student, "fake_score": critic}
