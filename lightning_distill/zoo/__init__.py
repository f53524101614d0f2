"""Where the shipped teachers, their feature extractors and their reference statistics lie.

One folder per entry. What an entry may hold: ``card.json`` and the teacher's weights,
``classifier.safetensors`` with ``classifier.json`` (the feature extractor of ``fd_cnn``) and
``reference.safetensors`` (features of real data). Its folder ``judge`` holds a second extractor of the same data with a
reference of its own, which nothing is tuned with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["list_zoo", "zoo_card", "zoo_file", "zoo_path"]

_ROOT = Path(__file__).parent


def list_zoo() -> list[str]:
    """Names of the shipped entries, sorted."""
    return sorted(p.name for p in _ROOT.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))


def zoo_path(name: str) -> Path:
    """The folder of a shipped entry, or of its second extractor (``fashion/judge``).

    Raises:
        ValueError: there is no such entry; the message lists what there is.
    """
    entry = name.removesuffix("/judge")
    if entry not in (names := list_zoo()) or not (_ROOT / name).is_dir():
        raise ValueError(f"the zoo has no entry {name!r}; it has {', '.join(names) or 'no entries'}.")
    return _ROOT / name


def zoo_file(name_or_path: str | Path, filename: str, builder: str) -> Path:
    """A file of a shipped entry or of a folder of the same layout.

    Args:
        name_or_path: zoo name, folder, or the file itself.
        filename: file wanted, for example ``classifier.safetensors``.
        builder: what makes that file, for the message when it is missing.

    Raises:
        ValueError: ``name_or_path`` is neither a folder, a file nor a zoo name.
        FileNotFoundError: the folder lacks the file.
    """
    path = Path(name_or_path)
    if not path.exists():
        path = zoo_path(str(name_or_path))
    if path.is_dir():
        path = path / filename
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {builder} writes it.")
    return path


def zoo_card(name: str) -> dict[str, Any]:
    """The card of a shipped teacher: data, training steps, seed, distances at each number of steps, sha256.

    Raises:
        FileNotFoundError: the entry has no teacher.
    """
    return json.loads(zoo_file(zoo_path(name), "card.json", "training the entry's teacher").read_text())
