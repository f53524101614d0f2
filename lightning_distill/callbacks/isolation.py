"""Look at a module in the middle of training without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_distill.methods.base import DistillationModule
from lightning_distill.networks.modes import evaluation_mode

__all__ = ["as_distillation", "run_folder", "undisturbed"]


@contextmanager
def undisturbed(module: LightningModule) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every mode and every global generator is as before."""
    with isolate_rng(), torch.no_grad(), evaluation_mode(module):
        yield


def run_folder(trainer: Trainer) -> Path | None:
    """Where a run writes; None when it keeps nothing. A collective: every rank must ask."""
    folder = trainer.log_dir
    return None if folder is None or getattr(trainer, "fast_dev_run", False) else Path(folder)


def as_distillation(callback: object, module: LightningModule) -> DistillationModule:
    """The module, or a clear error for one that is no distillation."""
    if not isinstance(module, DistillationModule):
        raise TypeError(f"{type(callback).__name__} needs a DistillationModule, not {type(module).__name__}.")
    return module
