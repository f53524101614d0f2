"""Pictures small enough to travel inside a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_distill.report.data import Picture

__all__ = ["Encoded", "chosen", "encode"]

_LARGE = (1600, 1_500_000)
_SMALL = 1000


@dataclass(frozen=True)
class Encoded:
    """A picture as it is put into a page.

    Attributes:
        data: content of the file.
        suffix: ``png`` or ``webp``.
        width: pixels.
        height: pixels.
    """

    data: bytes
    suffix: str
    width: int
    height: int


def chosen(pictures: Sequence[Picture], most: int) -> list[Picture]:
    """At most ``most`` pictures, evenly spaced; the first and the last are among them."""
    n = len(pictures)
    if n <= most:
        return list(pictures)
    return [pictures[round(i * (n - 1) / (most - 1))] for i in range(most)]


def encode(path: Path, large: bool = True) -> Encoded | None:
    """Read a picture; None where the file is damaged.

    Args:
        path: PNG.
        large: the file itself unless it is very large; otherwise it is scaled down and compressed with loss.
    """
    from PIL import Image

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    limit = _LARGE[0] if large else _SMALL
    if large and picture.width <= limit and len(content) <= _LARGE[1]:
        return Encoded(content, "png", picture.width, picture.height)
    if picture.width > limit:
        picture = picture.resize(
            (limit, max(1, round(picture.height * limit / picture.width))), Image.Resampling.LANCZOS
        )
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=90 if large else 80)
    small = stream.getvalue()
    if len(small) >= len(content):  # flat pictures are smaller as they are
        with Image.open(io.BytesIO(content)) as opened:
            return Encoded(content, "png", opened.width, opened.height)
    return Encoded(small, "webp", picture.width, picture.height)
