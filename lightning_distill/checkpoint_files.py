"""Checkpoint files that are whole or not there, and how a damaged one is known.

A file (a folder of shards likewise) is written under another name in the same folder, flushed to the disk and renamed,
so that a process that is killed at any moment leaves the earlier checkpoints as they were. A checkpoint is a ZIP
archive in which torch keeps a CRC-32 of every tensor; torch does not look at them when it reads, this module does.
They are part of the file, so that links, copies and renamed files have them too.
"""

import os
import pickle
import shutil
import struct
import uuid
import zipfile
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.checkpoint import FileSystemReader

__all__ = [
    "AtomicCheckpointIO",
    "damage",
    "last_good",
    "remove",
    "remove_parts",
    "require_whole",
    "take_place",
    "told",
    "write_checkpoint",
]

_UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, KeyError)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically and refuses damaged ones.

    The command line uses it unless the Trainer has another plugin; in Python give
    ``Trainer(plugins=[AtomicCheckpointIO()])``. Paths with a protocol (``s3://...``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one file; the earlier file of that name stays until the new one is complete.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file whose checksums are right.

        Raises:
            ValueError: the file is damaged.
        """
        if "://" not in str(path):
            require_whole(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically: all of the file appears, or nothing of it.

    Args:
        checkpoint: what ``torch.save`` takes.
        path: file to write; its folder is made.

    Raises:
        OSError: the disk is full, or the folder cannot be written; earlier checkpoints are untouched.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        take_place(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        # torch reports a failed write as a RuntimeError of its own
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(error, (OSError, RuntimeError)) or not isinstance(reason, OSError):
            raise
        raise OSError(
            f"the checkpoint {path} cannot be written: {told(reason)}; repair that{_instead(path.parent)}."
        ) from reason


def take_place(part: Path, path: Path) -> None:
    """Give a complete file or folder its final name, for good.

    A file replaces a file in one operation. A folder cannot be replaced: it is moved aside first, so that for a moment
    nothing has the name.
    """
    from lightning_distill.data.shards import flush_folder  # its package imports ``checkpoints``

    aside = None
    if path.is_dir() or (part.is_dir() and path.exists()):
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        os.replace(path, aside)
    os.replace(part, path)
    flush_folder(path.parent)
    if aside is not None:
        remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def told(error: OSError) -> str:
    """What the system says about a failure, in lower case."""
    return os.strerror(error.errno).lower() if error.errno else str(error)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left unfinished; nobody else may be writing into the folder."""
    for part in folder.glob(".*.ckpt.*.part"):
        with suppress(OSError):
            remove(part)


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file or folder; None if it is whole. Reads all of the file, once.

    Args:
        path: a single file, or a folder of shards (whose files are checked for their sizes).
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _folder_damage(path)
        facts = path.stat()
    except OSError as error:
        return told(error)
    return _file_damage(str(path.resolve()), facts.st_mtime_ns, facts.st_size, facts.st_ino)


@lru_cache(maxsize=256)
def _file_damage(path: str, *_state: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        if "magic number" in str(error) or "header" in str(error):
            return f"damaged: {error}"
        return "not a torch archive, or truncated"
    except _UNREADABLE as error:
        return told(error) if isinstance(error, OSError) else f"damaged: {error}"
    return None if wrong is None else f"its entry {wrong.partition('/')[2]} has a wrong checksum"


def _folder_damage(folder: Path) -> str | None:
    from lightning_distill.strategies.sharded_files import META, is_sharded

    if not is_sharded(folder):
        return f"{META} is missing, so it was not finished"
    if found := damage(folder / META):
        return f"{META}: {found}"
    try:
        for piece in FileSystemReader(folder).read_metadata().storage_data.values():
            if (folder / piece.relative_path).stat().st_size < piece.offset + piece.length:
                return f"{piece.relative_path} is truncated"
    except (*_UNREADABLE, pickle.UnpicklingError, AttributeError) as error:
        return f"damaged: {error}"
    return None


def last_good(folder: Path, told_of: bool = True) -> Path | None:
    """The newest whole checkpoint of a folder.

    ``good.ckpt``, to which ``CollapseAlarm`` goes back, comes after all others.

    Args:
        folder: with ``.ckpt`` files or folders.
        told_of: warn of newer ones that are damaged.
    """
    bad: list[str] = []
    dated = [(f.name != "good.ckpt", f.stat().st_mtime_ns, f) for f in folder.glob("*.ckpt") if f.exists()]
    for *_, file in sorted(dated, reverse=True):
        found = damage(file)
        if found is None:
            if bad and told_of:
                rank_zero_warn(f"{' and '.join(bad)} cannot be used; {file} is the newest checkpoint that is whole.")
            return file
        bad.append(f"{file} ({found})")
    return None


def require_whole(path: Path) -> None:
    """Raise a sentence that names a damaged checkpoint and the newest whole one beside it."""
    if not path.exists():
        raise FileNotFoundError(f"the checkpoint {path} does not exist{_instead(path.parent)}.")
    if (found := damage(path)) is not None:
        raise ValueError(f"{path} cannot be read as a checkpoint ({found}){_instead(path.parent)}.")


def _instead(folder: Path) -> str:
    try:
        good = last_good(folder, told_of=False)
    except OSError:
        good = None
    return f"; the newest whole checkpoint is {good}" if good else "; there is no whole checkpoint beside it"
