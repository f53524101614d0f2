"""``lightning-distill convert CKPT OUT``: a sharded checkpoint to a single file, or the other way round."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from lightning_distill.checkpoint_files import require_whole, write_checkpoint
from lightning_distill.checkpoints import read_checkpoint
from lightning_distill.commands.errors import CommandParser

__all__ = ["convert", "main"]


def main(words: Sequence[str]) -> None:
    """Convert a checkpoint into its other form."""
    parser = CommandParser(
        prog="lightning-distill convert",
        description="A folder of shards (role_fsdp2) becomes one file that every strategy, sample, evaluate and export "
        "read; one file becomes a folder of shards. Both can be resumed.",
    )
    parser.add_argument("checkpoint", help="folder of shards, or .ckpt file")
    parser.add_argument("out", help="what to write; must not exist")
    args = parser.parse_args(list(words))
    print(convert(Path(args.checkpoint).expanduser(), Path(args.out).expanduser()))


def convert(source: Path, out: Path) -> Path:
    """Write the other form of a checkpoint, in one process.

    Args:
        source: a sharded checkpoint (a folder) or a single file.
        out: does not exist; appears when it is complete.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: ``out`` exists.
        ValueError: ``source`` is damaged, or not a checkpoint of this package.
    """
    from lightning_distill.strategies import sharded_files

    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a checkpoint of a run.")
    if out.exists():
        raise FileExistsError(f"{out} exists; give another name, or remove it first.")
    require_whole(source)
    if source.is_dir():
        write_checkpoint(sharded_files.to_single(source), out)
    else:
        part = out.with_name(f"{out.name}.part")
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = read_checkpoint(source)
        if "lightning_distill" not in checkpoint:
            raise ValueError(f"{source} was not written by lightning_distill (its header is missing).")
        shutil.rmtree(part, ignore_errors=True)
        sharded_files.from_single(checkpoint, part)
        os.replace(part, out)
    return out
