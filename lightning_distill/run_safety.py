"""What protects a run: a lock on its folder, and advice when the memory does not suffice."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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

    A run on this machine is seen to live or not. One on another machine, or in another container, is waited for: a job
    that was requeued on another node finds the lock of its own earlier life.

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
            ours = stack.enter_context(claimed(file, lambda longest: _tell_of_wait(folder, file, longest)))
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


def _tell_of_wait(folder: Path, file: Path, longest: float) -> None:
    print(
        f"{folder} is locked by {_owner(file)}; watching for at most {longest:.0f} s whether that still runs.",
        file=sys.stderr,
        flush=True,
    )


def _owner(file: Path) -> str:
    try:
        content = json.loads(file.read_text())
        return f"process {content['pid']} on host {content['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its lock is {file}"


@contextmanager
def memory_advice(batch: Callable[[], str] | None = None) -> Iterator[None]:
    """Re-raise an error of too little memory with what was used and what can be changed.

    Args:
        batch: says what the samples of a forward were, when it is asked.

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
        facts = "; ".join([first, *_memory_used(), *([batch()] if batch is not None else [])])
        raise torch.OutOfMemoryError(
            f"the memory does not suffice ({facts}); raise model.accumulate_grad_batches (it splits each batch) or "
            "lower data.batch_size, set model.activation_checkpointing, train Lora roles instead of copies, use "
            "AdamW8bit, store the frozen weights in few bits (PretrainedDenoiser quantize=nf4); 'lightning-distill "
            "plan -c CONFIG.yaml' adds up the memory before a run."
        ) from error


def _memory_used() -> list[str]:
    """Peak and size of the GPU's memory, or of the host's where no GPU was used."""
    with suppress(Exception):  # a device in an error state answers nothing
        if torch.cuda.is_initialized():
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            return [f"allocated peak {_gib(torch.cuda.max_memory_allocated())} of {_gib(total)}"]
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return [f"this process' peak {_gib(peak)}, the host has {_gib(total)}"]
    return []


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
