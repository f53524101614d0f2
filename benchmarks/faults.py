"""What a training run survives: kill -9 at random moments and while it writes, damaged files, SIGTERM, a full disk.

    python benchmarks/faults.py --kills 100

Runs are those of the command line: ``configs/method/dmd2_ring4.yaml`` with smaller networks, a checkpoint after every
update. A run that was killed is started again with the same words, among them ``--ckpt_path last``. It has survived if
it ends with the same weights and the same states of optimizers as a run that was left alone, bit for bit. Runs are
forked from a process in which everything is imported, so that a kill meets the run and not the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "method" / "dmd2_ring4.yaml"
UPDATES = 8
NAME = "ring4"
EARLY = "the run ended before the fault"

#: in the forked process, before the run: the nth call of a function of ``os``, or the nth update, is the last deed
_TRAPS = """
def trap(name, count, deed):
    original = getattr(os, name)
    calls = [0]
    def trapped(*args, **kwargs):
        watched = name != "replace" or str(args[1]).endswith(".ckpt")
        calls[0] += watched
        if watched and calls[0] == count:
            if deed == "kill":
                os.kill(os.getpid(), 9)
            raise OSError(int(deed), os.strerror(int(deed)))
        return original(*args, **kwargs)
    setattr(os, name, trapped)

def signal_at(update, number):
    from lightning_distill.methods import DMD2
    original = DMD2.fake_score_loss
    def trapped(self, batch):
        if self.trainer.global_step == update:
            os.kill(os.getpid(), number)
        return original(self, batch)
    DMD2.fake_score_loss = trapped

def out_of_memory():
    from lightning_distill.methods import DMD2
    import torch
    def trapped(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has less.")
    DMD2.fake_score_loss = trapped
"""

_NURSERY = f"""
import json, os, sys
from lightning_distill.cli import import_everything, main
import_everything()
import lightning_distill.commands.trainer, torch
from torch.utils.tensorboard import SummaryWriter
{_TRAPS}
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        out = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1); os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = 1
        try:
            for call in order["before"]:
                exec(call)
            status = main(order["words"])
        except BaseException:
            import traceback; traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runs:
    """Short runs of the command line in forked processes, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._read() == "ready"

    def words(self, run: str, updates: int = UPDATES) -> list[str]:
        """The command line of a run in a folder of its own."""
        network = "init_args.spec.init_args.network.init_args.width=8"
        return [
            *("fit", "-c", str(CONFIG), "--ckpt_path=last", f"--trainer.max_steps={updates}"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--data.batch_size=8"),
            *(f"--model.student.{network}", f"--model.fake_score.{network}"),
            f"--trainer.logger.init_args.save_dir={self.folder / run}",
            *(f"--trainer.logger.init_args.name={NAME}", "--trainer.logger.init_args.version=0"),
            "--trainer.callbacks+=lightning_distill.run_checkpoints.StudentCheckpoint",
            "--trainer.callbacks.every_n_train_steps=1",
        ]

    def start(self, run: str, before: tuple[str, ...] = (), updates: int = UPDATES) -> int:
        """Start a run; returns its process id."""
        order = {"words": self.words(run, updates), "log": str(self.folder / f"{run}.log"), "before": before}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def end(self) -> int:
        """Wait for the run; returns its exit status, or minus the number of the signal that ended it."""
        return int(self._read())

    def run(self, run: str, before: tuple[str, ...] = (), updates: int = UPDATES) -> int:
        """Start a run and wait for it."""
        self.start(run, before, updates)
        return self.end()

    def log(self, run: str) -> str:
        """What a run has printed since its last start."""
        return (self.folder / f"{run}.log").read_text()

    def checkpoints(self, run: str) -> Path:
        """Where a run writes its checkpoints."""
        return self.folder / run / NAME / "version_0" / "checkpoints"

    def final(self, run: str, updates: int = UPDATES) -> dict[str, Any]:
        """Weights and states of optimizers at the end of a run."""
        from lightning_distill.checkpoint_files import last_good
        from lightning_distill.checkpoints import read_checkpoint

        content = read_checkpoint(last_good(self.checkpoints(run)))
        if content["global_step"] != updates:
            raise ValueError(f"the run ended at update {content['global_step']}")
        return {key: content[key] for key in ("state_dict", "optimizer_states", "lightning_distill")}

    def close(self) -> None:
        """End the process that runs are forked from."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs are forked from has died")
        return line.strip()


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def survives(runs: Runs, run: str, whole: dict[str, Any], delay: float = 0.0, before: tuple[str, ...] = ()) -> str:
    """Interrupt a run once, start it again, compare; returns what went wrong, or nothing.

    Args:
        runs: where it runs.
        run: its name.
        whole: the end of the run that was left alone.
        delay: seconds after which it is killed, if nothing in ``before`` ends it.
        before: calls in the forked process before the run.
    """
    process = runs.start(run, before)
    if not before:
        time.sleep(delay)
        with suppress(ProcessLookupError):  # done already
            os.kill(process, signal.SIGKILL)
    first = runs.end()
    if first == 0:
        return EARLY
    if status := runs.run(run):
        return f"exit status {status}: {runs.log(run)[-300:]}"
    return "" if equal(whole, runs.final(run)) else "other weights"


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _faults(runs: Runs, kills: int) -> list[dict[str, Any]]:
    started = time.perf_counter()
    runs.run("whole")
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
            found = survives(runs, f"{name}{index}", whole, **case)
            outcomes += [found] if found != EARLY else []  # nothing was tried
            shutil.rmtree(runs.folder / f"{name}{index}", ignore_errors=True)
        return outcomes

    moments = [{"delay": draw.uniform(0.0, 0.9 * length)} for _ in range(kills)]
    add("kill -9 at a random moment", several("random", moments), f"runs of {length:.1f} s, resumed with last")
    writes = max(1, kills // 2)
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
        status = runs.run(f"harm{index}")
        same = status == 0 and equal(whole, runs.final(f"harm{index}"))
        damaged.append("" if same and "cannot be used" in runs.log(f"harm{index}") else f"exit status {status}")
    add("last.ckpt with a flipped bit, or cut in half", damaged, "the newest whole checkpoint is used, and named")
    return rows


def main() -> None:
    """Try all faults and record what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="random moments of kill -9")
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
