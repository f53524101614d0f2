"""``lightning-distill report RUN_DIR [RUN_DIR ...]``: one page with curves, pictures and figures."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_distill.commands.errors import CommandParser
from lightning_distill.report import write_report

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """Write the report and its Markdown twin."""
    parser = CommandParser(
        prog="lightning-distill report",
        description="One page, HTML and Markdown, with the figures, curves and pictures of one or several runs.",
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run folders, for example runs/quickstart")
    parser.add_argument(
        "--out", help="HTML file, or folder for report.html (default: the run folder; of several runs the current one)"
    )
    args = parser.parse_args(list(words))
    path = write_report(args.run_dirs, args.out)
    print(f"{path}\n{path.with_suffix('.md')}")
