"""The shipped configurations; ``configs/`` of the repository is this folder."""

from __future__ import annotations

from pathlib import Path

__all__ = ["config_path"]


def config_path(name: str) -> Path:
    """A shipped configuration by its path below ``configs``, for example ``method/dmd2_fashion.yaml``.

    Raises:
        FileNotFoundError: there is no such file; the message lists those of the same folder.
    """
    path = Path(__file__).parent / name
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "nothing"
        raise FileNotFoundError(f"configs/{name} does not exist; that folder has {known}.")
    return path
