"""What protects a run: a lock on its folder, and advice when the memory does not suffice."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from lightning_distill.checkpoint_files import told
from lightning_distill.data.claims import claimed

__all__ = ["lock_file", "memory_advice", "run_lock"]

_OTHER_FOLDER = "--trainer.logger.init_args.version=... (or --trainer.default_root_dir=... without a logger)"


def lock_file(folder: Path, inside: bool = False) -> Path:
    """The lock of a run folder: beside it, since loggers want an empty folder, or ``inside`` of it."""
    return folder / ".run.lock" if inside else folder.with_name(f".{folder.name}.lock")


@contextmanager
def run_lock(folder: Path, inside: bool = False) -> Iterator[None]:
    """Keep other runs out of a run folder while the block runs; the lock of a killed run is taken over.

    Args:
        folder: run folder.
        inside: where the lock is, see ``lock_file``; its folder is made.

    Raises:
        FileExistsError: another run writes there.
        OSError: the folder cannot be written.
    """
    file = lock_file(folder, inside)
    with ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists() and not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            ours = stack.enter_context(claimed(file))
        except OSError as error:
            raise OSError(
                f"the run folder {folder} cannot be written: {told(error)}; repair that, or give another folder with "
                f"{_OTHER_FOLDER}."
            ) from error
        if not ours:
            raise FileExistsError(
                f"another run ({_owner(file)}) writes into {folder}; wait for it or stop it, or give another folder "
                f"with {_OTHER_FOLDER}."
            )
        yield


def _owner(file: Path) -> str:
    try:
        content = json.loads(file.read_text())
        return f"process {content['pid']} on host {content['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its lock is {file}"


@contextmanager
def memory_advice() -> Iterator[None]:
    """Re-raise an error of too little memory with what can be changed.

    Raises:
        torch.OutOfMemoryError: as in the block, with one sentence.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate" not in text:
            raise
        first = " ".join(text.splitlines()[0].split(". ")[:2]).rstrip(". ")
        raise torch.OutOfMemoryError(
            f"the memory does not suffice ({first}); raise model.accumulate_grad_batches (it splits each batch) or "
            "lower data.batch_size, set model.activation_checkpointing, train Lora roles instead of copies, store the "
            "frozen weights in few bits (PretrainedDenoiser quantize=nf4), and look at 'lightning-distill plan -c "
            "CONFIG.yaml', which adds up the memory before a run."
        ) from error
