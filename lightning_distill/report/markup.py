"""HTML and SVG as text in which everything is escaped that was not built here."""

from __future__ import annotations

import html
import re

__all__ = ["Html", "join", "tag"]

_VOID = {"img", "input", "meta", "rect", "line", "circle", "path", "polyline"}
_SVG_VOID = {"rect", "line", "circle", "path", "polyline"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class Html(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def join(parts: list[Html], between: str = "") -> Html:
    """Pieces of HTML one after the other; ``between`` is HTML too."""
    return Html(between.join(parts))


def tag(name: str, *children: str, **attributes: object) -> Html:
    """An element.

    Args:
        name: element name.
        children: ``Html`` as it is, other text escaped.
        attributes: a trailing underscore is dropped (``class_``), others become hyphens (``stroke_width``); None and
            False leave the attribute out, True is an attribute without value.

    Returns:
        the element; one without content closes itself in SVG.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{_escape(str(value))}"')
    opening = " ".join(words)
    if name in _VOID and not children:
        return Html(f"<{opening}/>" if name in _SVG_VOID else f"<{opening}>")
    inner = "".join(child if isinstance(child, Html) else _escape(child) for child in children)
    return Html(f"<{opening}>{inner}</{name}>")


def _escape(text: str) -> str:
    return html.escape(_CONTROL.sub("", text))
