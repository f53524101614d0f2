"""CPU seconds of training, without what a command line needs to begin."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["CpuSeconds"]


class CpuSeconds(Callback):
    """CPU seconds of training, kept in checkpoints: an interrupted run counts what its checkpoint holds.

    Attributes:
        seconds: until the last update, over all parts of the run.
        per_update: of each update since the start of this process.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.per_update: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._last = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count one update; Lightning runs the callbacks that save after all others."""
        now = time.process_time()
        self.per_update.append(now - self._last)
        self.seconds += now - self._last
        self._last = now

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = state_dict["seconds"]
