"""Figures of fake scores and discriminators at fresh student samples, a part of ``TrainingHealth``."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lightning_distill.batch import Batch
from lightning_distill.generation import generate
from lightning_distill.losses.diagnostics import critic_state, guidance_split, logit_statistics
from lightning_distill.methods.base import DistillationModule
from lightning_distill.methods.rollout import Rollout
from lightning_distill.methods.subinterval import SubintervalMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.randomness import derive_seed
from lightning_distill.times import bounded

__all__ = ["critic_figures", "discriminator_figures", "rolled_out"]


def rolled_out(module: DistillationModule, batch: Batch) -> Rollout | Tensor:
    """Samples as critics see them in training; those of sampling where students jump between two times.

    Args:
        module: the method, within its ``probing``.
        batch: conditions.
    """
    itself = type(module).simulate_student is not DistillationModule.simulate_student
    if module.sampler in ("renoise", "ode") or itself:
        return module.rollout(batch, grad=False)
    noise = module.draws.normal("start", (batch.size, *module.sample_shape))
    generator = torch.Generator().manual_seed(derive_seed(module.streams.seed, "health/rollout"))
    return generate(module.student, noise, batch.cond, module.student_times, module.sampler, generator=generator)


def critic_figures(
    module: DistillationModule,
    teacher: Denoiser,
    fake_score: Denoiser,
    made: Rollout | Tensor,
    batch: Batch,
    eps: Mapping[float, Tensor],
    u: Tensor,
) -> dict[str, Tensor]:
    """Lag, residual and gap of the fake score, and the parts of the guided direction.

    Args:
        module: the method, within its ``probing``.
        teacher: the frozen network.
        fake_score: the critic.
        made: see ``rolled_out``.
        batch: conditions.
        eps: noise (B, ...) by the quantile of the matching times at which it is added.
        u: one uniform number per sample, (B,), for random guidance.
    """
    process, cond = module.process, batch.cond
    distribution = getattr(module, "matching_times", None) or bounded(process, 0.02, 0.98)
    guidance = getattr(module, "guidance", None)
    guided = guidance is not None and guidance.needs_null and bool(cond)
    levels: dict[str, list[Tensor]] = {}
    for q, noise in eps.items():
        level = torch.full((len(noise),), q, dtype=torch.float64, device=noise.device)
        if isinstance(module, SubintervalMethod) and isinstance(made, Rollout):
            x_t, t, x = module.at_level(made, level, noise)
        else:
            x, t = made.x0 if isinstance(made, Rollout) else made, distribution.quantile(level, process)
            x_t = process.add_noise(x, noise, t)
        with getattr(module, "told_step", nullcontext)():
            fake = fake_score(x_t, t, cond).x0
        real = teacher(x_t, t, cond).x0
        state = critic_state(x, real, fake)
        found = {"fake_score_lag": state.lag, "fake_score_residual": state.residual, "score_gap": state.gap}
        if guided and guidance is not None:
            uncond = teacher(x_t, t, teacher.null_cond(cond)).x0
            split = guidance_split(real, uncond, fake, guidance.scales(t, u))
            found["guidance_share"], found["guidance_cosine"] = split.share, split.cosine
        for name, value in found.items():
            levels.setdefault(name, []).append(value)
    return _over_levels(levels, list(eps))


def discriminator_figures(
    module: DistillationModule,
    discriminator: nn.Module,
    x: Tensor,
    batch: Batch,
    eps: Mapping[float, Tensor],
    real_eps: Mapping[float, Tensor],
) -> dict[str, Tensor]:
    """Logits of student samples and of data, and the share of right answers.

    Args:
        module: the method, within its ``probing``.
        discriminator: the heads.
        x: student samples, (B, ...).
        batch: conditions and data.
        eps: noise of the samples by the quantile of the times, see ``critic_figures``.
        real_eps: noise of the data.
    """
    gan, network = getattr(module, "gan", None), getattr(module, "feature_network", None)
    if gan is None or network is None or batch.x0 is None:
        return {}
    process, data = module.process, batch.x0
    heads = getattr(module, "heads", None) or (lambda features, _cond: discriminator(features))
    distribution = gan.times or getattr(module, "critic_times", None) or bounded(process, 0.0, 1.0)
    # a shared backbone would tell the teacher, too
    told = getattr(module, "told_step", nullcontext) if gan.features == "fake_score" else nullcontext
    levels: dict[str, list[Tensor]] = {}
    for q, noise in eps.items():
        t = distribution.quantile(torch.full((len(x),), q, dtype=torch.float64, device=x.device), process)
        with told():
            real, fake = (
                heads(gan.tapped(network, process.add_noise(clean, n, t), t, batch.cond), batch.cond)
                for clean, n in ((data, real_eps[q]), (x, noise))
            )
        found = logit_statistics(real, fake, gan.kind)
        for name, value in {
            "logit_real": found.real_mean,
            "logit_real_std": found.real_std,
            "logit_fake": found.fake_mean,
            "logit_fake_std": found.fake_std,
            "discriminator_accuracy": found.accuracy,
        }.items():
            levels.setdefault(name, []).append(value)
    return _over_levels(levels, list(eps))


def _over_levels(found: Mapping[str, Sequence[Tensor]], levels: Sequence[float]) -> dict[str, Tensor]:
    """Each figure at every level and its mean, geometric for ratios."""
    figures = {}
    for name, values in found.items():
        stacked = torch.stack(list(values))
        ratio = name == "fake_score_lag"
        figures[name] = stacked.clamp_min(1e-12).log().mean().exp() if ratio else stacked.mean()
        figures |= {f"{name}/level_{q:g}": value for q, value in zip(levels, values)}
    return figures
