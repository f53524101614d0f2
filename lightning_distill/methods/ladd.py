"""LADD and ADD: adversarial distillation on the features of a frozen network (arXiv:2403.12015, arXiv:2311.17042)."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_distill.batch import Batch
from lightning_distill.generation import default_cond
from lightning_distill.guidance import Guidance, check_guidance, is_told
from lightning_distill.losses.adversarial import approximate_r1, discriminator_loss, r1_penalty
from lightning_distill.methods.base import DistillationModule, Terms
from lightning_distill.methods.discriminating import Discriminating
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import EDM, expand
from lightning_distill.times import LogitNormal, LogNormal, TimeDistribution, bounded

__all__ = ["ADD", "LADD"]


class LADD(Discriminating, DistillationModule):
    """Latent adversarial diffusion distillation: a GAN on noisy samples, seen through the frozen teacher's blocks.

        student:         loss_G(D(x_s)),                      x_s = alpha_s x + sigma_s eps,   x = G(z)
        discriminator:   loss_D(D(real_s), D(x_s)) + w_r R1

    Only the heads are trained beside the student. Noisy levels judge composition, clean ones texture.

    Args:
        teacher: the pretrained model; its blocks are the discriminator's features.
        gan: taps, loss and noise levels; ``features`` is ``teacher``. Without times they are the paper's logit-normal
            ones of mean 1 and width 1; on EDM, whose times are no shares of a path, ln(sigma / alpha) is what the logit
            of a flow's time is.
        r1: gradient penalty on real samples: ``none``, ``exact``, or ``approximate`` (a difference under small noise,
            no second derivatives through the teacher).
        r1_std: size of that noise. Half-precision networks round logits by as much as noise of .01 moves them, which
            is APT's; the difference under noise of .1 is right to about a tenth in bfloat16.
        guidance: of the teacher in the distillation term.
        discriminator_steps: discriminator updates per student update.
        discriminator_optimizer: of the heads; None for fused AdamW.
        discriminator_scheduler: stepped once per student update.
        **kwargs: see ``DistillationModule``. Weights: ``student/gan`` 1, ``student/distillation`` 0 (see ``ADD``),
            ``discriminator/r1`` 1e-4.

    Notes:
        The paper's "real" images are samples of the teacher: give a data module of stored teacher samples, or data.
        The discriminator's first update uses the student's samples of the cycle.
        Heads know conditions through the teacher's blocks, and classes if ``gan`` says so: with ``taps=["input"]``, no
        ``classes`` and no distillation term the student may ignore its conditions, of which a warning tells.
    """

    phases = {"student": ("student",), "discriminator": ("discriminator",)}
    #: the method compares samples without their conditions, as its docstring says
    of_samples_alone: ClassVar[bool] = False
    paper = "2403.12015"
    learns_from = "teacher, data"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/distillation": 0.0, "discriminator/r1": 1e-4}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        gan: Adversary | None = None,
        r1: Literal["none", "exact", "approximate"] = "none",
        r1_std: float = 0.1,
        guidance: Guidance | None = None,
        discriminator_steps: int = 1,
        discriminator_optimizer: OptimizerCallable | None = None,
        discriminator_scheduler: LRSchedulerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if gan is None or gan.features == "fake_score":
            raise ValueError(
                f"{type(self).__name__} reads features of the frozen teacher; give gan=Adversary(taps=[...], "
                "features='teacher')."
            )
        if r1 not in ("none", "exact", "approximate"):
            raise ValueError(f"r1={r1!r} is unknown; choose none, exact or approximate.")
        if discriminator_steps < 1:
            raise ValueError(f"discriminator_steps={discriminator_steps}: give 1 or more.")
        self.gan = gan
        self.r1, self.r1_std = r1, r1_std
        self.guidance = guidance or Guidance(1.0)
        self.discriminator_steps = discriminator_steps
        self.optimizer_factories["discriminator"] = discriminator_optimizer
        self.scheduler_factories["discriminator"] = discriminator_scheduler
        self.discriminator = None

    def build_roles(self) -> None:
        """Student and heads."""
        super().build_roles()
        assert self.gan is not None
        self.discriminator = self.gan.build(self.feature_network, self.sample_shape)

    def check_configuration(self) -> None:
        """Guidance must be possible; warns where nothing would tie samples to their conditions."""
        super().check_configuration()
        check_guidance(self.require_teacher(), self.guidance)
        tells = hasattr(self, "told_scale")  # of methods that are trajectory methods, too
        if self.student.embeds_guidance and not tells and not is_told(self.require_teacher()):
            raise ValueError(
                f"the student embeds a guidance scale, which {type(self).__name__} tells nobody; leave "
                "TwoTime(guidance=True) out, or use DMD2 with an adversarial term, which tells it."
            )
        assert self.gan is not None
        checkpointed = self.activation_checkpointing and self.student.network is self.require_teacher().network
        if self.r1 == "exact" and checkpointed and self.gan.network_taps:
            raise ValueError(
                f"r1='exact' of {type(self).__name__} differentiates the teacher's blocks twice; the student shares "
                "and recomputes them, with an attention that has one derivative alone. Give r1='approximate', "
                "activation_checkpointing=False, or a student that is a copy."
            )
        alone = type(self).student_loss is LADD.student_loss and not self.loss_weights["student/distillation"]
        known = sorted(default_cond(self.require_teacher(), 1))
        assert self.discriminator is not None
        told = self.gan.network_taps or self.discriminator.num_classes is not None
        if alone and known and not told and not self.of_samples_alone:
            rank_zero_warn(
                f"the teacher takes the conditions {known}, but the discriminator of {type(self).__name__} sees samples"
                " alone: real and student samples are compared as a whole, and the student may ignore its conditions. "
                "For a conditional student give LADD's gan a block of the teacher among its taps, classes=True where "
                "conditions are classes, or a weight to student/distillation (ADD)."
            )

    @property
    def gan_times(self) -> TimeDistribution:
        """Noise levels of the game."""
        assert self.gan is not None
        return self.gan.times or (LogNormal(1.0, 1.0) if isinstance(self.process, EDM) else LogitNormal(1.0, 1.0))

    @property
    def slices_per_cycle(self) -> int:
        """Batches of fresh student samples in a cycle."""
        return self.discriminator_steps

    def phase_plan(self) -> list[tuple[str, int]]:
        """Student first; its slice is the discriminator's first."""
        return [("student", 0), *(("discriminator", k) for k in range(self.discriminator_steps))]

    # ------------------------------------------------------------------------------------------------ losses
    def student_loss(self, batch: Batch) -> Terms:
        """The generator's side, and the distance to the teacher's prediction if it has a weight."""
        x = self.rollout(batch).x0
        terms = Terms(self.gan_term(x, batch), {"sample_std": x.detach().std()})
        if self.loss_weights["student/distillation"]:
            terms.losses["distillation"] = self.distillation(x, batch)
        return terms

    def distillation(self, x: Tensor, batch: Batch) -> Tensor:
        """Mean of alpha_t |x - y_T(x_t)|^2 (ADD, Eq. 4), without gradient through y_T."""
        x_t, t, _ = self.renoise(x.detach(), bounded(self.process, 0.02, 0.98), "distillation")
        with torch.no_grad():
            u = self.draws.of_slice().uniform("guidance", len(x))  # the scale that made the sample
            real = self.guidance(self.require_teacher(), x_t, t, batch.cond, u).x0
        return (expand(self.process.alpha(t), x) * (x - real).square()).mean()

    def discriminator_loss(self, batch: Batch) -> Terms:
        """The discriminator's side, and the penalty on its slope at real samples."""
        assert self.gan is not None
        x_s, s, _ = self.renoise(self.rollout(batch, grad=False).x0, self.gan_times, "gan")
        fake = self.logits(x_s, s, batch.cond)
        real_s = self.real_noisy(batch, s).requires_grad_(self.r1 == "exact")
        # the penalty is differentiated again, which fused attention cannot be
        with sdpa_kernel(SDPBackend.MATH) if self.r1 == "exact" else nullcontext():
            real = self.logits(real_s, s, batch.cond)
        terms = Terms({"gan": discriminator_loss(real, fake, self.gan.kind)})
        if self.r1 == "exact":
            terms.losses["r1"] = r1_penalty(real, real_s)
        elif self.r1 == "approximate":
            self._warn_of_rounding(real_s.device.type)
            nearby = real_s + self.r1_std * self.draws.normal("r1/noise", real_s.shape)
            terms.losses["r1"] = approximate_r1(real, self.logits(nearby, s, batch.cond), self.r1_std)
        terms.diagnostics |= {"logit_real": real.detach().mean(), "logit_fake": fake.detach().mean()}
        return terms

    def _warn_of_rounding(self, device: str) -> None:
        narrow = torch.is_autocast_enabled(device) or self.feature_network.computes_in(torch.float32).itemsize < 4
        if narrow and self.r1_std < 0.05:
            rank_zero_warn(
                f"r1_std={self.r1_std}: in half precision logits are rounded by as much as noise that small moves "
                f"them, and the penalty of {type(self).__name__} is mostly rounding; give .1, or train in float32."
            )

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls per phase of a one-step student; early-exit feature calls included."""
        assert self.gan is not None
        seen = 1 if self.gan.network_taps else 0
        paired = seen if self.gan.kind == "relativistic" else 0
        student = seen + paired + (1 if self.loss_weights["student/distillation"] else 0)
        return {
            "student": {"student": 1, "teacher": student},
            "discriminator": {"student": 0, "teacher": seen * (3 if self.r1 == "approximate" else 2)},
        }


class ADD(LADD):
    """Adversarial diffusion distillation: LADD's game together with the distance to the teacher's prediction.

        student:   loss_G(D(x_s)) + 2.5 mean alpha_t |x - y_T(x_t)|^2                                         (Eq. 1, 4)

    Args:
        teacher: the pretrained model.
        **kwargs: see ``LADD``; the default weights are 1 for ``student/gan`` and 2.5 for ``student/distillation``, the
            loss is ``gan``'s (the paper's is the hinge loss with an R1 penalty).

    Notes:
        The paper's features are those of DINOv2 on decoded images; here they are the teacher's, on noisy samples.
    """

    paper = "2311.17042"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/distillation": 2.5, "discriminator/r1": 1e-5}
