"""Tables of students in the plane by their distance to the data, from the records of toy.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cells import cell, mean

__all__ = ["board", "modes"]

_Row = Mapping[str, Any]


def _groups(result: Mapping[str, Any] | None, *keys: str) -> dict[tuple[Any, ...], list[_Row]]:
    groups: dict[tuple[Any, ...], list[_Row]] = {}
    for row in () if result is None else result["rows"]:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def modes(result: Mapping[str, Any] | None) -> str:
    """The four modes: one row per configuration by number of steps, best first, with an exact critic beside some.

    Args:
        result: record ``compare_ring4``, None where there is none.
    """
    groups = _groups(result, "config", "critic")
    learned = {config: rows for (config, critic), rows in groups.items() if critic is None}
    if not learned:
        return "(run `python benchmarks/toy.py ring4` to fill this table)"
    lines = [
        "| configuration | method | steps | seeds | SW2 | SW2 with the oracle critic | chi2 | recall | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for config, rows in sorted(learned.items(), key=lambda item: (item[1][0]["nfe"], mean(item[1], "sw2"))):
        oracle = groups.get((config, "oracle"))
        cells = [f"[`{Path(config).stem.removesuffix('_ring4')}`](../{config})", rows[0]["method"]]
        cells += [str(rows[0]["nfe"]), str(len(rows)), cell(rows, "sw2", 3), cell(oracle, "sw2", 3) if oracle else ""]
        cells += [cell(rows, "chi2", 2), f"{mean(rows, 'recall'):.2f}", f"{mean(rows, 'cpu_seconds'):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(learned.values()))[0]
    teacher = ", ".join(f"{first[f'sw2_teacher_{n}']:.3f} in {n}" for n in (1, 2, 4, 100))
    lines += [
        "",
        f"Mean over the seeds and their range; {first['samples']:,} points a draw; CPU seconds of one thread. Two sets "
        f"of data are {first['sw2_floor']:.3f} apart, the teacher is {teacher} steps from the data.",
    ]
    return "\n".join(lines)


def board(result: Mapping[str, Any] | None) -> str:
    """The checkerboard: one row per configuration and teacher, with the distance over that of the teacher.

    Args:
        result: record ``compare_checkerboard``, None where there is none.
    """
    groups = _groups(result, "config", "teacher")
    if not groups:
        return "(run `python benchmarks/toy.py checkerboard` to fill this table)"
    lines = [
        "| configuration | method | teacher | seeds | SW2 | over the teacher's in 100 steps | chi2 | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (config, teacher), rows in sorted(groups.items(), key=lambda item: (item[0][1] != "short", item[0][0])):
        cells = [f"[`{Path(config).stem.removesuffix('_checkerboard')}`](../{config})", rows[0]["method"], teacher]
        cells += [str(len(rows)), cell(rows, "sw2", 3), cell(rows, "ratio", 2), cell(rows, "chi2", 2)]
        cells.append(f"{mean(rows, 'cpu_seconds'):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    teachers = {rows[0]["teacher"]: rows[0] for rows in groups.values()}
    facts = [
        f"the {name} one has {row['sw2_teacher_100']:.3f} and chi2 {row['chi2_teacher_100']:.2f}"
        for name, row in sorted(teachers.items(), reverse=True)
    ]
    lines += ["", f"Teachers in 100 steps: {'; '.join(facts)}. Two sets of data are {rows[0]['sw2_floor']:.3f} apart."]
    return "\n".join(lines)
