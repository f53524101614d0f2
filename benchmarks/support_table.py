"""The support matrix and its summary, from the record of support.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["page", "summary"]

#: exports by their letter in the matrix
MARKS = {"pipeline": "P", "lora_diffusers": "L", "lora_kohya": "K"}


def summary(result: Mapping[str, Any] | None) -> str:
    """How many methods train a family, and how many of their students leave as stock pipelines and LoRA files."""
    if result is None:
        return "(run `python benchmarks/support.py` to fill this table)"
    rows = result["rows"]
    lines = ["| family | methods | full | LoRA | stock pipelines | LoRA files |", "|---|---|---|---|---|---|"]
    for family in result["families"]:
        own = [row for row in rows if row["family"] == family]
        if not own:
            continue
        trained = [[r for r in own if r["roles"] == roles and r["training"] == "trained"] for roles in ("full", "lora")]
        same = [
            len({r["method"] for r in own if any(_equal(r, export, result["tolerance"]) for export in exports)})
            for exports in (("pipeline",), ("lora_diffusers", "lora_kohya"))
        ]
        ran = len({row["method"] for row in own})
        cells = [family, str(ran), *(str(len(found)) for found in trained), *map(str, same)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Methods that were run with the family; how many of them trained a tiny random pipeline of it in full weights "
        "and as LoRA, and of how many the student left as a stock pipeline, and as a LoRA file, that makes the same "
        "samples.",
    ]
    return "\n".join(lines)


def _equal(row: Mapping[str, Any], export: str, tolerance: float) -> bool:
    value = row.get(export)
    return isinstance(value, float) and value <= tolerance


def page(result: Mapping[str, Any] | None) -> str:
    """docs/support_matrix.md: what was trained and exported, family by family.

    Args:
        result: record ``support``, None where there is none.
    """
    from lightning_distill.export.entries import ENTRIES

    entries = {entry.name: entry for entry in ENTRIES}
    lines = [
        "# Support matrix",
        "",
        "Which method trains which family, and which exports of the student make the same samples in stock diffusers.",
        "Written by `python benchmarks/make_tables.py` from `benchmarks/support.py`, which runs a cell with a tiny",
        "random pipeline of the family: one update, export, load with stock diffusers, latents against `sample()`.",
        "A cell that was not run is empty.",
    ]
    if result is None:
        return "\n".join([*lines, "", "(run `python benchmarks/support.py` to fill this table)", ""])
    rows, tolerance = result["rows"], result["tolerance"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    families = [name for name in result["families"] if any(row["family"] == name for row in rows)]
    lines += [
        "",
        f"P: the pipeline folder makes the same latents (differences below {tolerance:g} of the largest latent);",
        "L: so does the LoRA file with diffusers' names, K: with kohya's names. Before the slash a student of full",
        "weights, behind it a LoRA student. A number is a note below.",
        "",
        f"| method | {' | '.join(families)} |",
        f"|---|{'---|' * len(families)}",
    ]
    notes: dict[str, int] = {}

    def note(sentence: str) -> str:
        """Its number; what differs between families and sizes is left out."""
        for pattern, common in (
            (r"\b(UNet2DCondition|\w+Transformer[23]D)Model\b(?! embeds)(?!\.)", "network"),
            (r"\b(FlowMatching|VariancePreserving|TrigFlow)\([^)]*\)", r"\1"),
            (r"\[[\d., ]+\]", "[...]"),
            (r"samples( of shape| have the shape) \([\d, ]+\)( have \d+)?", "samples have another shape"),
            (
                r"RuntimeError: (\w+ skipped its update)\.",
                r"\1: its loss or gradient was not finite.",
            ),
        ):
            sentence = re.sub(pattern, common, sentence)
        return str(notes.setdefault(sentence, len(notes) + 1))

    def mark(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        if row["training"] != "trained":
            return note(row["training"])
        text = ""
        for export, letter in MARKS.items():
            value = row.get(export)
            if isinstance(value, float) and value <= tolerance:
                text += letter
            elif isinstance(value, float):
                text += f" {letter.lower()}={value:.0e}"
            elif value is not None:
                text += f" {note(value)}"
        return text.strip()

    cells = {(row["method"], row["family"], row["roles"]): row for row in rows}
    for method in methods:
        pairs = [[mark(cells.get((method, f, roles))) for roles in ("full", "lora")] for f in families]
        line = [" / ".join(pair) if any(pair) else "" for pair in pairs]
        lines.append(f"| {method} | {' | '.join(line)} |")
    lines += ["", *(f"{number}. {text}" for text, number in notes.items())]
    lines += [
        "",
        "## How the pipelines are called",
        "",
        "The card of an export states every argument. `renoise` needs `LCMScheduler` (variance-preserving models),",
        "`FlowMatchLCMScheduler` (flow matching) or `SCMScheduler` (Sana-Sprint), `ode` `DDIMScheduler` or",
        "`FlowMatchEulerDiscreteScheduler`; each is saved with the settings that give the student's times.",
        "",
        "| pipeline | network | guidance off, or the embedded scale | times of the user's own | seed |",
        "|---|---|---|---|---|",
    ]
    for entry in entries.values():
        off = ", ".join(f"{k}={v}" for k, v in entry.guidance_off.items()) or "guidance_scale of the training"
        grid = f"`{entry.grid_argument}=`" if entry.grid_argument else "shifted trailing grids only"
        if entry.name == "SanaSprintPipeline":
            grid = "two steps only"
        seed = "`generator=`" if entry.step_generator else "`torch.manual_seed`"
        lines.append(f"| {entry.name} | {entry.model_class} | {off} | {grid} | {seed} |")
    return "\n".join([*lines, ""])
