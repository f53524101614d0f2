"""Record the figures of a benchmark as JSON, with what is needed to judge and repeat them.

    write_result("throughput_cpu", {"rows": [...]}, seeds=[0, 1, 2])

writes ``results/<date>_<machine>_<what>.json`` (kept for ever) and ``results/latest/<what>.json`` (read by
tables and plots), both beside this file. From a shell, figures come as JSON from a file or standard input:

    python benchmarks/results.py throughput_cpu figures.json --seeds 0 1 2
    some_benchmark | python benchmarks/results.py compare_digits - --machine laptop --meta note="two threads"
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "diffusers", "numpy", "lightning-distill")


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
    """Commit of this checkout, with ``-dirty`` when tracked files differ; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value: Any, where: str) -> Any:
    """Figures as JSON values: scalars of numpy and torch become numbers; what is not finite is refused."""
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, (str, bool, int, float, type(None))) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which JSON cannot hold; record None and say why in a notes field.")
    if isinstance(value, str) and re.match(r"(/|[A-Za-z]:\\|~/)\S", value):
        raise ValueError(f"{where}={value!r} is an absolute path; record a name or a path inside the repository.")
    if not isinstance(value, (str, bool, int, float, type(None))):
        raise TypeError(f"{where} is a {type(value).__name__}; record numbers, strings, lists and mappings.")
    return value


def write_result(what: str, figures: dict[str, Any], *, results: Path = RESULTS, **meta: Any) -> Path:
    """Write the figures of one benchmark.

    Args:
        what: name of the benchmark, letters, digits and underscores; readers look it up under this name.
        figures: the benchmark's fixed fields; they stand at the top level of the file.
        results: folder to write to.
        meta: further facts for ``meta``, for example ``seeds=[0, 1]``; ``machine="laptop"`` goes into
            the file name (default: kind of processor and number of cores).

    Returns:
        the dated file.

    Raises:
        ValueError: a bad name, a field called ``meta``, a number that is not finite, or an absolute path.
        TypeError: a value that JSON cannot hold.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", what):
        raise ValueError(f"what={what!r} names a file; use letters, digits and underscores only.")
    if "meta" in figures:
        raise ValueError("the field 'meta' is written by write_result; pass further facts as keyword arguments.")
    now, facts = datetime.now(timezone.utc), machine()
    default = f"{platform.machine()}_{facts['cores']}cores" if "gpu" not in facts else str(facts["gpu"])
    name = re.sub(r"[^A-Za-z0-9]+", "-", str(meta.pop("machine", default))).strip("-").lower()
    record = {
        **_plain(figures, "figures"),
        "meta": {
            "what": what,
            "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "machine": {"name": name, **facts},
            "versions": versions(),
            "commit": commit(),
            "seeds": None,
            **_plain(meta, "meta"),
        },
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    dated = results / f"{now:%Y-%m-%d}_{name}_{what}.json"
    for path in (dated, results / "latest" / f"{what}.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(path)
    return dated


def main(arguments: list[str] | None = None) -> None:
    """Write figures given as JSON."""
    parser = argparse.ArgumentParser(description="Record the figures of a benchmark.")
    parser.add_argument("what", help="name of the benchmark, for example throughput_cpu")
    parser.add_argument("figures", help="JSON file with the figures, - for standard input")
    parser.add_argument("--seeds", type=int, nargs="*", default=None)
    parser.add_argument("--machine", default=None, help="name of the machine in the file name")
    parser.add_argument("--meta", nargs="*", default=[], metavar="KEY=VALUE", help="further facts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    meta: dict[str, Any] = {}
    for entry in options.meta:
        key, equals, value = entry.partition("=")
        if not equals:
            parser.error(f"--meta {entry}: give KEY=VALUE")
        meta[key] = value
    if options.machine is not None:
        meta["machine"] = options.machine
    try:
        text = sys.stdin.read() if options.figures == "-" else Path(options.figures).read_text()
        figures = json.loads(text)
        if not isinstance(figures, dict):
            raise ValueError('the figures must be a JSON object, for example {"rows": [...]}.')
        path = write_result(options.what, figures, results=options.results, seeds=options.seeds, **meta)
    except (OSError, ValueError, TypeError) as error:
        parser.error(str(error))
    print(f"wrote {path.name} and latest/{options.what}.json")


if __name__ == "__main__":
    main()
