"""Checksums of stores: what is wrong with a shard, and reading every shard once per machine before training.

What was read and found whole is remembered in the user's cache folder, one small file per store:

    verified/<digest of the store's folder>.json    by name of each file: size, time of its last change, SHA-256

While size and time stay, a file is not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lightning_distill.data.shards import Layout, _sha256, shard_name, write_file
from lightning_distill.data.store import Store
from lightning_distill.environment import cache_folder

__all__ = ["damage", "damages", "verify_stores"]

#: bytes to read from which on the progress is shown
LARGE = 10**9
_MOST_THREADS = 8
#: endings of the files that have checksums
_DATA = (".safetensors", ".jsonl")


def damage(store: Layout, shard: int) -> str | None:
    """What is wrong with a shard that was finished once, reads the shard.

    Args:
        store: a store or its writer.
        shard: its number.

    Returns:
        file and reason; None for a shard that is whole, or was never finished.
    """
    name = shard_name(shard)
    if store.is_whole(shard, checksums=True):
        return None
    if (record := store.record(shard)) is None:
        file = store.folder / f"{name}.json"
        return f"{file} cannot be read" if file.is_file() else None
    try:
        for file, facts in ((store.folder / part, facts) for part, facts in record["files"].items()):
            if not file.is_file():
                return f"{file} is missing"
            if (size := file.stat().st_size) != facts["bytes"]:
                return f"{file} has {size} bytes instead of {facts['bytes']}"
            if _sha256(file) != facts["sha256"]:
                return f"{file} does not match its checksum"
    except OSError as error:
        return f"{error.filename or name} cannot be read ({error.strerror})"
    except (KeyError, TypeError, AttributeError):
        return f"{store.folder / name}.json cannot be read"
    return None  # repaired by another process meanwhile


def damages(store: Layout, shards: Iterable[int]) -> list[str]:
    """One line for each of the shards that was finished once and is to be made again."""
    return [f"{found}; made again" for shard in shards if (found := damage(store, shard)) is not None]


def verify_stores(stores: Iterable[Store], switch: str, cache: str | Path | None = None) -> None:
    """Compare the shards of stores with their checksums; those that were compared before, by their sizes and times.

    Args:
        stores: complete ones.
        switch: what leaves this out, for the message.
        cache: folder of what is remembered; None is ``LIGHTNING_DISTILL_CACHE`` or the user's.

    Raises:
        ValueError: a shard is damaged.
    """
    for store in stores:
        _verify(store, switch, cache_folder(cache) / "verified")


def _verify(store: Store, switch: str, folder: Path) -> None:
    where = str(store.folder.resolve())
    memory = folder / f"{hashlib.sha256(where.encode()).hexdigest()[:24]}.json"
    known = _remembered(memory, where)
    found = _states(store.folder)  # before they are read, so that a later change is seen the next time
    left = [shard for shard in range(store.num_shards) if not _unchanged(known.get(shard_name(shard)), found)]
    if not left:
        return
    broken = _read(store, left, found)
    for shard in left:
        known.pop(shard_name(shard), None)
        record = None if shard in broken else store.record(shard)
        if record is not None:
            known[shard_name(shard)] = {
                name: [*found.get(name, (0, 0)), facts["sha256"]] for name, facts in record["files"].items()
            }
    _remember(memory, {"folder": where, "shards": known})
    if broken:
        command = "trajectories" if store.key.get("kind") == "trajectories" else "cache"
        others = "" if len(broken) == 1 else f" (and {len(broken) - 1} more of its shards are damaged)"
        what = damage(store, broken[0]) or f"{store.folder / shard_name(broken[0])}.json is missing"
        raise ValueError(
            f"{what}{others}; run the command that wrote the store (lightning-distill {command} ... --out "
            f"{store.folder}) once more, which makes damaged shards again, or leave the comparison out with "
            f"{switch}."
        )


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of the data files, by name."""
    names = [name for name in os.listdir(folder) if name.endswith(_DATA)]
    whole = os.stat not in os.supports_dir_fd
    descriptor = None if whole else os.open(folder, os.O_RDONLY)  # half the time of looking up whole paths
    try:
        stats = [os.stat(folder / name if whole else name, dir_fd=descriptor) for name in names]
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats)}


def _unchanged(known: Any, found: dict[str, tuple[int, int]]) -> bool:
    try:
        return bool(known) and all(found[name] == (size, changed) for name, (size, changed, _) in known.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _read(store: Store, shards: Sequence[int], found: dict[str, tuple[int, int]]) -> list[int]:
    """Hash shards; those that are damaged."""
    sizes = {s: sum(found.get(shard_name(s) + ending, (0, 0))[0] for ending in _DATA) for s in shards}
    total, start, console = sum(sizes.values()), time.monotonic(), Console(stderr=True)
    large = total > LARGE
    if large:
        rank_zero_info(f"comparing {total / 1e9:.1f} GB of {store.folder} with their checksums, once on this machine")
    columns = (TextColumn("checksums"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (large and console.is_terminal)) as progress:
        task = progress.add_task("", total=total)
        threads = max(1, min(_MOST_THREADS, os.cpu_count() or 1))
        broken = store.verify(shards, threads, lambda shard: progress.advance(task, sizes[shard]))
    if large:
        seconds = time.monotonic() - start
        rank_zero_info(f"compared in {seconds:.0f} s, {total / 1e9 / seconds:.2f} GB/s")
    return broken


def _remembered(file: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        return dict(content["shards"]) if content["folder"] == where else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remember(file: Path, content: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(content).encode())
    except OSError as error:
        warnings.warn(
            f"{file} cannot be written ({error.strerror}), so that stores are read at every start; name a folder that "
            "can be written in LIGHTNING_DISTILL_CACHE.",
            stacklevel=2,
        )
