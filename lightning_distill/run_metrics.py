"""Curves of a run that goes on in its own folder."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

__all__ = ["EarlierRows"]

_FILE, _ASIDE = "metrics.csv", ".metrics.earlier.csv"


class EarlierRows(Callback):
    """Keeps the rows of ``metrics.csv`` up to the checkpoint from which a run goes on; its logger removes them all.

    ``put_aside`` comes before training and ``take_back`` after it. Rows of updates that are made again are left out. A
    run that is killed in between finds them at its next start.
    """

    def put_aside(self, trainer: Trainer) -> None:
        """Save the files from the loggers, which delete them when they start."""
        if trainer.is_global_zero:
            for folder in _folders(trainer):
                if (folder / _FILE).is_file():
                    os.replace(folder / _FILE, folder / _ASIDE)

    def take_back(self, trainer: Trainer) -> None:
        """Put files back that no update has been added to: the run was at its end, or could not start."""
        if trainer.is_global_zero:
            for folder in _folders(trainer):
                if (folder / _ASIDE).is_file() and not (folder / _FILE).exists():
                    os.replace(folder / _ASIDE, folder / _FILE)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of earlier updates back."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if not isinstance(logger, CSVLogger):
                continue
            folder = Path(logger.log_dir)
            if not (folder / _ASIDE).is_file():
                continue
            with open(folder / _ASIDE, newline="") as stream:
                reader = csv.DictReader(stream)
                rows = [row for row in reader if _step(row) < trainer.global_step]
                columns = list(reader.fieldnames or ())
            part = folder / f".{_FILE}.part"
            with open(part, "w", newline="") as stream:
                writer = csv.DictWriter(stream, columns, extrasaction="ignore", restval="")
                writer.writeheader()
                writer.writerows(rows)
            os.replace(part, folder / _FILE)
            (folder / _ASIDE).unlink()
            logger.experiment.metrics_keys = columns  # later rows have these columns, and perhaps more


def _folders(trainer: Trainer) -> list[Path]:
    return [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)]


def _step(row: dict[str, str]) -> float:
    """Update of a row; of one that was cut off by a kill, none."""
    try:
        return float(row["step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")
