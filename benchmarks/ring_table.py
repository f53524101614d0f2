"""Table of students of the ring by their distance to the exact ends of trajectories, from the record of toy.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cells import cell, mean

__all__ = ["REFERENCE", "table"]

#: one-step error of the same losses in a short independent script, 2,500 updates of 384 points, one seed
REFERENCE = {
    "knowledge_distillation": 0.065,
    "flow_map_lsd": 0.094,
    "free_flow": 0.111,
    "boot": 0.120,
    "flow_map_esd": 0.124,
    "flow_map_psd": 0.162,
    "shortcut": 0.172,
    "consistency_training": 0.207,
    "mean_flow": 0.253,
    "scm": 0.279,
    "consistency_distillation": 0.327,
}


def table(result: Mapping[str, Any] | None) -> str:
    """Rows with distances to exact ends, best first.

    Args:
        result: record ``compare_ring``, None where there is none.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in () if result is None else result["rows"]:
        if "rmse" in row:
            groups.setdefault(row["config"], []).append(row)
    if not groups:
        return "(run `python benchmarks/toy.py ring` to fill this table)"
    lines = [
        "| configuration | method | steps | error | in 2 steps | in 4 | reference, 1 step | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for config, rows in sorted(groups.items(), key=lambda item: mean(item[1], "rmse")):
        name = Path(config).stem.removesuffix("_ring")
        cells = [f"[`{name}`](../{config})", rows[0]["method"], str(rows[0]["nfe"])]
        cells += [cell(rows, key, 3) if key in rows[0] else "" for key in ("rmse", "rmse_2", "rmse_4")]
        cells += [f"{REFERENCE[name]:.3f}" if name in REFERENCE else "", f"{mean(rows, 'cpu_seconds'):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = max(len(rows) for rows in groups.values())
    made = (result or {})["meta"]["samples"]
    lines += [
        "",
        f"Mean, and range of {seeds} seeds where one is given; {made:,} points; CPU seconds of one thread, with start. "
        "Reference: a single run of the same losses in an independent script (MLP of width 192, 2,500 updates of 384 "
        "points).",
    ]
    return "\n".join(lines)
