"""Speed and memory of DMD2 updates, on the machine at hand.

    python benchmarks/throughput.py                                          # small networks, CPU, a few minutes
    python benchmarks/throughput.py sdxl sd3 --device cuda --dtype bfloat16  # published sizes, random weights
    python benchmarks/throughput.py --limits                                 # SDXL on one GPU: does it fit?

Every row is one way to train: ``lora`` (one frozen backbone for three networks) or ``full``, with or without
activation checkpointing, compilation and the GAN. A row that does not fit into memory says so. Fields: student updates
per second (median over blocks), network calls per update, peak bytes (allocated on a GPU; parameters, gradients,
optimizer state and saved activations on a CPU), most bytes saved for backward at one time, and host
synchronisations in an update that is not logged.

``--guidance``, ``--optimizer`` and ``--quantize`` change all rows of a run. ``--limits`` measures the rows of
``LIMITS`` (1024 x 1024, batch 1, bf16-mixed, four steps, guidance 7) and compares the peak of allocated memory with
what a card has, in units of 10^9 bytes; the exit status is 1 where a limit is broken, not where a goal is missed.
"""

import argparse
import gc
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bare import bare_trainer
from counting import Counter, floor_bytes
from lightning.pytorch import Callback, Trainer
from real_sizes import SIZES, Size, build, parameters
from results import RESULTS, write_result
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import DataLoader, Dataset

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.methods import DMD2
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.compiling import compile_roles
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import example_cond
from lightning_distill.networks.quantisation import KINDS, check_quantisation, require_torchao
from lightning_distill.networks.roles import Lora
from lightning_distill.optim import AdamW8bit, default_optimizer

WARMUP = 2
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Limit:
    """What one way of training SDXL may need.

    Attributes:
        name: of the row.
        gigabytes: 10^9 bytes.
        goal: whether it is hoped for rather than required.
        weights: ``lora`` or ``full``.
        optimizer: as the option.
        quantize: as the option.
    """

    name: str
    gigabytes: float
    goal: bool = False
    weights: str = "lora"
    optimizer: str = "adamw"
    quantize: str = "none"

    def apply(self, args: argparse.Namespace) -> argparse.Namespace:
        """The options of its row."""
        fixed = {"device": "cuda", "dtype": "bfloat16", "batch": 1, "steps": 4, "guidance": 7.0}
        own = {"optimizer": self.optimizer, "quantize": self.quantize}
        return argparse.Namespace(**{**vars(args), **fixed, **own})

    @property
    def way(self) -> dict[str, Any]:
        """The way to train of its row."""
        return {"weights": self.weights, "checkpointing": True, "compile": False, "gan": False}


LIMITS = (
    Limit("LoRA", 24),
    Limit("LoRA, 8-bit frozen weights", 16, goal=True, quantize="int8"),
    Limit("full weights, 8-bit Adam", 80, weights="full", optimizer="adamw8bit"),
)


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


def _uncounted(step: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer's step outside of what counts; torchao's compiles itself, which no mode may watch."""

    def run(*arguments: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return step(*arguments, **options)

    return run


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
        with ExitStack() as apart, Counter(module, roles) as counted:
            for optimizer in module.trainer.optimizers:
                if isinstance(optimizer, AdamW8bit):
                    apart.enter_context(patch.object(optimizer, "step", _uncounted(optimizer.step)))
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
    teacher = build(size, args.device, dtype, None if args.quantize == "none" else args.quantize)
    options: dict[str, Any] = {}
    if way["weights"] == "lora":
        options |= {"student": Lora(rank=args.rank), "fake_score": Lora(rank=args.rank)}
    if way["gan"]:
        options["gan"] = Adversary([teacher.family.blocks[0] + ".0"])
    optimizer: Any = default_optimizer(LEARNING_RATE)
    if args.optimizer == "adamw8bit":
        optimizer = partial(AdamW8bit, lr=LEARNING_RATE)
    module = DMD2(
        teacher,
        shape=list(size.shape),
        guidance=Guidance(args.guidance),
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
        compile_roles(module)
    return module


def measure(name: str, way: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    size, cuda = SIZES[name], args.device == "cuda"
    row: dict[str, Any] = {"what": " ".join(k if v is True else str(v) for k, v in way.items() if v), **way}
    row |= {"implementation": "lightning_distill", "method": "DMD2", "network": name, "parameters": parameters(name)}
    row |= {"batch": args.batch, "dtype": args.dtype, "steps": args.steps, "fake_score_steps": args.ratio}
    row |= {"guidance": args.guidance, "optimizer": args.optimizer, "quantize": args.quantize}
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
    if cuda:
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return row


def judged(limit: Limit, row: dict[str, Any]) -> dict[str, Any]:
    """A row with its limit, and whether it keeps to it; one that ran out of memory does not."""
    peak = row.get("peak_bytes")
    return row | {
        "limit": limit.name,
        "limit_bytes": int(limit.gigabytes * 1e9),
        "goal": limit.goal,
        "within_limit": peak is not None and peak <= limit.gigabytes * 1e9,
    }


def verdict(row: dict[str, Any]) -> str:
    """One line about a row with a limit."""
    peak = f"{row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else "out of memory"
    word = "PASS" if row["within_limit"] else "MISS" if row["goal"] else "FAIL"
    kind = "goal" if row["goal"] else "limit"
    return f"{word}  {row['limit']}: {peak}, {kind} {row['limit_bytes'] / 1e9:g} GB"


def ways(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All combinations asked for."""
    for weights, checkpointing, compiled, gan in product(args.weights, args.checkpointing, args.compile, args.gan):
        yield {
            "weights": weights,
            "checkpointing": checkpointing == "on",
            "compile": compiled == "on",
            "gan": gan == "on",
        }


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for; what this machine cannot do ends the program before anything is built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="network", help=", ".join(SIZES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=None, help="default 16 on the CPU, 1 on a GPU")
    parser.add_argument("--steps", type=int, default=4, help="student steps")
    parser.add_argument("--ratio", type=int, default=5, help="fake-score updates per student update")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=1.0, metavar="W", help="scale of the teacher, 1 for none")
    parser.add_argument("--optimizer", choices=["adamw", "adamw8bit"], default="adamw", help="of both networks")
    parser.add_argument("--quantize", choices=["none", *KINDS], default="none", help="the teacher's linear layers")
    parser.add_argument("--limits", action="store_true", help="the rows of LIMITS alone, on a GPU")
    parser.add_argument("--weights", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    for switch in ("checkpointing", "compile", "gan"):
        both = ["off", "on"] if switch == "checkpointing" else ["off"]
        parser.add_argument(f"--{switch}", nargs="+", choices=["off", "on"], default=both)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--block", type=int, default=2, help="updates per block")
    args = parser.parse_args(arguments)
    if args.limits and not torch.cuda.is_available():
        sys.exit("throughput.py --limits measures SDXL on a GPU, and torch finds none here; run it on a CUDA machine.")
    if args.limits and args.networks not in ([], ["sdxl"]):
        parser.error(f"--limits measures sdxl, so leave out {', '.join(args.networks)}")
    args.networks = ["sdxl"] if args.limits else args.networks or ["small_unet"]
    if unknown := set(args.networks) - set(SIZES):
        parser.error(f"unknown network {', '.join(sorted(unknown))}; choose from {', '.join(SIZES)}")
    try:
        if args.limits or args.optimizer == "adamw8bit":
            require_torchao("--limits" if args.limits else "--optimizer adamw8bit")
        check_quantisation(None if args.quantize == "none" else args.quantize)
    except ImportError as error:
        sys.exit(str(error))
    if args.limits:
        args.device = "cuda"
    args.batch = args.batch or (1 if args.device == "cuda" else 16)
    return args


def kept(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of earlier runs that this one does not measure again: other networks', and limits or all but them."""
    return [row for row in rows if row["network"] not in args.networks or ("limit" in row) != args.limits]


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of this run, one after the other."""
    if args.limits:
        for limit in LIMITS:
            row = judged(limit, measure("sdxl", limit.way, limit.apply(args)))
            print(verdict(row), flush=True)
            yield row
        return
    for name in args.networks:
        for way in ways(args):
            yield measure(name, way, args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write ``throughput_cpu`` or ``throughput_gpu``; rows of other networks are kept.

    Args:
        arguments: command line, None for the program's own.

    Returns:
        1 where a limit is broken, 0 otherwise.
    """
    args = options(arguments)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.device == "cpu":
        torch.set_num_threads(1)
    what = "throughput_gpu" if args.device == "cuda" else "throughput_cpu"
    latest = Path(RESULTS) / "latest" / f"{what}.json"
    rows = kept(json.loads(latest.read_text())["rows"] if latest.is_file() else [], args)
    broken = False
    for row in measured(args):
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        broken |= not (row.get("within_limit", True) or row.get("goal"))
        rows.append(row)
        write_result(what, {"rows": rows})
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
