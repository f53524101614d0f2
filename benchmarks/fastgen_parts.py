"""What the comparisons with FastGen share: the batch, alternating blocks of the two sides, rows of the results."""

import statistics
import time
from typing import Any

import torch
from counting import Counter
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from lightning_distill.batch import Batch
from lightning_distill.networks.specs import seeded

SHAPE = [3, 32, 32]
PEER, OURS = "FastGen", "lightning_distill"


def examples(n: int) -> Batch:
    """Samples and one-hot classes."""
    with seeded(1):
        return Batch(x0=0.5 * torch.randn(n, *SHAPE), cond={"condition": torch.eye(10)[torch.arange(n) % 10]}, size=n)


def peer_data(batch: Batch) -> dict[str, Tensor]:
    """The same as FastGen has it."""
    condition = batch.cond["condition"]
    return {"real": batch.x0, "condition": condition, "neg_condition": torch.zeros_like(condition)}


class Repeated(Dataset[Batch]):
    """One batch for ever."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Batch:
        return self.batch


class Alternate(Callback):
    """Counts the second cycle of both sides, then times their blocks in turn.

    CPU seconds of one thread are what other work disturbs least; of several threads it is the time on the wall that
    counts.
    """

    def __init__(self, peer: Any, batch: int, block: int) -> None:
        self.peer, self.batch, self.block = peer, batch, block
        self.seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        self.counted: dict[str, Counter] = {}
        self._started = 0.0
        self._now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Wrap the training step, of which one is looked at."""
        step = pl_module.training_step
        names = [name for name in ("teacher", "student", "fake_score") if getattr(pl_module, name, None) is not None]

        def training_step(batch: Batch, batch_idx: int) -> None:
            if batch_idx != 1:
                return step(batch, batch_idx)
            roles = {name: getattr(pl_module, name).network for name in names}
            with Counter(pl_module, roles, self.batch) as self.counted["ours"]:
                step(batch, batch_idx)
            return None

        pl_module.training_step = training_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A block of this library begins."""
        if batch_idx >= 2 and (batch_idx - 2) % self.block == 0:
            self._started = self._now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """It ends, and the other side's block follows."""
        if batch_idx == 0:
            self.peer.cycle()
        elif batch_idx == 1:
            with Counter(self.peer.model, self.peer.networks, self.batch) as self.counted["peer"]:
                self.peer.cycle()
        elif (batch_idx - 1) % self.block == 0:
            # the span covers the loop's own work between the cycles of a block
            self.seconds["ours"].append((self._now() - self._started) / self.block)
            started = self._now()
            for _ in range(self.block):
                self.peer.cycle()
            self.seconds["peer"].append((self._now() - started) / self.block)


def row(
    variant: str,
    name: str,
    seconds: list[float],
    counted: Counter,
    floor: int,
    batch: int,
    method: str = "DMD2",
    dtype: str = "float32",
) -> dict[str, float | str | int | dict[str, float]]:
    """One row of the results."""
    return {
        "what": variant,
        "implementation": name,
        "method": method,
        "network": "EDM SongUNet, 3.50 M parameters",
        "batch": batch,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "updates_per_second": 1.0 / statistics.median(seconds),
        "seconds_per_cycle": {"min": min(seconds), "median": statistics.median(seconds)},
        "forwards": sum(counted.calls.values()),
        "calls": counted.calls,
        "passes": counted.passes,
        "gflop": counted.gflop,
        "peak_bytes": floor + counted.saved,
        "saved_activation_bytes": counted.saved,
        "host_syncs": counted.synchronisations,
    }


def compare(peer: dict[str, Any], ours: dict[str, Any]) -> None:
    """Put the ratios of two rows, whose blocks alternated, into that of this library."""
    for key in ("min", "median"):
        ours[f"seconds_ratio_{key}"] = ours["seconds_per_cycle"][key] / peer["seconds_per_cycle"][key]
    for key in ("gflop", "saved_activation_bytes"):
        ours[f"{key}_ratio"] = ours[key] / peer[key]
    peer["compared_with"] = ours["implementation"]


def line(entry: dict[str, Any]) -> str:
    """A row for the terminal."""
    seconds = entry["seconds_per_cycle"]
    return (
        f"{entry['what']:16} {entry['threads']} x {entry['dtype']:8} {entry['implementation']:27} "
        f"{seconds['min']:6.2f} s (median {seconds['median']:.2f}) "
        f"{entry['gflop']:6.1f} GFLOP {entry['passes']:5.1f} passes {entry['saved_activation_bytes'] / 2**20:6.1f} MiB "
        f"{entry['host_syncs']:5d} synchronisations"
    )
