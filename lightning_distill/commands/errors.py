"""Errors as one sentence: what is wrong, where, and what was probably meant.

jsonargparse reports a wrong key as a tree: every alternative of every union on the way down, with the values given. The
leaf that matters is the deepest one; the keys above it are its place in the YAML file.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["CommandError", "CommandParser", "is_user_error", "one_line"]

_NOISE = re.compile(
    r"(Does not validate against|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but|Unable to load)"
)


class CommandError(ValueError):
    """A command line that cannot be read."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise CommandError(f"{message} (see {self.prog} --help).")


def is_user_error(error: BaseException) -> bool:
    """Errors that are told in one sentence; anything else is a bug and keeps its traceback."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ArgumentError, MisconfigurationException))


def one_line(error: BaseException) -> str:
    """The sentence of an error."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    if isinstance(error, CommandError):
        return text
    if isinstance(error, OSError) and error.strerror and error.filename and not error.filename2:
        return f"{error.filename}: {error.strerror}."
    if "Parser key " in text or "Does not validate against" in text:
        leaves = _leaves(text)
        if leaves:
            return _explain(max(leaves, key=lambda leaf: len(leaf.place)))
    sentence = _sentence(text)
    if "\n" in text and "InterpolationKeyError" in type(error).__name__:
        key = re.search(r"full_key: (\S+)", text)
        return sentence + (f" (in {_without_command(key[1])})" if key else "")
    return (
        sentence
        if _is_ours(error) or sentence.startswith("the weights do not fit")
        else f"{sentence} ({type(error).__name__}; --debug shows where)"
    )


def _sentence(text: str) -> str:
    if match := re.match(r"Subcommand '(\w+)' does not accept option '([^']+)'", text):
        return _unknown_option(match[1], match[2])
    if match := re.match(r"unrecognized arguments: (.*)", text):
        first = match[1].split()[0].split("=")[0].lstrip("-")
        return _unknown_option("the command line", first)
    if match := re.match(r"the following arguments are required: (.*)", text):
        missing = ", ".join(_without_command(key) for key in match[1].split(", "))
        return f"{missing} must be given, in a YAML file (-c CONFIG.yaml) or as --{missing.split(', ')[0]}=..."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines[0].startswith("Error(s) in loading state_dict for"):
        return f"the weights do not fit the configuration of the network: {lines[1]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _unknown_option(where: str, option: str) -> str:
    return f"{where} has no option {option!r}{_meant(option, _trainer_options())}"


def _trainer_options() -> list[str]:
    from lightning.pytorch import Trainer

    names = [f"trainer.{name}" for name in inspect.signature(Trainer).parameters]
    return [*names, "model", "data", "ckpt_path", "config"]


# --------------------------------------------------------------------------------------------- the parser's tree
@dataclass
class _Leaf:
    """One complaint and what stands above it: ("key", name), ("class", path) or ("types", text) by indentation."""

    place: list[tuple[int, str, str]]
    message: str


def _leaves(text: str) -> list[_Leaf]:
    stack: list[tuple[int, str, str]] = []
    leaves: list[_Leaf] = []
    for line in text.splitlines():
        body = line.strip().removeprefix("- ").strip()
        indent = len(line) - len(line.lstrip())
        if not body or _NOISE.match(body):
            continue
        stack = [entry for entry in stack if entry[0] < indent]
        if match := re.match(r"Subtypes: (.*)", body):
            stack.append((indent, "types", match[1]))
            continue
        if match := re.match(r'Parser key "([^"]+)":?(.*)', body):
            stack.append((indent, "key", match[1]))
            body = match[2].strip()
        elif match := re.match(r"Problem with given class_path '([^']+)':?(.*)", body):
            stack.append((indent, "class", match[1]))
            body = match[2].strip()
        if body and not _NOISE.match(body):
            leaves.append(_Leaf(list(stack), body))
    return leaves


def _explain(leaf: _Leaf) -> str:
    keys: list[str] = []
    owner, allowed = "", ""
    for _, kind, value in leaf.place:
        if kind == "key":
            keys.append(_without_command(value))
        elif kind == "class":
            owner = value
            keys.append("init_args")
        else:
            allowed = value
    where = ".".join(keys)
    if match := re.match(r"Option '([^']+)' is not accepted", leaf.message):
        name, short, known = match[1].split(".")[0], owner.rsplit(".", 1)[-1], _arguments(owner)
        if name in known:  # of a parent
            return f"{where}.{name}: {short} sets {name!r} itself; leave it out."
        return f"{where}.{name}: {short} has no argument {name!r}{_meant(name, known)}"
    prefix = f"{where.removesuffix('.init_args')}: " if where else ""
    unknown = re.match(r"Expected a dot import path string: (.*)", leaf.message)
    wrong = re.match(r"Import path (\S+) does not correspond to a subclass of (\w+)", leaf.message)
    if unknown or wrong:
        given = (unknown or wrong)[1]  # type: ignore[index]
        problem = f"there is no class {given!r} here" if unknown else f"{given} is no {wrong[2]}"  # type: ignore[index]
        if unknown and (elsewhere := _path_of(given)):
            return (
                f"{prefix}{problem}; short names need an argument whose annotation says what belongs there: annotate "
                f"it, or write {elsewhere}."
            )
        return f"{prefix}{problem}{_meant(given.rsplit('.', 1)[-1], _subclasses(allowed), show_all=True)}"
    literal = re.match(r"Expected an? (typing\.Literal\[[^]]*\])\. Got value", leaf.message)
    if choices := _choices(literal[1] if literal else allowed):
        return f"{prefix}choose one of {', '.join(choices)}."
    message = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", leaf.message)
    message = re.sub(r"Expected an? ([^.]+)\. Got value: (.*)", r"expected \1, got \2", message)
    # sentences of our own say where they belong; the parser's need the key
    own = message.endswith(".") and " " in message and not message.startswith("expected")
    return message if own else prefix + message


def _choices(types: str) -> list[str]:
    """Values of a union of literals, such as ``[typing.Literal[16, 32], <class 'NoneType'>]``; none of other types."""
    literal = r"typing\.Literal\[([^]]*)\]"
    if re.sub(rf"{literal}|<class 'NoneType'>|[\[\], ]", "", types):
        return []
    values = [value.strip(" '") for part in re.findall(literal, types) for value in part.split(",")]
    return list(dict.fromkeys(values))


def _meant(given: str, known: Iterable[str], show_all: bool = False) -> str:
    names = sorted(set(known))
    if close := difflib.get_close_matches(given, names, n=3, cutoff=0.6):
        return f"; did you mean {' or '.join(close)}?"
    if names and (show_all or len(names) <= 20):
        return f"; choose one of {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
    return "."


def _path_of(name: str) -> str | None:
    """Full path of a class of this package by its short name, None where there is none."""
    for module in [key for key in sys.modules if key.startswith("lightning_distill.")]:
        found = getattr(sys.modules[module], name, None)
        if inspect.isclass(found) and found.__module__.startswith("lightning_distill."):
            return f"{found.__module__}.{name}"
    return None


def _arguments(class_path: str) -> list[str]:
    """Names of the arguments of a class, those that ``**kwargs`` hands on to its parents included."""
    cls = _imported(class_path)
    if not inspect.isclass(cls):
        return list(inspect.signature(cls).parameters) if callable(cls) else []
    names: list[str] = []
    for parent in cls.__mro__:
        if "__init__" in vars(parent) and parent is not object:
            parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
            names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)][1:]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def _subclasses(types: str) -> list[str]:
    """Names of the imported concrete subclasses of the classes in a text such as ``[<class 'a.B'>, ...]``."""
    found: set[str] = set()
    for path in re.findall(r"(?:<class ')?((?:\w+\.)+\w+)", types):
        waiting = [_imported(path)]
        while waiting:
            cls = waiting.pop()
            if inspect.isclass(cls):
                waiting += cls.__subclasses__()
                hidden = inspect.isabstract(cls) or cls.__name__.startswith("_") or cls.__module__ == "builtins"
                if not hidden and (not hasattr(cls, "phases") or hasattr(cls, "student_loss")):  # no base of methods
                    found.add(cls.__name__)
    return sorted(found)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _without_command(key: str) -> str:
    return re.sub(r"^(fit|validate|test|predict)\.", "", key)


def _is_ours(error: BaseException) -> bool:
    """Whether the sentence was written for users: by this package, or by the parsers and the Trainer's checks."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, (ArgumentError, MisconfigurationException, OSError)) or error.__traceback__ is None:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return Path(__file__).parents[1] in Path(frames[-1].filename).parents
