"""What a run or a benchmark ran on: machine, versions, commit; nothing that identifies a person or a host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "commit", "environment", "machine", "versions"]

PACKAGES = ("torch", "lightning", "diffusers", "numpy", "lightning-distill")


def cache_folder(given: str | Path | None = None) -> Path:
    """Where what is computed once is kept: the given folder, ``LIGHTNING_DISTILL_CACHE``, or the user's cache."""
    return Path(given or os.environ.get("LIGHTNING_DISTILL_CACHE") or "~/.cache/lightning_distill").expanduser()


def environment() -> dict[str, Any]:
    """Machine, versions and commit."""
    return {**machine(), **versions(), "commit": commit()}


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator of this machine, without names that identify it."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if "torch" in sys.modules:  # a caller without torch is not made to load it
        import torch

        facts["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
            facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return facts


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return names[1].strip() if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on; missing ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of this package's checkout, with ``-dirty`` when tracked files differ; None for an installed copy."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__)))  # an environment may lie inside another repository
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None
