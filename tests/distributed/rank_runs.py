"""Short runs of the contract cases, alone or as one of two processes; the script that the tests start by torchrun.

Starting processes is what costs, so that one pair of them runs all cases under all strategies and reports case by case:
``FOLDER/STRATEGY/CASE.pt`` is what a run has become, ``CASE.error`` why there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))

from method_cases import BATCH, CASES, Case, trainer  # noqa: E402

from lightning_distill.data import InMemory, ResumableLoader  # noqa: E402
from lightning_distill.methods import DistillationModule  # noqa: E402
from lightning_distill.strategies import RoleDataParallel, RoleFSDP2  # noqa: E402

STEPS = 3


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
    return ResumableLoader(source, BATCH // world, slices=module.slices_per_cycle, seed=3, rank=rank, world_size=world)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().cpu().clone()


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


def start(*words: str | Path, script: str | Path = __file__, timeout: float = 400.0) -> str:
    """Run this script, or another, in two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise AssertionError(done.stdout[-2000:] + done.stderr[-6000:])
    return done.stdout


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


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
