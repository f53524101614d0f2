"""Planned memory against the memory that the operating system gave to a training process on the CPU.

    python benchmarks/plan_peaks.py

Every run is a process of its own: it trains a tiny network first, so that all code is loaded, then builds the measured
networks and makes a few updates in Lightning's Trainer. What counts is the resident memory at its highest, less what
was there before the networks. Nothing of it is this library's own book-keeping. The allocator is told to give memory
back at once; scratch space of convolutions is part of what is measured and no part of the plan. Writes
``benchmarks/results/latest/plan_peaks.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bare import bare_trainer
from results import write_result
from torch.utils.data import DataLoader

from lightning_distill.batch import Batch
from lightning_distill.generation import default_cond
from lightning_distill.methods import DMD2, SCM
from lightning_distill.methods.base import DistillationModule
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.small import small_dit, small_unet
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.plan_parts import RESERVE
from lightning_distill.planning import plan
from lightning_distill.processes import FlowMatching

MIB = 2**20
#: glibc keeps no freed block of more than 64 KiB
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
UPDATES = 4


def unet() -> NewDenoiser:
    """12 million parameters on 3 x 32 x 32."""
    network = partial(small_unet, 32, 3, 10, (64, 128, 256), norm_num_groups=16, attention_head_dim=16)
    return NewDenoiser(network, FlowMatching(), "flow_prediction", null_class=10)


def dit() -> NewDenoiser:
    """38 million parameters, 256 tokens of 4 x 32 x 32."""
    network = partial(small_dit, 32, 4, 10, patch_size=2, num_layers=12, num_attention_heads=8, attention_head_dim=48)
    return NewDenoiser(network, FlowMatching(), "flow_prediction", null_class=10)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: of the row.
        build: makes the method, given its teacher's spec.
        teacher: spec of the teacher.
        batch: samples of one forward.
    """

    name: str
    build: Callable[[Any], DistillationModule]
    teacher: Callable[[], NewDenoiser]
    batch: int = 8

    def module(self) -> DistillationModule:
        """The method, without networks."""
        return self.build(self.teacher())


def _dmd2(teacher: Any, **settings: Any) -> DMD2:
    return DMD2(teacher, num_steps=1, fake_score_steps=1, **settings)


CASES = (
    Case("DMD2, UNet, full weights", _dmd2, unet),
    Case("DMD2 with GAN, UNet", partial(_dmd2, gan=Adversary(taps=["mid_block"], features="teacher")), unet),
    Case("DMD2, DiT, adapters", partial(_dmd2, student=Lora(rank=16), fake_score=Lora(rank=16), ema=[]), dit),
    Case("DMD2, DiT, checkpointing", partial(_dmd2, activation_checkpointing=True), dit, batch=16),
    Case("DMD2, DiT, accumulation", partial(_dmd2, accumulate_grad_batches=3), dit, batch=4),
    Case("sCM, UNet, exact derivative", SCM, unet),
)


def resident() -> int:
    """Bytes of memory that this process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def train(module: DistillationModule, batch: int) -> None:
    """A few updates.

    Args:
        module: to be trained.
        batch: samples of one forward.
    """
    module.configure_model()
    student = module.student
    assert isinstance(student, Denoiser)
    size = batch * module.accumulate_grad_batches
    data = Batch(cond=default_cond(student, size), x0=torch.randn(size, *module.sample_shape), size=size)
    trainer = bare_trainer(UPDATES)
    trainer.fit(module, DataLoader([data] * UPDATES, batch_size=None))


def child(case: Case) -> None:
    """Print the resident memory that a run added at its highest, in bytes."""
    torch.manual_seed(0)
    small = (
        partial(small_unet, 8, 1, 2, (8, 8), norm_num_groups=4, attention_head_dim=4)
        if case.teacher is unet
        else partial(small_dit, 8, 1, 2, num_layers=1)
    )
    tiny = NewDenoiser(small, FlowMatching(), "flow_prediction", null_class=2)
    train(case.build(tiny), 1)
    before = resident()
    train(case.module(), case.batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def measure(case: Case) -> dict[str, Any]:
    """The row of a case."""
    made = plan(case.module, case.batch, "32-true", device="cpu", updates=UPDATES)
    words = [sys.executable, __file__, "--child", str(CASES.index(case))]
    done = subprocess.run(words, env={**os.environ, **ALLOCATOR}, check=True, stdout=subprocess.PIPE, text=True)
    planned, measured = made.need - RESERVE, int(done.stdout.split()[-1])
    row = {"what": case.name, "planned": planned, "measured": measured, "ratio": planned / measured}
    return {**row, "resident": made.resident, "batch": case.batch}


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child is not None:
        child(CASES[args.child])
        return
    rows = []
    for case in CASES:
        rows.append(measure(case))
        print(json.dumps(rows[-1]), flush=True)
    write_result("plan_peaks", {"rows": rows})


if __name__ == "__main__":
    main()
