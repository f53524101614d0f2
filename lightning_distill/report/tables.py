"""The tables of a report: figures, configuration differences, facts, environment, warnings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_distill.evaluation.table import final_rows
from lightning_distill.records import EvaluationRow
from lightning_distill.report.data import RunData
from lightning_distill.report.measures import Figure, best_row, figures_of, with_floors
from lightning_distill.report.numbers import column_number

__all__ = [
    "Cell",
    "Head",
    "Row",
    "Table",
    "differences",
    "environments",
    "facts",
    "figures",
    "floors_of",
    "headline",
    "history",
    "overview",
    "run_warnings",
    "teacher_rows",
]


@dataclass(frozen=True)
class Cell:
    """Text of a cell, a quiet note below it, and whether it is the best of its column."""

    text: str
    note: str = ""
    best: bool = False
    number: bool = False


@dataclass(frozen=True)
class Head:
    """Heading of a column, with a second quiet line, a tooltip, and the colour of its run."""

    label: str
    source: str = ""
    number: bool = False
    hint: str = ""
    colour: int | None = None


@dataclass(frozen=True)
class Row:
    """Cells; ``kind`` says whose they are."""

    cells: list[Cell]
    kind: Literal["plain", "student", "teacher"] = "plain"


@dataclass(frozen=True)
class Table:
    """A table with a sentence below it."""

    head: list[Head]
    rows: list[Row]
    caption: str = ""
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ figures
def floors_of(run: RunData) -> dict[str, float]:
    """Distance between real data and real data, by the name of the distance."""
    floors = run.log.reference.get("floors") if run.log else None
    return floors if isinstance(floors, dict) else {}


def _final(run: RunData) -> list[EvaluationRow]:
    return [with_floors(row, floors_of(run)) for row in final_rows(run.log)] if run.log and run.log.rows else []


def teacher_rows(runs: Sequence[RunData], curve: bool = False) -> list[tuple[str, EvaluationRow]]:
    """Baselines, many steps first; runs that share a teacher share its rows.

    Args:
        runs: all runs.
        curve: those of the evaluations in training, instead of those of the last evaluations.

    Returns:
        pairs of the runs' names, empty where it is every run's, and the row.
    """
    found: list[tuple[list[str], EvaluationRow]] = []
    evaluated = [run for run in runs if run.log]
    for run in evaluated:
        if run.log is None:
            continue
        students = [row for row in run.log.rows if row.stage != "test"] if curve else final_rows(run.log)
        for row in run.log.compared(students):
            row = with_floors(row, floors_of(run))
            same = next((names for names, other in found if (other.nfe, other.metrics) == (row.nfe, row.metrics)), None)
            if same is None:
                found.append(([run.name], row))
            else:
                same.append(run.name)
    found.sort(key=lambda entry: -entry[1].nfe)
    return [("" if len(names) == len(evaluated) else ", ".join(names), row) for names, row in found]


def headline(run: RunData) -> tuple[str, list[tuple[Figure, float]]]:
    """The leading figures of the run's first final row, at most six, and whose they are."""
    rows = _final(run)
    rows = [row for row in rows if row.stage == "test"] or rows  # new noise, the other half: not what was tuned on
    if not rows:
        return "", []
    row = rows[0]
    chosen = [f for f in figures_of([row]) if f.direction is not None and f.name != "samples_per_second"]
    steps = f"{row.nfe} step{'s' if row.nfe > 1 else ''}"
    whose = f"Student ({row.weights}, {row.stage}), {steps}, update {row.step}, {row.num_samples} samples."
    return whose, [(f, row.metrics[f.name]) for f in chosen[:6]]


def figures(runs: Sequence[RunData]) -> Table | None:
    """The students' last figures and the teacher's; None where nothing was evaluated."""
    students = [(run, row) for run in runs for row in _final(run)]
    teachers = teacher_rows(runs)
    rows = [row for _, row in students] + [row for _, row in teachers]
    if not rows:
        return None
    columns = figures_of(rows)
    several, stages = len(runs) > 1, len({row.stage for _, row in students}) > 1
    ranked = [row for _, row in students] if several and students else rows
    best = {f.name: best_row(ranked, f) for f in columns}

    def values(row: EvaluationRow, run: RunData | None) -> list[Cell]:
        cells = []
        for f in columns:
            if f.name not in row.metrics:
                cells.append(Cell("", number=True))
                continue
            top = best[f.name]
            equal = top is not None and row in ranked and row.metrics[f.name] == top.metrics[f.name]
            cells.append(Cell(column_number(row.metrics[f.name]), _best_so_far(run, row, f), equal, True))
        return cells

    table = []
    sets = {(row.num_samples, row.half) for _, row in teachers}
    for names, row in teachers:
        first = [Cell(names or "all runs")] if several else []
        note = f"{row.num_samples} samples, {row.half.replace('_', '-')} half" if len(sets) > 1 else ""
        table.append(
            Row([*first, Cell("teacher", note), Cell(str(row.nfe), number=True), *values(row, None)], "teacher")
        )
    for run, row in students:
        first = [Cell(run.name)] if several else []
        stage = f", {row.stage}" if stages else ""
        who = Cell(f"student ({row.weights}{stage})", f"update {row.step}" if row.step is not None else "")
        table.append(Row([*first, who, Cell(str(row.nfe), number=True), *values(row, run)], "student"))
    head = [*([Head("run")] if several else []), Head("network"), Head("NFE", number=True)]
    head += [Head(f"{f.label}\u00a0{f.arrow}".strip(), f.source, True, f.name) for f in columns]
    whose = "of the students" if several else "of a column"
    caption = f"Bold: the best value {whose}; ↑ more is better, ↓ less is better. NFE: network evaluations per sample."
    if any(cell.note for row in table for cell in row.cells if cell.number):
        caption += " Small: a better earlier value @ its update."
    return Table(head, table, caption, [*_samples_notes(students, teachers), *_progress_note(columns)])


def _best_so_far(run: RunData | None, final: EvaluationRow, figure: Figure) -> str:
    """Where an earlier evaluation of the same kind was better."""
    if run is None or run.log is None or figure.name == "samples_per_second":
        return ""
    same = [
        r for r in run.log.of(final.weights, final.nfe) if (r.stage, r.num_samples) == (final.stage, final.num_samples)
    ]
    best = best_row([with_floors(row, floors_of(run)) for row in same], figure)
    if best is None:
        return ""
    text = column_number(best.metrics[figure.name])
    return "" if text == column_number(final.metrics[figure.name]) else f"{text} @ {best.step}"


def _progress_note(columns: Sequence[Figure]) -> list[str]:
    known = any(f.label == "progress" for f in columns)
    return ["Progress: 0 is the teacher with as many steps, 1 the teacher with many."] if known else []


def _samples_notes(
    students: Sequence[tuple[RunData, EvaluationRow]], teachers: Sequence[tuple[str, EvaluationRow]]
) -> list[str]:
    """How many samples, which half, and a caution where rows differ."""

    def words(rows: Sequence[EvaluationRow]) -> str:
        parts = dict.fromkeys(
            f"{row.num_samples} samples ({'the card' if row.stage == 'card' else f'noise seed {row.seed}'}, "
            f"{row.half.replace('_', '-')} half of the reference)"
            for row in rows
        )
        return "; ".join(parts)

    notes = []
    student_rows, baselines = [row for _, row in students], [row for _, row in teachers]
    if student_rows:
        notes.append(f"Student: {words(student_rows)}.")
    if baselines:
        notes.append(f"Teacher: {words(baselines)}.")
    if len({row.num_samples for row in student_rows + baselines}) > 1:
        notes.append("Distances of different numbers of samples cannot be compared closely: fewer samples, larger FD.")
    return notes


def history(run: RunData) -> Table | None:
    """Every evaluation of a run, oldest first; None for one or none."""
    rows = [with_floors(row, floors_of(run)) for row in run.log.rows] if run.log else []
    if len(rows) < 2:
        return None
    columns = figures_of(rows)
    head = [Head("update", number=True), Head("weights"), Head("NFE", number=True), Head("stage")]
    head += [Head(f"{f.label}\u00a0{f.arrow}".strip(), f.source, True, f.name) for f in columns]
    table = []
    for row in rows:
        cells = [Cell("" if row.step is None else str(row.step), number=True), Cell(row.weights)]
        cells += [Cell(str(row.nfe), number=True), Cell(row.stage)]
        cells += [
            Cell(column_number(row.metrics[f.name]) if f.name in row.metrics else "", number=True) for f in columns
        ]
        table.append(Row(cells))
    return Table(head, table)


# ------------------------------------------------------------------------------------------------ facts
def overview(runs: Sequence[RunData]) -> Table:
    """The facts of all runs beside each other."""
    return _side_by_side("", runs, [facts(run) for run in runs], "Bold: what differs." if len(runs) > 1 else "")


def facts(run: RunData) -> dict[str, str]:
    """What the run is, in a few words each."""
    trainer = run.config.get("trainer") or {}
    planned = trainer.get("max_steps")
    of = f" of {planned}" if isinstance(planned, int) and planned > 0 else ""
    known = {
        "method": run.method,
        "teacher": run.teacher,
        "student steps": run.student_steps,
        "student updates": f"{run.updates}{of}" if run.updates else "none recorded",
        "data": run.data,
        "precision": trainer.get("precision"),
        "seed": run.config.get("seed_everything"),
        "started": f"{run.started:%Y-%m-%d %H:%M} UTC" if run.started else None,
        "logged over": _duration(run.seconds),
    }
    return {key: str(value) for key, value in known.items() if value is not None}


def _duration(seconds: float | None) -> str | None:
    if seconds is None or seconds < 1:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _side_by_side(
    first: str, runs: Sequence[RunData], columns: Sequence[Mapping[str, str]], caption: str = ""
) -> Table:
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = []
    for key in keys:
        values = [column.get(key, "") for column in columns]
        rows.append(Row([Cell(key), *(Cell(v, best=len(set(values)) > 1) for v in values)]))
    return Table([Head(first), *_run_heads(runs)], rows, caption)


def _run_heads(runs: Sequence[RunData]) -> list[Head]:
    return [Head(run.name, colour=i) for i, run in enumerate(runs)] if len(runs) > 1 else [Head("")]


def environments(runs: Sequence[RunData]) -> Table | None:
    """What the runs ran on; None where nothing is known."""
    if not any(run.environment for run in runs):
        return None
    columns = [{k: _plain(v) for k, v in run.environment.items() if v is not None} for run in runs]
    return _side_by_side("", runs, columns, "Bold: what differs." if len(runs) > 1 else "")


def differences(runs: Sequence[RunData]) -> Table | None:
    """Configuration keys whose values differ; None for a single run."""
    if len(runs) < 2:
        return None
    flat = [_flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = []
    for key in keys:
        values = [values.get(key, "–") for values in flat]
        if len(set(values)) > 1 and not key.startswith("trainer.logger."):
            rows.append(Row([Cell(key), *map(Cell, values)]))
    caption = "Keys that differ, – where a run does not have the key; the folders of the loggers are left out."
    if not rows:
        caption = "The configurations are equal but for the folders of the loggers."
    return Table([Head("key"), *_run_heads(runs)], rows, caption)


def _flat(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {
            k: v for name, part in value.items() for k, v in _flat(part, f"{key}.{name}" if key else str(name)).items()
        }
    if isinstance(value, list) and any(isinstance(part, (Mapping, list)) for part in value):
        return {k: v for i, part in enumerate(value) for k, v in _flat(part, f"{key}.{i}").items()}
    return {key: _plain(value)}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def run_warnings(run: RunData, marked: bool = False) -> Table | None:
    """Warnings of a run, equal ones in one row; None without any.

    Args:
        run: a run.
        marked: the curves show when they were given.
    """
    if not run.warnings:
        return None
    grouped: dict[tuple[str, str], list[int]] = {}
    for warning in run.warnings:
        grouped.setdefault((warning.kind, warning.message), []).append(warning.step)
    rows = []
    for (kind, message), steps in grouped.items():
        when = str(steps[0]) if len(steps) == 1 else f"{min(steps)} to {max(steps)}"
        times = f"{len(steps)} times" if len(steps) > 1 else ""
        rows.append(Row([Cell(when, times), Cell(kind), Cell(message)]))
    caption = "Triangles in the curves mark these updates." if marked else ""
    return Table([Head("update"), Head("kind"), Head("message")], rows, caption)
