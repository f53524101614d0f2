"""Fill the generated parts of README.md from benchmarks/results/latest/*.json and from the registered methods.

python benchmarks/make_tables.py            # rewrite
python benchmarks/make_tables.py --check    # exit 1 when README.md is out of date
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LATEST = ROOT / "benchmarks" / "results" / "latest"


def _load(name: str) -> dict[str, Any] | None:
    file = LATEST / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def quickstart() -> str:
    """Picture and table of the quick start."""
    result = _load("quickstart")
    if result is None:
        return "(run `make quickstart` to fill this table)"
    card = json.loads((ROOT / "lightning_distill/zoo/fashion/card.json").read_text())["figures"]["by_steps"]
    fd = result["fd_cnn"]
    lines = [
        "![teacher with 50 steps, student with 1, teacher with 1, from the same noise](docs/images/quickstart.png)",
        "",
        "| Fashion-MNIST, 32x32 | steps | fd_cnn | recall | class accuracy |",
        "|---|---|---|---|---|",
    ]
    for steps in ("50", "4", "2", "1"):
        columns = (("fd_cnn", 2), ("recall_cnn", 2), ("class_accuracy", 3))
        row = [f"{card[steps][key]:.{digits}f}" for key, digits in columns]
        lines.append(f"| teacher | {steps} | {' | '.join(row)} |")
    lines.append(
        f"| **student (DMD2, data-free)** | **1** | **{fd['student_1']:.2f}** | {result['recall']:.2f} | "
        f"{result['class_accuracy']:.3f} |"
    )
    seconds = result["seconds"]
    lines += [
        "",
        f"Progress {result['progress']:.3f} after {seconds:.0f} s of distillation, {result['images_per_second']:.0f} "
        f"images/s from the student ({result['meta']['machine']['cpu']}, {result['meta']['machine']['cores']} cores).",
    ]
    lines += comparison()
    return "\n".join(lines)


def comparison() -> list[str]:
    """Mean and range over seeds of every configuration that was compared."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for problem in ("fashion", "digits"):
        for row in (_load(f"compare_{problem}") or {"rows": []})["rows"]:
            groups.setdefault(row["config"], []).append(row)
    if not groups:
        return []
    lines = ["", "Mean over seeds (smallest to largest); 5,000 samples, one thread:", ""]
    lines += [
        "| configuration | steps | seeds | progress | fd_cnn | recall | class accuracy | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for config, rows in groups.items():

        def cell(key: str, digits: int, rows: list[dict[str, Any]] = rows) -> str:
            values = [row[key] for row in rows]
            return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

        cells = [cell("progress", 3), cell("fd", 2), cell("recall", 2), cell("class_accuracy", 3)]
        seconds = sum(row["cpu_seconds"] for row in rows) / len(rows)
        lines.append(
            f"| [`{config}`]({config}) | {rows[0]['nfe']} | {len(rows)} | {' | '.join(cells)} | {seconds:.0f} |"
        )
    return lines


def methods() -> str:
    """One row per registered method."""
    from lightning_distill.commands.methods import method_rows

    lines = ["| method | paper | trained roles | data | configuration |", "|---|---|---|---|---|"]
    for row in method_rows():
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else ""
        lines.append(f"| {row.name} | {paper} | {row.roles} | {row.data} | {row.config} |")
    return "\n".join(lines)


def main() -> None:
    """Rewrite the marked parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = before = readme.read_text()
    for name, part in (("quickstart", quickstart()), ("methods", methods())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, rest = text.split(begin)
        text = head + begin + "\n" + part + "\n" + end + rest.split(end)[1]
    if args.check:
        sys.exit("README.md is out of date; run python benchmarks/make_tables.py" if text != before else 0)
    readme.write_text(text)


if __name__ == "__main__":
    main()
