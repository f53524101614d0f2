"""Reading IDX files, the format of MNIST and its relatives: a big-endian header, then raw bytes."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["read_idx"]

_UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path, ndim: int | None = None) -> Tensor:
    """The array in an IDX file of unsigned bytes, plain or gzipped.

    Args:
        path: the file; ``.gz`` means gzipped.
        ndim: number of dimensions it must have; None accepts any.

    Returns:
        uint8 tensor of the shape given in the file's header.

    Raises:
        ValueError: the file is truncated, corrupted, or not an IDX file of unsigned bytes with ``ndim``
            dimensions.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or corrupted ({error}); copy or download it again.") from None
    if len(raw) < 4 or raw[:3] != bytes([0, 0, _UNSIGNED_BYTE]) or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} does not begin like an IDX file of unsigned bytes; copy or download it again.")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    if ndim is not None and len(shape) != ndim:
        raise ValueError(f"{path} holds an array of {len(shape)} dimensions, expected {ndim}; check the file's name.")
    body = len(raw) - 4 - 4 * len(shape)
    if body != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path} has {body} bytes of data where its header {shape} says otherwise; copy it again.")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=len(raw) - body).reshape(shape).copy())
