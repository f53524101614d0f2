"""The report as one HTML file that needs nothing else: pictures and curves are in it, and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import datetime, timezone

from lightning_distill import __version__
from lightning_distill.report import tables
from lightning_distill.report.curves import Section, curve_sections
from lightning_distill.report.data import Picture, RunData
from lightning_distill.report.markup import Html, join, tag
from lightning_distill.report.numbers import number
from lightning_distill.report.pictures import chosen, encode
from lightning_distill.report.style import STYLE
from lightning_distill.report.svg import draw

__all__ = ["page"]

#: what the browser may load: nothing that is not in the file
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MOST_PICTURES = 12
GRID_TEXT = "The same noise at every update. Choose a small picture to see it large."
STRIP_TEXT = (
    "Clean samples that the teacher (upper row of a pair) and the student (lower row) predict along the teacher's "
    "trajectory, from noise (left) to data (right)."
)


def page(runs: Sequence[RunData]) -> str:
    """The page.

    Args:
        runs: one, or several to be compared; their names differ.
    """
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    body = [_header(runs, title), *_notes(runs), *_figures(runs), *_warnings(runs), *_pictures(runs)]
    body += [part for section in curve_sections(runs) for part in _curves(section)]
    body += [*_history(runs), *_differences(runs), *_configuration(runs), *_environment(runs), _footer()]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"{title}: distillation report"),
        tag("style", Html(STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', tag('main', join(body, chr(10)))), lang='en')}\n"


# ------------------------------------------------------------------------------------------------ parts
def _header(runs: Sequence[RunData], title: str) -> Html:
    if len(runs) > 1:
        lead = tag("p", ", ".join(run.name for run in runs), class_="lead") if len(runs) > 2 else Html("")
        return tag("header", tag("h1", title), lead, tag("h2", "Overview"), _table(tables.overview(runs), text=True))
    run = runs[0]
    steps = f" into {run.student_steps} step{'s' if run.student_steps > 1 else ''}" if run.student_steps else ""
    lead = tag("p", f"{run.method}: {run.teacher}{steps}", class_="lead")
    whose, leading = tables.headline(run)
    tiles = [
        tag(
            "div",
            tag("b", number(value, 3)),
            tag("span", f"{figure.label} ({figure.source})\u00a0{figure.arrow}".replace(" ()", "")),
            class_="tile card",
        )
        for figure, value in leading
    ]
    facts = [tag("div", tag("dt", key), tag("dd", value)) for key, value in tables.facts(run).items()]
    return tag(
        "header",
        tag("h1", title),
        lead,
        *([tag("div", *tiles, class_="tiles"), tag("p", whose, class_="caption")] if tiles else []),
        tag("dl", *facts, class_="facts card"),
    )


def _notes(runs: Sequence[RunData]) -> list[Html]:
    notes = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    return [tag("div", tag("ul", *(tag("li", note) for note in notes)), class_="notes")] if notes else []


def _figures(runs: Sequence[RunData]) -> list[Html]:
    table = tables.figures(runs)
    return [tag("h2", "Figures"), _table(table)] if table else []


def _warnings(runs: Sequence[RunData]) -> list[Html]:
    parts = []
    for run in runs:
        if table := tables.run_warnings(run, len(runs) == 1):
            heading = [tag("h3", run.name)] if len(runs) > 1 else []
            parts += [*heading, _folded_when_long(table, 12)]
    return [tag("h2", "Warnings"), *parts] if parts else []


def _folded_when_long(table: tables.Table, most: int) -> Html:
    if len(table.rows) <= most:
        return _table(table, text=True)
    shown = tables.Table(table.head, table.rows[:most], table.caption)
    rest = tables.Table(table.head, table.rows[most:])
    more = tag("summary", f"{len(rest.rows)} more")
    return join([_table(shown, text=True), tag("details", more, _table(rest, text=True), class_="card")])


def _curves(section: Section) -> list[Html]:
    charts = tag("div", *(tag("div", draw(chart), class_="card") for chart in section.charts), class_="charts")
    if section.folded:
        return [tag("details", tag("summary", section.title), charts, class_="card")]
    text = [tag("p", section.text, class_="quiet")] if section.text else []
    return [tag("h2", section.title), *text, charts]


def _history(runs: Sequence[RunData]) -> list[Html]:
    found = [(run, table) for run in runs if (table := tables.history(run))]
    parts = [
        tag(
            "details",
            tag("summary", f"All {len(table.rows)} evaluations" + _of(run, runs)),
            _table(table),
            class_="card",
        )
        for run, table in found
    ]
    return [tag("h2", "Evaluations"), *parts] if parts else []


def _differences(runs: Sequence[RunData]) -> list[Html]:
    table = tables.differences(runs)
    return [tag("h2", "Configuration: what differs"), _table(table, text=True)] if table else []


def _configuration(runs: Sequence[RunData]) -> list[Html]:
    parts = [
        tag("details", tag("summary", "config.yaml" + _of(run, runs)), tag("pre", run.config_text), class_="card")
        for run in runs
    ]
    return [tag("h2", "Configuration"), *parts]


def _environment(runs: Sequence[RunData]) -> list[Html]:
    table = tables.environments(runs)
    return [tag("h2", "Environment"), _table(table, text=True)] if table else []


def _footer() -> Html:
    now = datetime.now(timezone.utc)
    return tag("footer", f"lightning_distill {__version__}, report of {now:%Y-%m-%d %H:%M} UTC")


def _of(run: RunData, runs: Sequence[RunData]) -> str:
    return f" of {run.name}" if len(runs) > 1 else ""


# ------------------------------------------------------------------------------------------------ pictures
def _pictures(runs: Sequence[RunData]) -> list[Html]:
    several = len(runs) > 1
    most = MOST_PICTURES if not several else MOST_PICTURES // 2
    grids = [_panel(run, several, _gallery(run, f"grid{i}", most)) for i, run in enumerate(runs) if run.pictures]
    strips = [_panel(run, several, _last_strip(run)) for run in runs if run.strips]
    others = [_panel(run, several, _others(run)) for run in runs if run.other_pictures]
    parts: list[Html] = []
    for title, text, panels in (
        ("Samples over training", GRID_TEXT, grids),
        ("Predictions along the trajectory", STRIP_TEXT, strips),
        ("Further pictures", "", others),
    ):
        if shown := [panel for panel in panels if panel]:
            parts += [tag("h2", title), *([tag("p", text, class_="quiet")] if text else [])]
            parts.append(tag("div", *shown, class_="runs"))
    return parts


def _panel(run: RunData, several: bool, content: Html) -> Html:
    heading = [tag("h3", run.name)] if several else []
    return tag("div", *heading, content, class_="card") if content else Html("")


def _gallery(run: RunData, name: str, most: int) -> Html:
    """The last grid large, the others small; the chosen one becomes the large one."""
    shots = []
    shown = chosen(run.pictures, most)
    for picture in shown:
        last = picture is shown[-1]
        image = _image(picture, f"samples at update {picture.step}", large=last)
        choice = tag("input", type_="radio", name_=name, checked=last)
        words = tag("span", f"update {picture.step}")
        shots.append(tag("label", choice, image, words, class_="shot last" if last else "shot"))
    return tag("div", *shots, class_="gallery")


def _last_strip(run: RunData) -> Html:
    picture = run.strips[-1]
    return tag("div", _image(picture, "trajectory strip"), tag("span", f"update {picture.step}"), class_="picture")


def _others(run: RunData) -> Html:
    shown = chosen(run.other_pictures, 6)
    parts = [tag("div", _image(p, p.path.name), tag("span", p.path.name), class_="picture") for p in shown]
    return join(parts)


def _image(picture: Picture, text: str, large: bool = True) -> Html:
    encoded = encode(picture.path, large)
    if encoded is None:
        return tag("p", f"{picture.path.name} is damaged.", class_="quiet")
    source = f"data:image/{encoded.suffix};base64,{base64.b64encode(encoded.data).decode()}"
    return tag("img", src=source, alt=text, width=encoded.width, height=encoded.height)


# ------------------------------------------------------------------------------------------------ tables
def _table(table: tables.Table, text: bool = False) -> Html:
    """A table that scrolls sideways where it is too wide.

    Args:
        table: what to show.
        text: cells are sentences or words, not figures.
    """
    heads = []
    for i, head in enumerate(table.head):
        swatch = (
            [] if head.colour is None else [tag("span", class_="swatch", style=f"background:var(--c{head.colour % 8})")]
        )
        source = [tag("small", head.source)] if head.source else []
        class_ = "n" if head.number else "first" if i == 0 else None
        heads.append(tag("th", *swatch, head.label, *source, class_=class_, title=head.hint or None))
    rows = [_row(row) for row in table.rows]
    titled = any(head.label for head in table.head)
    grid = tag("table", *([tag("thead", tag("tr", *heads))] if titled else []), tag("tbody", *rows))
    below = [tag("p", line, class_="caption") for line in (table.caption, " ".join(table.notes)) if line]
    if not rows:
        return join(below)
    return join([tag("div", grid, class_="scroll card text" if text else "scroll card"), *below])


def _row(row: tables.Row) -> Html:
    cells = []
    for i, cell in enumerate(row.cells):
        words = ["n"] * cell.number + ["best"] * cell.best + ["first"] * (i == 0)
        note = [tag("small", cell.note)] if cell.note else []
        cells.append(tag("td", cell.text, *note, class_=" ".join(words) or None))
    return tag("tr", *cells, class_=None if row.kind == "plain" else row.kind)
