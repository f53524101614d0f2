"""What a training run survives, from kill -9 at random moments to a clock that is set back.

    python benchmarks/faults.py --kills 50

Runs are those of the command line: ``configs/method/dmd2_ring4.yaml`` with smaller networks, a checkpoint after every
update. A run that was killed is started again with the same words, among them ``--ckpt_path last``. It has survived if
it ends with the same weights and the same states of optimizers as a run that was left alone, bit for bit. Runs are
forked from a process in which everything is imported, so that a kill meets the run and not the imports.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fault_runs import UPDATES, Runs

EARLY = "the run ended before the fault"
#: kills of one run on its way to the end
LIVES = 5


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def close(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the weights of two states differ by no more than the order of additions."""
    a, b = a["state_dict"], b["state_dict"]
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-5) for key in a)


def ended(runs: Runs, run: str, whole: dict[str, Any], processes: int = 1, same: Callable[..., bool] = equal) -> str:
    """Run to the end and compare; returns what went wrong, or nothing."""
    if status := runs.run(run, processes=processes):
        return f"exit status {status}: {runs.log(run)[-300:]}"
    return "" if same(whole, runs.final(run)) else "other weights"


def survives(
    runs: Runs,
    run: str,
    whole: dict[str, Any],
    delay: float = 0.0,
    before: tuple[str, ...] = (),
    processes: int = 1,
) -> str:
    """Interrupt a run once, start it again, compare; returns what went wrong, or nothing.

    Args:
        runs: where it runs.
        run: its name.
        whole: the end of the run that was left alone.
        delay: seconds after which it is killed, if nothing in ``before`` ends it.
        before: calls in the forked processes before the run; they know their ``rank``.
        processes: that train together.
    """
    process = runs.start(run, before, processes=processes)
    if not before:
        time.sleep(delay)
        with suppress(ProcessLookupError):  # done already
            os.kill(process, signal.SIGKILL)
    first = runs.end()
    return EARLY if first == 0 else ended(runs, run, whole, processes)


def lives(runs: Runs, run: str, whole: dict[str, Any], kills: int, delay: Callable[[], float]) -> list[str]:
    """Kill a run several times on its way and let it end; returns what went wrong, or nothing, for every kill.

    Args:
        runs: where it runs.
        run: its name.
        whole: the end of the run that was left alone.
        kills: at most; fewer if it ends before.
        delay: draws the seconds from a start to a kill.
    """
    killed = 0
    while killed < kills:
        process = runs.start(run)
        time.sleep(delay())
        with suppress(ProcessLookupError):  # done already
            os.kill(process, signal.SIGKILL)
        if (status := runs.end()) == 0:
            break
        if status != -signal.SIGKILL:
            return [f"exit status {status} instead of a kill: {runs.log(run)[-300:]}"] * (killed + 1)
        killed += 1
    return [ended(runs, run, whole)] * killed


def flip(file: Path) -> None:
    """Change one bit of a checkpoint's largest tensor; between the records of the archive nobody would notice."""
    with zipfile.ZipFile(file) as archive:
        record = max((e for e in archive.infolist() if "/data/" in e.filename), key=lambda entry: entry.file_size)
    content = bytearray(file.read_bytes())
    start = record.header_offset + 30 + sum(struct.unpack_from("<HH", content, record.header_offset + 26))
    content[start + record.file_size // 2] ^= 1
    file.write_bytes(content)


def _faults(runs: Runs, kills: int) -> list[dict[str, Any]]:
    started = time.perf_counter()
    if status := runs.run("whole"):
        raise RuntimeError(f"the run that is left alone ended with status {status}: {runs.log('whole')}")
    length, whole = time.perf_counter() - started, runs.final("whole")
    draw, rows = random.Random(0), []

    def add(fault: str, outcomes: list[str], notes: str) -> None:
        wrong = [outcome for outcome in outcomes if outcome]
        rows.append(
            {
                "fault": fault,
                "tried": len(outcomes),
                "survived": len(outcomes) - len(wrong),
                "notes": "; ".join([notes, *sorted(set(wrong))[:3]]),
            }
        )
        print(rows[-1], flush=True)

    def several(name: str, cases: list[dict[str, Any]]) -> list[str]:
        outcomes = []
        for index, case in enumerate(cases):
            found = survives(runs, f"{name}{index}", **{"whole": whole, **case})
            outcomes += [found] if found != EARLY else []  # nothing was tried
            shutil.rmtree(runs.folder / f"{name}{index}", ignore_errors=True)
        return outcomes

    outcomes: list[str] = []
    while len(outcomes) < kills:
        run = f"random{len(outcomes)}"
        wanted = min(LIVES, kills - len(outcomes))
        outcomes += lives(runs, run, whole, wanted, lambda: draw.uniform(0.0, 0.9 * length))
        shutil.rmtree(runs.folder / run, ignore_errors=True)
    add("kill -9 at a random moment", outcomes, f"up to {LIVES} times on the way of a run, resumed with last")
    writes = max(1, kills // 10)
    places = [("fsync", "written, not flushed"), ("replace", "flushed, not renamed")]
    for function, what in places:
        traps = [{"before": (f"trap({function!r}, {draw.randint(1, 2 * UPDATES)}, 'kill')",)} for _ in range(writes)]
        add(f"kill -9 while a checkpoint is {what}", several(function, traps), "every update writes two files")
    ends = [{"before": (f"signal_at({n}, {number})",)} for n in range(1, UPDATES - 1, 2) for number in (15, 10)]
    add("SIGTERM or SIGUSR1 within a cycle", several("signal", ends), "the cycle is finished and saved")
    full = [{"before": (f"trap('fsync', {n}, '28')",)} for n in (3, 9)]  # even calls flush the folder
    add("disk full while a checkpoint is written", several("full", full), "one sentence; earlier files are kept")
    damaged = []
    for index, harm in enumerate((flip, lambda file: os.truncate(file, file.stat().st_size // 2))):
        runs.run(f"harm{index}", ("signal_at(4, 15)",))
        harm(runs.checkpoints(f"harm{index}") / "last.ckpt")
        found = ended(runs, f"harm{index}", whole)
        damaged.append(found or ("" if "cannot be used" in runs.log(f"harm{index}") else "not said"))
    add("last.ckpt with a flipped bit, or cut in half", damaged, "the newest whole checkpoint is used, and named")
    jumps = [{"before": (f"clock_set_at(2, {by})", "signal_at(4, 9)")} for by in (-86400, 86400)]
    add(
        "clock set back or forward by a day, then kill -9",
        several("clock", jumps),
        "dates of files choose wrongly at most",
    )
    add("losses that are not finite", [_nan(runs, n) for n in (1, 4)], "the update is skipped and counted")
    _of_two_processes(runs, whole, add, several)
    return rows


def _nan(runs: Runs, update: int) -> str:
    """An update whose losses are all NaN; returns what went wrong, or nothing."""
    run = f"nan{update}"
    if status := runs.run(run, (f"nan_at({update})",)):
        return f"exit status {status}"
    state = runs.final(run)["state_dict"]
    if state["skipped_steps"].tolist() != [1.0, 2.0]:  # the fake score is updated twice in a cycle
        return f"skipped {state['skipped_steps'].tolist()}"
    return "" if all(bool(t.isfinite().all()) for t in state.values()) else "weights are not finite"


def _of_two_processes(runs: Runs, whole: dict[str, Any], add: Callable, several: Callable) -> None:
    runs.run("two", processes=2)
    two = runs.final("two")
    outcomes = ["" if close(whole, two) else "two processes train something else"]
    for name, first, second in (("grown", 1, 2), ("shrunk", 2, 1)):
        runs.run(name, ("signal_at(3, 15)",), processes=first)
        outcomes.append(ended(runs, name, whole, second, close))
    add("resumed by another number of processes", outcomes, "one after two, two after one; equal up to rounding")
    for what, number in (("kill -9", 9), ("SIGTERM", 15)):
        before = f"if rank == 1: signal_at(3, {number})"
        outcomes = several(f"rank{number}", [{"before": (before,), "processes": 2, "whole": two}])
        add(f"{what} of one of two processes", outcomes, "the other ends by itself, both are started again")


def main() -> None:
    """Try all faults and record what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="random moments of kill -9")
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    args = parser.parse_args()
    from results import write_result

    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        try:
            rows = _faults(runs, args.kills)
        finally:
            runs.close()
    if not args.dry:
        print(write_result("faults", {"rows": rows}, seeds=[0]))


if __name__ == "__main__":
    main()
