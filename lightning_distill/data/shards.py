"""Files of a store: names, sizes, checksums, and writing them so that a reader sees a whole file or none."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "DTYPES",
    "FORMAT",
    "HEADER",
    "Layout",
    "difference",
    "explained",
    "flush_folder",
    "listed",
    "plain_key",
    "read_header",
    "shard_name",
    "told",
    "write_file",
]

FORMAT = 1
HEADER = "store.json"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def shard_name(shard: int) -> str:
    """Beginning of the names of a shard's files."""
    return f"shard_{shard:06d}"


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Failures to write as one sentence."""
    reasons = {
        errno.ENOSPC: ("the disk is full", "free some space and run the same command again; finished shards are kept"),
        errno.EDQUOT: ("the disk quota is used up", "free some space and run the same command again"),
        errno.EFBIG: ("a file may not become that large here", "choose a smaller shard size"),
        errno.EROFS: ("the file system is read-only", "give another folder"),
        errno.EACCES: ("the folder may not be written", "change its permissions or give another folder"),
        errno.EPERM: ("the folder may not be written", "change its permissions or give another folder"),
        errno.ENOTDIR: ("a part of the path is a file", "give another folder"),
        errno.EEXIST: ("there is a file of that name", "give another folder"),
    }
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        what, repair = reasons[error.errno]
        raise OSError(f"the store {folder} cannot be written: {what}; {repair}.") from error


def write_file(file: Path, data: bytes) -> None:
    """Write atomically: all of the file appears, or nothing of it."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    flush_folder(file.parent)


def flush_folder(folder: Path) -> None:
    """Make renames last through a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def plain_key(key: Mapping[str, Any]) -> dict[str, Any]:
    """A key as JSON reads it back."""
    try:
        content: dict[str, Any] = json.loads(json.dumps(dict(key), sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"the key of a store holds numbers, strings, lists and mappings only ({error}).") from None
    return content


def read_header(folder: Path) -> dict[str, Any]:
    """Content of ``store.json``: format, key, num_records, shard_size.

    Raises:
        FileNotFoundError: the folder is no store.
        ValueError: the file is damaged or of another format, or a number is not positive.
    """
    file = folder / HEADER
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is not a store: it has no {HEADER}; give the folder that 'lightning-distill trajectories' or "
            "'lightning-distill cache' wrote."
        )
    try:
        header = json.loads(file.read_text())
        if header["format"] != FORMAT:
            raise ValueError(f"{file} has the format {header['format']}; this version reads {FORMAT}.")
        for name in ("num_records", "shard_size"):
            if type(header[name]) is not int or header[name] < 1:
                raise TypeError(f"{name} is {header[name]!r}, not a positive integer")
        if not isinstance(header["key"], dict):
            raise TypeError("its key is no mapping")
        return {name: header[name] for name in ("format", "key", "num_records", "shard_size")}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove the folder and write the store again.") from None


class Layout:
    """What writers and readers share: which records a shard has, and whether its files are whole.

    Args:
        folder: of the store.
        num_records: of the complete store.
        shard_size: records of every shard but the last, which may have fewer.
    """

    def __init__(self, folder: Path, num_records: int, shard_size: int) -> None:
        self.folder = folder
        self.num_records = num_records
        self.shard_size = shard_size
        self._intact: dict[int, tuple[Any, ...]] = {}

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete store."""
        return -(-self.num_records // self.shard_size)

    def rows(self, shard: int) -> range:
        """Indices of a shard's records."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"the store {self.folder} has the shards 0 to {self.num_shards - 1}, not {shard}.")
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_records))

    def record(self, shard: int) -> dict[str, Any] | None:
        """What is written down about a shard; None if it is not finished."""
        try:
            record: dict[str, Any] = json.loads((self.folder / f"{shard_name(shard)}.json").read_text())
            return record if {"files", "tensors"} <= set(record) else None
        except (OSError, ValueError, TypeError):
            return None

    def is_whole(self, shard: int, checksums: bool) -> bool:
        """Whether a shard's files are there with their sizes, and with their checksums if asked for."""
        record = self.record(shard)
        if record is None:
            return False
        try:
            files = record["files"].items()
            if any((self.folder / name).stat().st_size != facts["bytes"] for name, facts in files):
                return False
            if checksums and self._intact.get(shard) != (state := self._state(record)):
                if any(_sha256(self.folder / name) != facts["sha256"] for name, facts in files):
                    return False
                self._intact[shard] = state
        except (OSError, KeyError, TypeError, AttributeError):
            return False
        return True

    def _state(self, record: dict[str, Any]) -> tuple[Any, ...]:
        """Checksums and times of a shard's files: while these stay, the files are not read again."""
        return tuple(
            (name, facts["sha256"], (self.folder / name).stat().st_mtime_ns) for name, facts in record["files"].items()
        )

    def broken(self, checksums: bool) -> list[int]:
        """Shards that are not there or not whole."""
        return [shard for shard in range(self.num_shards) if not self.is_whole(shard, checksums)]


def difference(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> tuple[str, str, str] | None:
    """The first entry in which two keys differ: its name and both values as text, of digests the beginning."""
    for name in sorted({*theirs, *ours}):
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if (inner := difference(a, b, f"{prefix}{name}.")) is not None:
                return inner
        elif (name in theirs, a) != (name in ours, b):
            shown = [repr(v) if name in side else "nothing" for side, v in ((theirs, a), (ours, b))]
            first, second = (re.sub(r"'([0-9a-f]{12})[0-9a-f]{52}'", r"sha256 \1", text) for text in shown)
            return f"{prefix}{name}", first, second
    return None


def listed(shards: Sequence[int]) -> str:
    """The first few numbers as text."""
    return ", ".join(map(str, shards[:8])) + (", ..." if len(shards) > 8 else "")


def told(layout: Mapping[str, Any]) -> str:
    """Names, dtypes and shapes as text."""
    return ", ".join(f"{name} {entry['dtype']} {tuple(entry['shape'])}" for name, entry in sorted(layout.items()))
