"""Run every test, the slow ones included, file by file, and keep what passed: ``make matrix``.

A file of tests is not run again as long as the package, the tests own helpers and the main packages' versions are
what they were when it passed; an interrupted run goes on where it stopped. The outcome of every test is kept in
``.matrix/``, the summary in ``benchmarks/results/latest/matrix.json``.

    python benchmarks/matrix.py [--jobs 2] [--only tests/contracts] [--again]
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from results import write_result

from lightning_distill.environment import versions

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".matrix"


def key(file: Path) -> str:
    """What the outcome of a test file depends on."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    shared = [p for p in (ROOT / "tests").rglob("*.py") if not p.name.startswith("test_")]
    sources = [
        *(ROOT / "lightning_distill").rglob("*.py"),
        *(ROOT / "lightning_distill").rglob("*.yaml"),
        *shared,
        file,
    ]
    for source in sorted(sources):
        digest.update(source.relative_to(ROOT).as_posix().encode() + source.read_bytes())
    return digest.hexdigest()


def state_file(file: Path) -> Path:
    """Where the outcome of a test file is kept."""
    return STATE / (file.relative_to(ROOT).as_posix().replace("/", ".") + ".json")


def outcome(case: ElementTree.Element) -> str:
    """passed, failed, error or skipped."""
    kinds = {"failure": "failed", "error": "error", "skipped": "skipped"}
    return next((kinds[child.tag] for child in case if child.tag in kinds), "passed")


def run(file: Path) -> dict[str, Any]:
    """Run one file of tests and keep its outcome."""
    report = STATE / f"{file.stem}.{os.getpid()}.{abs(hash(file))}.xml"
    name = file.relative_to(ROOT).as_posix()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started, before = time.perf_counter(), key(file)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "not gpu", f"--junitxml={report}", name]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    tests = []
    if report.is_file():
        for case in ElementTree.parse(report).iter("testcase"):
            test = f"{case.get('classname')}::{case.get('name')}"
            tests.append({"test": test, "outcome": outcome(case), "seconds": round(float(case.get("time", 0)), 2)})
        report.unlink()
    # 5: nothing to run in this file
    record = {
        "file": name,
        "key": before,
        "passed": done.returncode in (0, 5),
        "seconds": round(seconds, 1),
        "tests": tests,
    }
    part = state_file(file).with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(state_file(file))
    print(f"{'passed' if record['passed'] else 'FAILED'}  {len(tests):4d} tests {seconds:6.1f} s  {name}", flush=True)
    if not record["passed"]:
        print(done.stdout[-3000:], done.stderr[-1000:], flush=True)
    return record


def main() -> None:
    """Run what has not passed yet, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="tests", help="folder or file of tests")
    parser.add_argument("--again", action="store_true", help="run what has passed, too")
    args = parser.parse_args()
    STATE.mkdir(exist_ok=True)
    start = ROOT / args.only
    files = [start] if start.is_file() else sorted(start.rglob("test_*.py"))
    if not files:
        sys.exit(f"there are no tests in {args.only}")

    def record(file: Path) -> dict[str, Any]:
        kept = state_file(file)
        if not args.again and kept.is_file():
            earlier: dict[str, Any] = json.loads(kept.read_text())
            if earlier["passed"] and earlier["key"] == key(file):
                return earlier
        return run(file)

    with ThreadPoolExecutor(args.jobs) as pool:
        records = list(pool.map(record, files))
    tests = [test for r in records for test in r["tests"]]
    counts = {kind: sum(t["outcome"] == kind for t in tests) for kind in ("passed", "failed", "error", "skipped")}
    rows = [{k: r[k] for k in ("file", "passed", "seconds")} | {"tests": len(r["tests"])} for r in records]
    if args.only == "tests":
        write_result("matrix", {**counts, "seconds": sum(r["seconds"] for r in records), "rows": rows})
    print(f"{len(tests)} tests: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    sys.exit(0 if all(r["passed"] for r in records) else 1)


if __name__ == "__main__":
    main()
