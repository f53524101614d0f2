"""When a run saves its state: every so many student updates, at its end, and when it is asked to stop."""

import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.checkpoint_files import newest_history
from lightning_distill.collectives import max_over_processes
from lightning_distill.requeue import is_requeued_by, requeue

__all__ = ["MonitorWatch", "RunStopped", "StopSignals", "StopWithoutSaving", "StudentCheckpoint", "checkpoint_folder"]


class StudentCheckpoint(ModelCheckpoint):
    """Checkpoints counted in student updates; ``last.ckpt`` is always the state at the end of the run.

    Lightning's own saves at multiples of ``every_n_train_steps`` only. The state is saved within the last batch, as
    every other checkpoint is, so that a run continued with more updates equals one that was never stopped. A run that
    goes on in its own folder, also with another ``every_n_train_steps``, replaces its ``last.ckpt``. One that goes back
    there, to a checkpoint with fewer updates than the folder's newest, counts as a rewind: what it saves is newer than
    what it left behind.

    Args:
        every_n_train_steps: student updates between checkpoints, at least 1.
        keep: the newest ``step*.ckpt`` that stay, at least 1; ``last.ckpt`` is beside them.

    Raises:
        ValueError: one of them is below 1.
    """

    def __init__(self, every_n_train_steps: int = 1000, keep: int = 2) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(
                    f"StudentCheckpoint({name}={value}): give 1 or more; trainer.enable_checkpointing=false saves "
                    "nothing at all."
                )
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            save_top_k=-1,  # what stays is decided here
            filename="step{step}",
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self.keep = keep
        self._saved_step = 0
        self._rewinds = 0

    @property
    def state_key(self) -> str:
        """The same for all settings, so that a run that is continued with others knows its files."""
        return "StudentCheckpoint"

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and how often the run went back."""
        return {**super().state_dict(), "rewinds": self._rewinds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        super().load_state_dict(state_dict)
        self._rewinds = state_dict.get("rewinds", 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the run goes back."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step and self.dirpath:
            self._rewinds = trainer.strategy.broadcast(self._counted(trainer.global_step))

    def _counted(self, updates: int) -> int:
        """Rewinds of a run that goes on after so many updates."""
        rewinds, newest = newest_history(Path(str(self.dirpath)))
        if (self._rewinds, updates) >= (rewinds, newest):
            return self._rewinds
        rank_zero_warn(
            f"the run goes back from update {newest} to {updates}. Checkpoints of later updates stay in {self.dirpath} "
            "until they are replaced; from its first checkpoint on, --ckpt_path last means this continuation."
        )
        return rewinds + 1

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
        if trainer.is_global_zero and self.dirpath:
            self._remove_older(trainer, Path(filepath).parent)

    def _remove_older(self, trainer: Trainer, folder: Path) -> None:
        """Leave the newest files up to this update; later ones are another continuation's."""
        steps = {int(m[1]): f for f in folder.glob("step*.ckpt") if (m := re.fullmatch(r"step(\d+)\.ckpt", f.name))}
        past = sorted(step for step in steps if step <= trainer.global_step)
        for step in past[: -self.keep]:
            if self._should_remove_checkpoint(trainer, str(steps[step]), ""):
                self._remove_checkpoint(trainer, str(steps[step]))


class MonitorWatch(Callback):
    """Tells once of callbacks that look for a figure in vain.

    A ``ModelCheckpoint`` whose figure is not there when it is due saves nothing, and an ``EarlyStopping``, which looks
    at the end of an epoch, does nothing in a run that is over before.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for an end of an epoch."""
        if not 0 < trainer.max_steps <= trainer.num_training_batches:
            return
        for callback in trainer.early_stopping_callbacks:
            if not getattr(callback, "_check_on_train_epoch_end", True):
                continue
            rank_zero_warn(
                f"EarlyStopping looks at {callback.monitor!r} at the end of an epoch, which has "
                f"{trainer.num_training_batches} updates here, and the run {trainer.max_steps}: it does nothing. Give "
                "it check_on_train_epoch_end: false, to look after each evaluation of GenerativeEvaluation."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look for the figures that are due at this update."""
        for callback in trainer.checkpoint_callbacks:
            every = getattr(callback, "_every_n_train_steps", 0)
            name = getattr(callback, "monitor", None)
            if not name or name in self._told or not every or trainer.global_step % every:
                continue
            if name not in trainer.callback_metrics:
                self._told.add(name)
                known = sorted(key for key in trainer.callback_metrics if key.startswith("val/"))
                rank_zero_warn(
                    f"ModelCheckpoint monitors {name!r}, which nothing has measured at update {trainer.global_step}: "
                    f"it saves nothing there. Measured are {', '.join(known) or 'no figures of samples'} (see "
                    "GenerativeEvaluation and its every_n_steps)."
                )


class RunStopped(SystemExit):
    """The end of a run that was asked to stop; the exit status is 128 + the signal's number.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


#: above the numbers of all signals
_FIRST = 1000


class StopWithoutSaving(Callback):
    """SIGTERM, SIGUSR1 and the first Ctrl-C end a run between two updates; for runs that save nothing.

    The running cycle is finished first, and a validation that has begun. A signal that reaches one process stops all of
    them. A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._requeued_by: set[int] = set()
        self._process = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, whose own handling of SIGTERM saves nothing."""
        self._asked = int(signal.SIGTERM) if trainer.received_sigterm else 0
        self._process = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may
        self._requeued_by = {number for number in _stop_signals(trainer) if is_requeued_by(trainer, number)}
        for number in _stop_signals(trainer):
            self._previous[number] = signal.signal(number, self._remember)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if any process was asked to."""
        asked = self._asked
        if trainer.world_size > 1:
            # where processes were asked differently, to be put back into the queue is not to be forgotten
            rank = asked + _FIRST * is_requeued_by(trainer, asked)
            asked = int(max_over_processes(torch.tensor(float(rank), device=trainer.strategy.root_device))) % _FIRST
        if not asked or 0 < trainer.max_steps <= trainer.global_step:
            return
        path = _save(trainer)
        trainer._logger_connector.on_batch_end()  # what this cycle has logged, which Lightning writes after us
        trainer._logger_connector.update_train_step_metrics()
        if trainer.is_global_zero:
            after = f"stopped by {signal.Signals(asked).name} after update {trainer.global_step}"
            lost = f"nothing was saved, so all {trainer.global_step} updates are lost; enable_checkpointing would save"
            print(f"{after}; {f'continue with --ckpt_path {path}' if path else lost}", file=sys.stderr, flush=True)
        if is_requeued_by(trainer, asked):
            requeue(trainer)
        elif asked not in (signal.SIGTERM, signal.SIGINT) and callable(previous := self._previous.get(asked)):
            previous(asked, None)
        raise RunStopped(asked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _remember(self, number: int, frame: Any) -> None:
        previous = self._previous.get(number)
        if number == signal.SIGINT and self._process == os.getpid():  # not a loader's worker, which inherits this
            if self._asked == number and callable(previous):
                previous(number, frame)
            os.write(2, b"\nCtrl-C: this update is finished, then the run stops; once more interrupts it at once\n")
        if self._asked not in self._requeued_by:
            self._asked = number

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()


class StopSignals(StopWithoutSaving, Checkpoint):
    """SIGTERM, SIGUSR1 and the first Ctrl-C end a run between two updates, with a checkpoint to go on from bit for bit.

    The running cycle is finished and its state saved: by ``StudentCheckpoint`` as ``last.ckpt``, or as
    ``interrupted.ckpt`` beside the checkpoints of another ``ModelCheckpoint``. Under SLURM with automatic requeueing
    (``SLURMEnvironment``), its signal, SIGUSR1 unless told otherwise, also puts the job back into the queue.

    As a ``Checkpoint`` it runs after all other callbacks, so that their state is that of a finished cycle.
    """


def checkpoint_folder(trainer: Trainer, folder: str | Path) -> Path:
    """Where the checkpoints of a run are.

    Args:
        trainer: its first ``ModelCheckpoint`` may name a folder.
        folder: run folder.
    """
    given = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    return Path(given[0]) if given else Path(folder) / "checkpoints"


def _stop_signals(trainer: Trainer) -> set[int]:
    numbers = {int(signal.SIGTERM), *([int(signal.SIGUSR1)] if hasattr(signal, "SIGUSR1") else [])}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background jobs ignore Ctrl-C
        numbers.add(int(signal.SIGINT))
    return numbers | {int(number) for number in signal.valid_signals() if is_requeued_by(trainer, int(number))}


def _save(trainer: Trainer) -> str | None:
    """Path of the saved state; None for a run that saves nothing."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, StudentCheckpoint):
            callback.save_now(trainer)
            return callback.last_model_path
    if not trainer.checkpoint_callbacks:
        return None
    path = checkpoint_folder(trainer, trainer.log_dir or trainer.default_root_dir) / "interrupted.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    return str(path)
