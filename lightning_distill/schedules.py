"""Learning-rate schedules counted in student updates, nameable in YAML (``LambdaLR`` is not)."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["WarmupDecay"]


class WarmupDecay(LambdaLR):
    """Linear warm-up, plateau, then a decay to ``final`` at ``total_steps``.

    Args:
        optimizer: the optimizer whose learning rates are scaled.
        warmup_steps: student updates until the full learning rate.
        total_steps: student updates at which the decay ends; needed unless ``decay`` is ``none``.
        decay: shape of the decay.
        decay_start: update at which the decay begins; None means right after the warm-up.
        final: factor at the end.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        decay: Literal["none", "linear", "cosine"] = "none",
        decay_start: int | None = None,
        final: float = 0.0,
    ) -> None:
        start = warmup_steps if decay_start is None else decay_start
        if decay != "none" and (total_steps is None or total_steps <= start):
            raise ValueError(
                f"WarmupDecay(decay={decay!r}) needs total_steps > {start} (the update at which the decay starts), "
                f"got {total_steps}; set it to trainer.max_steps."
            )

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            if decay == "none" or step < start:
                return 1.0
            assert total_steps is not None
            progress = min(1.0, (step - start) / (total_steps - start))
            shape = 1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
            return final + (1.0 - final) * shape

        super().__init__(optimizer, factor)
