"""When a run saves its state: every so many student updates, at its end, and when it is asked to stop."""

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

__all__ = ["RunStopped", "StopSignals", "StudentCheckpoint", "checkpoint_folder"]


class StudentCheckpoint(ModelCheckpoint):
    """Checkpoints counted in student updates; ``last.ckpt`` is always the state at the end of the run.

    Lightning's own saves at multiples of ``every_n_train_steps`` only. The state is saved within the last batch, as
    every other checkpoint is, so that a run continued with more updates equals one that was never stopped.

    Args:
        every_n_train_steps: student updates between checkpoints.
    """

    def __init__(self, every_n_train_steps: int = 1000) -> None:
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            filename="step{step}",
            auto_insert_metric_name=False,
        )
        self._saved_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at multiples of ``every_n_train_steps``, and when this batch was the last."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps or trainer.should_stop:
            self.save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the last batch did not know to be the end (a number of epochs)."""
        self.save_now(trainer)

    def save_now(self, trainer: Trainer) -> None:
        """Save the present state, unless that has been done or there is none."""
        if self._saved_step == trainer.global_step or trainer.global_step == 0:
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved_step = trainer.global_step


class RunStopped(SystemExit):
    """The end of a run that was asked to stop; the exit status is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopSignals(Checkpoint):
    """SIGTERM and SIGUSR1 end a run between two updates, with a checkpoint from which it goes on bit for bit.

    The running cycle is finished and its state saved: by ``StudentCheckpoint`` as ``last.ckpt``, or as
    ``interrupted.ckpt`` beside the checkpoints of another ``ModelCheckpoint``. A validation that has begun is finished
    first. A signal that reaches one process stops all of them. Under SLURM with automatic requeueing, Lightning's own
    handler of the requeueing signal runs once the cycle is finished, rather than in its middle.

    As a ``Checkpoint`` it runs after all other callbacks, so that their state is that of a finished cycle.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, whose own handling of SIGTERM saves nothing."""
        self._asked = int(signal.SIGTERM) if trainer.received_sigterm else 0
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may
        for number in _stop_signals(trainer):
            self._previous[number] = signal.signal(number, self._remember)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if any process was asked to."""
        asked = self._asked
        if trainer.world_size > 1:
            found = torch.tensor(float(asked), device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(found, reduce_op="max"))
        if not asked or 0 < trainer.max_steps <= trainer.global_step:
            return
        path = _save(trainer)
        if asked != signal.SIGTERM and callable(previous := self._previous.get(asked)):
            previous(asked, None)
        if trainer.is_global_zero:
            print(
                f"stopped by {signal.Signals(asked).name} after update {trainer.global_step}; continue with "
                f"--ckpt_path {path}",
                file=sys.stderr,
                flush=True,
            )
        raise RunStopped(asked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _remember(self, number: int, frame: Any) -> None:
        self._asked = number

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()


def checkpoint_folder(trainer: Trainer, folder: str | Path) -> Path:
    """Where the checkpoints of a run are.

    Args:
        trainer: its first ``ModelCheckpoint`` may name a folder.
        folder: run folder.
    """
    given = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    return Path(given[0]) if given else Path(folder) / "checkpoints"


def _stop_signals(trainer: Trainer) -> set[int]:
    numbers = {int(signal.SIGTERM)} | ({int(signal.SIGUSR1)} if hasattr(signal, "SIGUSR1") else set())
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(environment, SLURMEnvironment) and environment.requeue_signal is not None:
        numbers.add(int(environment.requeue_signal))
    return numbers


def _save(trainer: Trainer) -> str:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, StudentCheckpoint):
            callback.save_now(trainer)
            return callback.last_model_path
    path = checkpoint_folder(trainer, trainer.log_dir or trainer.default_root_dir) / "interrupted.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    return str(path)
