"""A Trainer that does nothing but train, so that only the loop itself is timed."""

from typing import Any

from lightning.pytorch import Trainer


def bare_trainer(max_steps: int, **settings: Any) -> Trainer:
    """No logger, checkpoints, progress bar, summary or logging steps.

    Args:
        max_steps: student updates.
        **settings: further arguments of ``Trainer``; without an accelerator the CPU's.
    """
    settings.setdefault("accelerator", "cpu")
    return Trainer(
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**9,
        **settings,
    )
