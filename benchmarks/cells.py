"""Cells of tables: the mean over the rows of several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["cell", "mean"]

Rows = Sequence[Mapping[str, Any]]


def mean(rows: Rows, key: str) -> float:
    """Mean of a figure."""
    return float(sum(row[key] for row in rows) / len(rows))


def cell(rows: Rows, key: str, digits: int) -> str:
    """Mean of a figure, with its range where there are several rows."""
    values = [row[key] for row in rows]
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(rows, key):.{digits}f}{spread}"
