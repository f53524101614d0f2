"""The figures of a run as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_distill.records import EvaluationLog, EvaluationRow

__all__ = ["final_rows", "print_table"]

#: measures in the order of their columns; others follow as they come
_FIRST = ("progress", "fid", "fd", "sw2", "recall", "precision", "coverage", "class_accuracy")
_LEFT_OUT = ("nearest_cnn", "samples_per_second")


def final_rows(log: EvaluationLog) -> list[EvaluationRow]:
    """The last row of every network and number of steps, in the order of their first appearance."""
    last: dict[tuple[str, int, str], EvaluationRow] = {}
    for row in log.rows:
        last[row.weights, row.nfe, row.stage] = row
    newest = max((row.step or 0 for row in log.rows), default=0)
    return [row for row in last.values() if row.step == newest] or list(last.values())


def columns(rows: Sequence[EvaluationRow]) -> list[str]:
    """Measures that occur in the rows, the important ones first."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))

    def rank(name: str) -> int:
        return next((i for i, first in enumerate(_FIRST) if name == first or name.startswith(f"{first}_")), len(_FIRST))

    return sorted((n for n in names if not n.startswith(_LEFT_OUT)), key=rank)


def print_table(log: EvaluationLog, console: Console | None = None) -> None:
    """Teacher rows and the student's last rows.

    Args:
        log: rows of a run.
        console: where to print; None is standard output.
    """
    students = final_rows(log)
    shown = [*sorted(log.teacher, key=lambda row: -row.nfe), *students]
    names = columns(shown)
    table = Table("", "steps", *names)
    for row in shown:
        who = "teacher" if row.role == "teacher" else f"student ({row.weights})"
        cells = [f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in names]
        table.add_row(who, str(row.nfe), *cells, style="bold" if row.role == "student" else None)
    (console or Console()).print(table)
