"""The cycle of updates, as a part of ``DistillationModule``: phases, accumulation, clipping, averages, logging."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill.batch import Batch, as_batch
from lightning_distill.collectives import mean_over_processes
from lightning_distill.data.base import check_scaling
from lightning_distill.ema import EMAProfile, check_horizon, paired_buffers, update_average
from lightning_distill.memory_format import match_states
from lightning_distill.methods.clock import PhaseClock
from lightning_distill.methods.guards import (
    LossWeightWatch,
    check_adapters_heard,
    check_batch,
    check_examples,
    check_fitted_before,
    check_last_batch,
    check_optimizer,
    check_ranks,
    check_same_update,
    check_scheduler,
    check_trainer,
    stop_when_stuck,
)
from lightning_distill.methods.rollout import Rollout
from lightning_distill.methods.subclassing import check_hyperparameters, parameters_of
from lightning_distill.methods.terms import Terms, checked, mean_terms
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.optim import default_optimizer, guard_step
from lightning_distill.randomness import Draws, RandomStreams

__all__ = ["Cycle"]


class Cycle(LightningModule):
    """The updates of one ``training_step``: one of the student, then those of the other networks.

    Only the student's optimizer steps through Lightning's wrapper, so ``trainer.global_step`` and ``max_steps`` count
    student updates. A phase's losses are its method ``<phase>_loss``.
    """

    #: trained roles by phase, in the order of a cycle; the student comes first.
    phases: ClassVar[dict[str, tuple[str, ...]]] = {"student": ("student",)}
    #: further networks that change during training (moving targets) and belong into checkpoints.
    targets: ClassVar[tuple[str, ...]] = ()
    #: default factors of loss terms, by "phase/term".
    default_loss_weights: ClassVar[Mapping[str, float]] = {}
    default_lr: ClassVar[float] = 1e-4
    default_betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    student: Denoiser
    student_ema: nn.ModuleDict
    loss_weights: dict[str, float]
    optimizer_factories: dict[str, OptimizerCallable | None]
    scheduler_factories: dict[str, LRSchedulerCallable | None]
    gradient_clip_val: float | None
    accumulate_grad_batches: int
    ema_profiles: list[EMAProfile]
    max_skipped_steps: int
    check_data: bool
    streams: RandomStreams
    draws: Draws
    clock: PhaseClock
    #: non-finite steps that were not taken, by phase: all, and the last ones in a row
    skipped_steps: Tensor
    skipped_in_a_row: Tensor
    #: phase whose losses are being computed; strategies read it
    running_phase: str | None
    #: updates of a fit that has ended
    updates_before: int = 0
    _given_shape: tuple[int, ...] | None
    _seen_shape: tuple[int, ...] | None
    _weight_watch: LossWeightWatch
    _rollouts: dict[tuple[str, int, int], Rollout]
    _stepping: tuple[int, Tensor]
    _trained: dict[str, list[nn.Parameter]]
    #: buffers of each average, and the student's that they follow; None before the first update
    _followers: list[tuple[list[Tensor], list[Tensor]]] | None

    # ------------------------------------------------------------------------------------------------ parameters
    def role_parameters(self, name: str) -> list[nn.Parameter]:
        """Trained parameters of a role; empty where the configuration has none."""
        if name not in self._trained:
            self._trained[name] = parameters_of(getattr(self, name, None))
        return self._trained[name]

    def forget_parameters(self) -> None:
        """Look parameters up again; called when a strategy has replaced them by shards."""
        self._trained.clear()
        self._followers = None

    def averages(self) -> list[list[nn.Parameter]]:
        """Parameters of each student average, in the order of ``student.parameters()``."""
        return [list(average.parameters()) for average in self.student_ema.values()]

    # ------------------------------------------------------------------------------------------------ the cycle
    @property
    def slices_per_cycle(self) -> int:
        """Equal parts a cycle's batch is cut into; phases that share samples share a slice."""
        return 1

    def phase_plan(self) -> list[tuple[str, int]]:
        """Phases of one cycle in order, each with the slice of the batch it uses."""
        return [(phase, 0) for phase in self.phases]

    def configure_optimizers(self) -> Any:
        """One optimizer, and its schedule if there is one, per phase.

        Raises:
            ValueError: a schedule that follows a figure, ``ReduceLROnPlateau``, or an optimizer that wants a closure,
                ``LBFGS``.
        """
        configured = []
        for phase, roles in self.phases.items():
            parameters = [p for role in roles for p in self.role_parameters(role)]
            factory: Callable[..., Optimizer] = self.optimizer_factories.get(phase) or default_optimizer(
                self.default_lr, self.default_betas
            )
            entry: dict[str, Any] = {"optimizer": factory(parameters)}
            check_optimizer(entry["optimizer"], phase)
            entry["optimizer"].register_load_state_dict_post_hook(match_states)
            if (factory_of_schedule := self.scheduler_factories.get(phase)) is not None:
                schedule = factory_of_schedule(entry["optimizer"])
                check_scheduler(schedule, phase)
                entry["lr_scheduler"] = {"scheduler": schedule, "name": f"lr/{phase}"}
            configured.append(entry)
        return configured

    def setup(self, stage: str) -> None:
        """Refuse strategies and precisions that cannot train several phases, before anything is built."""
        if stage == "fit":
            self._check_phases()
            check_trainer(self.trainer)
            check_hyperparameters(self)
            if (data := getattr(self.trainer, "datamodule", None)) is not None:
                check_hyperparameters(data)
            from lightning_distill.strategies import check_strategy  # which import this module

            check_strategy(self.trainer.strategy, len(self.phases))

    @property
    def sampled_profiles(self) -> list[EMAProfile]:
        """Profiles of the averages to sample from, which should forget the teacher."""
        return self.ema_profiles

    def on_fit_start(self) -> None:
        """Warn about averages that will mostly hold the teacher's weights."""
        check_horizon(self.sampled_profiles, self.trainer.max_steps)

    def on_train_start(self) -> None:
        """Refuse processes that begin at different updates, and let each draw masks of dropout of its own."""
        check_same_update(self.trainer)
        check_last_batch(self.trainer.train_dataloader, self.slices_per_cycle * self.accumulate_grad_batches)
        check_ranks(self.trainer)
        check_fitted_before(self)
        if self.trainer.global_rank > 0 and self.trainer.global_step == 0:  # later, checkpoints have the states
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One cycle."""
        batch = as_batch(batch)
        self._check_data(batch, self.trainer.global_step)
        slices = self._slice(batch)
        update = self.trainer.global_step
        plan, every = self.phase_plan(), max(1, getattr(self.trainer, "log_every_n_steps", 50))
        log = (update + sum(phase == "student" for phase, _ in plan)) // every > update // every
        repeats: dict[str, int] = {}
        self._rollouts.clear()  # an interrupted cycle leaves its own
        for phase, index in plan:
            repeat = repeats[phase] = repeats.get(phase, -1) + 1
            with self.clock.measure(phase, self.device):
                terms = self._phase(phase, slices[index], update, repeat, index)
            self._weight_watch.saw(phase, terms.losses)
            if log:
                self._log_terms(phase, terms)
        self._rollouts.clear()
        self._step_schedules(repeats)
        if log:
            self._log_skipped()
            self._weight_watch.tell()

    def on_train_end(self) -> None:
        """Tell of loss weights that did nothing."""
        self._weight_watch.tell(at_end=True)
        self.updates_before = self.trainer.global_step

    def _step_schedules(self, ran: Mapping[str, int]) -> None:
        """Learning-rate schedules of the phases that ran go on, all of them as often as the student has stepped."""
        given = self.lr_schedulers() or []
        scheduled = [phase for phase in self.phases if self.scheduler_factories.get(phase) is not None]
        for phase, scheduler in zip(scheduled, given if isinstance(given, list) else [given]):
            if phase in ran:
                for _ in range(max(1, ran.get("student", 0) + 1)):
                    scheduler.step()

    def _slice(self, batch: Batch) -> list[Batch]:
        parts = self.slices_per_cycle
        check_batch(type(self).__name__, batch.size, parts, self.accumulate_grad_batches)
        size = batch.size // parts
        return [batch.rows(i * size, (i + 1) * size) for i in range(parts)]

    def _phase(self, phase: str, batch: Batch, update: int, repeat: int, slice_index: int) -> Terms:
        """Gradients over the micro-batches of one slice, then one optimizer step."""
        index = list(self.phases).index(phase)
        loss_function = self.losses_of(phase)
        optimizers = self.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        parts = self.accumulate_grad_batches
        size = batch.size // parts
        logged: list[Terms] = []
        total = torch.zeros((), device=self.device)
        with self._only(phase):
            for micro in range(parts):
                first = self.global_rank * batch.size + micro * size
                self.draws = Draws(self.streams, update, first, f"{phase}{repeat}", slice_index, self.device, True)
                terms = checked(loss_function(batch.rows(micro * size, (micro + 1) * size)), f"{phase}_loss")
                loss = self.weighted_sum(phase, terms) / parts
                with self._reduced(micro == parts - 1):
                    self.manual_backward(loss)
                total = total + loss.detach()
                logged.append(terms)
            if update == repeat == 0 and self.trainer.world_size == 1:
                check_adapters_heard(self, phase)
            self._stepping = (index, total)
            if phase == "student":
                optimizer.step()
                self._average(update + repeat + 1, batch.size * self.trainer.world_size)
            else:
                inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
                self.trainer.strategy.optimizer_step(inner, closure=lambda: None, model=self)
        optimizer.zero_grad(set_to_none=True)
        self.after_phase(phase)
        mean = mean_terms(logged)
        mean.diagnostics.update(total=total, grad_norm=self._grad_norm)
        return mean

    def after_phase(self, phase: str) -> None:
        """Called when a phase's optimizer has stepped; ``self._skipped`` is 1 where the step was skipped."""

    def after_rollback(self) -> None:
        """Called when an earlier state has been restored in a running fit; copies on the host are read again."""

    def losses_of(self, phase: str) -> Callable[[Batch], Terms]:
        """The method that computes the losses of a phase."""
        function: Callable[[Batch], Terms] = getattr(self, f"{phase}_loss")
        return function

    def _check_phases(self) -> None:
        """Refuse a class of which no part can be trained, such as a base of methods, before it begins."""
        if missing := [f"{phase}_loss" for phase in self.phases if not callable(getattr(self, f"{phase}_loss", None))]:
            raise TypeError(
                f"{type(self).__name__} has no {missing[0]}(batch); choose a method, or write it: it returns the Terms "
                f"of the phase {missing[0].removesuffix('_loss')!r}."
            )

    def weighted_sum(self, phase: str, terms: Terms) -> Tensor:
        """Total loss of a phase: its terms with their ``loss_weights``."""
        losses = [self.loss_weights.get(f"{phase}/{name}", 1.0) * value for name, value in terms.losses.items()]
        return torch.stack(losses).sum()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip and guard; Lightning calls this when gradients are complete.

        In ``16-mixed`` they are unscaled by then, but for optimizers that unscale in their own step, as fused ones do.
        """
        index, loss = self._stepping
        loss = mean_over_processes(loss)  # all ranks skip a step, or none
        scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None) if scaled else None
        self._grad_norm, self._skipped = guard_step(optimizer, loss, self.gradient_clip_val, scaler=scaler)
        self.skipped_steps[index] += self._skipped
        self.skipped_in_a_row[index] = (self.skipped_in_a_row[index] + 1.0) * self._skipped

    def _average(self, update: int, samples_per_update: int) -> None:
        current = list(self.student.parameters())
        for profile, average in zip(self.ema_profiles, self.averages()):
            update_average(average, current, profile.beta(update, samples_per_update), self._skipped)
        if self._followers is None:
            self._followers = [paired_buffers(average, self.student) for average in self.student_ema.values()]
        for own, theirs in self._followers:
            if own:
                torch._foreach_copy_(own, theirs)

    @contextmanager
    def _only(self, phase: str) -> Iterator[None]:
        """Within it only the phase's own networks collect gradients; the others still pass them to their inputs."""
        own = {id(p) for role in self.phases[phase] for p in self.role_parameters(role)}
        others = [p for roles in self.phases.values() for role in roles for p in self.role_parameters(role)]
        frozen = [p for p in others if id(p) not in own]
        for parameter in frozen:
            parameter.requires_grad_(False)
        self.running_phase = phase
        settle = None if self._trainer is None else getattr(self.trainer.strategy, "settle_flags", None)
        if settle is not None:
            settle()
        try:
            yield
        finally:
            self.running_phase = None
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _reduced(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged over processes in the last of the backward passes of an optimizer step."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        return strategy.block_backward_sync()

    def _check_data(self, batch: Batch, update: int) -> None:
        if update >= 2:  # a run that was resumed is past that
            return
        if batch.x0 is not None:
            self._seen_shape = tuple(batch.x0.shape[1:])
        if not self.check_data:
            return
        check_examples(self.student, batch, self._given_shape or self.student.sample_shape)
        if batch.x0 is not None:
            check_scaling(batch.x0, self.student.sigma_data)

    # ------------------------------------------------------------------------------------------------ logging
    def _log_terms(self, phase: str, terms: Terms) -> None:
        values = {f"train/{phase}/{k}": v for k, v in {**terms.losses, **terms.diagnostics}.items()}
        self.log_dict({k: v.detach() for k, v in values.items()}, batch_size=1)

    def _log_skipped(self) -> None:
        in_a_row = self.skipped_in_a_row.tolist()
        for phase, skipped, streak in zip(self.phases, self.skipped_steps.tolist(), in_a_row):
            self.log(f"train/{phase}/skipped_steps", skipped, batch_size=1)
            stop_when_stuck(phase, streak, self.max_skipped_steps)
