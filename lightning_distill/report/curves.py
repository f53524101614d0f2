"""Which curves a report shows: evaluations beside the teacher, losses, gradient norms, health."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_distill.report.data import Curve, RunData
from lightning_distill.report.measures import Figure, describe
from lightning_distill.report.svg import Chart, Reference, Series
from lightning_distill.report.tables import floors_of, teacher_rows

__all__ = ["Section", "curve_sections"]

_EVALUATION = re.compile(r"(?:val|test)/(.+)/nfe(\d+)/(.+)")
_NOT_SHOWN = ("epoch", "hp_metric")
#: ranges of ``health/...`` that are no reason to worry, from the table of ``callbacks.TrainingHealth``
_HEALTHY = {
    "fake_score_lag": (0.5, 1.05),
    "fake_score_slope": (-0.3, 0.3),
    "guidance_share": (0.2, 0.7),
    "discriminator_accuracy": (0.55, 0.9),
    "brightness_drift": (-0.2, 0.2),
    "contrast_ratio": (0.8, 1.2),
    "saturation_ratio": (0.8, 1.3),
    "spread_ratio": (0.8, 1.2),
    "ema_distance": (0.0, 0.1),
}


@dataclass(frozen=True)
class Section:
    """Charts under a heading.

    Attributes:
        title: heading.
        charts: plots.
        text: a sentence below the heading.
        folded: hidden until it is asked for.
    """

    title: str
    charts: list[Chart]
    text: str = ""
    folded: bool = False


@dataclass
class _Grouped:
    """Tags of all runs by where they belong, in the order of their first appearance."""

    losses: dict[str, list[str]] = field(default_factory=dict)
    gradients: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def curve_sections(runs: Sequence[RunData]) -> list[Section]:
    """All curves of the runs by section; sections without curves are left out.

    Args:
        runs: one run, or several that are drawn over each other.
    """
    groups = _group(runs)
    marks = [(w.step, f"{w.kind}: {w.message}") for w in runs[0].warnings] if len(runs) == 1 else []

    def chart(name: str, title: str) -> Chart | None:
        return _scalar_chart(runs, name, title, marks)

    sections = [Section("Evaluation", _evaluation(runs), _evaluation_text(runs))]
    for phase, tags in sorted(groups.losses.items(), key=lambda entry: entry[0] != "student"):
        title = f"Losses: {_words(phase)}" if phase else "Losses"
        sections.append(Section(title, _losses(runs, tags, chart)))
    gradients = [chart(name, _words(name.split("/")[-2]) if "/" in name else name) for name in groups.gradients]
    sections.append(Section("Gradient norms", _present(gradients), "Before clipping."))
    sections.append(_skipped(runs, groups.skipped, chart))
    sections += _health(runs, groups.health, chart, marks)
    sections.append(Section("Other", _present([chart(name, name) for name in groups.others])))
    return [section for section in sections if section.charts]


def _group(runs: Sequence[RunData]) -> _Grouped:
    groups = _Grouped()
    for name in dict.fromkeys(tag for run in runs for tag in run.scalars):
        parts = name.split("/")
        if name in _NOT_SHOWN or _EVALUATION.fullmatch(name):
            continue
        if parts[0] == "health":
            groups.health.append(name)
        elif parts[-1] == "skipped_steps":
            groups.skipped.append(name)
        elif parts[-1].startswith("grad_norm"):
            groups.gradients.append(name)
        elif parts[0] == "train":
            groups.losses.setdefault(parts[1] if len(parts) > 2 else "", []).append(name)
        else:
            groups.others.append(name)
    return groups


# ------------------------------------------------------------------------------------------------ evaluation
def _evaluation(runs: Sequence[RunData]) -> list[Chart]:
    found: dict[str, list[tuple[int, tuple[int, str], Curve]]] = {}
    for index, run in enumerate(runs):
        for (metric, nfe, weights), curve in _evaluation_curves(run).items():
            if metric != "samples_per_second":
                found.setdefault(metric, []).append((index, (nfe, weights), curve))
    charts = []
    for figure in sorted(map(describe, found), key=lambda f: f.rank):
        entries = found[figure.name]
        steps = sorted({nfe for _, (nfe, _), _ in entries})
        title = f"{figure.label} ({figure.source})" if figure.source else figure.label
        if len(runs) == 1 or len(steps) == 1:
            charts.append(_evaluation_chart(runs, figure, title, entries))
        else:  # colours are runs: a plot for each number of steps
            for nfe in steps:
                part = [entry for entry in entries if entry[1][0] == nfe]
                charts.append(_evaluation_chart(runs, figure, f"{title}, {_steps(nfe)}", part))
    return _drawable(charts)


def _evaluation_chart(
    runs: Sequence[RunData], figure: Figure, title: str, entries: list[tuple[int, tuple[int, str], Curve]]
) -> Chart:
    variants = sorted({variant for _, variant, _ in entries})
    series = [
        Series(
            _label(runs, index, variant, len(variants) > 1),
            curve.steps,
            curve.values,
            colour=index if len(runs) > 1 else variants.index(variant),
            dash=variants.index(variant) if len(runs) > 1 else 0,
            points=len(curve.steps) <= 60,
        )
        for index, variant, curve in entries
    ]
    steps = {nfe for nfe, _ in variants}
    note = {"higher": "more is better", "lower": "less is better", None: ""}[figure.direction]
    name = figure.name if len(steps) > 1 else f"{figure.name}/nfe{min(steps)}"
    return Chart(title, series, _references(runs, figure.name, steps), name, note)


def _label(runs: Sequence[RunData], index: int, variant: tuple[int, str], several: bool) -> str:
    nfe, weights = variant
    if len(runs) == 1:
        return f"student, {_steps(nfe)}, {weights}"
    return f"{runs[index].name}, {weights}" if several else runs[index].name


def _evaluation_curves(run: RunData) -> dict[tuple[str, int, str], Curve]:
    """Figures over updates by (metric, nfe, weights): the recorded rows, else what was logged."""
    curves: dict[tuple[str, int, str], Curve] = {}
    points: dict[tuple[str, int, str], dict[int, float]] = {}
    for row in run.log.rows if run.log else []:
        if row.stage != "test" and row.step is not None:  # other noise and another half: no point of this curve
            for metric, value in row.metrics.items():
                points.setdefault((metric, row.nfe, row.weights), {})[row.step] = value
    for key, values in points.items():
        steps = sorted(values)
        curves[key] = Curve(np.array(steps), np.array([values[s] for s in steps], dtype=np.float64))
    if run.log is None:
        for name, curve in run.scalars.items():
            if name.startswith("val/") and (match := _EVALUATION.fullmatch(name)):
                curves[match[1], int(match[2]), match[3]] = curve
    return curves


def _references(runs: Sequence[RunData], metric: str, steps: set[int]) -> list[Reference]:
    """The teacher with as many steps, the teacher with most, and real data against real data."""
    lines: list[Reference] = []
    teachers = teacher_rows(runs, curve=True)
    most = max((row.nfe for _, row in teachers), default=0)
    for names, row in teachers:
        if row.nfe in steps | {most} and np.isfinite(row.metrics.get(metric, np.nan)):
            whose = f"teacher of {names}" if names else "teacher"
            lines.append(Reference(f"{whose}, {_steps(row.nfe)}", row.metrics[metric]))
    if metric.split("_")[0] == "progress":
        lines.append(Reference("teacher, many steps", 1.0))
    floors = {floors_of(run).get(metric) for run in runs if run.log}
    if len(floors) == 1 and isinstance(floor := floors.pop(), (int, float)) and floor > 0:
        lines.append(Reference("real data against real data", floor))
    return lines


def _evaluation_text(runs: Sequence[RunData]) -> str:
    if any(len(curve.steps) > 1 for run in runs for curve in _evaluation_curves(run).values()):
        return ""
    return "There is one evaluation only; every_n_steps of GenerativeEvaluation makes it a curve."


# ------------------------------------------------------------------------------------------------ scalars
def _scalar_chart(runs: Sequence[RunData], name: str, title: str, marks: list[tuple[int, str]]) -> Chart | None:
    series = [
        Series(run.name if len(runs) > 1 else "", run.scalars[name].steps, run.scalars[name].values, colour=index)
        for index, run in enumerate(runs)
        if name in run.scalars
    ]
    family = name.split("/")[1] if name.startswith("health/") else ""
    charts = _drawable([Chart(title, series, name=name, marks=marks, healthy=_HEALTHY.get(family))])
    return charts[0] if charts else None


def _losses(runs: Sequence[RunData], tags: list[str], chart: Callable[[str, str], Chart | None]) -> list[Chart]:
    """The terms of a phase; the total is left out where it is one of them."""
    same = [t for t in tags for total in tags if total.endswith("/total") and t != total and _equal(runs, t, total)]
    charts = []
    for name in tags:
        if same and name.endswith("/total"):
            continue
        title = _words(name.split("/")[-1]) + (" (= total)" if name in same else "")
        charts.append(chart(name, title))
    return _present(charts)


def _equal(runs: Sequence[RunData], first: str, second: str) -> bool:
    for run in runs:
        a, b = run.scalars.get(first), run.scalars.get(second)
        if a is None or b is None:
            return False
        if not (np.array_equal(a.steps, b.steps) and np.array_equal(a.values, b.values, equal_nan=True)):
            return False
    return True


def _skipped(runs: Sequence[RunData], tags: list[str], chart: Callable[[str, str], Chart | None]) -> Section:
    """Updates that were skipped for a loss or gradient that is not finite; nothing where none was."""
    shown = [t for t in tags if any(t in run.scalars and (run.scalars[t].values > 0).any() for run in runs)]
    text = "The loss or a gradient was not finite."
    return Section("Skipped updates", _present([chart(name, _words(name.split("/")[-2])) for name in shown]), text)


def _health(
    runs: Sequence[RunData],
    tags: list[str],
    chart: Callable[[str, str], Chart | None],
    marks: list[tuple[int, str]],
) -> list[Section]:
    """Health figures; of a single run those of one family share a plot, of several the noise levels are folded."""
    text = "Tinted: the range that is no reason to worry."
    families: dict[str, list[str]] = {}
    for name in tags:
        families.setdefault(name.split("/")[1], []).append(name)
    charts: list[Chart | None] = []
    levels: list[Chart | None] = []
    for family, names in families.items():
        if len(runs) > 1 or len(names) == 1:
            for name in names:
                (levels if "/level_" in name else charts).append(chart(name, _words(name.split("/", 1)[1])))
            continue
        series = []
        for index, name in enumerate(names):
            curve, rest = runs[0].scalars[name], name.split("/")[2:]
            label = _words("/".join(rest)) or "all" if len(names) > 1 else ""
            series.append(Series(label, curve.steps, curve.values, colour=index, dash=index // 8))
        charts += _drawable([Chart(_words(family), series, [], f"health/{family}", "", marks, _HEALTHY.get(family))])
    sections = [Section("Health", _present(charts), text)]
    if levels:
        sections.append(Section("Health by noise level", _present(levels), folded=True))
    return sections


# ------------------------------------------------------------------------------------------------ helpers
def _drawable(charts: Sequence[Chart]) -> list[Chart]:
    """Charts with something to draw, told in the note where values are not finite."""
    kept = []
    for chart in charts:
        missing = sum(int((~series.finite).sum()) for series in chart.series)
        drawn = [series for series in chart.series if series.finite.any()]
        if not drawn:
            continue
        note = f"{missing} not finite" if missing else chart.note
        kept.append(Chart(chart.title, drawn, chart.references, chart.name, note, chart.marks, chart.healthy))
    return kept


def _present(charts: Sequence[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _steps(n: int) -> str:
    return f"{n} step" + ("s" if n > 1 else "")
