"""Make an object from its part of a configuration, as strictly as ``fit`` does and not more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

__all__ = ["instantiate", "maker"]

Kind = TypeVar("Kind")


def maker(kind: type[Kind], key: str) -> Callable[[Any], Kind]:
    """A function that makes objects of one kind.

    Args:
        kind: a base class; what is made is an instance of it.
        key: name of the part, for error messages.

    Returns:
        ``class_path`` and ``init_args`` as plain data -> the object. As in ``fit``, arguments without types are passed
        on as they are.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, key, fail_untyped=False)

    def make(content: Any) -> Kind:
        made: Kind = parser.instantiate_classes(parser.parse_object({key: content}))[key]
        return made

    return make


def instantiate(kind: type[Kind], key: str, content: Any) -> Kind:
    """One object, see ``maker``."""
    return maker(kind, key)(content)
