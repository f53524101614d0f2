"""Checkpoint files that are whole or not there, and how a damaged one is known.

A file (a folder of shards likewise) is written under another name in the same folder, flushed to the disk and renamed,
so that a process that is killed at any moment leaves the earlier checkpoints as they were. A checkpoint, or each piece
of a tensor in a folder of shards, is a ZIP archive in which torch keeps a CRC-32 of every tensor; torch does not look
at them when it reads, this module does. They are part of the file, so that links, copies and renamed files have them
too. Which checkpoint is the newest is told by the count of updates inside, not by dates, which copies do not keep.
"""

import glob
import io
import math
import os
import pickle
import re
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
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

__all__ = [
    "AtomicCheckpointIO",
    "damage",
    "last_good",
    "newest_history",
    "remove",
    "remove_parts",
    "require_whole",
    "restore",
    "take_place",
    "told",
    "write_checkpoint",
]

_UNREADABLE = (
    *(OSError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, KeyError),
    *(TypeError, AttributeError, IndexError, NotImplementedError, pickle.UnpicklingError),
)


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
        """Read a file whose checksums are right; pickled code is refused, whatever ``weights_only`` says.

        Raises:
            ValueError: the file is damaged, or holds more than tensors and plain values.
        """
        if "://" not in str(path):
            require_whole(Path(path))
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} cannot be read as a checkpoint ({_pickled(error)}).") from None


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
    """Remove what killed processes left unfinished; nobody else may be writing into the folder.

    A checkpoint that is whole and was only waiting for its name gets it, see ``restore``.
    """
    for name in sorted({part.name[1:].rsplit(".", 2)[0] for part in folder.glob(".*.ckpt.*.part")}):
        with suppress(OSError):
            restore(folder / name)
            for part in _parts(folder / name):
                remove(part)


def restore(path: Path) -> None:
    """Give a checkpoint that is not there back to its name, if a process was killed while it replaced it.

    Between the two renames of ``take_place`` the old and the new folder are whole, and neither has the name: the newest
    gets it.
    """
    if path.exists():
        return
    whole = next((part for part in sorted(_parts(path), key=_age, reverse=True) if damage(part) is None), None)
    if whole is None:
        return
    if path.is_symlink():  # to nowhere
        path.unlink()
    take_place(whole, path)
    rank_zero_warn(f"{path} was being written when its process was killed; it is whole, and has its name again.")


def _parts(path: Path) -> list[Path]:
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.part"))


# ---------------------------------------------------------------------------------------------------- what is whole
def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file or folder; None if it is whole. Reads all of it, once.

    Files with pickled code count as damaged, since nothing here will ever load them.

    Args:
        path: a single file, or a folder of shards. Processes but the first compare the sizes of shards only: the first
            decides for all what is read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _folder_damage(str(path), getattr(rank_zero_only, "rank", 0) == 0, *_folder_state(path))
        return _file_damage(*_file_state(path))
    except OSError as error:
        return told(error)


def _file_state(path: Path) -> tuple[Any, ...]:
    """While these stay, a file is not read again."""
    facts = path.stat()
    return str(path.resolve()), facts.st_mtime_ns, facts.st_size, facts.st_ino


def _folder_state(folder: Path) -> tuple[Any, ...]:
    return tuple(_file_state(file) for file in sorted(folder.iterdir()))


@lru_cache(maxsize=256)
def _file_damage(path: str, *_state: int) -> str | None:
    try:
        with open(path, "rb") as stream:
            if (found := _archive_damage(stream)) is not None:
                return found
        _plain(path)
    except pickle.UnpicklingError as error:
        return _pickled(error)
    except _UNREADABLE as error:
        return told(error) if isinstance(error, OSError) else f"damaged: {_first_line(error)}"
    return None


def _archive_damage(stream: Any) -> str | None:
    try:
        with zipfile.ZipFile(stream) as archive:
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        if "magic number" in str(error) or "header" in str(error):
            return f"damaged: {error}"
        return "not a torch archive, or truncated"
    return None if wrong is None else f"its entry {wrong.partition('/')[2]} has a wrong checksum"


def _plain(path: str | Path) -> Any:
    """Content of a file, its tensors left on the disk."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _pickled(error: Exception) -> str:
    """Instead of torch's message, which explains how to load such a file all the same."""
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    kind = f" ({name[1]})" if name else ""
    return f"it holds pickled code or objects{kind}, which are never loaded, besides tensors and plain values"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@lru_cache(maxsize=256)
def _folder_damage(path: str, contents: bool, *_state: Any) -> str | None:
    from lightning_distill.strategies.sharded_files import META, is_sharded, metadata_damage, read_index

    folder = Path(path)
    if not is_sharded(folder):
        return f"{META} is missing, so it was not finished"
    if found := damage(folder / META):
        return f"{META}: {found}"
    try:
        if found := metadata_damage(folder):
            return found
        for name, item in read_index(folder).storage_data.items():
            if (folder / item.relative_path).stat().st_size < item.offset + item.length:
                return f"{item.relative_path} is truncated"
            if contents and (found := _item_damage(folder / item.relative_path, item.offset, item.length)):
                return f"{item.relative_path}, {name.fqn}: {found}"
    except _UNREADABLE as error:
        return told(error) if isinstance(error, OSError) else f"damaged: {_first_line(error)}"
    return None


def _item_damage(file: Path, offset: int, length: int) -> str | None:
    """What is wrong with one piece of a tensor; it is an archive of its own."""
    with open(file, "rb") as stream:
        stream.seek(offset)
        return _archive_damage(io.BytesIO(stream.read(length)))


# ---------------------------------------------------------------------------------------------------- which is newest
def _age(path: Path) -> tuple[tuple[float, float], int]:
    """Orders checkpoints: how often the run went back, updates inside, then the date."""
    try:
        return _history(*_file_state(path / "meta.pt" if path.is_dir() else path)), path.stat().st_mtime_ns
    except OSError:
        return (math.inf, math.inf), 0


@lru_cache(maxsize=256)
def _history(path: str, *_state: int) -> tuple[float, float]:
    """Rewinds and ``global_step`` of a file; infinite where it cannot be read, so that it is looked at and told of."""
    try:
        content = _plain(path)
    except _UNREADABLE:
        return math.inf, math.inf
    if not isinstance(content, dict):
        return 0.0, -1.0
    saving = (content.get("callbacks") or {}).get("StudentCheckpoint") or {}
    return float(saving.get("rewinds", 0)), float(content.get("global_step", -1))


def newest_history(folder: Path) -> tuple[int, int]:
    """Rewinds and updates of the newest checkpoint of a folder, whole or not; (0, 0) where none can be read."""
    known = [history for file in folder.glob("*.ckpt") if math.isfinite((history := _age(file)[0])[1])]
    rewinds, updates = max(known, default=(0.0, 0.0))
    return int(rewinds), int(updates)


def last_good(folder: Path, told_of: bool = True) -> Path | None:
    """The newest whole checkpoint of a folder: of most updates, and of those the one written last.

    A run that went back to an earlier checkpoint and saved again goes before what it left behind, whatever that counts.
    ``good.ckpt``, to which ``CollapseAlarm`` goes back, comes after all others.

    Args:
        folder: with ``.ckpt`` files or folders.
        told_of: warn of newer ones that are damaged.
    """
    bad: list[tuple[tuple[tuple[float, float], int], str]] = []
    aged = [(f.name != "good.ckpt", _age(f), f) for f in folder.glob("*.ckpt") if f.exists()]
    for _, age, file in sorted(aged, reverse=True):
        found = damage(file)
        if found is None:
            newer = [what for ((_, updates), date), what in bad if math.isfinite(updates) or date >= age[1]]
            if newer and told_of:
                rank_zero_warn(f"{' and '.join(newer)} cannot be used; {file} is the newest checkpoint that is whole.")
            return file
        bad.append((age, f"{file} ({found})"))
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
