"""The figures of a run as a table on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lightning_distill.records import EvaluationLog, EvaluationRow

__all__ = ["final_rows", "print_table"]

#: measures in the order of their lines; others follow as they come
_FIRST = ("progress", "fid", "fd", "sw2", "recall", "precision", "coverage", "class_accuracy")
#: columns that fit on a narrow terminal
_MOST = 6
_LEFT_OUT = ("nearest_cnn", "nearest_judge")


def final_rows(log: EvaluationLog) -> list[EvaluationRow]:
    """The last row of every network and number of steps, in the order of their first appearance."""
    last: dict[tuple[str, int, str], EvaluationRow] = {}
    for row in log.rows:
        last[row.weights, row.nfe, row.stage] = row
    newest = max((row.step or 0 for row in log.rows), default=0)
    return [row for row in last.values() if row.step == newest] or list(last.values())


def measures(rows: Sequence[EvaluationRow]) -> list[str]:
    """Measures that occur in the rows, the important ones first."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))

    def rank(name: str) -> int:
        return next((i for i, first in enumerate(_FIRST) if name == first or name.startswith(f"{first}_")), len(_FIRST))

    return sorted((name for name in names if not name.startswith(_LEFT_OUT)), key=rank)


def print_table(log: EvaluationLog, console: Console | None = None) -> None:
    """Measures of the teacher's rows and of the student's last ones, a column each.

    Of the teacher those that the student's are compared with. A star marks those with another number of samples, or
    half of the reference, than the student's.

    Args:
        log: rows of a run.
        console: where to print; None is standard output.
    """
    students = final_rows(log)
    teacher = sorted(log.compared(students), key=lambda row: -row.nfe)
    if len(teacher) + len(students) > _MOST:  # the many-step teacher, and what has as many steps as a student
        wanted = {row.nfe for row in students} | {teacher[0].nfe if teacher else 0}
        teacher = [row for row in teacher if row.nfe in wanted]
    shown = [*teacher, *students]
    sets = [_samples(row) for row in students if row.num_samples]
    others = [row for row in teacher if row.num_samples and any(_samples(row) != mine for mine in sets)]
    table = Table(box=SIMPLE)
    table.add_column("", no_wrap=True)
    for row in shown:
        who = row.role if row.role == "teacher" or row.weights == "student" else f"student\n{row.weights}"
        who += "*" * (row in others)
        steps = f"{row.nfe} step{'s' if row.nfe > 1 else ''}"
        table.add_column(f"{who}\n{steps}", style="bold" if row.role == "student" else None, justify="right")
    for name in measures(students or shown):
        table.add_row(name, *(f"{row.metrics[name]:.4g}" if name in row.metrics else "" for row in shown))
    if console is None:  # a file is as wide as it must be
        console = Console() if sys.stdout.isatty() else Console(width=max(80, 24 + 11 * len(shown)))
    console.print(table)
    if others:
        mine = " and ".join(dict.fromkeys(sets))
        card = "from its card, " if others[0].stage == "card" else ""
        console.print(
            f"* {card}{_samples(others[0])}; the student: {mine}. Fewer samples make larger distances; recall and "
            "coverage depend on both.",
            highlight=False,
        )


def _samples(row: EvaluationRow) -> str:
    return f"{row.num_samples} samples, {row.half.replace('_', '-')} half"
