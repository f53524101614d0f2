"""A progress bar in student updates, with losses, samples per second and the time left.

On a terminal it is a live ``rich`` line; elsewhere (log files, CI) it prints one line every tenth of the run.
"""

import time
from collections import deque
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor

from lightning_distill.batch import as_batch

__all__ = ["StudentProgressBar"]


class StudentProgressBar(ProgressBar):
    """Progress in student updates (``trainer.global_step``) rather than in batches and epochs.

    Losses are read, which waits for the device, only when a line is drawn; steps in between run ahead.

    Args:
        metrics: patterns of logged names that are shown besides those logged with ``prog_bar=True``. They are
            fetched when drawn, whereas ``prog_bar=True`` makes Lightning fetch a value at every batch.
        refresh_seconds: time between two drawings on a terminal.
        lines: number of lines printed over a run where there is no terminal.
        samples_per_update: samples that count as one update of one process; None takes the whole batch of the
            loader, that is all phases of a cycle.
        console: where to draw, None for standard output.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("train/*/total",),
        refresh_seconds: float = 0.5,
        lines: int = 10,
        samples_per_update: int | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        if refresh_seconds <= 0 or lines < 1:
            raise ValueError(
                f"StudentProgressBar(refresh_seconds={refresh_seconds}, lines={lines}): needs a positive "
                "time between drawings and one line or more; for silence: Trainer(enable_progress_bar=False)."
            )
        self.metrics = tuple(metrics)
        self.refresh_seconds = float(refresh_seconds)
        self.lines = int(lines)
        self.samples_per_update = samples_per_update
        self._console = console
        self._enabled = True
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._next_draw = 0.0
        #: (seconds, updates, samples) at recent drawings; rates are taken over this window
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=20)
        self._samples = 0

    # -------------------------------------------------------------------------------------------- switches
    def enable(self) -> None:
        """Show progress (Lightning calls this on the main process)."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (Lightning calls this on all other processes)."""
        self._enabled = False

    @property
    def is_enabled(self) -> bool:
        """Whether this process shows progress."""
        return self._enabled

    # ----------------------------------------------------------------------------------------------- hooks
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not self._enabled:
            return
        self._console = self._console or Console()
        self._samples = 0
        self._marks.clear()
        self._mark(trainer)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("updates"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                console=self._console,
                auto_refresh=False,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=self._total(trainer), line="")
        self._schedule(trainer)

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        self._samples += self._batch_samples(batch) * trainer.world_size
        if self._due(trainer):
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._enabled and self._marks and self._marks[-1][1] != trainer.global_step:
            self._draw(trainer)
        self._stop()

    def on_exception(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the live line."""
        (self._console or Console()).print(*args, **kwargs)

    # ---------------------------------------------------------------------------------------- what to show
    def line(self, trainer: Trainer) -> str:
        """Step, losses, rate and remaining time as text.

        Args:
            trainer: the trainer of the run.
        """
        total = self._total(trainer)
        step = trainer.global_step
        parts = [f"{step}/{total}" if total else f"{step}"]
        parts += [f"{name} {value:.4g}" for name, value in self._values(trainer).items()]
        updates_per_second, samples_per_second = self._rates()
        if samples_per_second > 0:
            parts.append(f"{samples_per_second:.3g} samples/s")
        if total and updates_per_second > 0:
            parts.append(f"ETA {_clock((total - step) / updates_per_second)}")
        return "  ".join(parts)

    def _values(self, trainer: Trainer) -> dict[str, float]:
        """Losses by short name; reading them waits for the device."""
        shown: dict[str, float] = {}
        for name, value in trainer.callback_metrics.items():
            if any(fnmatch(name, pattern) for pattern in self.metrics):
                shown[_short(name)] = value.item()
        for name, number in trainer.progress_bar_metrics.items():
            if name != "v_num":
                shown[name] = float(number.item() if isinstance(number, Tensor) else number)
        return shown

    def _rates(self) -> tuple[float, float]:
        """Updates and samples per second over the window of recent drawings."""
        (then, updates_then, samples_then), (now, updates, samples) = self._marks[0], self._marks[-1]
        seconds = now - then
        return ((updates - updates_then) / seconds, (samples - samples_then) / seconds) if seconds > 0 else (0.0, 0.0)

    def _batch_samples(self, batch: Any) -> int:
        if self.samples_per_update is not None:
            return self.samples_per_update
        try:
            return as_batch(batch).size
        except (TypeError, ValueError):
            return 0

    @staticmethod
    def _total(trainer: Trainer) -> int | None:
        total = trainer.estimated_stepping_batches
        return int(total) if 0 < total < float("inf") else None

    # ------------------------------------------------------------------------------------------------ when
    def _due(self, trainer: Trainer) -> bool:
        if self._progress is not None:
            return time.monotonic() >= self._next_draw
        total = self._total(trainer)
        # without a known end: by time, as rarely as suits a log file
        return trainer.global_step >= self._next_draw if total else time.monotonic() >= self._next_draw

    def _schedule(self, trainer: Trainer) -> None:
        total = self._total(trainer)
        if self._progress is not None:
            self._next_draw = time.monotonic() + self.refresh_seconds
        elif total:
            done = trainer.global_step * self.lines // total
            self._next_draw = min(total, -(-(done + 1) * total // self.lines))
        else:
            self._next_draw = time.monotonic() + 60.0

    def _mark(self, trainer: Trainer) -> None:
        self._marks.append((time.monotonic(), trainer.global_step, self._samples))

    def _draw(self, trainer: Trainer) -> None:
        assert self._console is not None
        self._mark(trainer)
        text = self.line(trainer)
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, line=text)
            self._progress.refresh()
        else:
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)
        self._schedule(trainer)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _short(name: str) -> str:
    """``train/student/total`` -> ``student``."""
    return name.removeprefix("train/").removesuffix("/total")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
