r"""Table and fronts of students that are told a guidance scale, from the record of ``dials.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchmetrics.functional.regression import spearman_corrcoef

__all__ = ["accurate_rows", "best_solver", "nearest_scale", "pareto", "plot", "rank_correlation", "table"]

PICTURE = "docs/images/dials.png"
NAMES = {"teacher": "teacher", "consistency": "consistency distillation", "flow_map": "flow map (LSD)", "dmd2": "DMD2"}
COLOURS = {"teacher": "black", "consistency": "tab:blue", "flow_map": "tab:orange", "dmd2": "tab:green"}
SOLVERS = {"ode": "Euler", "heun": "Heun", "adams": "Adams-Bashforth", "dpmpp_2m": "DPM-Solver++(2M)"}
RESPONSES = ("precision", "recall", "class_accuracy")

Row = Mapping[str, Any]


# ------------------------------------------------------------------------------------------------ figures
def select(rows: Sequence[Row], **facts: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in facts.items())]


def own_distance(row: Row) -> float:
    """Frechet distance to the accurately solved teacher at the row's own scale."""
    return float(row["fd_teacher"][f"{row['guidance']:g}"])


def best_solver(rows: Sequence[Row], steps: int, scale: float) -> Row:
    """The teacher's row with the solver nearest to its accurate samples among those that cost no more than Euler.

    Args:
        rows: of the record.
        steps: of Euler, whose evaluations are the most that another solver may have.
        scale: w.
    """
    mine = select(rows, who="teacher", guidance=scale)
    budget = next(row["evaluations"] for row in mine if row["sampler"] == "ode" and row["steps"] == steps)
    return min((row for row in mine if row["evaluations"] <= budget), key=own_distance)


def accurate_rows(rows: Sequence[Row], who: str) -> list[Row]:
    """Rows of the largest number of steps, by scale; the teacher's by Heun's method.

    Args:
        rows: of the record.
        who: name.
    """
    scales = sorted({row["guidance"] for row in rows})
    mine = select(rows, who=who, **({"sampler": "heun"} if who == "teacher" else {}))
    most = max(row["steps"] for row in mine)
    return [select(mine, steps=most, guidance=w)[0] for w in scales]


def by_steps(rows: Sequence[Row], who: str, scales: Sequence[float]) -> list[list[Row]]:
    """Rows at these scales, one list for each number of steps; the teacher's with its best solver for as many of Euler.

    Args:
        rows: of the record.
        who: name.
        scales: w.
    """
    if who == "teacher":
        steps = sorted({row["steps"] for row in select(rows, who=who, sampler="ode")})
        return [[best_solver(rows, n, w) for w in scales] for n in steps]
    steps = sorted({row["steps"] for row in select(rows, who=who)})
    return [[select(rows, who=who, steps=n, guidance=w)[0] for w in scales] for n in steps]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's correlation with mean ranks of ties; None where one of the two is constant."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    found = spearman_corrcoef(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    return float(found)


def nearest_scale(row: Row) -> float:
    """The scale at which the teacher's samples are nearest to those of a row."""
    return float(min(row["fd_teacher"], key=lambda w: row["fd_teacher"][w]))


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points for which no other has a smaller or equal first and second coordinate, ascending in the first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def as_many_evaluations(rows: Sequence[Row], row: Row) -> float | None:
    """Evaluations that the teacher's best solver needs to be as near to its accurate samples as a student's row is."""
    teacher = select(rows, who="teacher", guidance=row["guidance"])
    enough = [r["evaluations"] for r in teacher if own_distance(r) <= own_distance(row)]
    return min(enough, default=None)


# ------------------------------------------------------------------------------------------------ table
def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _front_lines(rows: Sequence[Row], scales: Sequence[float]) -> list[str]:
    titles = ["", "steps", "evaluations", "µs per image"]
    titles += [f"{what} at w = {', '.join(f'{w:g}' for w in scales)}" for what in ("FD", "recall", "FD to the teacher")]
    lines = [_line(titles), "|" + "---|" * len(titles)]
    chosen = [(who, found) for who in NAMES if select(rows, who=who) for found in by_steps(rows, who, scales)]
    for who, found in chosen:
        calls = sorted({row["evaluations"] for row in found})
        spent = [f"{1e6 * f(row['seconds_per_image'] for row in found):.0f}" for f in (min, max)]
        spread = f"{spent[0]} to {spent[1]}" if spent[0] != spent[1] else spent[0]
        steps = "/".join(dict.fromkeys(f"{SOLVERS.get(row['sampler'], '')} {row['steps']}".strip() for row in found))
        cells = [NAMES[who], steps, " to ".join(f"{n:g}" for n in dict.fromkeys((calls[0], calls[-1]))), spread]
        figures = (lambda row: row["fd"], lambda row: row["recall"], own_distance)
        lines.append(_line([*cells, *(", ".join(f"{figure(row):.2f}" for row in found) for figure in figures)]))
    return lines


def _response_lines(rows: Sequence[Row], scales: Sequence[float]) -> list[str]:
    teacher, whole = accurate_rows(rows, "teacher"), [f"{w:g}" for w in scales]
    titles = ["largest number of steps", *(f"{what.replace('_', ' ')} at w = {', '.join(whole)}" for what in RESPONSES)]
    titles += ["rank correlation with the teacher's", f"nearest teacher for w = {', '.join(whole)}"]
    titles += ["evaluations the teacher needs to be as near"]
    lines = [_line(titles), "|" + "---|" * len(titles)]
    for who in [name for name in NAMES if select(rows, who=name)]:
        found = accurate_rows(rows, who)
        cells = [NAMES[who]]
        for what in RESPONSES:
            cells.append(", ".join(f"{row[what]:.{3 if what == 'class_accuracy' else 2}f}" for row in found))
        if who == "teacher":
            lines.append(_line([*cells, "", ", ".join(f"{nearest_scale(row):g}" for row in found), ""]))
            continue
        ranks = [rank_correlation([r[what] for r in found], [r[what] for r in teacher]) for what in RESPONSES]
        cells.append(", ".join("constant" if rank is None else f"{rank:+.1f}" for rank in ranks))
        cells.append(", ".join(f"{nearest_scale(row):g}" for row in found))
        needed = [as_many_evaluations(rows, row) for row in found]
        lines.append(_line([*cells, ", ".join("more" if n is None else f"{n:g}" for n in needed)]))
    return lines


def table(result: Mapping[str, Any] | None) -> str:
    """The page's generated part.

    Args:
        result: record ``dials``, None where there is none.
    """
    if result is None:
        return "(run `python benchmarks/dials.py` to fill this table)"
    rows, scales = result["rows"], result["scales"]
    low, high = result["range"]
    trained = [
        f"{NAMES[who]} ([`{Path(done['config']).stem}`](../{done['config']}), {done['updates']:,} updates in "
        f"{done['cpu_seconds']:.0f} CPU s)"
        for who, done in result["training"].items()
    ]
    return "\n".join(
        [
            "![fronts over guidance and steps, and the response to the guidance scale](images/dials.png)",
            "",
            *_response_lines(rows, scales),
            "",
            "Rank correlations are of precision, recall and class accuracy over the scales, in this order.",
            "",
            *_front_lines(rows, scales),
            "",
            f"Students: {'; '.join(trained)}; one seed. Scales of training are drawn from [{low:g}, {high:g}].",
            f"{result['samples']:,} samples; FD is to the digits, precision and recall are to their held-out half.",
            f"*FD to the teacher* is the distance to as many samples of the teacher ({result['accurate']}) at the same",
            "scale from other noise. Rows of the teacher have at each scale the solver nearest to these among those",
            "that cost no more evaluations than Euler's 1, 2, 4 ... steps; guidance (w > 1) costs it two evaluations a",
            f"step. Time is CPU time of one thread ({result['meta']['machine']['cpu']}), batches of 500.",
        ]
    )


# ------------------------------------------------------------------------------------------------ picture
def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def plot(result: Mapping[str, Any] | None, file: Path) -> None:
    """Fronts over scales and steps, and responses to the scale.

    Args:
        result: record ``dials``, None where there is none.
        file: picture to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if result is None:
        return
    rows, scales = result["rows"], result["scales"]
    figure = Figure(figsize=(10.5, 8), layout="constrained")
    (cost, near), (response, front) = figure.subplots(2, 2)
    for who in [name for name in NAMES if select(rows, who=name)]:
        mine, style = select(rows, who=who), {"color": COLOURS[who], "label": NAMES[who]}
        points = [(row["evaluations"], row["fd"]) for row in mine]
        cost.scatter(*zip(*points), s=9, alpha=0.35, color=COLOURS[who])
        least = pareto(points)
        cost.plot(*zip(*least, (max(points)[0], least[-1][1])), marker="o", ms=4, **style)
        # without w = 1, which costs the teacher half as much as the others
        guided = [w for w in scales if w > 1.0]
        groups = by_steps(rows, who, guided)
        means = [
            (1e6 * _mean([r["seconds_per_image"] for r in g]), _mean([own_distance(r) for r in g])) for g in groups
        ]
        near.plot(*zip(*means), marker="o", ms=4, **style)
        found = accurate_rows(rows, who)
        response.plot(scales, [row["recall"] for row in found], marker="o", ms=4, **style)
        response.plot(scales, [row["precision"] for row in found], marker="s", ms=4, ls="--", color=COLOURS[who])
        seconds = [1e6 * row["seconds_per_image"] for row in mine]
        front.scatter(
            [row["recall"] for row in mine],
            [row["fd"] for row in mine],
            s=[6 + 14 * math.log10(1 + s) for s in seconds],
            alpha=0.4,
            color=COLOURS[who],
            linewidths=0,
        )
        best = pareto([(-row["recall"], row["fd"]) for row in mine])
        front.plot([-x for x, _ in best], [y for _, y in best], **style)
    cost.set(xscale="log", yscale="log", xlabel="network evaluations per image", ylabel="FD to the digits")
    cost.set_title("every scale and number of steps; lines: least FD so far", fontsize=10)
    near.set(xscale="log", yscale="log", xlabel="CPU time per image (µs)", ylabel="FD to the accurate teacher")
    near.set_title(f"at the same scale, mean over w = {', '.join(f'{w:g}' for w in guided)}", fontsize=10)
    response.set(xlabel="guidance scale w", ylabel="recall (solid), precision (dashed)")
    response.set_title("largest number of steps", fontsize=10)
    front.set(yscale="log", xlabel="recall", ylabel="FD to the digits")
    front.set_title("lines: not dominated; area: seconds per image (log)", fontsize=10)
    for axis in (cost, near, response, front):
        axis.grid(alpha=0.3)
    for side in (cost.xaxis, cost.yaxis, near.xaxis, near.yaxis, front.yaxis):
        side.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_formatter(NullFormatter())
    cost.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
