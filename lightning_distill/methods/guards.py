"""Settings that would ruin a run in silence: refused before it begins, or told while it goes on."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from lightning_distill.collectives import max_over_processes
from lightning_distill.data.loader import ResumableLoader
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.second_time import second_time_of
from lightning_distill.networks.signatures import call_parameters

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_distill.batch import Batch
    from lightning_distill.methods.base import DistillationModule
    from lightning_distill.methods.cycle import Cycle
    from lightning_distill.networks.denoiser import Denoiser

__all__ = [
    "LossWeightWatch",
    "check_adapters_heard",
    "check_batch",
    "check_examples",
    "check_null_class",
    "check_optimizer",
    "check_precision",
    "check_ranks",
    "check_same_update",
    "check_schedule",
    "check_scheduler",
    "check_step_settings",
    "check_target_time",
    "check_trainer",
    "stop_when_stuck",
]

#: updates after which a term that no loss has returned is told of
PATIENCE = 100


def check_step_settings(gradient_clip_val: float | None, accumulate_grad_batches: int, max_skipped_steps: int) -> None:
    """Refuse numbers with which an optimizer step would do harm, or nothing.

    Args:
        gradient_clip_val: largest gradient norm, above 0, or None.
        accumulate_grad_batches: micro-batches, at least 1.
        max_skipped_steps: skipped steps in a row after which training stops, at least 1.

    Raises:
        ValueError: one of them is none of that.
    """
    if gradient_clip_val is not None and not gradient_clip_val > 0.0:  # NaN is not above 0 either
        raise ValueError(f"gradient_clip_val={gradient_clip_val}: give a positive norm, or null for no clipping.")
    if accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches={accumulate_grad_batches}: give 1 or more.")
    if max_skipped_steps < 1:
        raise ValueError(
            f"max_skipped_steps={max_skipped_steps}: give the number of updates in a row that may fail, 1 or more."
        )


def check_precision(precision: str) -> None:
    """Refuse trained weights of 16 bits.

    Raises:
        ValueError: the precision is 16-true or bf16-true.
    """
    if precision == "16-true":
        raise ValueError(
            "precision=16-true keeps weights and gradients in float16, where usual updates are lost and small "
            "gradients are 0; use bf16-mixed, or 16-mixed where the device has no bfloat16."
        )
    if precision == "bf16-true":
        raise ValueError(
            "precision=bf16-true keeps trained weights in bfloat16, where an update of less than 1/512 of a weight is "
            "lost; use bf16-mixed, and dtype: bfloat16 of PretrainedDenoiser for a teacher of half the size."
        )


def check_trainer(trainer: Trainer) -> None:
    """Refuse trained weights of 16 bits, and tell of averages that Lightning would make beside the module's own.

    Raises:
        ValueError: the precision is 16-true or bf16-true.
    """
    check_precision(str(trainer.precision))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if type(callback).__name__.endswith("WeightAveraging"):
            rank_zero_warn(
                f"{type(callback).__name__} averages every network of the run, teacher and critics too, and keeps its "
                "weights where sampling and export do not look; use model.init_args.ema, which averages the student."
            )


def check_same_update(trainer: Trainer) -> None:
    """Refuse processes that do not begin at the same update, as where one of them did not find the checkpoint.

    Raises:
        RuntimeError: on every process, before the first update.
    """
    here = trainer.global_step
    bounds = torch.tensor([float(here), -float(here)], device=trainer.strategy.root_device)
    last, first = max_over_processes(bounds).tolist()
    if last != -first:
        raise RuntimeError(
            f"the processes would begin at updates {-first:.0f} to {last:.0f} (process {trainer.global_rank} at "
            f"{here}), since not all of them found the checkpoint; put the run's folder where every node can read it."
        )


def check_batch(method: str, samples: int, slices: int, micro_batches: int) -> None:
    """Refuse a batch that cannot be cut into equal parts.

    Args:
        method: its name.
        samples: in the loader's batch.
        slices: per cycle.
        micro_batches: per slice.

    Raises:
        ValueError: ``samples`` is no multiple of ``slices`` times ``micro_batches``.
    """
    if samples % (slices * micro_batches):
        raise ValueError(
            f"the loader yields {samples} samples, but a cycle of {method} cuts its batch into {slices} slices of "
            f"{micro_batches} micro-batches; give a multiple of {slices * micro_batches} samples per batch, and "
            "drop_last=True to a DataLoader of your own (this package's data modules multiply by the slices "
            "themselves)."
        )


def check_last_batch(loader: object, parts: int) -> None:
    """Refuse a ``DataLoader`` whose last batch cannot be cut into equal parts, before an epoch has been trained.

    Args:
        loader: of the fit; others than ``DataLoader`` are not looked at.
        parts: slices of a cycle times micro-batches of a slice.

    Raises:
        ValueError: what is left of the data set for the last batch is no multiple of ``parts``.
    """
    if not isinstance(loader, DataLoader) or loader.drop_last or loader.batch_size is None:
        return
    try:
        left = len(loader.sampler) % loader.batch_size  # type: ignore[arg-type]
    except TypeError:  # nobody knows how many samples there are
        return
    if left % parts:
        raise ValueError(
            f"the last batch of an epoch has {left} samples, and a cycle cuts its batch into {parts} equal parts; give "
            "the DataLoader drop_last=True."
        )


def check_ranks(trainer: Trainer) -> None:
    """Refuse a ``ResumableLoader`` of another process, with which processes would train on the same samples.

    Args:
        trainer: of the fit.

    Raises:
        ValueError: the loader's rank and number of processes are not the trainer's.
    """
    loader, split = trainer.train_dataloader, trainer.distributed_sampler_kwargs or {}
    if not isinstance(loader, ResumableLoader):
        return
    own = split.get("rank", 0), split.get("num_replicas", 1)
    if (loader.rank, loader.world_size) != own:
        raise ValueError(
            f"the ResumableLoader was made with rank={loader.rank} and world_size={loader.world_size}, and this is "
            f"process {own[0]} of {own[1]}; make it in train_dataloader() of a data module with "
            "rank=self.trainer.global_rank, world_size=self.trainer.world_size, as those of lightning_distill.data do."
        )


def check_fitted_before(module: Cycle) -> None:
    """Warn of a second fit of the same module that begins at update 0."""
    if module.updates_before and module.trainer.global_step == 0:
        rank_zero_warn(
            f"this {type(module).__name__} has been trained for {module.updates_before} updates, and this fit begins "
            "at 0: it draws the same noise again, and its averages begin anew; go on with fit(ckpt_path=...), or "
            "make a new module."
        )


def check_target_time(module: DistillationModule) -> None:
    """Refuse a student with a branch for target times in a method that trains it without one.

    Raises:
        ValueError: it would be trained at r = t, and sampled at r = 0.
    """
    installed = second_time_of(module.student.network)
    if installed is None or installed.kind is None:
        return
    if getattr(module, "takes_target", False) or module.capability == "two_time":
        return
    raise ValueError(
        f"the student has a branch for target times, which {type(module).__name__} does not train: it would be sampled "
        "at other ones than it has seen. Leave TwoTime(...) out (TwoTime(kind=None, guidance=True) embeds a guidance "
        "scale alone), or use a method of flow maps, such as MeanFlow or AnyFlow."
    )


def check_null_class(denoiser: Denoiser) -> None:
    """Refuse a null class that has no row in the network's table of classes.

    Raises:
        ValueError: the label is beyond the last row.
    """
    rows = getattr(getattr(denoiser.network, "config", None), "num_class_embeds", None)
    if denoiser.null_class is not None and rows is not None and denoiser.null_class >= rows:
        raise ValueError(
            f"null_class={denoiser.null_class}, and {type(denoiser.network).__name__} has num_class_embeds={rows}, "
            f"for the labels 0 to {rows - 1}; give the label that it was trained to ignore, mostly {rows - 1}."
        )


def check_examples(denoiser: Denoiser, batch: Batch, shape: Sequence[int] | None) -> None:
    """Refuse labels that a network does not have, and tell of other mismatches of data and network.

    Args:
        denoiser: the student.
        batch: one of the first.
        shape: of the samples that are made, without the batch dimension; None where nothing says it.

    Raises:
        ValueError: a class label is negative, or none of the network's classes.
    """
    labels, count = batch.cond.get("class_labels"), denoiser.num_classes
    name = type(denoiser.network).__name__
    if labels is None:
        if count is not None:
            rank_zero_warn(
                f"{name} knows {count} classes and the batches have no class_labels: it is trained without and sampled "
                f"with them; use data with classes, for example Prior(num_classes={count})."
            )
    elif not labels.is_floating_point() and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (count is not None and high >= count):
            none = "" if denoiser.missing_null(["class_labels"]) else f", and {count} for none"
            known = "" if count is None else f"{name} has the classes 0 to {count - 1}{none}"
            raise ValueError(
                f"the batches have the class label {low if low < 0 else high}; {known or 'labels begin at 0'}. Give "
                "data with these classes, or a network with more."
            )
    argument = call_parameters(denoiser.network).get("class_labels")
    if labels is not None and count is None and argument is not None and argument.default is not argument.empty:
        rank_zero_warn(
            f"the batches have class_labels, and nothing says how many classes {name} has: it is trained with labels "
            "and sampled without; give the network an attribute num_classes."
        )
    found = None if batch.x0 is None else tuple(batch.x0.shape[1:])
    if found is not None and shape is not None and found != tuple(shape):
        rank_zero_warn(
            f"the batches have samples of shape {found}, and the student is sampled in the shape {tuple(shape)}; "
            "resize the data, or give model.init_args.shape."
        )


def check_adapters_heard(module: Cycle, phase: str) -> None:
    """Tell of adapters that a phase's loss does not depend on: their layers are not called, or their output is unused.

    Some modules read the weights of layers within them and call none, where an adapter has no effect. A layer that is
    heard in other blocks is not told of, because last blocks often compute what nothing reads; nor is one that the
    method keeps as it is.

    Args:
        module: after the backward pass of its first update, on one process.
        phase: whose networks are looked at.
    """
    for role in module.phases[phase]:
        network = getattr(module, role, None)
        if not isinstance(network, AdapterDenoiser):
            continue
        layers = {
            path: layer.lora_B[network.adapter_name].weight
            for path, layer in network.bank.layers.items()
            if network.adapter_name in layer.lora_B
        }
        layers = {path: weight for path, weight in layers.items() if weight.requires_grad}
        kinds = {path: re.sub(r"\.\d+\.", ".*.", path) for path in layers}
        heard = {kinds[path] for path, weight in layers.items() if weight.grad is not None}
        silent = [path for path in layers if kinds[path] not in heard]
        if silent:
            rank_zero_warn(
                f"{len(silent)} of the {len(layers)} adapters of {role} are without effect ({silent[0]!r} is the "
                f"first): {type(network.network).__name__} does not call their layers, or does not use what they "
                "give; leave them out with target_modules."
            )


def check_schedule(module: DistillationModule, name: str, updates: int, consequence: str) -> None:
    """Warn of a schedule that is longer than the run.

    Args:
        module: in a run.
        name: of the setting.
        updates: student updates that it needs.
        consequence: what the student has missed by then.
    """
    if 0 < module.trainer.max_steps < updates:
        rank_zero_warn(
            f"{name} asks for {updates} student updates, and the run ends after {module.trainer.max_steps}: "
            f"{consequence}; lower {name}, or raise max_steps."
        )


def check_optimizer(optimizer: Optimizer, phase: str) -> None:
    """Refuse an optimizer that evaluates the loss itself.

    Args:
        optimizer: of the phase.
        phase: its name.

    Raises:
        ValueError: its ``step`` cannot do without a closure, as that of ``LBFGS``.
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{phase}_optimizer: {type(optimizer).__name__} computes the loss several times in a step, and a loss of "
            "distillation has other noise each time; use an optimizer of one gradient, such as torch.optim.AdamW."
        )


def check_scheduler(scheduler: object, phase: str) -> None:
    """Refuse a learning-rate schedule that needs a figure to step.

    Args:
        scheduler: of the phase's optimizer.
        phase: its name.

    Raises:
        ValueError: it is a ``ReduceLROnPlateau``.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            f"{phase}_scheduler: ReduceLROnPlateau waits for a figure to stop falling, and losses of distillation do "
            "not tell when; use a schedule of updates, such as WarmupDecay."
        )


def stop_when_stuck(phase: str, in_a_row: float, most: int) -> None:
    """Raise when too many updates of a phase in a row were skipped.

    Args:
        phase: whose updates.
        in_a_row: how many of the last ones were skipped.
        most: ``max_skipped_steps``.

    Raises:
        RuntimeError: ``in_a_row`` has reached ``most``.
    """
    if in_a_row >= most:
        raise RuntimeError(
            f"the last {int(in_a_row)} {phase} updates had a loss or gradient that is not finite and were skipped; "
            "training stops, and the last checkpoint is intact. Lower the learning rate, check the data, or use "
            "precision=bf16-mixed instead of 16-mixed."
        )


class LossWeightWatch:
    """Tells once of given ``loss_weights`` whose name is almost that of a term.

    Nothing lists the terms of a method: some depend on its parts, and some begin after a warm-up. So this warns of
    what is likely a slip, and never refuses: at the first logging step after ``PATIENCE`` updates, or at the end.

    Args:
        given: keys of ``loss_weights`` that the user gave, ``"phase/term"``.
    """

    def __init__(self, given: Iterable[str]) -> None:
        self._missing = set(given)
        self._found: set[str] = set()
        self._updates = 0

    def saw(self, phase: str, terms: Iterable[str]) -> None:
        """Remember the terms that a phase has returned."""
        if self._missing:
            self._updates += phase == "student"
            self._found.update(f"{phase}/{term}" for term in terms)
            self._missing -= self._found

    def tell(self, at_end: bool = False) -> None:
        """Warn of the keys that have had no effect, if it is time to."""
        if self._updates < (1 if at_end else PATIENCE):
            return
        phases = {name.split("/", 1)[0] for name in self._found}
        for key in sorted(key for key in self._missing if key.split("/", 1)[0] in phases):
            phase = key.split("/", 1)[0]
            known = sorted(name for name in self._found if name.startswith(f"{phase}/"))
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            if close:
                self._missing.remove(key)
                rank_zero_warn(
                    f"loss_weights has {key!r}, which has done nothing in {self._updates} updates: the {phase} phase "
                    f"has returned {_listed(known)} only; did you mean {close[0]!r}?"
                )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(repr(name) for name in names)
