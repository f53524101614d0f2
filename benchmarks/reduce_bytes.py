"""Bytes of gradients that two processes exchange per optimizer step, against the bytes of the network that steps.

    python benchmarks/reduce_bytes.py                    # DMD2 on the shipped Fashion-MNIST teacher, a minute

Counted, not timed: every tensor that enters an all-reduce during a backward pass, under ``role_ddp`` and under plain
DDP. ``parameter_bytes`` are those of the phase's trained parameters, the least that has to be exchanged.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bare import bare_trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lightning_distill.data.prior import Prior
from lightning_distill.methods import DMD2
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.specs import ZooDenoiser
from lightning_distill.strategies import RoleDataParallel

PLAIN = "ddp_find_unused_parameters_true"
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {},
    "dmd2_lora": {"student": Lora(rank=8), "fake_score": Lora(rank=8)},
}
#: the first cycle agrees on what takes part; the second is counted
CYCLES = 2


class VisibleDDP(DDPStrategy):
    """Plain DDP whose buckets are reduced by ``torch.distributed.all_reduce``, where they can be counted."""

    def configure_ddp(self) -> None:
        """Add the hook."""
        super().configure_ddp()
        self.model.register_comm_hook(None, allreduce_hook)


def count(strategy: str, settings: dict[str, Any], teacher: str) -> list[dict[str, Any]]:
    """Bytes per optimizer step and phase, as this process sends them."""
    counted: Counter = Counter()
    seen: list[Counter] = []

    class Counting(DMD2):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            counted.clear()
            super().training_step(batch, batch_idx)
            seen.append(Counter(counted))

    module = Counting(ZooDenoiser(teacher), **settings, fake_score_steps=2)
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() > 1:  # the loss, from which every process learns whether to skip the step, is one number
            counted[module.running_phase] += tensor.numel() * tensor.element_size()
        return original(tensor, *args, **kwargs)

    chosen: Any = VisibleDDP(find_unused_parameters=True) if strategy == PLAIN else RoleDataParallel()
    run = bare_trainer(
        devices=2,
        strategy=chosen,
        max_steps=CYCLES,
    )
    dist.all_reduce = all_reduce
    try:
        run.fit(module, Prior(num_classes=10, batch_size=2))
    finally:
        dist.all_reduce = original
    steps = Counter(phase for phase, _ in module.phase_plan())
    return [
        {
            "phase": phase,
            "bytes": seen[-1][phase] // steps[phase],
            "parameter_bytes": sum(
                p.numel() * p.element_size() for role in roles for p in module.role_parameters(role)
            ),
        }
        for phase, roles in module.phases.items()
    ]


def rows_of_two_processes(teacher: str) -> list[dict[str, Any]]:
    """Start two processes and collect what they count."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = [*launcher, __file__, "--teacher", teacher, "--into", str(out)]
        subprocess.run(words, env=environment, check=True)
        rows: list[dict[str, Any]] = json.loads(out.read_text())
        return rows


def main() -> None:
    """Write ``reduce_bytes``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="fashion", help="entry of the zoo")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.into is None:
        from results import write_result

        print(write_result("reduce_bytes", {"rows": rows_of_two_processes(args.teacher)}, teacher=args.teacher))
        return
    rows = [
        {"strategy": strategy, "method": method, **row}
        for strategy in ("role_ddp", PLAIN)
        for method, settings in METHODS.items()
        for row in count(strategy, settings, args.teacher)
    ]
    if os.environ["RANK"] == "0":
        Path(args.into).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
