"""Interrupted and resumed runs on two processes; the script of ``test_resume_ranks``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rank_runs import leave, named, train

from lightning_distill.strategies import RoleDataParallel, RoleFSDP2

CASES = ["gan_fake_score", "told_interval_lora"]
STEPS = 4
STOP = 2

STRATEGIES = {
    "ddp": RoleDataParallel,
    "sharded": RoleFSDP2,
    "single": lambda: RoleFSDP2(save_distributed_checkpoint=False),
}


class OwnGenerator(Callback):
    """Another state of torch's generator on every process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_start(self, *_: Any) -> None:
        torch.manual_seed(100 + self.rank)


def run(
    name: str, folder: Path, strategy: Any, rank: int, world: int, ckpt_path: Path | None = None, save: bool = True
):
    """A run of all steps that saves its checkpoints at each second one."""
    (case,) = named([name])
    torch.manual_seed(1)  # networks are made with it
    saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=STOP, save_top_k=-1, filename="{step}")
    settings = {"callbacks": [saving, OwnGenerator(rank)], "enable_checkpointing": True} if save else {}
    return train(case, folder / f"files{rank}", strategy, rank, world, STEPS, ckpt_path=ckpt_path, **settings)


def main(folder: Path, names: list[str]) -> None:
    """Every way of writing a checkpoint, and every way of reading one."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def keep(state: dict[str, torch.Tensor], name: str) -> None:
        if rank == 0:
            torch.save(state, folder / f"{name}.pt")
        torch.save(torch.get_rng_state(), folder / f"{name}-generator{rank}.pt")

    for name in names:
        for kind, strategy in STRATEGIES.items():
            out = folder / f"{name}-{kind}"
            keep(run(name, out, strategy(), rank, world), f"{name}-{kind}-whole")
            path = out / f"step={STOP}.ckpt"
            assert path.is_dir() == (kind == "sharded")
            assert not list(out.glob("*.part"))
            keep(run(name, out, strategy(), rank, world, path, save=False), f"{name}-{kind}-resumed")
        # what one process wrote, as it is and converted; and what the other strategy wrote
        for origin, path in (
            ("one", folder / f"{name}-one" / f"step={STOP}.ckpt"),
            ("converted", folder / f"{name}-one" / "sharded.ckpt"),
            ("other", folder / f"{name}-ddp" / f"step={STOP}.ckpt"),
        ):
            keep(run(name, folder / "x", RoleFSDP2(), rank, world, path, save=False), f"{name}-from-{origin}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
