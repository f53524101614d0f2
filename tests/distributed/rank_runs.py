"""Short runs of the contract cases, alone or as one of two processes; the script that the tests start by torchrun.

Starting processes is what costs, so that one pair of them runs all cases under all strategies and reports case by case:
``FOLDER/STRATEGY/CASE.pt`` is what a run has become, ``CASE.error`` why there is none.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))

from method_cases import BATCH, CASES, LOADER_SEED, Case, trainer  # noqa: E402

from lightning_distill.data import InMemory, ResumableLoader  # noqa: E402
from lightning_distill.methods import DistillationModule  # noqa: E402
from lightning_distill.strategies import RoleDataParallel, RoleFSDP2  # noqa: E402
from lightning_distill.strategies.sharding import unsharded  # noqa: E402

STEPS = 3
#: imported once, in the process from which ranks are forked
PRELOADED = [
    *("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.tensor"),
    *("lightning.pytorch", "lightning_distill.methods", "lightning_distill.strategies"),
]


class WithoutAveraging(RoleDataParallel):
    """What a strategy that forgets the other processes trains: a control of the comparison."""

    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        self._reducing = None


#: strategies that have no name of their own
MADE = {
    "without_averaging": WithoutAveraging,
    "replicated": lambda: RoleFSDP2(replicas=2),
    "whole_networks": lambda: RoleFSDP2(shard_blocks=False, reduce_dtype="float32"),
}


def smooth_adam(parameters: Any) -> torch.optim.Optimizer:
    """Adam that does not turn rounding errors of vanishing gradients into whole steps."""
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.5, 0.9), eps=1e-3, fused=True)


def build(case: Case, folder: Path, **overrides: Any) -> DistillationModule:
    """The case with smooth optimizers for all its phases."""
    module = case.build(folder, **overrides)
    for phase in module.phases:
        module.optimizer_factories[phase] = smooth_adam
    return module


def loader(case: Case, module: DistillationModule, rank: int, world: int) -> ResumableLoader:
    source = InMemory(case.data())
    order = {"seed": LOADER_SEED, "rank": rank, "world_size": world}
    return ResumableLoader(source, BATCH // world, slices=module.slices_per_cycle, **order)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return unsharded(tensor).clone()


def train(
    case: Case, folder: Path, strategy: Any = "auto", rank: int = 0, world: int = 1, steps: int = STEPS, **settings: Any
) -> dict[str, torch.Tensor]:
    """The state that a run ends with: weights, averages, counters, all of them whole."""
    folder.mkdir(parents=True, exist_ok=True)
    module = settings.pop("module", None) or build(case, folder)
    ckpt_path = settings.pop("ckpt_path", None)
    fit = trainer(steps, devices=world, strategy=strategy, use_distributed_sampler=False, **settings)
    fit.fit(module, loader(case, module, rank, world), ckpt_path=ckpt_path)
    return {name: whole(value) for name, value in module.state_dict().items()}


def named(names: list[str]) -> list[Case]:
    return [case for case in CASES if case.name in names]


def start(*words: str | Path, script: str | Path = __file__, timeout: float = 400.0, processes: int = 2) -> str:
    """Run this script, or another, in two processes; returns what they print.

    They are told what torchrun would tell them, and are forked from a process that has imported everything.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(processes)]
        told = [[str(script), *map(str, words)], processes, port]
        ranks = [context.Process(target=as_rank, args=(rank, str(logs[rank]), *told)) for rank in range(processes)]
        for process in ranks:
            process.start()
        end = time.monotonic() + timeout
        while time.monotonic() < end and any(process.is_alive() for process in ranks):
            if any(process.exitcode for process in ranks):
                end = min(end, time.monotonic() + 20.0)  # the other has lost its partner
            time.sleep(0.05)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        text = [log.read_text() if log.exists() else "" for log in logs]
    if any(code != 0 for code in codes):
        raise AssertionError("\n".join(f"rank {i} ended with {codes[i]}:\n{text[i][-5000:]}" for i in range(processes)))
    return "".join(text)


def as_rank(rank: int, log: str, words: list[str], processes: int, port: int) -> None:
    """Run a script as one of several processes."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.enable(open(2, "w", closefd=False))  # noqa: SIM115  (to the end)
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({key: str(value) for key, value in {**names, **launched, "HF_HUB_OFFLINE": 1}.items()})
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def main(folder: Path, plan: dict[str, list[str]]) -> None:
    """Run the cases of each strategy."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for strategy, names in plan.items():
        out = folder / strategy
        out.mkdir(parents=True, exist_ok=True)
        for case in named(names):
            try:
                chosen = MADE.get(strategy, lambda strategy=strategy: strategy)()
                state = train(case, out / f"files{rank}", chosen, rank, world)
            except Exception:
                (out / f"{case.name}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
                continue
            if rank == 0:
                torch.save(state, out / f"{case.name}.pt")
            else:
                torch.save(state, out / f"{case.name}.second.pt")


def leave() -> None:
    """End together: threads of gloo that outlive the interpreter may crash it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave()
