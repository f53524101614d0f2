"""Tables of the registered methods: paper and figure of each, and the samplers that fit its students."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_distill.capabilities import SAMPLERS_OF, TRAINED_FOR
from lightning_distill.commands.methods import method_classes, method_rows

__all__ = ["capabilities", "evidence", "table"]

ROOT = Path(__file__).resolve().parent.parent
#: problems with a figure in the table, and what each is
PROBLEMS = {"ring4": "four modes in the plane", "ring": "a ring of eight modes"}


def evidence(name: str, description: str) -> str:
    """What the formulas of a method were compared with.

    Args:
        name: of its class.
        description: its docstring, which says so where a paper left formulas open.
    """
    file = ROOT / "tests" / "fixtures" / "parity" / f"{name}.json"
    if file.is_file():
        fixture = json.loads(file.read_text())
        repository, commit = fixture["repository"], fixture["commit"]
        return f"[parity](https://github.com/{repository}/tree/{commit[:10]})"
    return "reconstructed" if "reconstructed" in description.lower() else "derived"


def table(results: Mapping[str, Mapping[str, Any] | None]) -> str:
    """One row per registered method, with its figure on the four modes or on the ring.

    Args:
        results: record ``compare_<problem>`` of each of ``PROBLEMS``, None where there is none.
    """
    lines = [
        "| method | paper | formulas | trained roles | data | configuration | problem: steps, SW2 (CPU s) |",
        "|---|---|---|---|---|---|---|",
    ]
    rows_of_methods = method_rows()
    descriptions = {cls.__name__: cls.__doc__ or "" for cls in method_classes()}
    measured: dict[str, list[dict[str, Any]]] = {}
    for problem in PROBLEMS:
        for row in (results.get(problem) or {"rows": []})["rows"]:
            if row["seed"] == 0 and "critic" not in row:  # the only one that all have
                measured.setdefault(row["method"], []).append({**row, "problem": problem})
    for method in rows_of_methods:
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
        best = min(measured.get(method.name, []), key=lambda row: (row["nfe"], row["sw2"]), default=None)
        figure = f"{best['problem']}: {best['nfe']}, {best['sw2']:.3f} ({best['cpu_seconds']:.0f})" if best else ""
        config = best["config"] if best else method.config
        formulas = evidence(method.name, descriptions[method.name])
        cells = [method.name, paper, formulas, method.roles, method.data, config, figure]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Formulas: *parity*, losses and gradients equal those of released code, run once on tiny networks "
        "(`tests/methods/test_parity*.py`); *derived*, tested against closed forms and independent derivations; "
        "*reconstructed*, the paper left part of them open. Configuration: the one that made the figure beside it.",
    ]
    for problem, what in PROBLEMS.items():
        rows = [row for of_method in measured.values() for row in of_method if row["problem"] == problem]
        if rows:
            one, two = (max(row[f"sw2_teacher_{steps}"] for row in rows) for steps in (1, 2))
            many = [row["sw2_teacher_100"] for row in rows]
            least, most = f"{min(many):.2f}", f"{max(many):.2f}"
            lines += [
                "",
                f"`{problem}` is {what} with an exact teacher; SW2 is the sliced Wasserstein distance of the student "
                f"of `*_{problem}.yaml` to the data, one seed. Two random sets of data are {rows[0]['sw2_floor']:.3f} "
                "apart, the mean of four pairs that differ by nearly as much: what lies below it does not tell methods "
                f"apart. The teacher has {one:.2f} with one step, {two:.2f} with two, and "
                f"{least if least == most else f'{least} to {most}'} with 100. Not a ranking: settings are hardly "
                "tuned, students start at random.",
            ]
    return "\n".join(lines)


def capabilities() -> str:
    """What students of each method are trained for, and the samplers that it takes for them, for docs/flow_maps.md."""
    method_rows()  # imports all methods
    lines = ["| trained for | methods | samplers |", "|---|---|---|"]
    for kind, (what, _) in TRAINED_FOR.items():
        found: dict[tuple[str, ...], list[str]] = {}
        for cls in method_classes():
            if str(cls.capability) == kind:
                fitting = tuple(name for name in cls.samplers if name in SAMPLERS_OF.get(kind, cls.samplers))
                found.setdefault(fitting, []).append(cls.__name__)
        for fitting, names in sorted(found.items(), key=lambda item: sorted(item[1])):
            samplers = ", ".join(f"`{name}`" for name in fitting)
            lines.append(f"| {what} | {', '.join(sorted(names))} | {samplers} |")
    return "\n".join(lines)
