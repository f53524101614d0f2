"""Pictures from bytes to tensors, with the file's name in every complaint."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["over_white", "read_frames", "read_picture"]


def over_white(picture: Any) -> Any:
    """A PIL picture in RGB; what is transparent becomes white, with half-transparent pixels mixed."""
    from PIL import Image

    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def read_picture(content: bytes | Path, name: str) -> Tensor:
    """One picture over white.

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
    """The first frames of a picture (of an animated GIF, WebP or PNG for more than one).

    Args:
        content: encoded picture, or its file.
        name: what to call it in an error.
        count: number of frames, 1 or more.

    Returns:
        (3, count, H, W), uint8.

    Raises:
        ValueError: it cannot be decoded, or has fewer frames.
    """
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms.functional import pil_to_tensor

    frames = []
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
            available = getattr(file, "n_frames", 1)
            if available < count:
                raise ValueError(f"{name} has {available} frames, but {count} are asked for; leave it out.")
            for index in range(count):
                if count > 1:
                    file.seek(index)
                frames.append(pil_to_tensor(over_white(file)))
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture {name} cannot be read ({error}); repair or remove it.") from None
    return torch.stack(frames, dim=1)
