"""Runs of students and fake scores with experts whose samples lie in one of two processes; started by torchrun.

``FOLDER/STRATEGY/CASE.pt`` holds what a run has become, and what each of the processes samples from it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from rank_runs import MADE, Case, build, leave, train
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))

from method_cases import BATCH, EPOCH, LOADER_SEED, dmd2, flow_dit, flow_mlp, mapping, points

from lightning_distill.batch import Batch
from lightning_distill.data.loader import epoch_generator
from lightning_distill.methods import DMD2, MeanFlow, PhasedDMD
from lightning_distill.networks.experts import Experts
from lightning_distill.networks.two_time import TwoTime

STEPS = 2


def apart(labels: int = 3) -> Batch:
    """Conditions alone: of each batch the first process' half has class 0, and the second one's the last class."""
    n = 2 * EPOCH * BATCH
    given, order = torch.zeros(n, dtype=torch.long), torch.randperm(n, generator=epoch_generator(LOADER_SEED, 0))
    given[order] = torch.where(torch.arange(n) % BATCH < BATCH // 2, 0, labels - 1)
    return Batch(cond={"class_labels": given}, size=n)


def later_without() -> Batch:
    """As ``apart``; the first batch has all four classes, the later ones the first two."""
    n = 2 * EPOCH * BATCH
    given, order = torch.zeros(n, dtype=torch.long), torch.randperm(n, generator=epoch_generator(LOADER_SEED, 0))
    given[order] = torch.where(torch.arange(n) < BATCH, torch.arange(n) % 4, torch.arange(n) % 2)
    return Batch(cond={"class_labels": given}, size=n)


def by_class() -> Experts:
    """Two experts, each met in one process."""
    return Experts(classes=[[0, 1], [2, 3]])


CASES = [
    Case("student", DMD2, lambda: flow_mlp(4), lambda: apart(4), dmd2(student=by_class, fake_score_steps=1)),
    Case("unmet", DMD2, lambda: flow_mlp(4), lambda: apart(4), dmd2(
        student=lambda: Experts(classes=[[0], [1, 2], [3]]), fake_score_steps=1
    )),
    Case("left_out", DMD2, lambda: flow_mlp(4), later_without, dmd2(student=by_class, fake_score_steps=1)),
    Case("dit", DMD2, flow_dit, lambda: apart(3), dmd2(
        student=lambda: Experts(classes=[[0], [1, 2]]), fake_score_steps=1
    )),
    Case("told_step", DMD2, lambda: flow_mlp(4), lambda: apart(4), dmd2(
        student=by_class, fake_score=by_class, num_steps=2, critic_condition_on="step"
    )),
    # in a batch of eight some expert has samples in one process only
    Case("two_times", MeanFlow, flow_mlp, points, mapping(
        student=lambda: Experts(boundaries=[0.75, 0.5, 0.25, 0.1], role=TwoTime())
    )),
    Case("levels", PhasedDMD, flow_mlp, points, dmd2(
        num_steps=2, fake_score=lambda: Experts(boundaries=[0.9, 0.8, 0.7, 0.1])
    )),
]  # fmt: skip


class Sampling(Callback):
    """At the end predictions for the class and the time that only this process has."""

    def __init__(self, rank: int | None) -> None:
        self.ranks = (0, 1) if rank is None else (rank,)
        self.found: dict[str, Tensor] = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ask the network as it is, in this process for the own part only."""
        classes = pl_module.student.num_classes
        shape = pl_module.sample_shape
        for rank in self.ranks:
            x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(rank))
            t = torch.full((2,), (0.95, 0.05)[rank], dtype=torch.float64)
            cond = {} if not classes else {"class_labels": torch.full((2,), (0, classes - 1)[rank])}
            for name, network in (("student", pl_module.student), *pl_module.student_ema.items()):
                with torch.no_grad():
                    self.found[f"{name}{rank}"] = network(x, t, cond).x0.clone()


def run(case: Case, folder: Path, strategy: Any = "auto", rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Weights and averages of a run, and samples of this process, or of all where there is one."""
    sampling = Sampling(None if world == 1 else rank)
    module = build(case, folder)
    state = train(case, folder, strategy, rank, world, STEPS, module=module, callbacks=[sampling])
    return {**state, **{f"sampled {name}": value for name, value in sampling.found.items()}}


def main(folder: Path, plan: dict[str, list[str]]) -> None:
    """Run the cases of each strategy."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for strategy, names in plan.items():
        out = folder / strategy
        out.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            if case.name in names:
                try:
                    chosen = MADE.get(strategy, lambda strategy=strategy: strategy)()
                    torch.save(run(case, out / f"files{rank}", chosen, rank, world), out / f"{case.name}.{rank}.pt")
                except Exception:
                    (out / f"{case.name}.error").write_text(f"rank {rank}: {traceback.format_exc()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave()
