"""``lightning-distill methods``: what can be trained."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_distill.commands.errors import CommandParser
from lightning_distill.methods.base import DistillationModule

__all__ = ["MethodRow", "main", "method_classes", "method_rows"]

#: problems of the shipped configurations, the shortest runs first
PROBLEMS = ("ring4", "ring", "digits", "fashion")


@dataclass(frozen=True)
class MethodRow:
    """One method as shown to users; all strings."""

    name: str
    paper: str
    roles: str
    data: str
    config: str
    summary: str


def method_classes(base: type[DistillationModule] = DistillationModule) -> Iterator[type[DistillationModule]]:
    """Concrete methods, each once: subclasses, here and in plugins, that define or inherit a student loss."""
    found: dict[type[DistillationModule], None] = {}
    for cls in base.__subclasses__():
        if hasattr(cls, "student_loss"):
            found[cls] = None
        found |= dict.fromkeys(method_classes(cls))
    yield from found


def method_rows() -> list[MethodRow]:
    """All registered methods, sorted by name."""
    from lightning_distill.cli import import_everything

    import_everything()
    contents = {path: path.read_text() for path in (Path(__file__).parents[1] / "configs").glob("*/*.yaml")}
    rows = []
    for cls in method_classes():
        roles = ", ".join(dict.fromkeys(role for roles in cls.phases.values() for role in roles))
        line = f"class_path: {cls.__name__}\n"
        using = [path for path, text in contents.items() if line in text]
        best = min(using, key=lambda path: _preference(cls.__name__, path, contents[path]), default=None)
        used = f"configs/{best.parent.name}/{best.name}" if best else ""
        summary = (inspect.getdoc(cls) or "").split("\n")[0]
        rows.append(MethodRow(cls.__name__, cls.paper, roles, cls.learns_from, used, summary))
    return sorted(rows, key=lambda row: row.name)


def _preference(name: str, path: Path, text: str) -> tuple[bool, int, Path]:
    """Which configuration stands for a method: least first, one that bears its name and runs as it is."""
    own, _, problem = path.stem.rpartition("_")
    named = own.replace("_", "") == name.lower() and problem in PROBLEMS
    return "RunDenoiser" in text, PROBLEMS.index(problem) if named else len(PROBLEMS), path


def main(words: Sequence[str]) -> None:
    """Print the table."""
    parser = CommandParser(prog="lightning-distill methods", description="What can be trained.")
    parser.parse_args(list(words))
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("method", "paper", "configuration", "trained roles", "data", "what it is"):
        table.add_column(name, no_wrap=name in ("method", "paper", "configuration"))
    for row in method_rows():
        table.add_row(row.name, row.paper and f"arXiv:{row.paper}", row.config, row.roles, row.data, row.summary)
    console = Console()
    console.width = max(console.width, 160)  # a table that is cut off is worse than one that wraps
    console.print(table)
