"""Which rows of an evaluation tell whether a student collapses, and what their figures are about."""

from collections.abc import Sequence

from lightning.pytorch import Trainer

from lightning_distill.records import EvaluationLog, EvaluationRow

__all__ = ["evaluation_log", "kind_of", "telling_rows"]


def evaluation_log(trainer: Trainer) -> EvaluationLog | None:
    """The ``history`` of the first callback that keeps one (``log`` is Lightning's own name on callbacks)."""
    logs = (getattr(callback, "history", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return next((log for log in logs if isinstance(log, EvaluationLog)), None)


def telling_rows(rows: Sequence[EvaluationRow], own_steps: int) -> list[EvaluationRow]:
    """Rows at the student's own number of steps and of one network, where there is such a choice."""
    own = [row for row in rows if row.nfe == own_steps] or list(rows)
    averaged = [row for row in own if row.weights == "ema"]
    return averaged or [row for row in own if row.weights == own[0].weights]


def kind_of(metric: str) -> str | None:
    """``recall`` or ``diversity``, the alarm that a low figure raises; None for other figures."""
    words = metric.split("_")
    if words[0] in ("recall", "coverage"):
        return "recall"
    return "diversity" if words[0] == "vendi" or "diversity" in words else None
