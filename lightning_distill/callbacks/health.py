"""Is the distillation healthy? Figures of critic, guidance, discriminator, gradients, averages, samples and speed."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_distill.batch import Batch, as_batch
from lightning_distill.callbacks.isolation import as_distillation, undisturbed
from lightning_distill.callbacks.networks_in_training import critic_figures, discriminator_figures, rolled_out
from lightning_distill.generation import default_cond, generate, index_noise
from lightning_distill.guidance import Guidance
from lightning_distill.losses.diagnostics import (
    gradient_cosines,
    gradient_norms,
    sample_moments,
    weight_distance,
)
from lightning_distill.methods.base import DistillationModule
from lightning_distill.methods.rollout import Rollout
from lightning_distill.metrics.diversity import duplicate_rate
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.randomness import derive_seed
from lightning_distill.times import few_step_times

__all__ = ["TrainingHealth"]


class TrainingHealth(Callback):
    """Measures, every ``every_n_steps`` student updates, what tells early that a distillation goes wrong.

    Everything is logged under ``health/`` to the logger at that very update and to ``callback_metrics`` (where
    ``CollapseAlarm`` reads it). What needs a part that the method does not have is left out. With several levels,
    ``NAME/level_Q`` is the figure at the Q-quantile of the method's matching times (uniform where it has none); where
    scores are compared within a sub-interval, of those above the end of the sample's step.

    ==========================  =======================================  =================  ============================
    name (``health/...``)       meaning                                  healthy            else
    ==========================  =======================================  =================  ============================
    fake_score_lag              denoising error of the fake score over   .5 to 1.05         above 1.2: it lags behind
                                the teacher's, on fresh student samples                     or diverges; more
                                (geometric mean over levels)                                ``fake_score_steps``, lower
                                                                                            rate of the student
    fake_score_residual         correlation of the fake score's error    -.1 to .35         above .45: as a lag;
                                with y_T - y_F (0 for an exact one)                         below: it has not left the
                                                                                            teacher, raise its rate
    score_gap                   |y_F - y_T| over the teacher's error;    falls, stays > 0   exactly 0: the critic is
                                with an exact critic gap^2 = 1 - lag                        not trained
    guidance_share              share of (w-1)(y_c - y_u) in the         .2 to .7           above .9: guidance alone
                                guided direction                                            drives the student; lower w
    guidance_cosine             between that and y_c - y_F               below 0 once       positive throughout: nothing
                                                                         trained            holds the guidance back
    logit_real, logit_fake      discriminator, mean (and ``_std``)       apart by < 5       far apart: lower the
                                                                                            discriminator's rate
    discriminator_accuracy      share of right answers                   .55 to .9          1: it has won (less weight,
                                                                                            more noise); .5: it has lost
    term_norm/TERM              gradient norm of a weighted term         within a factor    change ``loss_weights``
                                                                         of 10
    cosine/A_B                  between the gradients of two terms       above -.3          opposed: lower one's weight
    ema_distance/NAME           |average - student| / |student|          below .1, falling  grows: the learning rate is
                                                                         at the end         too high or the average slow
    samples/mean, std,          moments of the raw student's samples,
    channel_spread, spread      from the same noise every time
    brightness_drift            (mean - reference) / reference std       within .2          saturating: lower guidance
                                                                                            or the learning rate
    contrast_ratio              std over the reference's                 .8 to 1.2          above: guidance too strong
    saturation_ratio            channel_spread over the reference's      .8 to 1.3          as contrast
    spread_ratio                std between samples over the             .8 to 1.2          below .5: mode collapse
                                reference's
    duplicates                  share of samples with a near twin        about .01          above .1: mode collapse
                                (see ``metrics.diversity``)
    skipped/PHASE               share of non-finite updates since the    0                  lower the learning rate; use
                                last figures                                                bf16
    samples_per_second          of the loader, all processes             steady
    time/PHASE, time/other      share of the wall time; ``other`` is     other < .2         more loader workers; rarer
                                data, callbacks and logging                                 evaluation
    peak_memory_gib             largest allocation on the GPU so far     steady
    ==========================  =======================================  =================  ============================

    The lag compares two networks on the student's samples, so it is small again once the student has run far past its
    teacher: then brightness_drift and spread_ratio tell.

    The reference of the drifts is the data, where batches have some, else samples of the teacher. Critic, guidance and
    discriminator are probed on fresh training rollouts (all student steps mixed, as the critic sees them, which is told
    the step where it is in training) with noise of their own: a run with this callback has the same weights, bit for
    bit, as one without, and updates in between wait for nothing. One probe costs about 3 network calls of
    ``num_samples`` per level.

    Args:
        every_n_steps: student updates between figures.
        terms_every_n_steps: student updates between comparisons of the terms' gradients, which need the memory of one
            more set of student gradients for each term; 0 for never. Sharded networks are left out.
        num_samples: samples per process; at most those of a batch where conditions come from it.
        levels: quantiles of the matching times, each in (0, 1).
        reference_steps: steps of the teacher's samples that are the reference without data; 0 leaves the drifts out.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        terms_every_n_steps: int = 250,
        num_samples: int = 64,
        levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        reference_steps: int = 20,
    ) -> None:
        super().__init__()
        if every_n_steps < 1 or terms_every_n_steps < 0 or num_samples < 2 or reference_steps < 0:
            raise ValueError(
                f"TrainingHealth(every_n_steps={every_n_steps}, terms_every_n_steps={terms_every_n_steps}, num_samples="
                f"{num_samples}, reference_steps={reference_steps}): give at least 1 update, 2 samples, and nothing "
                "negative."
            )
        if not levels or not all(0.0 < q < 1.0 for q in levels):
            raise ValueError(f"TrainingHealth(levels={list(levels)}): levels are quantiles between 0 and 1.")
        self.every_n_steps = every_n_steps
        self.terms_every_n_steps = terms_every_n_steps
        self.num_samples = num_samples
        self.levels = tuple(float(q) for q in levels)
        self.reference_steps = reference_steps
        #: the last figures without ``health/``, and the update they belong to
        self.latest: dict[str, float] = {}
        self.measured_at = 0
        self._reference: dict[str, float] = {}
        self._references = 0
        self._teacher_samples: Tensor | None = None
        self._skipped: list[float] = []
        self._mark: tuple[float, int, dict[str, float]] = (0.0, 0, {})
        self._samples = 0

    # ------------------------------------------------------------------------------------------------ when
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules that are no distillation."""
        as_distillation(self, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        module = as_distillation(self, pl_module)
        self._samples = 0
        self._skipped = module.skipped_steps.tolist()
        self._restart_clock(trainer, module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and measure when it is time."""
        batch = as_batch(batch)
        self._samples += batch.size * trainer.world_size
        step = trainer.global_step
        terms = self.terms_every_n_steps and step % self.terms_every_n_steps == 0
        if not step or not (step % self.every_n_steps == 0 or terms):
            return
        module = as_distillation(self, pl_module)
        figures: dict[str, Tensor] = {}
        if speed := step % self.every_n_steps == 0:
            figures |= self._speed(trainer, module)
        with undisturbed(module), trainer.precision_plugin.forward_context():
            if speed:
                figures |= self._networks(trainer, module, batch)
                figures |= self._sampled(trainer, module, batch)
            if terms:
                figures |= self._terms(trainer, module, batch)
        self._publish(trainer, module, figures)
        if speed:
            self._restart_clock(trainer, module)

    def _publish(self, trainer: Trainer, module: DistillationModule, figures: Mapping[str, Tensor]) -> None:
        if not figures:
            return
        values = torch.stack([v.detach().to(module.device, torch.float32) for v in figures.values()])
        numbers = trainer.strategy.reduce(values, reduce_op="mean").tolist()
        self.latest = dict(zip(figures, numbers, strict=True))
        self.measured_at = trainer.global_step
        named = {f"health/{name}": value for name, value in self.latest.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)
        module.log_dict(named, logger=False, batch_size=1, rank_zero_only=False)

    # ------------------------------------------------------------------------------------------------ networks
    @torch.no_grad()
    def _networks(self, trainer: Trainer, module: DistillationModule, batch: Batch) -> dict[str, Tensor]:
        """Figures of critic, guidance, discriminator and averages."""
        figures: dict[str, Tensor] = {}
        fake_score, teacher = getattr(module, "fake_score", None), module.teacher
        discriminator = getattr(module, "discriminator", None)
        if teacher is not None and (fake_score is not None or discriminator is not None):
            batch = batch.rows(0, min(self.num_samples, batch.size))
            first = trainer.global_rank * batch.size
            with module.probing("health", first):
                made = rolled_out(module, batch)
                x = made.x0 if isinstance(made, Rollout) else made
                eps = {q: module.draws.normal(f"noise{i}", x.shape) for i, q in enumerate(self.levels)}
                real_eps = {q: module.draws.normal(f"real_noise{i}", x.shape) for i, q in enumerate(self.levels)}
                u = module.draws.uniform("guidance", len(x))
                # within, the steps that made the samples are known
                if fake_score is not None:
                    figures |= critic_figures(module, teacher, fake_score, made, batch, eps, u)
                if discriminator is not None and batch.x0 is not None:
                    figures |= discriminator_figures(module, discriminator, x, batch, eps, real_eps)
        current = list(module.student.parameters())
        for name, average in zip(module.student_ema, module.averages()):
            figures[f"ema_distance/{name}"] = weight_distance(average, current)
        return figures

    def _terms(self, trainer: Trainer, module: DistillationModule, batch: Batch) -> dict[str, Tensor]:
        """Norms of the gradients of the student's terms, and the angles between them."""
        if any(hasattr(p, "device_mesh") for p in module.role_parameters("student")):
            return {}
        # no more samples than a training step differentiates
        part = batch.rows(0, batch.size // (module.slices_per_cycle * module.accumulate_grad_batches))
        gradients = module.term_gradients(part, "health/terms", trainer.global_rank * part.size)
        figures = {f"term_norm/{term}": value for term, value in gradient_norms(gradients).items()}
        return figures | {f"cosine/{a}_{b}": value for (a, b), value in gradient_cosines(gradients).items()}

    # ------------------------------------------------------------------------------------------------ samples
    @torch.no_grad()
    def _sampled(self, trainer: Trainer, module: DistillationModule, batch: Batch) -> dict[str, Tensor]:
        """Moments of the student's samples, and how far they are from the reference."""
        if module.teacher is None:
            return {}  # a teacher in training samples in many steps
        network = module.sampling_network("student")
        samples = self._generate(trainer, module, network, module.student_times, module.sampler, batch)
        moments = sample_moments(samples).figures()
        figures = {f"samples/{name}": value for name, value in moments.items()}
        real = self._reference_samples(trainer, module, batch)
        if real is not None and min(len(real), len(samples)) > 1:
            duplicates = duplicate_rate(samples.flatten(1), real.to(samples).flatten(1))
            figures["duplicates"] = torch.tensor(duplicates)
        if real is not None or self._reference:
            reference = self._reference_moments(trainer, module, real, fixed=batch.x0 is None)
            figures["brightness_drift"] = (moments["mean"] - reference["mean"]) / reference["std"]
            figures["contrast_ratio"] = moments["std"] / reference["std"]
            figures["spread_ratio"] = moments["spread"] / reference["spread"]
            if "channel_spread" in moments:
                figures["saturation_ratio"] = moments["channel_spread"] / reference["channel_spread"]
        return figures

    def _generate(
        self,
        trainer: Trainer,
        module: DistillationModule,
        network: Denoiser,
        times: Sequence[float],
        sampler: str,
        batch: Batch,
        guidance_scale: float | Guidance = 1.0,
    ) -> Tensor:
        """Samples from the same noise at every update."""
        known = set(batch.cond) <= {"class_labels"}
        n = self.num_samples if known else min(self.num_samples, batch.size)
        first = trainer.global_rank * n
        cond = default_cond(network, n, first) if known else network.accepted(batch.rows(0, n).cond)
        noise = index_noise(n, module.sample_shape, derive_seed(module.streams.seed, "health"), first)
        generator = torch.Generator().manual_seed(derive_seed(module.streams.seed, "health/fresh", first))
        return generate(
            network,
            noise,
            cond,
            times,
            sampler,
            guidance_scale=guidance_scale if cond else 1.0,
            generator=generator,
            batch_size=max(1, batch.size),
        )

    def _reference_samples(self, trainer: Trainer, module: DistillationModule, batch: Batch) -> Tensor | None:
        """The data of the batch; without data, samples of the teacher, made once."""
        if batch.x0 is not None:
            return batch.x0
        if self._teacher_samples is None and self.reference_steps:
            teacher = module.require_teacher()
            times = few_step_times(teacher.process, self.reference_steps)
            made = self._generate(trainer, module, teacher, times, "ode", batch, module.teacher_guidance)
            self._teacher_samples = made.cpu()
        return self._teacher_samples

    def _reference_moments(
        self, trainer: Trainer, module: DistillationModule, real: Tensor | None, fixed: bool
    ) -> dict[str, float]:
        """Moments of all data seen at probes so far, or of the teacher's samples."""
        if real is None or (fixed and self._reference):
            return self._reference
        moments = sample_moments(real).figures()
        values = torch.stack(list(moments.values())).float().to(module.device)
        new = dict(zip(moments, trainer.strategy.reduce(values, reduce_op="mean").tolist(), strict=True))
        self._references += 1
        old = self._reference or new
        self._reference = {k: old[k] + (v - old[k]) / self._references for k, v in new.items()}
        return self._reference

    # ------------------------------------------------------------------------------------------------ speed
    def _speed(self, trainer: Trainer, module: DistillationModule) -> dict[str, Tensor]:
        phases = module.phase_seconds  # waits for the device, so that the wall time below is whole
        then, samples, before = self._mark
        wall = max(time.perf_counter() - then, 1e-9)
        shares = {name: (seconds - before.get(name, 0.0)) / wall for name, seconds in phases.items()}
        values = {f"time/{name}": share for name, share in shares.items()}
        values["time/other"] = max(0.0, 1.0 - sum(shares.values()))
        values["samples_per_second"] = (self._samples - samples) / wall
        now = module.skipped_steps.tolist()
        steps = {phase: sum(name == phase for name, _ in module.phase_plan()) for phase in module.phases}
        updates = max(1, trainer.global_step - self._started)
        for phase, new, old in zip(module.phases, now, self._skipped):
            values[f"skipped/{phase}"] = max(0.0, new - old) / (updates * max(1, steps[phase]))
        self._skipped = now
        if module.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(module.device) / 2**30
        return {name: torch.tensor(value) for name, value in values.items()}

    def _restart_clock(self, trainer: Trainer, module: DistillationModule) -> None:
        self._started = trainer.global_step
        self._mark = (time.perf_counter(), self._samples, module.phase_seconds)

    # ------------------------------------------------------------------------------------------------ resume
    def state_dict(self) -> dict[str, Any]:
        """The reference of the drifts."""
        return {"reference": dict(self._reference), "references": self._references}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the reference of the run that is resumed."""
        self._reference = dict(state_dict["reference"])
        self._references = int(state_dict["references"])
