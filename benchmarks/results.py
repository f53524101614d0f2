"""Record the figures of a benchmark as JSON, with what is needed to judge and repeat them.

    write_result("throughput_cpu", {"rows": [...]}, seeds=[0, 1, 2])

writes ``results/<date>_<machine>_<what>.json`` (kept for ever) and ``results/latest/<what>.json`` (read by
tables and plots), both beside this file. From a shell, figures come as JSON from a file or standard input:

    python benchmarks/results.py throughput_cpu figures.json --seeds 0 1 2
    some_benchmark | python benchmarks/results.py compare_digits - --machine laptop --meta note="two threads"
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_distill.environment import commit, machine, versions

RESULTS = Path(__file__).parent / "results"


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
