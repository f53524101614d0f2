"""Locks between processes, on one or on several machines that share a folder.

A lock is a file that only one process can create; it says who made it. A process that was killed leaves its file
behind: on the same machine it is known by its process that is gone, however long a suspended one has been silent; from
another machine by a file that nobody has touched for two minutes (whoever holds a lock touches it every fifteen
seconds). Where the system does not tell when a process started, ids that are used again leave the age to decide too.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["claimed", "sweep"]

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 120.0


#: between two looks at a lock of another machine
_LOOK_SECONDS = 1.0


@contextmanager
def claimed(file: Path, waiting: Callable[[float], None] | None = None) -> Iterator[bool]:
    """Hold a lock while the block runs, if nobody else holds it.

    Two processes that find the same stale lock at the same moment may, very rarely, both get it; what is done under a
    lock must therefore be harmless to do twice.

    Args:
        file: lock file, in an existing folder.
        waiting: given, the lock of a process on another machine, whose end cannot be seen from here, is watched until
            it is touched or as old as that of a killed process; called once, with the longest wait in seconds.

    Yields:
        whether the lock is ours.

    Raises:
        OSError: the folder cannot be written.
    """
    content = json.dumps({**_machine(), "pid": os.getpid(), "started": _started(os.getpid()), "time": time.time()})
    ours = _create(file, content) or (_remove_stale(file) and _create(file, content))
    if not ours and waiting is not None and _left_behind(file, waiting):
        ours = _create(file, content) or (_remove_stale(file) and _create(file, content))
    if not ours:
        yield False
        return
    done = threading.Event()
    beat = threading.Thread(target=_heartbeat, args=(file, done), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        done.set()
        beat.join()
        with suppress(OSError):
            if file.read_text() == content:
                file.unlink()


def sweep(folder: Path) -> None:
    """Remove the locks that killed processes left in a folder, finished and unfinished ones."""
    for pattern in ("*.lock", ".*.lock.*"):
        for file in folder.glob(pattern):
            with suppress(OSError):
                _remove_stale(file)


def _create(file: Path, content: str) -> bool:
    """Whether the file could be made; never empty where the file system has hard links."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    part.write_text(content)
    try:
        os.link(part, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(file, "x") as stream:
                stream.write(content)
        except FileExistsError:
            return False
    finally:
        part.unlink(missing_ok=True)
    return True


def _remove_stale(file: Path) -> bool:
    """Whether the lock was left behind and is now gone."""
    try:
        content = file.read_text()
        if not _is_stale(file, content):
            return False
        aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}.stale")
        os.rename(file, aside)
        if aside.read_text() != content:  # another process was faster, and this is its new lock: give it back
            with suppress(OSError):
                os.link(aside, file)
            aside.unlink()
            return False
        aside.unlink()
    except FileNotFoundError:
        pass
    return True


def _left_behind(file: Path, waiting: Callable[[float], None]) -> bool:
    """Watch the lock of another machine; whether its process seems to be gone."""
    told = False
    try:
        content, touched = file.read_text(), file.stat().st_mtime_ns
        with suppress(ValueError, KeyError, TypeError):
            if _is_here(json.loads(content)):
                return False  # its process lives
        while not _is_stale(file, content):
            if not told:
                told = True
                waiting(STALE_SECONDS + HEARTBEAT_SECONDS)
            time.sleep(_LOOK_SECONDS)
            if file.stat().st_mtime_ns != touched or file.read_text() != content:
                return False
    except FileNotFoundError:
        pass  # given back
    return True


def _is_here(owner: dict[str, Any]) -> bool:
    return all(owner[key] == value for key, value in _machine().items())


def _is_stale(file: Path, content: str) -> bool:
    try:
        owner: dict[str, Any] = json.loads(content)
        if _is_here(owner):
            alive = _is_alive(owner["pid"], owner["started"])
            if owner["started"] or not alive:
                return not alive
    except (ValueError, KeyError, TypeError):
        pass  # being written, or its process was killed meanwhile
    return _now(file.parent) - file.stat().st_mtime > STALE_SECONDS


def _machine() -> dict[str, str]:
    """What tells process ids apart: host, start of the system, and the container's own numbering."""
    facts = {"host": socket.gethostname(), "boot": "", "pids": ""}
    with suppress(OSError):
        facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        facts["pids"] = os.readlink("/proc/self/ns/pid")
    return facts


def _is_alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's, of which the system may tell nothing
        return _started(pid) in ("", started)
    return _started(pid) == started


def _started(pid: int) -> str:
    """Start time of a process in clock ticks, where the system tells: ids are used again. Empty for zombies too."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in ("Z", "X") else fields[18]


def _now(folder: Path) -> float:
    """Time by the clock of the folder's file system."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        return os.fstat(stream.fileno()).st_mtime


def _heartbeat(file: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(file)
