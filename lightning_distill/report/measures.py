"""What is known of a figure by its name: how people write it, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_distill.records import EvaluationRow

__all__ = ["Figure", "best_row", "better", "describe", "figures_of", "with_floors"]

Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """A figure's name in two parts.

    Attributes:
        name: key in ``EvaluationRow.metrics``, or derived from one.
        label: what it measures.
        source: extractor; empty without one.
        direction: which way is better; None where neither is.
        rank: place in tables.
    """

    name: str
    label: str
    source: str
    direction: Direction | None
    rank: int

    @property
    def arrow(self) -> str:
        """Which way is better, as a character."""
        return {"higher": "↑", "lower": "↓", None: ""}[self.direction]


#: label and direction by the beginning of the name, in the order of columns
_KNOWN: dict[str, tuple[str, Direction | None]] = {
    "progress": ("progress", "higher"),
    "fid": ("FID", "lower"),
    "fd": ("FD", "lower"),
    "sw2": ("SW2", "lower"),
    "recall": ("recall", "higher"),
    "precision": ("precision", "higher"),
    "class_accuracy": ("class accuracy", "higher"),
    "clip_score": ("CLIP score", "higher"),
    "kid": ("KID", "lower"),
    "is": ("IS", "higher"),
    "coverage": ("coverage", "higher"),
    "density": ("density", "higher"),
    "vendi": ("Vendi", "higher"),
    "lpips_diversity": ("LPIPS diversity", "higher"),
    "nearest_ratio": ("nearest / teacher's", None),
    "nearest": ("nearest", None),
    "duplicates": ("duplicates", "lower"),
    "samples_per_second": ("samples/s", "higher"),
}
_FLOOR = "/floor"


def describe(name: str) -> Figure:
    """The figure behind a name such as ``fd_cnn``; unknown ones keep their name and have no direction."""
    base = name.removesuffix(_FLOOR)
    floor = base != name
    for rank, (known, (label, direction)) in enumerate(_KNOWN.items()):
        if base == known or base.startswith(f"{known}_"):
            label = f"{label} / floor" if floor else label
            return Figure(name, label, base[len(known) + 1 :], direction, 2 * rank + floor)
    return Figure(name, name.replace("_", " "), "", None, 2 * len(_KNOWN))


def figures_of(rows: Sequence[EvaluationRow]) -> list[Figure]:
    """All figures of the rows, important ones first, one extractor's beside another's."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    return sorted((describe(name) for name in names), key=lambda figure: figure.rank)


def better(direction: Direction | None, first: float, second: float) -> bool:
    """Whether ``first`` is better than ``second``; never for what is not finite."""
    if direction is None or not math.isfinite(first):
        return False
    if not math.isfinite(second):
        return True
    return first > second if direction == "higher" else first < second


def best_row(rows: Sequence[EvaluationRow], figure: Figure) -> EvaluationRow | None:
    """The row with the best value; None where no way is better or no value finite. The first of equals."""
    best: EvaluationRow | None = None
    for row in rows:
        value = row.metrics.get(figure.name, math.nan)
        if better(figure.direction, value, math.nan if best is None else best.metrics[figure.name]):
            best = row
    return best


def with_floors(row: EvaluationRow, floors: dict[str, float]) -> EvaluationRow:
    """The row with every distance over its real-vs-real floor added.

    Args:
        row: any row.
        floors: floor by the name of the distance.
    """
    known = {k: v for k, v in floors.items() if k in row.metrics and isinstance(v, (int, float)) and v > 0}
    ratios = {f"{name}{_FLOOR}": row.metrics[name] / floor for name, floor in known.items()}
    return EvaluationRow(**{**vars(row), "metrics": {**row.metrics, **ratios}}) if ratios else row
