"""``lightning-distill cache``: text embeddings, and latents of pictures, computed once and kept in a store.

Several processes, on one machine or on several with a common file system, may run the same command at the same time.
After an interruption, however hard, the same command goes on and ends with the same shards.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_distill.commands.errors import CommandParser
from lightning_distill.data.buckets import Bucket, make_buckets
from lightning_distill.data.cached import check_alike
from lightning_distill.data.checksums import damages
from lightning_distill.data.encoding import Encoders, Part, Plan, Record, fill, make_parts, write_null
from lightning_distill.data.image_text import ImageText, find_image_text, from_prompts
from lightning_distill.data.prompts import read_prompts
from lightning_distill.data.store import Store, is_store
from lightning_distill.networks.autoencoders import autoencoder_folder
from lightning_distill.networks.text import TextEncoder

__all__ = ["main"]

_DTYPES = ("float32", "bfloat16", "float16")


def main(words: Sequence[str]) -> None:
    """Plan, encode what is missing, and say what there is."""
    args = _parser().parse_args(list(words))
    _check_numbers(args)
    out = Path(args.out).expanduser()
    records = _records(args)
    negative = _negative(args.negative_prompt, records)
    pictures = isinstance(records[0], ImageText)
    if pictures and not (args.vae or args.pipeline):
        raise ValueError("--vae is needed with --text-encoder and pictures: the folder of an autoencoder.")
    encoders = Encoders(
        args.pipeline,
        args.text_encoder,
        str(autoencoder_folder(args.vae or args.pipeline)) if pictures else None,
        args.dtype,
        args.max_length,
    )
    size = None if args.resolution is None or pictures else (args.resolution, args.resolution)
    encoder = encoders.text(args.device, size)  # complains about a folder before any picture is looked at
    parts = make_parts(out, encoders, records, _buckets(args, pictures), args.frames, size, negative, args.skip_broken)
    check_alike(sorted(folder for folder in out.glob("*") if is_store(folder)), parts[0].key)
    plan = Plan(encoders, parts, args.shard_size, args.batch_size, args.frames, args.skip_broken, size)
    writers = [plan.writer(part) for part in parts]
    missing = [writer.missing() for writer in writers]
    for writer, shards in zip(writers, missing):
        for line in damages(writer, shards):
            print(line, file=sys.stderr)
    done = [len(p.records) - sum(len(w.rows(s)) for s in shards) for p, w, shards in zip(parts, writers, missing)]
    null = write_null(out, encoder, parts[0].key)
    if sum(done) < len(records):
        _run(plan, args, done, encoder if args.workers == 1 else None)
    _summary(parts, null, args.skip_broken)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="lightning-distill cache", description="Compute text embeddings and latents once, into a store."
    )
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument("--pipeline", help="folder of the teacher's diffusers pipeline")
    encoder.add_argument("--text-encoder", help="folder of a plain text model, instead of a pipeline")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", help="file of prompts: txt, csv, jsonl or parquet")
    source.add_argument("--images", help="folder of pictures with captions, or of webdataset .tar files")
    parser.add_argument("--out", required=True, help="folder of the store; the same command continues it")
    parser.add_argument("--column", help="name of the column with the prompt or caption")
    parser.add_argument("--negative-prompt", help="what guidance leads away from (default: the pipeline's own)")
    parser.add_argument("--vae", help="folder of the autoencoder (default: the pipeline's)")
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels; with --buckets, of the square")
    parser.add_argument("--buckets", action="store_true", help="keep aspect ratios: one store per size")
    parser.add_argument(
        "--bucket-step", type=int, default=64, help="sides of buckets are multiples of it (default: 64)"
    )
    parser.add_argument("--max-ratio", type=float, default=2.0, help="largest aspect ratio of a bucket (default: 2)")
    parser.add_argument(
        "--frames", type=int, default=1, help="frames of each animated picture, for video models (default: 1)"
    )
    parser.add_argument("--max-length", type=int, help="tokens per prompt (default: the pipeline's own)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="bfloat16", help="of the encoders and the embeddings (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="records per pass (default: %(default)s)")
    parser.add_argument("--shard-size", type=int, default=1024, help="records per file (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; on GPUs, one or more each (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one, or cpu",
    )
    parser.add_argument("--skip-broken", action="store_true", help="leave out what has no picture that can be read")
    return parser


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("batch_size", "shard_size", "workers", "frames", "bucket_step"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more.")
    for name in ("max_length", "resolution"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--device {args.device} cannot be used ({reason}); give cpu or a device of this machine."
        ) from None


def _records(args: argparse.Namespace) -> Sequence[Record]:
    if args.images is not None:
        return find_image_text(args.images, args.column, args.skip_broken)
    prompts = read_prompts(args.prompts, args.column)
    return from_prompts(prompts) if any(p.image is not None for p in prompts) else prompts


def _negative(given: str | None, records: Sequence[Record]) -> str | None:
    """The one negative prompt: a teacher's guidance has one unconditional embedding."""
    found = {record.negative for record in records} - {None}
    if given is not None or not found:
        return given
    if len(found) > 1:
        first, second = sorted(str(text) for text in found)[:2]
        raise ValueError(
            f"the column negative_prompt holds {len(found)} different texts ({first[:40]!r}, {second[:40]!r}, ...), "
            "but guidance has one unconditional embedding; say which one with --negative-prompt."
        )
    text = str(found.pop())
    if count := sum(record.negative is None for record in records):
        print(
            f"{count} of {len(records)} rows have no negative_prompt; that of the others, {text[:60]!r}, holds for all",
            file=sys.stderr,
        )
    return text


def _buckets(args: argparse.Namespace, pictures: bool) -> list[Bucket]:
    if not pictures:
        return []
    if args.resolution is None:
        raise ValueError("--resolution is needed for pictures: the side in pixels that the teacher was trained at.")
    if args.buckets:
        return make_buckets(args.resolution, args.bucket_step, args.max_ratio)
    return [Bucket(args.resolution, args.resolution)]


# ------------------------------------------------------------------------------------------------ running
def _run(plan: Plan, args: argparse.Namespace, done: Sequence[int], encoder: TextEncoder | None) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = sum(len(part.records) for part in plan.parts)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("records", total=total, completed=sum(done))

        def report(records: int) -> None:
            progress.advance(task, records)

        if not console.is_terminal:
            console.print(f"{total - sum(done)} of {total} records to encode", highlight=False)
        if args.workers == 1:
            fill(plan, args.device, report=report, encoder=encoder)
        else:
            _run_workers(plan, args, report)
        progress.update(task, completed=total)


def _run_workers(plan: Plan, args: argparse.Namespace, report: Any) -> None:
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    workers = [
        context.Process(target=_worker, args=(plan, _device(args.device, i), i, args.workers, messages), daemon=True)
        for i in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers) or not messages.empty():
            try:
                kind, value = messages.get(timeout=0.2)
            except queue.Empty:
                if dead := [w for w in workers if w.exitcode not in (None, 0)]:
                    raise RuntimeError(
                        f"a worker process was ended from outside (exit status {dead[0].exitcode}); is there enough "
                        "memory for --workers? The same command goes on where this one stopped."
                    ) from None
                continue
            if kind == "error":
                raise ValueError(value)
            report(value)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            worker.join()


def _worker(plan: Plan, device: str, index: int, count: int, messages: Any) -> None:
    """One process of ``--workers``."""
    from lightning_distill.commands.errors import is_user_error, one_line

    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        missing = max(len(plan.writer(part).missing()) for part in plan.parts)
        fill(plan, device, first=index * missing // count, report=lambda n: messages.put(("records", n)))
    except Exception as error:
        if not is_user_error(error):
            raise
        messages.put(("error", one_line(error)))


def _device(device: str, index: int) -> str:
    """The GPUs of this machine in turn, unless one was named."""
    return f"cuda:{index % torch.cuda.device_count()}" if device == "cuda" else device


def _summary(parts: Sequence[Part], null: Path, skip_broken: bool) -> None:
    broken = []
    for part in parts:
        store = Store(part.folder)
        shapes = ", ".join(f"{n} {'x'.join(map(str, store.shapes[n])) or 'scalar'}" for n in store.names)
        print(f"{store.folder}: {len(store)} records ({shapes})")
        if skip_broken:
            facts = store.facts(range(len(store)))
            broken += [r.name for r, fact in zip(part.records, facts) if isinstance(r, ImageText) and "broken" in fact]
    if broken:
        print(f"{len(broken)} of the pictures cannot be read and are never drawn (first: {broken[0]})")
    print(f"{null}: the unconditional embedding, null_cond=... of the teacher")
