"""Short runs of the command line that can be killed, forked from one process in which everything is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "method" / "dmd2_ring4.yaml"
UPDATES = 6
NAME = "ring4"
#: seconds after which a run that hangs is ended
PATIENCE = 600

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

def nan_at(update):
    from lightning_distill.methods import DMD2
    original = DMD2.weighted_sum
    def trapped(self, phase, terms):
        loss = original(self, phase, terms)
        return loss * float("nan") if self.draws.update == update else loss
    DMD2.weighted_sum = trapped

def clock_set_at(update, seconds):
    from lightning_distill.methods import DMD2
    original, replace, now, by = DMD2.fake_score_loss, os.replace, time.time, [0.0]
    def trapped(self, batch):
        by[0] = seconds if self.trainer.global_step >= update else 0.0
        return original(self, batch)
    def dated(source, target):
        replace(source, target)
        if str(target).endswith(".ckpt"):
            os.utime(target, (now() + by[0], now() + by[0]))
    DMD2.fake_score_loss, os.replace, time.time = trapped, dated, lambda: now() + by[0]

def out_of_memory():
    from lightning_distill.methods import DMD2
    import torch
    def trapped(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has less.")
    DMD2.fake_score_loss = trapped
"""

_NURSERY = f"""
import json, os, signal, socket, sys, time
from lightning_distill.cli import import_everything, main
import_everything()
import lightning_distill.commands.trainer, torch
from torch.utils.tensorboard import SummaryWriter
{_TRAPS}
print("ready", flush=True)

def run(order, rank):
    out = os.open(order["log"] + (".%d" % rank if rank else ""), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1); os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm({PATIENCE})
    status = 1
    try:
        for call in order["before"]:
            exec(call, globals() | dict(rank=rank))
        status = main(order["words"])
    except BaseException:
        import traceback; traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    order = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(order["processes"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            if order["processes"] > 1:
                os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
            run(order, rank)
    print(pids[0], flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)
"""


class Runs:
    """Short runs of the command line in forked processes, one at a time.

    Args:
        folder: for all their files.

    Attributes:
        statuses: of all processes of the last run, as ``end`` returns that of the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.statuses: list[int] = []
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

    def words(self, run: str, updates: int = UPDATES, processes: int = 1) -> list[str]:
        """The command line of a run in a folder of its own."""
        several = ("--trainer.strategy=role_ddp", f"--trainer.devices={processes}") if processes > 1 else ()
        network = "init_args.spec.init_args.network.init_args.width=8"
        return [
            *("fit", "-c", str(CONFIG), "--ckpt_path=last", f"--trainer.max_steps={updates}"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            *(f"--data.batch_size={8 // processes}", *several),
            *(f"--model.student.{network}", f"--model.fake_score.{network}"),
            f"--trainer.logger.init_args.save_dir={self.folder / run}",
            *(f"--trainer.logger.init_args.name={NAME}", "--trainer.logger.init_args.version=0"),
            "--trainer.callbacks+=lightning_distill.run_checkpoints.StudentCheckpoint",
            "--trainer.callbacks.every_n_train_steps=1",
        ]

    def start(self, run: str, before: tuple[str, ...] = (), updates: int = UPDATES, processes: int = 1) -> int:
        """Start a run; returns the id of its (first) process."""
        words = self.words(run, updates, processes)
        order = {"words": words, "log": str(self.folder / f"{run}.log"), "before": before, "processes": processes}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def end(self) -> int:
        """Wait for the run; returns its exit status, or minus the number of the signal that ended it."""
        self.statuses = [int(word) for word in self._read().split()]
        return self.statuses[0]

    def run(self, run: str, before: tuple[str, ...] = (), updates: int = UPDATES, processes: int = 1) -> int:
        """Start a run and wait for it."""
        self.start(run, before, updates, processes)
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
