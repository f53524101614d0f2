"""Speed and memory of DMD2 updates, on the machine at hand.

    python benchmarks/throughput.py                                          # small networks, CPU, a few minutes
    python benchmarks/throughput.py sdxl sd3 --device cuda --dtype bfloat16  # published sizes, random weights

Every row is one way to train: ``lora`` (one frozen backbone for three networks) or ``full``, with or without
activation checkpointing, compilation and the GAN. A row that does not fit into memory says so. Fields: student updates
per second (median over blocks), network calls per update, peak bytes (allocated on a GPU; parameters, gradients,
optimizer state and saved activations on a CPU), most bytes saved for backward at one time, and host
synchronisations in an update that is not logged.
"""

import argparse
import gc
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bare import bare_trainer
from counting import Counter, floor_bytes
from lightning.pytorch import Callback, Trainer
from real_sizes import SIZES, Size, build, parameters
from results import RESULTS, write_result
from torch.utils.data import DataLoader, Dataset

from lightning_distill.batch import Batch
from lightning_distill.methods import DMD2
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import example_cond
from lightning_distill.networks.roles import Lora
from lightning_distill.optim import default_optimizer

WARMUP = 2


class Conditions(Dataset[Batch]):
    """The same conditions (and noise as data) for ever, made beforehand: nothing but training is measured."""

    def __init__(self, denoiser: Denoiser, shape: tuple[int, ...], size: int, data: bool) -> None:
        if denoiser.num_classes is None:
            cond = example_cond(denoiser.network, size)
        else:
            cond = {"class_labels": torch.arange(size) % denoiser.num_classes}
        self.batch = Batch(cond=cond, x0=torch.randn(size, *shape) if data else None, size=size)

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Batch:
        return self.batch


class Measure(Callback):
    """Times updates after a warm-up and counts what one of them does."""

    def __init__(self, blocks: int, block: int) -> None:
        self.blocks, self.block = blocks, block
        self.seconds: list[float] = []
        self.calls: dict[str, int] = {}
        self.saved = 0
        self.synchronisations = 0
        self._started = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Wrap the training step: one update is looked at, the others are timed."""
        step = pl_module.training_step

        def training_step(batch: Batch, batch_idx: int) -> None:
            if batch_idx == WARMUP - 1:
                self._look(pl_module, step, batch, batch_idx)
            else:
                step(batch, batch_idx)

        pl_module.training_step = training_step

    def _look(self, module: Any, step: Any, batch: Batch, index: int) -> None:
        roles = {name: role for name, role in module.named_children() if isinstance(role, Denoiser)}
        with Counter(module, roles) as counted:
            step(batch, index)
        self.calls, self.saved = counted.calls, counted.saved
        self.synchronisations = counted.synchronisations

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Take the time at the borders of blocks."""
        done = trainer.global_step - WARMUP
        if done < 0 or done % self.block:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if done:
            self.seconds.append((now - self._started) / self.block)
        self._started = now


def method(size: Size, way: dict[str, Any], args: argparse.Namespace) -> DMD2:
    """DMD2 trained in one way."""
    dtype = getattr(torch, args.dtype)
    teacher = build(size, args.device, dtype)
    options: dict[str, Any] = {}
    if way["weights"] == "lora":
        options |= {"student": Lora(rank=args.rank), "fake_score": Lora(rank=args.rank)}
    if way["gan"]:
        options["gan"] = Adversary([teacher.family.blocks[0] + ".0"])
    optimizer = default_optimizer(1e-5)
    module = DMD2(
        teacher,
        shape=list(size.shape),
        num_steps=args.steps,
        fake_score_steps=args.ratio,
        updates_per_sample=args.ratio,
        student_optimizer=optimizer,
        fake_score_optimizer=optimizer,
        activation_checkpointing=way["checkpointing"],
        ema=[] if way["weights"] == "full" else None,
        check_data=False,
        **options,
    )
    module.configure_model()
    if way["compile"]:
        for role in {id(r.network): r.network for r in (module.student, module.fake_score, teacher)}.values():
            role.compile()
    return module


def measure(name: str, way: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    size, cuda = SIZES[name], args.device == "cuda"
    row: dict[str, Any] = {"what": " ".join(k if v is True else str(v) for k, v in way.items() if v), **way}
    row |= {"implementation": "lightning_distill", "method": "DMD2", "network": name, "parameters": parameters(name)}
    row |= {"batch": args.batch, "dtype": args.dtype, "steps": args.steps, "fake_score_steps": args.ratio}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        module = method(size, way, args)
        probe = Measure(args.blocks, args.block)
        trainer = bare_trainer(
            max_steps=WARMUP + args.blocks * args.block,
            accelerator="gpu" if cuda else "cpu",
            devices=1,
            precision="bf16-mixed" if args.dtype == "bfloat16" else "32-true",
            callbacks=[probe],
        )
        trainer.fit(module, DataLoader(Conditions(module.student, size.shape, args.batch, way["gan"]), batch_size=None))
    except torch.OutOfMemoryError:
        return row | {"out_of_memory": True}
    floor = floor_bytes((*module.parameters(), *module.buffers()), trainer.optimizers)
    row |= {
        "updates_per_second": 1.0 / statistics.median(probe.seconds),
        "seconds_per_update": {"min": min(probe.seconds), "median": statistics.median(probe.seconds)},
        "forwards": probe.calls,
        "saved_activation_bytes": probe.saved,
        "floor_bytes": floor,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else floor + probe.saved,
        "host_syncs": probe.synchronisations,
    }
    return row


def ways(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All combinations asked for."""
    for weights, checkpointing, compiled, gan in product(args.weights, args.checkpointing, args.compile, args.gan):
        yield {
            "weights": weights,
            "checkpointing": checkpointing == "on",
            "compile": compiled == "on",
            "gan": gan == "on",
        }


def main() -> None:
    """Measure and write ``throughput_cpu`` or ``throughput_gpu``; rows of other networks are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="network", help=", ".join(SIZES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=None, help="default 16 on the CPU, 1 on a GPU")
    parser.add_argument("--steps", type=int, default=4, help="student steps")
    parser.add_argument("--ratio", type=int, default=5, help="fake-score updates per student update")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--weights", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    for switch in ("checkpointing", "compile", "gan"):
        both = ["off", "on"] if switch == "checkpointing" else ["off"]
        parser.add_argument(f"--{switch}", nargs="+", choices=["off", "on"], default=both)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--block", type=int, default=2, help="updates per block")
    args = parser.parse_args()
    networks = args.networks or ["small_unet"]
    if unknown := set(networks) - set(SIZES):
        parser.error(f"unknown network {', '.join(sorted(unknown))}; choose from {', '.join(SIZES)}")
    args.batch = args.batch or (1 if args.device == "cuda" else 16)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.device == "cpu":
        torch.set_num_threads(1)
    what = "throughput_gpu" if args.device == "cuda" else "throughput_cpu"
    latest = Path(RESULTS) / "latest" / f"{what}.json"
    rows = json.loads(latest.read_text())["rows"] if latest.is_file() else []
    rows = [row for row in rows if row["network"] not in networks]
    for name in networks:
        for way in ways(args):
            row = measure(name, way, args)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            rows.append(row)
            write_result(what, {"rows": rows})
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
