"""Fill README.md and pages of docs/ from benchmarks/results/latest/*.json and from the registered methods.

python benchmarks/make_tables.py            # rewrite
python benchmarks/make_tables.py --check    # exit 1 when one of them is out of date
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import budget_table
import cost_tables
import dials_table
import methods_table
import plane_table
import recipes_table
import ring_table
import support_table

ROOT = Path(__file__).resolve().parent.parent
LATEST = ROOT / "benchmarks" / "results" / "latest"
#: labels of earlier records
RENAMED = {"lightning_distill defaults": "lightning_distill, cheaper settings"}


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
        "`fd_cnn` is the Frechet distance in the features of a shipped classifier, less is better:",
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


def _compared(*problems: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of all seeds by configuration and its settings."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for problem in problems:
        for row in (_load(f"compare_{problem}") or {"rows": []})["rows"]:
            groups.setdefault(row["config"] + _settings(row, "configs"), []).append(row)
    return groups


def comparison() -> list[str]:
    """Mean and range over seeds of every configuration that was compared with three seeds."""
    compared = _compared("fashion", "digits")
    own = {"seconds", "settings"}  # of rows that are no shipped configuration as it is
    groups = {name: rows for name, rows in compared.items() if len(rows) > 2 and not own & rows[0].keys()}
    if not groups:
        return []
    lines = [
        "",
        "Mean over three seeds (smallest to largest); 5,000 samples, one thread, CPU seconds of all stages:",
        "",
        "| configuration | steps | progress | fd_cnn | recall | class accuracy | pass | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rows in groups.values():

        def cell(key: str, digits: int, rows: list[dict[str, Any]] = rows) -> str:
            values = [row[key] for row in rows]
            return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

        cells = [cell("progress", 3), cell("fd", 2), cell("recall", 2), cell("class_accuracy", 3)]
        seconds = sum(row["cpu_seconds"] for row in rows) / len(rows)
        config = rows[0]["config"]
        what = f"[`{config}`]({config}){_settings(rows[0], 'configs')}"
        cells.append(f"{sum(not row.get('objections', ['unknown']) for row in rows)} of {len(rows)}")
        lines.append(f"| {what} | {rows[0]['nfe']} | {' | '.join(cells)} | {seconds:.0f} |")
    return lines


def stored() -> str:
    """Configurations that learn from stored trajectories, beside the teacher in as many steps."""
    compared = _compared("fashion")
    groups = {
        name: rows[0]
        for name, rows in compared.items()
        if rows[0]["method"] != "AGD" and len(rows) < 3 and "seconds" not in rows[0]
    }
    guided = [row for rows in compared.values() for row in rows if row["method"] == "AGD"]
    if not groups:
        return "(run `python benchmarks/compare.py fashion --store STORE --configs ...` to fill this table)"
    lines = [
        "| configuration | steps | fd_cnn | teacher, as many steps | progress | recall | class accuracy | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(groups.values(), key=lambda row: (row["nfe"], row["fd"])):
        name = row["config"].rpartition("/")[2]
        own = row[f"fd_teacher_{row['nfe']}"]
        cells = [f"{row['fd']:.2f}", f"{own:.2f}", f"{row['progress']:.3f}"]
        cells += [f"{row['recall']:.2f}", f"{row['class_accuracy']:.3f}", f"{row['cpu_seconds']:.0f}"]
        what = f"[`{name}`](../{row['config']}){_settings(row, '../configs')}"
        lines.append(f"| {what} | {row['nfe']} | {' | '.join(cells)} |")
    many = next(iter(groups.values()))["fd_teacher_50"]
    lines += [
        "",
        f"Fashion-MNIST, one seed, 5,000 samples; the teacher in 50 steps has {many:.2f}. CPU seconds are those of "
        "training (of both stages where there are two) on a machine with other load, without those of the store.",
    ]
    for row in guided:
        steps, name = row["nfe"], row["config"].rpartition("/")[2]
        lines += [
            "",
            f"[`{name}`](../{row['config']}): adapters in place of classifier-free guidance, {steps} network calls for "
            f"{steps} steps, fd_cnn {row['fd']:.2f}; guidance itself, with twice the calls, "
            f"{row[f'fd_teacher_{steps}']:.2f} ({row['fd'] / row[f'fd_teacher_{steps}'] - 1.0:+.0%}; "
            f"{row['samples']:,} samples, {row['cpu_seconds']:.0f} CPU s of training). This guidance costs Frechet "
            "distance here: near to it is good, lower is not.",
        ]
    return "\n".join(lines)


def _settings(row: dict[str, Any], configs: str) -> str:
    """What a row changed in its configuration, and the stages before it, in the folder ``configs``."""
    words = [f"{key} {value}" for key, value in row.get("settings", {}).items()]
    for config in (word.rstrip("~") for word in row.get("after", ())):
        words.append(f"after [`{config.rpartition('/')[2]}`]({configs}/{config.removeprefix('configs/')})")
    return f", {', '.join(words)}" if words else ""


def methods() -> str:
    """One row per registered method, for README.md."""
    return methods_table.table({problem: _load(f"compare_{problem}") for problem in methods_table.PROBLEMS})


def strategies() -> str:
    """Bytes between processes per optimizer step."""
    result = _load("reduce_bytes")
    if result is None:
        return "(run `python benchmarks/reduce_bytes.py` to fill this table)"
    lines = [
        f"DMD2 on the shipped Fashion-MNIST network ({result['rows'][0]['parameter_bytes'] / 4e6:.2f} million "
        "parameters) in two processes:",
        "",
        "| strategy | roles | network that steps | bytes of its parameters | bytes moved per step |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        roles = "LoRA" if row["method"].endswith("lora") else "copies"
        lines.append(
            f"| `{row['strategy']}` | {roles} | {row['phase']} | {row['parameter_bytes']:,} | {row['bytes']:,} |"
        )
    return "\n".join(lines)


def cost() -> str:
    """What the callbacks of the quick start cost."""
    result = _load("callbacks")
    if result is None:
        return "(run `python benchmarks/callbacks.py` to fill this line)"
    parts = ", ".join(f"{name} {seconds / result['cpu_seconds']:.1%}" for name, seconds in result["callbacks"].items())
    return f"In the quick start all of them together take {result['share']:.0%} of the CPU seconds ({parts})."


def emoji() -> str:
    """Picture and table of docs/text_to_emoji.md."""
    result = _load("emoji")
    if result is None:
        return "(run `python benchmarks/emoji.py` to fill this table)"
    captions, real = result["captions"], result["real"]
    seconds = {stage: f"{spent['cpu_seconds']:.0f}" for stage, spent in result["training"].items()}
    lines = [
        "![real pictures, teacher and students by held-out caption, from the same noise](images/emoji.png)",
        "",
        f"| unseen captions, 32x32 | steps | network calls | R@1 | KID x 1000 | {result['frechet']} | progress (KID) |",
        "|---|---|---|---|---|---|---|",
        f"| real pictures | | | {result['ceiling']:.3f} | {1e3 * real['kid']:.1f} | {real['fd']:.2f} | |",
    ]
    for row in sorted(result["rows"], key=lambda row: (row["who"] != "teacher", -row["nfe"])):
        calls = row["nfe"] * (1 if row["guidance"] == 1 else 2)  # guidance asks the network twice
        done = "" if row["progress"] is None else f"{row['progress']:.2f}"
        cells = [f"{row['recall']:.3f}", f"{1e3 * row['kid']:.1f}", f"{row['fd']:.2f}", done]
        lines.append(f"| {row['who']} | {row['nfe']} | {calls} | {' | '.join(cells)} |")
    features = {"effnet": "EfficientNet-Lite0", "pixels8": "means of 4x4 pixels"}[result["features"]]
    lines += [
        "",
        f"Features: {features}. R@1 is the share of the {captions['names']} held-out names that a linear probe, fitted",
        f"on the {captions['training']} training pictures, finds from the picture (chance {result['chance']:.3f}).",
        f"KID and the Frechet distance compare {captions['held_out']} pictures of held-out captions with real ones,",
        f"mean of {result['draws']} draws; the row of real pictures compares these with training pictures.",
        f"CPU seconds of one thread ({result['meta']['machine']['cpu']}): {seconds['teacher']} for the teacher, "
        f"{seconds['student_4']} for four steps, {seconds['student_1']} for one step.",
    ]
    return "\n".join(lines)


def super_resolution() -> str:
    """Picture and table of docs/super_resolution.md."""
    result = _load("super_resolution")
    if result is None:
        return "(run `python benchmarks/super_resolution.py --data ROOT` to fill this table)"
    rows, training, seen = result["rows"], result["training"], set[str]()
    distances, factor = list(result["reference"]), result["factor"]
    columns = {"psnr": ("PSNR", 2), "consistency": ("PSNR to the input", 2)} | {name: (name, 2) for name in distances}
    if any(row["lpips"] is not None for row in rows):
        columns["lpips"] = ("LPIPS", 3)
    lines = [
        "![input, teacher, students and truth, a test picture of each class](images/super_resolution.png)",
        "",
        f"| restored by | network calls | realism | {' | '.join(title for title, _ in columns.values())} | CPU s |",
        f"|---|---|---|{'---|' * len(columns)}---|",
    ]
    for row in rows:
        who = {"real": "(the true pictures)", "bicubic": "bicubic enlargement"}.get(row["who"], row["who"])
        config, seconds = row.get("config"), ""
        if config and config not in seen:
            seen.add(config)
            spent = training[config]["cpu_seconds"]
            who = f"[{who}](../configs/{config})"
            seconds = "" if spent is None else f"{spent:.0f}"
        cells = [who, str(row["nfe"] or ""), "" if row["realism"] is None else f"{row['realism']:g}"]
        cells += ["" if row[key] is None else f"{row[key]:.{digits}f}" for key, (_, digits) in columns.items()]
        lines.append(f"| {' | '.join([*cells, seconds])} |")
    size, real = 32 // factor, next(iter(result["reference"].values()))
    cpus: dict[str, list[str]] = {}
    for config, done in training.items():
        found = next((row["who"] for row in rows if row.get("config") == config), "YONOS' teacher")
        cpus.setdefault(done.get("cpu", result["meta"]["machine"]["cpu"]), []).append(found)
    machines = (
        "; ".join(f"{cpu} for {', '.join(who)}" for cpu, who in cpus.items()) if len(cpus) > 1 else next(iter(cpus))
    )
    lines += [
        "",
        f"{result['samples']:,} test pictures of Fashion-MNIST, {size}x{size} to 32x32, which no network has seen; one",
        "seed. PSNR in dB (mean over pictures, range 2) to the true picture, and of the degraded result to the input.",
        f"Frechet distances to the {real:,} training pictures in the features of two classifiers. CPU seconds of one",
        f"thread ({machines}) in training, a student's without its teacher's; CTMSR has none.",
    ]
    return "\n".join(lines)


def tangents() -> str:
    """Cost of an exact derivative, for docs/flow_maps.md."""
    result = _load("tangents")
    if result is None:
        return "(run `python benchmarks/tangents.py` to fill this table)"
    of_attention = [row for row in result["rows"] if row["what"] == "attention tangent"]
    updates = [row for row in result["rows"] if row["what"] == "update"]
    lines = ["| derivative of one attention layer | memory | seconds |", "|---|---|---|"]
    names = {"chunked": "chunks of queries", "math": "torch's `MATH` backend"}
    for row in of_attention:
        lines.append(f"| {names[row['route']]} | {row['peak_bytes'] / 2**20:,.0f} MiB | {row['seconds']:.2f} |")
    one, machine = of_attention[0], result["meta"]["machine"]
    lines += [
        "",
        f"{one['tokens']:,} tokens, {one['heads']} heads of {one['head_dim']}, {one['dtype']}, {machine['cpu']}; the "
        f"two differ by {one['relative_difference']:.0e}.",
        "",
        "| value with gradient, and the tangent | operations | time | error of the tangent |",
        "|---|---|---|---|",
    ]
    for row in updates:
        error = "0" if row["mode"] == "jvp" else f"{row['relative_error']:.1e}"
        lines.append(f"| `{row['mode']}` | {row['flop_ratio']:.2f} | {row['time_ratio']:.2f} | {error} |")
    lines += ["", f"In units of the value with gradient alone; {updates[0]['network']}."]
    return "\n".join(lines)


def fastgen(what: str = "throughput_fastgen", option: str = "") -> str:
    """Cost of a cycle of DMD2, or of other updates, here and in FastGen, for docs/fastgen.md."""
    result = _load(what)
    if result is None:
        return f"(run `python benchmarks/fastgen.py --fastgen FOLDER{option}` to fill this table)"
    several = len({(row.get("threads"), row["dtype"]) for row in result["rows"]}) > 1
    head = ["setting", *["threads"] * several, "implementation", "s, least", "s, median"]
    head += ["passes", "GFLOP", "MiB for backward", "host reads"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        seconds = [f"{row['seconds_per_cycle'][key]:.2f}" for key in ("min", "median")]
        counts = [f"{row['passes']:g}", f"{row['gflop']:.0f}", f"{row['saved_activation_bytes'] / 2**20:.0f}"]
        if "gflop_ratio" in row:  # of the row above, with which its blocks alternated
            seconds = [f"{s} (x {row[f'seconds_ratio_{key}']:.2f})" for s, key in zip(seconds, ("min", "median"))]
            counts[1] += f" (x {row['gflop_ratio']:.2f})"
            counts[2] += f" (x {row['saved_activation_bytes_ratio']:.2f})"
        cells = [*seconds, *counts, f"{row['host_syncs']:,}"]
        who = RENAMED.get(row["implementation"], row["implementation"])
        place = [f"{row['threads']}, {row['dtype']}"] if several else []
        lines.append(f"| {' | '.join([row['what'], *place, who, *cells])} |")
    worst = max(result["equality"].values())
    machine = result["meta"]["machine"]
    kind = "" if several else f"{result['rows'][0]['dtype']}, one thread of "
    time = "CPU seconds of one thread, seconds on the wall of several" if several else "CPU seconds"
    lines += [
        "",
        f"Batch {result['rows'][0]['batch']}, {kind}{machine['cpu']}, {result['repeats']} blocks a side, {time}. "
        f"On equal draws losses and gradients differ by {worst:.0e} at most.",
    ]
    return "\n".join(lines)


def fastgen_tangents() -> str:
    """Cost of an update with an exact derivative here and in FastGen, for docs/fastgen.md."""
    return fastgen("tangents_fastgen", " --tangents")


def _seconds_to(rows: list[dict[str, Any]], goal: float) -> str:
    """Seconds until a progress, of one seed or the median, least and most of several; empty where one never came."""
    seconds = [row[f"seconds_to_{goal}"] for row in rows]
    if None in seconds:
        return ""
    spread = f" ({min(seconds):.0f} to {max(seconds):.0f})" if len(seconds) > 1 else ""
    return f"{median(seconds):.0f}{spread}"


def fastgen_quality() -> str:
    """Seconds until a student is good here and in FastGen, for docs/fastgen.md."""
    result = _load("quality_fastgen")
    if result is None:
        return "(run `python benchmarks/fastgen.py --fastgen FOLDER --quality` to fill this table)"
    lines = [
        "| implementation | learning rate | critic updates | CPU s to .8 | CPU s to .9 | best progress | at CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    sides: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        sides.setdefault((row["implementation"], row["rate"], row["fake_score_steps"]), []).append(row)
    several = []
    for (name, rate, updates), rows in sides.items():
        point = [name, f"{rate:g}", str(updates)]
        at, best = max(rows[0]["points"], key=lambda point: point[1])
        cells = [*point, *(_seconds_to(rows[:1], goal) for goal in (0.8, 0.9)), f"{best:.2f}", f"{at:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        if len(rows) > 1:
            cells = [*point, str(len(rows)), *(_seconds_to(rows, goal) for goal in (0.8, 0.9))]
            several.append(f"| {' | '.join(cells)} |")
    if several:
        lines += [
            "",
            "Over seeds, the best setting of each side: median (least to most).",
            "",
            "| implementation | learning rate | critic updates | seeds | CPU s to .8 | CPU s to .9 |",
            "|---|---|---|---|---|---|",
            *several,
        ]
    machine = result["meta"]["machine"]
    lines += [
        "",
        f"At least {result['first']:.0f} CPU seconds of one thread of {machine['cpu']} for every point, up to "
        f"{result['budget']:.0f} for the one of each side that was best by then, fewer where .9 came before; "
        f"{result['samples']:,} samples.",
    ]
    return "\n".join(lines)


def marked(text: str, name: str, part: str) -> str:
    """The text with the part between the markers of a name replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    return head + begin + "\n" + part + "\n" + end + rest.split(end)[1]


def main() -> None:
    """Rewrite the marked parts of pages, and the generated page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pages = {
        ROOT / "README.md": {"quickstart": quickstart, "methods": methods, "strategies": strategies, "cost": cost}
        | {"families": lambda: support_table.summary(_load("support"))},
        ROOT / "docs" / "text_to_emoji.md": {"emoji": emoji},
        ROOT / "docs" / "super_resolution.md": {"super_resolution": super_resolution},
        ROOT / "docs" / "trajectories.md": {"stored": stored},
        ROOT / "docs" / "digits.md": {
            "digits": lambda: budget_table.table(_load("compare_digits"), "digits"),
            "variants": lambda: budget_table.variants(_load("compare_digits")),
        },
        ROOT / "docs" / "fashion.md": {
            "fashion": lambda: budget_table.table(_load("compare_fashion"), "fashion"),
            "variants": lambda: budget_table.variants(_load("compare_fashion")),
        },
        ROOT / "docs" / "dials.md": {"dials": lambda: dials_table.table(_load("dials"))},
        ROOT / "docs" / "plane.md": {
            "modes": lambda: plane_table.modes(_load("compare_ring4")),
            "board": lambda: plane_table.board(_load("compare_checkerboard")),
        },
        ROOT / "docs" / "flow_maps.md": {"tangents": tangents}
        | {"capabilities": methods_table.capabilities}
        | {"ring": lambda: ring_table.table(_load("compare_ring"))},
        ROOT / "docs" / "fastgen.md": {"fastgen": fastgen, "quality": fastgen_quality}
        | {"tangents": fastgen_tangents, "cheaper": lambda: cost_tables.cheaper(_load("compare_fashion"))},
        ROOT / "docs" / "memory.md": {"peaks": lambda: cost_tables.peaks(_load("plan_peaks"))},
        ROOT / "docs" / "recipes.md": {"recipes": lambda: recipes_table.table(_load("recipes"))},
    }
    written = {ROOT / "docs" / "support_matrix.md": support_table.page(_load("support"))}
    for page, parts in pages.items():
        written[page] = page.read_text()
        for name, make in parts.items():
            written[page] = marked(written[page], name, make())
    if args.check:
        stale = [page.name for page, text in written.items() if not page.is_file() or page.read_text() != text]
        sys.exit(f"{' and '.join(stale)} out of date; run python benchmarks/make_tables.py" if stale else 0)
    for page, text in written.items():
        page.write_text(text)
    for problem in budget_table.SECONDS:
        budget_table.plot(_load(f"compare_{problem}"), problem)
    dials_table.plot(_load("dials"), ROOT / dials_table.PICTURE)


if __name__ == "__main__":
    main()
