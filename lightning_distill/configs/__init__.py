"""The shipped configurations; ``configs/`` of the repository is this folder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

__all__ = ["config_path", "read_mapping", "with_shipped"]

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
        ValueError: a file is no configuration.
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


def read_mapping(file: Path) -> dict[str, Any]:
    """A configuration file as plain data; nothing for a file that is not there, which the parser says.

    Raises:
        ValueError: it is no YAML, empty, or not a mapping.
    """
    try:
        content = yaml.safe_load(file.expanduser().read_text())
    except OSError:
        return {}
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file; give a configuration in YAML.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{file} is not valid YAML: {getattr(error, 'problem', error)}{place}.") from None
    if content is None:
        raise ValueError(f"{file} is empty; give a configuration with a model section.")
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no configuration: it holds a {type(content).__name__} instead of keys.")
    return content


def _found(name: str) -> str:
    if "\n" in name:
        return name
    if Path(name).expanduser().exists():
        read_mapping(Path(name))
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
