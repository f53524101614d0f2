"""The report as Markdown, with its pictures and curves as files beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_distill.report import tables
from lightning_distill.report.curves import Section, curve_sections
from lightning_distill.report.data import Picture, RunData
from lightning_distill.report.html import GRID_TEXT, MOST_PICTURES, STRIP_TEXT
from lightning_distill.report.pictures import chosen, encode
from lightning_distill.report.svg import draw

__all__ = ["write_markdown"]


def write_markdown(runs: Sequence[RunData], out: Path) -> Path:
    """Write the report and the folder ``<name>_files`` beside it.

    Args:
        runs: one, or several to be compared.
        out: file to write, ``.md``.
    """
    files = _Files(out.parent / f"{out.stem}_files")
    parts = [f"# {_text(' and '.join(run.name for run in runs))}", _table(tables.overview(runs))]
    notes = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    parts += ["\n".join(f"- {_text(note)}" for note in notes)] if notes else []
    if figures := tables.figures(runs):
        parts += ["## Figures", _table(figures)]
    warned = [(run, table) for run in runs if (table := tables.run_warnings(run, len(runs) == 1))]
    parts += ["## Warnings"] if warned else []
    for run, table in warned:
        parts += [*_heading(run, runs), _table(table)]
    parts += _pictures(runs, files)
    for section in curve_sections(runs):
        parts += _curves(section, files)
    if differences := tables.differences(runs):
        parts += ["## Configuration: what differs", _table(differences)]
    parts.append("## Configuration")
    for run in runs:
        parts += [*_heading(run, runs), _fenced(run.config_text)]
    if environment := tables.environments(runs):
        parts += ["## Environment", _table(environment)]
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return out


class _Files:
    """Files beside the page, each name once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: set[str] = set()

    def add(self, stem: str, suffix: str, content: bytes) -> str:
        """Write a file and return the link to it."""
        stem = re.sub(r"[^A-Za-z0-9]+", "_", stem).strip("_") or "file"
        name, count = f"{stem}.{suffix}", 1
        while name.lower() in self._names:
            count += 1
            name = f"{stem}_{count}.{suffix}"
        self._names.add(name.lower())
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)
        return f"{self.folder.name}/{name}".replace(" ", "%20")


def _heading(run: RunData, runs: Sequence[RunData]) -> list[str]:
    return [f"### {_text(run.name)}"] if len(runs) > 1 else []


def _curves(section: Section, files: _Files) -> list[str]:
    links = []
    for chart in section.charts:
        link = files.add(f"curve_{chart.name or chart.title}", "svg", str(draw(chart, standalone=True)).encode())
        links.append(f"![{_text(chart.name or chart.title)}]({link})")
    return [f"## {_text(section.title)}", *([section.text] if section.text else []), "\n".join(links)]


def _pictures(runs: Sequence[RunData], files: _Files) -> list[str]:
    parts: list[str] = []
    most = MOST_PICTURES if len(runs) == 1 else MOST_PICTURES // 2
    for title, text, choice in (
        ("Samples over training", GRID_TEXT.split(". ")[0] + ".", [chosen(run.pictures, most)[::-1] for run in runs]),
        ("Predictions along the trajectory", STRIP_TEXT, [run.strips[-1:] for run in runs]),
        ("Further pictures", "", [chosen(run.other_pictures, 6) for run in runs]),
    ):
        if not any(choice):
            continue
        parts += [f"## {title}", *([text] if text else [])]
        for run, pictures in zip(runs, choice):
            if pictures:
                parts += _heading(run, runs)
                parts += [_picture(p, run, files, large=i == 0) for i, p in enumerate(pictures)]
    return parts


def _picture(picture: Picture, run: RunData, files: _Files, large: bool) -> str:
    words = picture.path.name if picture.step is None else f"update {picture.step}"
    encoded = encode(picture.path, large)
    if encoded is None:
        return f"{_text(picture.path.name)} is damaged."
    link = files.add(f"{run.name}_{picture.path.stem}", encoded.suffix, encoded.data)
    return f"{_text(words)}\n\n![{_text(words)}]({link})"


# ------------------------------------------------------------------------------------------------ text
def _table(table: tables.Table) -> str:
    heads = [_text(f"{head.label} {head.source}".strip()) for head in table.head]
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("|" + "|".join("---:" if head.number else "---" for head in table.head) + "|")
    for row in table.rows:
        lines.append("| " + " | ".join(_cell(cell) for cell in row.cells) + " |")
    below = [_text(" ".join([table.caption, *table.notes]).strip())]
    return "\n\n".join(["\n".join(lines)] * bool(table.rows) + [text for text in below if text])


def _cell(cell: tables.Cell) -> str:
    text = _text(cell.text)
    text = f"**{text}**" if cell.best and text else text
    return f"{text} ({_text(cell.note)})" if cell.note else text


def _text(text: str) -> str:
    """Text without a meaning in Markdown or HTML, in one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", text)


def _fenced(text: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text) or [""]))
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"
