"""Ten thousand updates in one process: does memory stay flat and an update as fast as at the beginning?

    python benchmarks/soak.py

A run of the command line, ``configs/method/dmd2_digits.yaml`` with a small batch, with logging and with a checkpoint
every 1000 updates. Compared are the last fifth of the updates and the second; the first one warms up. Writes
``benchmarks/results/latest/soak.json``.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from results import write_result

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "method" / "dmd2_digits.yaml"
STATM = Path("/proc/self/statm")

#: measurements in order, and what the run ended with
ROWS: list[dict[str, float]] = []
END: dict[str, Any] = {}


def resident() -> float:
    """Memory of this process, MiB; where the system does not tell, the most it has had."""
    if STATM.is_file():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Meter(Callback):
    """Measures memory, processor time and losses.

    Args:
        every: updates between measurements.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = every
        self.started = 0.0
        self.all_finite = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A row every so many updates; the time of measuring is left out."""
        if trainer.global_step % self.every:
            return
        spent = time.process_time() - self.started
        gc.collect()
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        self.all_finite &= all(map(math.isfinite, logged.values()))
        things = gc.get_objects()
        row = {
            "update": trainer.global_step,
            "resident_mib": resident(),
            "tensors": sum(type(thing) is torch.Tensor for thing in things),
            "objects": len(things),
            "cpu_ms_per_update": 1e3 * spent / self.every,
        }
        del things
        if ROWS or self.started:  # the first span holds the start of the run
            ROWS.append(row)
        self.started = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the run ended with."""
        finite = all(bool(p.isfinite().all()) for p in pl_module.parameters())
        END.update(
            updates=trainer.global_step,
            skipped=int(pl_module.skipped_steps.sum()),  # type: ignore[operator, union-attr]
            finite=finite and self.all_finite,
            logged=sorted(k for k in trainer.callback_metrics if k.startswith("train/")),
        )


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Last fifth over second fifth, minus 1: growth of memory, of live tensors, and of the time of an update."""
    fifth = len(rows) // 5
    early, late = rows[fifth : 2 * fifth], rows[-fifth:]

    def growth(key: str) -> float:
        return statistics.median(row[key] for row in late) / statistics.median(row[key] for row in early) - 1.0

    return {
        "memory_growth": growth("resident_mib"),
        "tensor_growth": growth("tensors"),
        "object_growth": growth("objects"),
        "slowdown": growth("cpu_ms_per_update"),
    }


def soak(updates: int, batch: int, folder: Path) -> dict[str, Any]:
    """The run; returns its figures."""
    from lightning_distill.cli import main as command

    torch.set_num_threads(1)
    schedules = [
        f"--model.{role}_scheduler.init_args.{key}={value}"
        for role in ("student", "fake_score")
        for key, value in (("total_steps", updates), ("decay_start", updates * 7 // 10))
    ]
    status = command(
        [
            *("fit", "-c", str(CONFIG), f"--trainer.max_steps={updates}", f"--data.batch_size={batch}", *schedules),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            f"--trainer.logger.init_args.save_dir={folder}",
            *("--trainer.callbacks+=soak.Meter", f"--trainer.callbacks.every={max(1, updates // 100)}"),
        ]
    )
    if status:
        raise RuntimeError(f"the run ended with status {status}")
    return {"batch": batch, **END, **summary(ROWS), "rows": ROWS[:: max(1, len(ROWS) // 20)]}


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    args = parser.parse_args()
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(args.updates, args.batch, Path(folder))
    figures["cpu_seconds"] = round(time.process_time() - started, 1)
    print({key: value for key, value in figures.items() if key != "rows"})
    if not args.dry:
        print(write_result("soak", figures, seeds=[0]))


if __name__ == "__main__":
    from soak import main as run  # under the name by which the command line finds ``Meter``

    run()
