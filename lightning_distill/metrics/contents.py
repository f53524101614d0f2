"""What an object holds, as plain values whose ``repr`` tells it from others: part of the keys of kept figures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_distill.checkpoints import fingerprint

__all__ = ["content"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, Enum, torch.dtype, torch.device)
#: where modules keep their parts; everything else that begins with an underscore is no setting
_PARTS = ("_parameters", "_buffers", "_modules")


def content(part: Any, files: bool = False, depth: int = 4) -> Any:
    """Type and settings of an object as plain values, the same in every process.

    Tensors are told by the hash of their values, functions by their names, modules by their parts and public
    attributes (``training`` excepted); what lies deeper than ``depth`` objects in each other by its type.

    Args:
        part: any object.
        files: text that names a file or folder stands for its files with their sizes and times.
        depth: levels of objects; those of modules and containers do not count.
    """
    if files and isinstance(part, str | Path) and str(part) and (root := Path(part).expanduser()).exists():
        found = sorted(p for p in root.iterdir() if p.is_file()) if root.is_dir() else [root]
        return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in found]
    if isinstance(part, Tensor):
        return fingerprint([part])
    if isinstance(part, np.ndarray):
        return part.dtype.str, part.shape, hashlib.sha256(part.tobytes()).hexdigest()
    if isinstance(part, _PLAIN):
        return part
    if isinstance(part, (set, frozenset)):
        return sorted(map(repr, part))
    if isinstance(part, Path):
        return str(part)
    if isinstance(part, Mapping):
        return [(str(key), content(value, files, depth)) for key, value in part.items()]
    if isinstance(part, (list, tuple)):
        return [content(value, files, depth) for value in part]
    if isinstance(part, partial):
        return content((part.func, part.args, part.keywords), files, depth)
    name = getattr(part, "__qualname__", type(part).__qualname__)
    module = isinstance(part, nn.Module)
    if not hasattr(part, "__dict__") or (depth == 0 and not module):
        return name
    skipped = {"training"} if module else set()
    kept = [key for key in sorted(vars(part)) if (key[0] != "_" or key in _PARTS) and key not in skipped]
    return name, [(key, content(vars(part)[key], files, depth if module else depth - 1)) for key in kept]
