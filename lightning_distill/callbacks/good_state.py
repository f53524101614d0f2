"""The last good state of a run, ``good.ckpt``: where it lies, whose it is, and how a run goes back to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_distill.checkpoints import read_checkpoint
from lightning_distill.methods.base import DistillationModule
from lightning_distill.strategies.sharded_files import read_meta

__all__ = ["good_path", "kept_step", "restore"]

#: entries of an optimizer's groups that are learning rates
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
#: lists of a scheduler that are learning rates
_SCHEDULED = ("base_lrs", "max_lrs", "_last_lr")


def good_path(trainer: Trainer) -> Path:
    """``good.ckpt`` beside the other checkpoints of a run; all processes call it."""
    checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
    folder = trainer.log_dir  # on every rank: it is broadcast
    return Path(checkpoints or Path(folder or trainer.default_root_dir) / "checkpoints") / "good.ckpt"


def kept_step(trainer: Trainer, path: Path) -> int | None:
    """Update of the state in a file, None where there is none that can be read; the first process' answer for all.

    Other nodes may have other disks, and what follows is decided by all processes alike.
    """
    step: int | None = None
    if trainer.is_global_zero and path.exists():
        try:
            step = int((read_meta if path.is_dir() else read_checkpoint)(path).get("global_step", -1))
        except (ValueError, OSError):
            step = None
    return trainer.strategy.broadcast(step)


def restore(trainer: Trainer, module: DistillationModule, path: Path, lr_factor: float) -> None:
    """Put a checkpoint's weights and moments back in place, and multiply the present learning rates.

    Args:
        trainer: of the running fit.
        module: its module.
        path: of the checkpoint.
        lr_factor: factor on every learning rate.
    """
    optimizers = trainer.strategy.optimizers
    rates = [[_rates(group) for group in optimizer.param_groups] for optimizer in optimizers]
    with isolate_rng():  # generators are restored for resuming, by the module's hook or the strategy
        checkpoint = trainer.strategy.load_checkpoint(path)
        module.on_load_checkpoint(checkpoint)
    trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    for optimizer, groups in zip(optimizers, rates, strict=True):
        for group, old in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: rate * lr_factor for key, rate in old.items()})
    for config in trainer.lr_scheduler_configs:
        _scale_schedule(config.scheduler, lr_factor)
    module.after_rollback()


def _rates(group: Mapping[str, Any]) -> dict[str, Any]:
    """Learning rates of a parameter group; tensors are copied, since restoring may write into them."""
    return {k: group[k].clone() if isinstance(group[k], torch.Tensor) else group[k] for k in _RATES if k in group}


def _scale_schedule(scheduler: Any, factor: float) -> None:
    for name in _SCHEDULED:
        if getattr(scheduler, name, None) is not None:
            setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
    for inner in getattr(scheduler, "_schedulers", ()):
        _scale_schedule(inner, factor)
