"""``lightning-distill trajectories``: run a teacher's solver and keep what it did, for methods that learn from it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_distill.bfloat16 import bfloat16_advice
from lightning_distill.commands.errors import CommandParser, is_user_error, one_line
from lightning_distill.commands.instantiation import instantiate
from lightning_distill.commands.run_folder import find_run
from lightning_distill.data.checksums import damages, verify_stores
from lightning_distill.data.shards import read_header
from lightning_distill.data.store import StoreWriter, is_store
from lightning_distill.data.trajectories import StoredConditions
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.run_denoiser import RunDenoiser
from lightning_distill.networks.specs import DenoiserSpec, PretrainedDenoiser, ZooDenoiser, as_denoiser
from lightning_distill.times import few_step_times
from lightning_distill.trajectories import RECORDS, SOLVERS, Recipe, trajectory_key, trajectory_records
from lightning_distill.zoo import list_zoo

__all__ = ["main", "teacher_spec"]


@dataclass(frozen=True)
class _Job:
    """All that a process needs to make records; plain values, so that it can be sent to one."""

    teacher: str
    recipe: Recipe
    shape: tuple[int, ...]
    cond: str
    cond_names: list[str]
    folder: str
    key: dict[str, Any]
    num: int
    shard_size: int
    batch_size: int
    device: str

    def writer(self) -> StoreWriter:
        return StoreWriter(self.folder, self.key, self.num, self.shard_size)


def main(words: Sequence[str]) -> None:
    """Write a store of trajectories, or go on with one."""
    parser = CommandParser(
        prog="lightning-distill trajectories",
        description="Run a teacher's solver and keep what it did. Stopped at any moment, the same command goes on; "
        "several machines that share the folder share the work.",
    )
    parser.add_argument(
        "--teacher",
        required=True,
        help="shipped teacher, run folder, model folder, or a YAML file (or text) with class_path and init_args",
    )
    parser.add_argument("--out", required=True, help="folder of the store")
    parser.add_argument(
        "--records",
        choices=RECORDS,
        default="pairs",
        help="pairs: (noise, x0), the default; points: and K states between; guided: and the predictions there, guided "
        "and not",
    )
    parser.add_argument("--num", type=int, required=True, help="number of records")
    parser.add_argument(
        "--solver",
        choices=sorted(SOLVERS),
        default="dpmpp_2m",
        help="of the teacher (default: %(default)s); ddim and ode are other names of euler, dpmpp2m of dpmpp_2m",
    )
    parser.add_argument("--steps", type=int, default=50, help="steps of the solver (default: %(default)s)")
    parser.add_argument("--shift", type=float, help="shift of its grid (default: that of the teacher's process)")
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="W",
        help="scale, or smallest and largest of it (default: 1, none)",
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="native times outside of which the scale is 1 (default: guidance at all times)",
    )
    parser.add_argument("--points", type=int, help="states per record (default: all steps; pairs have none)")
    parser.add_argument(
        "--cond",
        default="classes",
        help="classes (default: in turn; nothing for unconditional teachers), or a store of conditions",
    )
    parser.add_argument(
        "--cond-keys", nargs="+", metavar="KEY", help="conditions of that store (default: all that the teacher knows)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare that store with its checksums")
    parser.add_argument("--shape", type=int, nargs="+", help="of one sample (default: the network's own)")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="of what is kept (default: %(default)s)",
    )
    parser.add_argument("--bf16", action="store_true", help="run the network under bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0, help="of noise and guidance scales (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="records per pass of the solver (default: %(default)s)"
    )
    parser.add_argument("--shard-size", type=int, default=1024, help="records per file (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes; on several GPUs each has its own in turn (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    args = parser.parse_args(list(words))
    for name in ("num", "steps", "batch_size", "shard_size", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more.")
    if len(args.guidance) > 2:
        raise ValueError(f"--guidance {args.guidance}: give one scale, or the smallest and the largest.")
    if args.guidance_interval is not None and not args.guidance_interval[0] < args.guidance_interval[1]:
        raise ValueError(f"--guidance-interval {args.guidance_interval}: give the lower time, then the higher one.")
    device = _device(args.device)
    if args.bf16 and (advice := bfloat16_advice(torch.device(device).type, "leave --bf16 out")):
        print(advice, file=sys.stderr)
    denoiser = _build(args.teacher)
    shape = tuple(args.shape or denoiser.sample_shape or ())
    if not shape:
        raise ValueError(f"{type(denoiser.network).__name__} does not know the shape of its samples; give --shape.")
    points = 0 if args.records == "pairs" else args.steps
    recipe = Recipe(
        args.records,
        tuple(few_step_times(denoiser.process, args.steps, args.shift)),
        args.solver,
        (args.guidance[0], args.guidance[-1]),
        points if args.points is None else args.points,
        args.dtype,
        args.seed,
        args.bf16,
        None if args.guidance_interval is None else tuple(args.guidance_interval),
    )
    conditions = _conditions(args.cond, args.cond_keys, denoiser)
    if conditions is not None and not args.no_verify:
        verify_stores([conditions.store], "--no-verify")
    identity = conditions.identity() if conditions else "classes" if denoiser.num_classes is not None else "none"
    # one evaluation of the network shows what does not fit together, before anything is written
    first = None if conditions is None else conditions.gather(torch.arange(1))
    trajectory_records(
        denoiser.to(device), replace(recipe, times=recipe.times[:1], points=min(1, recipe.points)), 0, 1, shape, first
    )
    job = _Job(
        args.teacher,
        recipe,
        shape,
        args.cond,
        conditions.names if conditions else [],
        args.out,
        _comparable(trajectory_key(denoiser, recipe, shape, identity), Path(args.out).expanduser()),
        args.num,
        args.shard_size,
        args.batch_size,
        device,
    )
    writer = job.writer()
    missing = writer.missing()
    for line in damages(writer, missing):
        print(line, file=sys.stderr)
    bar = _Bar(args.num, args.num - sum(len(writer.rows(shard)) for shard in missing))
    with bar:
        if args.workers == 1:
            _make(job, denoiser, missing, bar.advance)
        elif missing:
            denoiser.to("cpu")  # each process has its own copy
            _make_in_processes(job, missing, min(args.workers, len(missing)), bar.advance)
    print(f"{args.num} records in {Path(args.out)}")


def teacher_spec(text: str) -> DenoiserSpec:
    """The teacher that a command line names.

    Args:
        text: name of a shipped teacher; folder of a run; folder of a diffusers pipeline, or a model on the local hub;
            or ``class_path`` and ``init_args`` of any spec, as YAML or a file of it.

    Raises:
        ValueError: the YAML is no spec.
    """
    if "class_path" in text or text.endswith((".yaml", ".yml", ".json")):
        from lightning_distill.cli import import_everything

        import_everything()
        content = yaml.safe_load(Path(text).expanduser().read_text() if Path(text).expanduser().is_file() else text)
        return instantiate(DenoiserSpec, "teacher", content)  # type: ignore[type-abstract]
    if text in list_zoo():
        return ZooDenoiser(text)
    try:
        find_run(text)
    except FileNotFoundError:
        return PretrainedDenoiser(text)
    return RunDenoiser(text)


def _build(teacher: str) -> Denoiser:
    return as_denoiser(teacher_spec(teacher)).requires_grad_(False).eval()


def _conditions(cond: str, keys: list[str] | None, denoiser: Denoiser) -> StoredConditions | None:
    if cond == "classes":
        if keys is not None:
            raise ValueError(f"--cond-keys {' '.join(keys)}: give the store that has them as --cond.")
        return None
    return StoredConditions.chosen(cond, keys, denoiser.family.cond_keys)


def _comparable(key: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The key, without what a store that an earlier version began does not say; it is finished as it was begun."""
    if not is_store(folder):
        return key
    begun = read_header(folder)["key"]
    if begun.get("kind") != "trajectories" or "denoiser" in begun:
        return key
    print(
        f"{folder} was begun by an earlier version, which did not write down how the teacher's network is read and "
        "what its guidance leads away from: this is not compared, so go on with the same teacher only",
        file=sys.stderr,
    )
    process = {k: v for k, v in key["process"].items() if k != "angles"}
    return {**{k: v for k, v in key.items() if k != "denoiser"}, "process": process}


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name)
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name}: there is no such device here; give auto, cpu, cuda or cuda:N.") from None
    return name


# ------------------------------------------------------------------------------------------------------ making
def _make(job: _Job, denoiser: Denoiser, shards: Sequence[int], advance: Callable[[int], None]) -> None:
    """Write shards, those that no other process writes."""
    writer = job.writer()
    conditions = None if not job.cond_names else StoredConditions(job.cond, job.cond_names)
    for shard in writer.claims(shards):
        rows = writer.rows(shard)
        parts = []
        # batches begin anew in every shard, so that its bytes do not depend on who made which shard
        for first in range(rows.start, rows.stop, job.batch_size):
            n = min(job.batch_size, rows.stop - first)
            cond = None if conditions is None else conditions.gather(torch.arange(first, first + n))
            parts.append(trajectory_records(denoiser, job.recipe, first, n, job.shape, cond))
            advance(n)
        writer.write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _make_in_processes(job: _Job, shards: list[int], workers: int, advance: Callable[[int], None]) -> None:
    """The same in several processes.

    Raises:
        ValueError: what a process could not do, in its own sentence.
        RuntimeError: a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    threads = max(1, torch.get_num_threads() // workers)
    processes = []
    for index in range(workers):
        start = index * len(shards) // workers  # each begins elsewhere, and helps the others at the end
        device = job.device
        if device == "cuda":
            device = f"cuda:{index % torch.cuda.device_count()}"
        arguments = (replace(job, device=device), shards[start:] + shards[:start], threads, messages)
        processes.append(context.Process(target=_work, args=arguments, daemon=True))
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes) or not messages.empty():
            try:
                message = messages.get(timeout=0.2)
            except queue.Empty:
                if dead := [p for p in processes if p.exitcode not in (None, 0)]:
                    code = dead[0].exitcode or 0
                    how = f"was stopped by signal {-code} (was the memory used up?)" if code < 0 else "failed"
                    raise RuntimeError(
                        f"a process {how}; finished shards are kept: run the same command again, perhaps with fewer "
                        "--workers."
                    ) from None
                continue
            if isinstance(message, str):
                raise ValueError(message)
            advance(message)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(job: _Job, shards: list[int], threads: int, messages: Any) -> None:
    """A process of ``_make_in_processes``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        _make(job, _build(job.teacher).to(job.device), shards, messages.put)
    except Exception as error:
        if not is_user_error(error):
            raise
        messages.put(one_line(error))


def _leave_with_parent() -> None:
    """End this process when the one that started it is gone, however that was stopped."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


# ---------------------------------------------------------------------------------------------------- progress
class _Bar:
    """Records made: a live line on a terminal, elsewhere one line every tenth of the work."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.begun = total, done, done
        self.start = time.monotonic()
        self.console = Console()
        self.shown = 10 * done // total
        self.live: Progress | None = None
        if self.console.is_terminal:
            columns = (TextColumn("records"), BarColumn(bar_width=40), MofNCompleteColumn(), TimeRemainingColumn())
            self.live = Progress(*columns, console=self.console)
            self.task = self.live.add_task("", total=total, completed=done)

    def __enter__(self) -> _Bar:
        if self.live is not None:
            self.live.start()
        if self.done:
            self.console.print(f"{self.done} of {self.total} records are there already", highlight=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def advance(self, n: int) -> None:
        """N more records were made."""
        self.done += n
        if self.live is not None:
            self.live.update(self.task, completed=self.done)
        elif 10 * self.done // self.total > self.shown:
            self.shown = 10 * self.done // self.total
            speed = (self.done - self.begun) / max(1e-9, time.monotonic() - self.start)
            self.console.print(f"{self.done}/{self.total} records  {speed:.3g}/s", highlight=False)
