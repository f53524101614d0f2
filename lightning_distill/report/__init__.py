"""What a run did, on one page: figures beside the teacher's, curves, sample grids, warnings, configuration.

The page is one HTML file that works offline and by e-mail; a Markdown twin lies beside it. Only the
records of a run are read, neither weights nor method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_distill.report.data import Curve, Picture, RunData, RunWarning, load_run_data
from lightning_distill.report.html import page
from lightning_distill.report.markdown import write_markdown

__all__ = ["Curve", "Picture", "RunData", "RunWarning", "load_run_data", "write_report"]


def write_report(folders: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        folders: run folders, or those above their ``version_N``.
        out: HTML file to write, or a folder for ``report.html``; the Markdown twin gets the same name with ``.md``, its
            pictures the folder ``<name>_files``. None is ``report.html`` in the run folder, of several runs in the
            current folder.

    Returns:
        the HTML file.

    Raises:
        FileNotFoundError: a folder is no run.
        ValueError: no folder, a configuration that cannot be read, or ``out`` is no HTML file.
    """
    runs = _distinct([load_run_data(f) for f in ([folders] if isinstance(folders, (str, Path)) else folders)])
    if not runs:
        raise ValueError("there is no run to report on; give at least one run folder.")
    path = _target(runs, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(runs), encoding="utf-8")
    write_markdown(runs, path.with_suffix(".md"))
    return path


def _target(runs: Sequence[RunData], out: str | Path | None) -> Path:
    if out is None:
        return (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    path = Path(out).expanduser()
    if path.is_dir():
        return path / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {out}: the report is an HTML file; give a name that ends in .html.")
    return path


def _distinct(runs: list[RunData]) -> list[RunData]:
    """Every run once, under a name of its own: more of the path where names are equal."""
    runs = list({run.folder.resolve(): run for run in runs}.values())
    names = [run.name for run in runs]
    for length in range(2, 1 + max((len(run.folder.resolve().parts) for run in runs), default=0)):
        repeated = {name for name in names if names.count(name) > 1}
        longer = ["/".join(run.folder.resolve().parts[-length:]) for run in runs]
        names = [more if name in repeated else name for name, more in zip(names, longer)]
    return [replace(run, name=name) for run, name in zip(runs, names)]
