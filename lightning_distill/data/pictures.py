"""Pictures from bytes to tensors, with the file's name in every complaint."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "READING",
    "as_shown",
    "files_below",
    "open_picture",
    "over_white",
    "read_frames",
    "read_picture",
    "shown_size",
]

#: part of the keys of stores: another number wherever the same file gives other pixels than before
READING = 2

_ORIENTATION = 0x0112
#: what brings the pixels of each orientation upright; those from 5 on lie on their side
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def files_below(root: Path, suffixes: Collection[str]) -> list[Path]:
    """Files with one of some suffixes, sorted; folders that are symbolic links count as folders.

    Args:
        root: folder.
        suffixes: in small letters, with the dot.
    """
    found = []
    for name, folders, files in os.walk(root, followlinks=True):
        folder = Path(name)
        above = folder.parents[: len(folder.relative_to(root).parts)]
        if any(os.path.samefile(folder, other) for other in above):  # a link back
            folders.clear()
            continue
        found += [p for p in map(folder.joinpath, files) if p.suffix.lower() in suffixes and p.is_file()]
    return sorted(found)


@contextmanager
def open_picture(content: bytes | Path, name: str) -> Iterator[Any]:
    """A picture opened by PIL; whatever goes wrong while it is read names it.

    Args:
        content: encoded picture, or its file.
        name: what to call it in an error.

    Raises:
        ValueError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
            yield file
    except Exception as error:  # decoders raise nearly everything where a file is damaged
        reason = str(error) or type(error).__name__
        raise ValueError(f"the picture {name} cannot be read ({reason}); repair or remove it.") from None


def as_shown(file: Any) -> Any:
    """An opened picture as a viewer shows it: upright by its EXIF orientation, RGB of 8 bits, transparency over white.

    Raises:
        ValueError: its pixels have no known range.
    """
    from PIL import Image

    picture = over_white(file)
    turn = _UPRIGHT.get(_orientation(file.getexif))
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


def shown_size(file: Any) -> tuple[int, int]:
    """Height and width of an opened picture as a viewer shows it, from its header alone where the format allows."""
    from PIL import Image

    # PIL gives TIFF its upright size already, and would decode a PNG to look for EXIF behind the pixels
    turned = file.format != "TIFF" and _orientation(lambda: Image.Image.getexif(file)) >= 5
    return (file.width, file.height) if turned else (file.height, file.width)


def _orientation(read_exif: Any) -> int:
    try:
        found = read_exif().get(_ORIENTATION, 1)
    except Exception:  # many a whole picture has damaged EXIF
        return 1
    return found if found in _UPRIGHT else 1


def over_white(picture: Any) -> Any:
    """A PIL picture in RGB of 8 bits; what is transparent becomes white, with half-transparent pixels mixed.

    Raises:
        ValueError: floating-point pixels, or integers of more than 16 bits.
    """
    from PIL import Image

    if picture.mode == "F" or picture.mode.startswith("I"):
        return _from_wide(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _from_wide(picture: Any) -> Any:
    """A grey picture of 16-bit integers in RGB of 8 bits, which PIL itself would clip instead of scale."""
    from PIL import Image

    values = np.array(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        kind = "floating-point numbers" if picture.mode == "F" else "integers of more than 16 bits"
        raise ValueError(f"its pixels are {kind}, of which no range is known, instead of 8 or 16 bits")
    if isinstance(clear := picture.info.get("transparency"), int):
        values[values == clear] = 65535
    return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8)).convert("RGB")


def read_picture(content: bytes | Path, name: str) -> Tensor:
    """One picture as a viewer shows it: upright, over white.

    Args:
        content: encoded picture, or its file.
        name: what to call it in an error.

    Returns:
        (3, H, W), uint8.

    Raises:
        ValueError: it cannot be decoded.
    """
    return read_frames(content, name, 1)[:, 0]


def read_frames(content: bytes | Path, name: str, count: int) -> Tensor:
    """The first frames of a picture (of an animated GIF, WebP or PNG for more than one), upright and over white.

    Args:
        content: encoded picture, or its file.
        name: what to call it in an error.
        count: number of frames, 1 or more.

    Returns:
        (3, count, H, W), uint8.

    Raises:
        ValueError: it cannot be decoded, or has fewer frames.
    """
    from torchvision.transforms.functional import pil_to_tensor

    frames = []
    with open_picture(content, name) as file:
        available = getattr(file, "n_frames", 1)
        for index in range(count if count <= available else 0):
            if count > 1:
                file.seek(index)
            frames.append(pil_to_tensor(as_shown(file)))
    if not frames:
        raise ValueError(f"{name} has {available} frames, but {count} are asked for; leave it out.")
    return torch.stack(frames, dim=1)
