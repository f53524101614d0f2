"""Reading the small JSON files of model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_json"]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or one clear sentence."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}); download the folder again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} where a JSON object is expected.")
    return content
