"""Table of docs/recipes.md: what each recipe needs at full size.

table(json.loads(Path("benchmarks/results/latest/recipes.json").read_text()))
"""

from __future__ import annotations

from typing import Any

from lightning_distill.configs import config_path

__all__ = ["table"]


def _cell(device: dict[str, Any]) -> str:
    """What makes a recipe fit, and the GiB it then needs."""
    needs, change = device["needs_gib"], device["fits"]
    if change is None:
        return f"no: {min(needs.values()):.1f} at best"
    return f"{change}: {needs[change]:.1f}"


def _seconds(value: float) -> str:
    """Two significant digits."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10.0 else f"{rounded:.2g}"


def table(result: dict[str, Any]) -> str:
    """Rows of all recipes, and how to read them.

    Args:
        result: content of ``recipes.json``.
    """
    rows = result["rows"]
    devices = list(next(iter(rows.values()))["devices"])
    lines = [
        f"| recipe | parameters | samples | {' | '.join(f'{d}, GiB' for d in devices)} | GFLOP per update | "
        "estimated s per update |",
        f"|---|---|---|{'---|' * len(devices)}---|---|",
    ]
    for name, row in rows.items():
        cells = [
            f"[{name}](../configs/recipe/{name}.yaml){'' if row.get('gradients_stay') else ' *'}",
            f"{row['parameters'] / 1e9:.2f}e9",
            f"{row['samples_per_update']} ({row['micro_batch']})",
            *(_cell(row["devices"][device]) for device in devices),
            f"{row['gflop_per_update']:,}",
            _seconds(row["gflop_per_update"] * 1e9 / (result["share"] * result["peak_flops"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    shipped = sorted(path.stem for path in (config_path("quickstart.yaml").parent / "recipe").glob("*.yaml"))
    if missing := [name for name in shipped if name not in rows]:
        links = ", ".join(f"[{name}](../configs/recipe/{name}.yaml)" for name in missing)
        lines += ["", f"Not planned yet (`python benchmarks/plan.py --recipes --only NAME`): {links}."]
    if any(not row.get("gradients_stay") for row in rows.values()):
        lines += [
            "",
            "\\* planned before the gradients of earlier micro-batches were counted: with accumulation up to one set "
            "of gradients (4 bytes per trained parameter) more.",
        ]
    share, peak = result["share"], result["peak_flops"] / 1e12
    lines += [
        "",
        "Samples: per student update of one process, in brackets of one forward. Memory: planned for one process, "
        f"{result['precision']}, {result['reserve_gib']:g} GiB of it reserve, with activation checkpointing as the "
        "recipes say; the first change that makes it fit, on top of the earlier ones. On several GPUs weights and "
        "states are divided by `role_fsdp2`, gradients counted whole: an upper bound.",
        "",
        "GFLOP: counted, of matrix products, convolutions and attention, one student update with the critic's updates "
        f"and what checkpoints recompute, rollouts of average length. "
        f"**Estimated, not measured**: the time of that work at {share:.0%} of "
        f"{peak:.0f} TFLOP/s (dense bfloat16 of an H100), on one such GPU.",
    ]
    return "\n".join(lines)
