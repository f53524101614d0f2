"""Tables and scatter plots of every method in the same time on one teacher, from the records of compare.py."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from cells import cell, mean

__all__ = ["plot", "table", "variants"]

ROOT = Path(__file__).resolve().parent.parent
#: figures by their decimals
COLUMNS = {"progress": 3, "progress_judge": 3, "fd": 2, "recall": 2, "class_accuracy": 3, "student_updates": 0}
TRACKS = {"Prior": "learn from the teacher alone", "Toy2D": "see real pictures"}
#: seconds of the commands that are proposed where there is no record
SECONDS = {"digits": 60, "fashion": 120}


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[Mapping[str, Any]]]]:
    """Rows of all seeds by configuration, best mean progress first within equal steps, by track.

    Of several budgets of a configuration the one that most rows have counts.
    """
    rows = [row for row in rows if "seconds" in row and "settings" not in row and "after" not in row]
    usual = Counter(map(_budget, rows)).most_common(1)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["config"], []).append(row)
    for config, found in groups.items():
        groups[config] = [row for row in found if _budget(row) == usual[0][0]] or found
    tracks: dict[str, list[list[Mapping[str, Any]]]] = {}
    for config, found in groups.items():
        source = yaml.safe_load((ROOT / "lightning_distill" / config).read_text())["data"]["class_path"]
        tracks.setdefault(TRACKS[source.rpartition(".")[2]], []).append(found)
    for found in tracks.values():
        found.sort(key=lambda rows: (rows[0]["nfe"], -mean(rows, "progress")))
    return tracks


def table(result: Mapping[str, Any] | None, problem: str) -> str:
    """The generated part of a problem's page.

    Args:
        result: record ``compare_<problem>``, None where there is none.
        problem: ``digits`` or ``fashion``.
    """
    tracks = {} if result is None else grouped(result["rows"])
    if not tracks:
        seconds = SECONDS[problem]
        return f"(run `python benchmarks/compare.py {problem} --seconds {seconds} --configs 'method/*_ring*.yaml'`)"
    everything = [row for groups in tracks.values() for rows in groups for row in rows]
    budgets = Counter(_budget(row) for row in everything)
    usual = budgets.most_common(1)[0][0]
    card = _figures(problem)
    own = ", ".join(f"{card[k]['fd_cnn']:.2f} in {k}" for k in ("1", "2", "4", "8", "50"))
    lines = [f"![progress against recall, by number of steps](images/{problem}.png)", ""]
    for track, groups in tracks.items():
        lines += [
            f"Methods that {track}:",
            "",
            "| configuration | method | steps | progress | in the second features | fd_cnn | recall | class accuracy | "
            "updates | passes |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for rows in groups:
            config, method = rows[0]["config"], rows[0]["method"]
            name = Path(config).stem
            cells = [f"[`{name}`](../{config})", method, str(rows[0]["nfe"])]
            cells += [cell(rows, key, digits) for key, digits in COLUMNS.items()]
            if {_budget(row) for row in rows} != {usual}:
                cells[-1] += " *"
            passed = sum(not row["objections"] for row in rows)
            cells.append(f"{passed} of {len(rows)}" if len(rows) > 1 else "yes" if passed else "")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    others = "".join(f"; * {seconds:.0f} of {cpu}" for seconds, cpu in sorted(set(budgets) - {usual}))
    lines.append(
        f"{usual[0]:.0f} CPU seconds of training each, of one thread of {usual[1]}{others}; 5,000 "
        f"samples against the held-out half of the real pictures. The teacher's fd_cnn is {own} steps."
    )
    return "\n".join(lines)


def _budget(row: Mapping[str, Any]) -> tuple[float, str]:
    """Seconds, and of which processor."""
    return row["seconds"], str(row.get("cpu"))


def _begun(word: str) -> str:
    """``cmt_ring form=flow_map (20 s)`` of an earlier stage."""
    name, _, seconds = word.rstrip("~").partition("@")
    config, *settings = name.split(":")
    return " ".join([Path(config).stem, *settings, *([f"({seconds} s)"] if seconds else [])])


def variants(result: Mapping[str, Any] | None) -> str:
    """Rows with other settings than the configurations', stages before them or other times, beside those as they are.

    Args:
        result: record ``compare_<problem>``, None where there is none.
    """
    timed = [row for row in (result or {"rows": []})["rows"] if "seconds" in row]
    kinds = {(row["config"], str(row.get("after")), str(row.get("settings")), row["seconds"]) for row in timed}
    several = {config for config, count in Counter(kind[0] for kind in kinds).items() if count > 1}
    varied = {row["config"] for row in timed if "settings" in row or "after" in row} | several
    groups: dict[tuple[str, str, str, float], list[Mapping[str, Any]]] = {}
    for row in sorted(timed, key=lambda row: (row["config"], row["seconds"])):
        if row["config"] in varied:
            kind = (row["config"], str(row.get("after")), str(row.get("settings")), row["seconds"])
            groups.setdefault(kind, []).append(row)
    if not groups:
        return "(none)"
    lines = [
        "| configuration | begins as | settings | CPU s "
        "| of all stages | progress | recall | class accuracy | updates |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rows in groups.values():
        row = rows[0]
        begins = ", ".join(_begun(word) for word in row.get("after", ()))
        settings = "; ".join(
            f"{key.replace('.init_args', '')} {value}" for key, value in row.get("settings", {}).items()
        )
        cells = [f"[`{Path(row['config']).stem}`](../{row['config']})", begins, settings, f"{row['seconds']:.0f}"]
        cells.append(cell(rows, "cpu_seconds", 0) if begins else "")
        cells += [cell(rows, key, COLUMNS[key]) for key in ("progress", "recall", "class_accuracy", "student_updates")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: Mapping[str, Any] | None, problem: str) -> None:
    """Scatter of progress against recall and against updates, one colour per number of steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    groups = [rows for found in grouped(result["rows"] if result else ()).values() for rows in found]
    if not groups:
        return
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = {1: "tab:blue", 2: "tab:orange", 4: "tab:green"}
    figures = {"recall": "recall", "student_updates": "updates within the budget"}
    for axis, (key, title) in zip(axes, figures.items(), strict=True):
        for steps, colour in colours.items():
            chosen = [rows for rows in groups if rows[0]["nfe"] == steps]
            if not chosen:
                continue
            x, y = [mean(rows, key) for rows in chosen], [max(0.0, mean(rows, "progress")) for rows in chosen]
            axis.scatter(x, y, s=22, color=colour, label=f"{steps} step{'s' if steps > 1 else ''}")
        axis.set(xlabel=title)
        axis.grid(alpha=0.3)
    worst = min(mean(rows, "progress") for rows in groups)
    axes[0].set(ylabel=f"progress (fd_cnn{'; negative ones at 0' if worst < 0.0 else ''})")
    axes[0].axvline(_figures(problem)["50"]["recall_cnn"], color="gray", linestyle=":", label="teacher, 50 steps")
    updates = [mean(rows, "student_updates") for rows in groups]
    if max(updates) > 3.0 * min(updates):
        axes[1].set_xscale("log")
        ticks = [digit * 10**power for power in range(6) for digit in (1, 3)]
        between = [tick for tick in ticks if 0.7 * min(updates) <= tick <= 1.4 * max(updates)]
        axes[1].xaxis.set_major_locator(FixedLocator(between))
        axes[1].xaxis.set_minor_formatter(NullFormatter())
    axes[1].xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
    axes[0].legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "images" / f"{problem}.png", dpi=110)


def _figures(problem: str) -> dict[str, Any]:
    """Figures of the shipped teacher by its number of steps."""
    card = json.loads((ROOT / "lightning_distill" / "zoo" / problem / "card.json").read_text())
    return dict(card["figures"]["by_steps"])
