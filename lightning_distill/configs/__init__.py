"""The shipped configurations; ``configs/`` of the repository is this folder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path, PurePath

__all__ = ["config_path", "with_shipped"]

FOLDER = Path(__file__).parent


def config_path(name: str) -> Path:
    """A shipped configuration by its path below ``configs``, for example ``method/dmd2_fashion.yaml``.

    Raises:
        FileNotFoundError: there is no such file; the message lists those of the same folder.
    """
    path = FOLDER / name
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "nothing"
        raise FileNotFoundError(f"configs/{name} does not exist; that folder has {known}.")
    return path


def with_shipped(words: Sequence[str]) -> list[str]:
    """A command line on which the names of shipped configurations stand for their files, in whatever folder.

    A file that exists is what its name says. ``configs/method/dmd2_fashion.yaml``, ``method/dmd2_fashion.yaml`` and
    ``dmd2_fashion`` are the same where it does not.

    Args:
        words: with ``-c FILE``, ``--config FILE`` or ``--config=FILE``.

    Raises:
        FileNotFoundError: a name with ``.yaml`` is neither a file nor a shipped configuration; the message has those
            that are like it.
    """
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if found and found[-1] in ("-c", "--config"):
            found.append(_found(word))
        elif option in ("-c", "--config") and equals:
            found.append(f"{option}={_found(value)}")
        else:
            found.append(word)
    return found


def _found(name: str) -> str:
    if "\n" in name or Path(name).expanduser().exists():
        return name
    parts = PurePath(name).parts
    inner = PurePath(*parts[1:]) if parts[:1] == ("configs",) else PurePath(name)
    shipped = {path.relative_to(FOLDER).as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}
    same = [p for key, p in shipped.items() if inner.as_posix() in (key, key.removesuffix(".yaml"), p.stem)]
    if len(same) == 1:
        return str(same[0])
    if not name.endswith((".yaml", ".yml")):
        return name  # a configuration written out, of which the parser knows more
    stems = {Path(key).stem: key for key in shipped}
    like = ", ".join(f"configs/{stems[stem]}" for stem in difflib.get_close_matches(inner.stem, stems, 3))
    near = f"; shipped ones of a like name: {like}" if like else ""
    raise FileNotFoundError(f"the configuration {name} does not exist, here or among the shipped ones{near}.")
