"""Curves as SVG: no plotting library, so that a page stays small, follows the colour scheme and prints sharply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lightning_distill.report.markup import Html, tag
from lightning_distill.report.numbers import downsample, log_ticks, nice_ticks, number, smooth, tick_text

__all__ = ["COLOURS", "Chart", "Reference", "Series", "draw"]

WIDTH, PLOT_HEIGHT = 420, 168
_LEFT, _RIGHT = 46, 14
_BANDS = 60
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_REFERENCE_DASHES = ("6 4", "2 4", "10 4 2 4", "1 3")
_LIGHT = ("#2563c9", "#d9622b", "#12876f", "#a43fa8", "#a67c00", "#c93a5b", "#3c8bb3", "#66707a")
_DARK = ("#6ea8ff", "#ff9a62", "#4fcfb0", "#dd8be0", "#e6bf4d", "#ff8ba6", "#7fcbee", "#a9b3bd")


def _variables(colours: Sequence[str], **others: str) -> str:
    named = {**{f"c{i}": colour for i, colour in enumerate(colours)}, **others}
    return "".join(f"--{name}:{value};" for name, value in named.items())


#: style of the curves and the colours of the page, light and dark
COLOURS = (
    ":root{"
    + _variables(_LIGHT, ink="#1b2128", muted="#5c6773", grid="#e4e8ec", card="#ffffff", ground="#f5f6f8")
    + "}\n@media (prefers-color-scheme:dark){:root{"
    + _variables(_DARK, ink="#e6eaee", muted="#9aa5b1", grid="#323a43", card="#1c2229", ground="#12161b")
    + "}}\n"
    "svg.chart{font:11px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:var(--ink);display:block}\n"
    "svg.chart .title{font-size:13px;font-weight:600}svg.chart .quiet{fill:var(--muted)}\n"
    "svg.chart .grid{stroke:var(--grid)}svg.chart .axis{stroke:var(--muted)}\n"
    "svg.chart .curve{fill:none;stroke-width:2;stroke-linejoin:round}svg.chart .raw{stroke-width:1;opacity:.35}\n"
    "svg.chart .reference{stroke:var(--muted);stroke-width:1.5;fill:none}\n"
    "svg.chart .healthy{fill:var(--c2);opacity:.12}\n"
    "svg.chart .mark{fill:var(--c1)}svg.chart .band{fill:var(--ink);opacity:0}svg.chart .band:hover{opacity:.08}\n"
)


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: name in the legend; empty for none.
        steps: student updates, ascending, (n,).
        values: (n,); values that are not finite are gaps.
        colour: index of the colour.
        dash: index of the dash pattern, 0 is a full line.
        points: draw the points too, and never a smoothed curve.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: int = 0
    dash: int = 0
    points: bool = False

    @cached_property
    def finite(self) -> np.ndarray:
        """Which values are finite, (n,) bool."""
        return np.isfinite(self.values)


@dataclass(frozen=True)
class Reference:
    """A horizontal line, for example the teacher's figure."""

    label: str
    value: float


@dataclass(frozen=True)
class Chart:
    """One plot over student updates.

    Attributes:
        title: heading.
        series: curves.
        references: horizontal lines; all are within the range of the axis.
        name: full name, for the tooltip of the heading and for file names.
        note: quiet text behind the title, for example the unit or which way is better.
        marks: (update, text) of events, drawn as triangles on the axis.
        healthy: range of values that is tinted.
    """

    title: str
    series: list[Series]
    references: list[Reference] = field(default_factory=list)
    name: str = ""
    note: str = ""
    marks: list[tuple[int, str]] = field(default_factory=list)
    healthy: tuple[float, float] | None = None


# ------------------------------------------------------------------------------------------------ drawing
@dataclass(frozen=True)
class _Axes:
    """Maps updates and values to the picture."""

    x_low: float
    x_high: float
    low: float
    high: float
    log: bool
    top: float

    def x(self, step: float) -> float:
        return _LEFT + (step - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high, v = (
            (math.log10(n) for n in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.top + PLOT_HEIGHT * (1 - (v - low) / (high - low))


def draw(chart: Chart, standalone: bool = False) -> Html:
    """The chart as an SVG element.

    The value axis is logarithmic when all values are positive and span more than two decades.

    Args:
        chart: what to draw; at least one finite value.
        standalone: a file of its own, with its style, instead of a part of a page that has it.
    """
    legend, legend_height = _legend(chart)
    axes = _axes(chart, top=26 + legend_height)
    bottom = axes.top + PLOT_HEIGHT
    height = round(bottom + 34)
    parts = [
        tag("text", tag("title", chart.name or chart.title), chart.title, x=4, y=15, class_="title"),
        *([tag("text", chart.note, x=WIDTH - 4, y=15, text_anchor="end", class_="quiet")] if chart.note else []),
        *legend,
        *_healthy(chart, axes),
        *_grid(axes, bottom),
    ]
    for index, line in enumerate(chart.references):
        where = _round(axes.y(line.value))
        name = tag("title", f"{line.label}: {number(line.value)}")
        dash = _REFERENCE_DASHES[index % len(_REFERENCE_DASHES)]
        parts.append(
            tag("path", name, d=f"M{_LEFT} {where}H{WIDTH - _RIGHT}", class_="reference", stroke_dasharray=dash)
        )
    for series in chart.series:
        parts += _curve(series, axes)
    parts += _bands(chart, axes, bottom)
    for step, text in chart.marks:
        x = axes.x(min(max(step, axes.x_low), axes.x_high))
        outline = f"M{_round(x)} {_round(bottom - 7)}l4 7h-8z"
        parts.append(tag("path", tag("title", f"update {step}: {text}"), d=outline, class_="mark"))
    style = []
    if standalone:
        style = [tag("style", Html(COLOURS)), tag("rect", width=WIDTH, height=height, style="fill:var(--card)")]
    size = {"width": WIDTH, "height": height} if standalone else {}
    return tag(
        "svg",
        *style,
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        class_="chart",
        role="img",
        aria_label=_spoken(chart),
        **size,
    )


def _spoken(chart: Chart) -> str:
    ends = []
    for series in chart.series:
        if series.finite.any():
            last = np.flatnonzero(series.finite)[-1]
            ends.append(f"{series.label or 'value'} {number(series.values[last])} at update {series.steps[last]}")
    return f"{chart.name or chart.title}: {'; '.join(ends)}"


def _axes(chart: Chart, top: float) -> _Axes:
    steps = np.concatenate([s.steps for s in chart.series])
    values = np.concatenate([s.values[s.finite] for s in chart.series] + [[r.value for r in chart.references]])
    low, high = float(values.min()), float(values.max())
    log = low > 0 and high / low > 100
    if log:
        low, high = low / 1.15, high * 1.15
    elif high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - 0.1 * abs(low), high + 0.1 * abs(high)) if high else (0.0, 1.0)
    else:
        pad = 0.06 * (high - low)
        low, high = (low - pad if low < 0 or low - pad > 0 else 0.0), high + pad
    x_low, x_high = float(steps.min()), float(steps.max())
    x_low = 0.0 if x_low < 0.2 * x_high else x_low
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    last = nice_ticks(x_low, x_high + 0.01 * (x_high - x_low))[-1]  # updates are logged from 0 on: 1999 is the end
    x_high = max(x_high, last)
    return _Axes(x_low, x_high, low, high, log, top)


def _grid(axes: _Axes, bottom: float) -> list[Html]:
    right = WIDTH - _RIGHT
    parts = []
    for value in log_ticks(axes.low, axes.high) if axes.log else nice_ticks(axes.low, axes.high):
        y = _round(axes.y(value))
        parts.append(tag("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(
            tag("text", tick_text(value), x=_LEFT - 6, y=_round(axes.y(value) + 4), text_anchor="end", class_="quiet")
        )
    steps = [t for t in nice_ticks(axes.x_low, axes.x_high) if t == int(t)]
    for step in steps:
        x = _round(axes.x(step))
        parts.append(tag("line", x1=x, x2=x, y1=_round(bottom), y2=_round(bottom + 4), class_="axis"))
        parts.append(tag("text", tick_text(step), x=x, y=_round(bottom + 16), text_anchor="middle", class_="quiet"))
    y = _round(bottom)
    parts.append(tag("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="axis"))
    middle = (_LEFT + right) / 2
    text = "student updates (logarithmic values)" if axes.log else "student updates"
    parts.append(tag("text", text, x=middle, y=_round(bottom + 29), text_anchor="middle", class_="quiet"))
    return parts


def _healthy(chart: Chart, axes: _Axes) -> list[Html]:
    if chart.healthy is None:
        return []
    low, high = (min(max(value, axes.low), axes.high) for value in chart.healthy)
    top, bottom = axes.y(high), axes.y(low)
    if bottom - top < 0.5:
        return []
    size = {"width": WIDTH - _LEFT - _RIGHT, "height": _round(bottom - top)}
    return [tag("rect", x=_LEFT, y=_round(top), class_="healthy", **size)]


def _curve(series: Series, axes: _Axes) -> list[Html]:
    steps, values = series.steps[series.finite], series.values[series.finite]
    if not len(steps):
        return []
    # a gap wherever a value in between is missing
    gaps = np.concatenate([[0], np.cumsum(~series.finite)])[:-1][series.finite]
    smoothed = None if series.points else smooth(values, axes.log)
    colour = f"var(--c{series.colour % len(_LIGHT)})"
    style = {"stroke": colour, "stroke_dasharray": _DASHES[series.dash % len(_DASHES)] or None}
    kept = downsample(values)
    parts = [
        tag(
            "path",
            d=_path(steps[kept], values[kept], gaps[kept], axes),
            class_="curve raw" if smoothed is not None else "curve",
            **style,
        )
    ]
    if smoothed is not None:
        kept = downsample(smoothed)
        parts.append(tag("path", d=_path(steps[kept], smoothed[kept], gaps[kept], axes), class_="curve", **style))
    if series.points or len(steps) == 1:
        parts += [
            tag("circle", cx=_round(axes.x(s)), cy=_round(axes.y(v)), r=3, style=f"fill:{colour}")
            for s, v in zip(steps[kept], values[kept])
        ]
    return parts


def _path(steps: np.ndarray, values: np.ndarray, gaps: np.ndarray, axes: _Axes) -> str:
    words, before = [], -1
    for step, value, gap in zip(steps, values, gaps):
        words.append(f"{'L' if gap == before else 'M'}{_round(axes.x(step))} {_round(axes.y(value))}")
        before = gap
    return "".join(words)


def _bands(chart: Chart, axes: _Axes, bottom: float) -> list[Html]:
    """Invisible stripes whose tooltip tells the values below the pointer."""
    steps = np.unique(np.concatenate([s.steps for s in chart.series]))
    if len(steps) > _BANDS:
        steps = steps[np.linspace(0, len(steps) - 1, _BANDS).round().astype(int)]
    edges = np.concatenate([[axes.x_low], (steps[1:] + steps[:-1]) / 2, [axes.x_high]])
    parts = []
    for step, start, end in zip(steps, edges[:-1], edges[1:]):
        lines = [f"update {step}"]
        for series in chart.series:
            nearest = int(np.abs(series.steps - step).argmin())
            if start <= series.steps[nearest] <= end:
                lines.append(f"{series.label}: ".removeprefix(": ") + number(series.values[nearest]))
        x, width = axes.x(start), axes.x(end) - axes.x(start)
        parts.append(
            tag(
                "rect",
                tag("title", "\n".join(lines)),
                x=_round(x),
                y=_round(axes.top),
                width=_round(max(width, 1)),
                height=_round(bottom - axes.top),
                class_="band",
            )
        )
    return parts


def _legend(chart: Chart) -> tuple[list[Html], float]:
    """Entries in lines below the title, and their height; widths of words are estimated."""
    entries = [
        (s.label, f"var(--c{s.colour % len(_LIGHT)})", _DASHES[s.dash % len(_DASHES)]) for s in chart.series if s.label
    ]
    entries += [
        (f"{r.label} {number(r.value, 3)}", "var(--muted)", _REFERENCE_DASHES[i % len(_REFERENCE_DASHES)])
        for i, r in enumerate(chart.references)
    ]
    parts: list[Html] = []
    x, y = 4.0, 32.0
    for label, colour, dash in entries:
        label = label if len(label) <= 60 else label[:28] + " ... " + label[-28:]
        width = 24 + 5.9 * len(label) + 12
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + 16
        outline = f"M{_round(x)} {_round(y - 4)}h18"
        parts.append(tag("path", d=outline, stroke=colour, stroke_width=2, stroke_dasharray=dash or None))
        parts.append(tag("text", label, x=_round(x + 23), y=_round(y)))
        x += width
    return parts, y - 32 + 18 if entries else 0.0


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
