"""Tables of what settings and plans are worth: quality beside cheaper settings, plans beside measured memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cells import cell
from scipy.stats import t as student_t

__all__ = ["cheaper", "peaks"]

#: of which the cheaper settings are compared
CONFIG = "configs/method/dmd2_gan_fashion.yaml"


def cheaper(result: Mapping[str, Any] | None) -> str:
    """Quality and CPU seconds of one configuration with and without the settings that save work, by seed.

    Args:
        result: record ``compare_fashion``, None where there is none.
    """
    groups: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in (result or {"rows": []})["rows"]:
        if row["config"] == CONFIG and "seconds" not in row:
            words = ", ".join(f"`{key}: {value}`" for key, value in row.get("settings", {}).items())
            groups.setdefault(words, {})[row["seed"]] = row
    if "" not in groups or len(groups) < 2:
        return f"(run `python benchmarks/compare.py fashion --configs {CONFIG}` with and without settings)"
    usual = groups[""]
    lines = [
        "| settings | progress | recall | student updates | CPU s |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for words, found in sorted(groups.items()):
        rows = list(found.values())
        cells = [words or "none", cell(rows, "progress", 3), cell(rows, "recall", 2)]
        cells += [cell(rows, "student_updates", 0), cell(rows, "cpu_seconds", 0)]
        lines.append(f"| {' | '.join(cells)} |")
        both = sorted(found.keys() & usual.keys())
        if words and len(both) > 1:
            gains = [found[seed]["progress"] - usual[seed]["progress"] for seed in both]
            middle = sum(gains) / len(gains)
            spread = math.sqrt(sum((gain - middle) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))
            half = float(student_t.ppf(0.975, len(gains) - 1)) * spread
            seconds = [sum(of[seed]["cpu_seconds"] for seed in both) for of in (found, usual)]
            notes.append(
                f"With {words}, seeds paired: progress {middle:+.3f}, 95 % between {middle - half:+.3f} and "
                f"{middle + half:+.3f}, for {seconds[0] / seconds[1]:.2f} of the CPU seconds ({len(both)} seeds)."
            )
    return "\n".join([*lines, "", *notes])


def peaks(result: Mapping[str, Any] | None) -> str:
    """Planned beside measured memory.

    Args:
        result: record ``plan_peaks``, None where there is none.
    """
    if result is None:
        return "(run `python benchmarks/plan_peaks.py` to fill this table)"
    lines = ["| run | batch | planned, MiB | measured, MiB | ratio |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        mebibytes = [f"{row[key] / 2**20:.0f}" for key in ("planned", "measured")]
        ratio = f"{row['planned'] / row['measured']:.2f}"
        lines.append(f"| {' | '.join([row['what'], str(row['batch']), *mebibytes, ratio])} |")
    return "\n".join(lines)
