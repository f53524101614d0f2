"""Sharded checkpoints: a folder of ``.distcp`` files, to which every process writes its part, and ``meta.pt``.

The folder holds exactly what a single file does, under names that do not depend on the number of processes:

    state_dict.<tensor>                          weights, averages, buffers
    optimizer_<i>.<parameter>.<key>              state of optimizer i, for example exp_avg
    meta.pt                                      everything else, with the parameter groups of the optimizers

so either form can be made from the other (``lightning-distill convert``) and be read by any number of processes.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_distill.checkpoint_files import remove, restore, take_place, told, write_checkpoint

__all__ = [
    "assemble",
    "begin",
    "finish",
    "from_single",
    "is_sharded",
    "metadata_damage",
    "optimizer_key",
    "part_of",
    "read_index",
    "read_meta",
    "split",
    "stored_tensors",
    "to_single",
    "write_meta",
    "write_shards",
]

META = "meta.pt"
#: what torch writes about the pieces of tensors, and where ``meta.pt`` keeps its SHA-256
_INDEX, _DIGEST = ".metadata", "index_sha256"

#: whether torch's functions take ``no_dist``; those of torch 2.6 that do are deprecated
_ALONE = "no_dist" in inspect.signature(dcp.save).parameters


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a complete sharded checkpoint; ``meta.pt`` is written last."""
    return (Path(path) / META).is_file()


def optimizer_key(index: int, parameter: str, key: str) -> str:
    """Name of one tensor of an optimizer's state."""
    return f"optimizer_{index}.{parameter}.{key}"


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the rest.

    Args:
        checkpoint: what a single file holds; its header names the parameters of each optimizer in order.

    Raises:
        ValueError: written before checkpoints named these parameters.
    """
    names = checkpoint.get("lightning_distill", {}).get("parameters")
    states = checkpoint.get("optimizer_states", [])
    if names is None and states:
        raise ValueError(
            "this checkpoint does not name the parameters of its optimizers (it was written by an earlier version); "
            "resume it once with the version at hand and convert what that writes."
        )
    tensors = {f"state_dict.{name}": value for name, value in checkpoint["state_dict"].items()}
    rest: list[dict[str, Any]] = []
    for index, optimizer in enumerate(states):
        plain: dict[int, dict[str, Any]] = {}
        for number, state in optimizer["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[optimizer_key(index, names[index][number], key)] = value
                else:
                    plain.setdefault(number, {})[key] = value
        rest.append({"state": plain, "param_groups": optimizer["param_groups"]})
    meta = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    return tensors, {**meta, "optimizer_states": rest}


def assemble(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``split``."""
    names = meta.get("lightning_distill", {}).get("parameters") or []
    state_dict, states = {}, []
    numbers = [{name: i for i, name in enumerate(group)} for group in names]
    for optimizer in meta.get("optimizer_states", []):
        state = {number: dict(values) for number, values in optimizer["state"].items()}
        states.append({"state": state, "param_groups": optimizer["param_groups"]})
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "state_dict":
            state_dict[rest] = tensor
        else:
            index = int(kind.removeprefix("optimizer_"))
            parameter, _, key = rest.rpartition(".")
            states[index]["state"].setdefault(numbers[index][parameter], {})[key] = tensor
    for optimizer in states:
        optimizer["state"] = dict(sorted(optimizer["state"].items()))
    return {**meta, "state_dict": state_dict, "optimizer_states": states}


#: names in an index of shards beside its own classes and types of numbers
_INDEX_NAMES = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Reads an index of shards and nothing that runs code."""

    def find_class(self, module: str, name: str) -> Any:
        own = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        number = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        if own or number or (module, name) in _INDEX_NAMES:
            found = super().find_class(module, name)
            if not own or isinstance(found, type):
                return found
        raise pickle.UnpicklingError(f"the index of shards names {module}.{name}, which is no part of an index")


def read_index(path: str | Path) -> Metadata:
    """Which tensors a sharded checkpoint holds and where; torch itself would unpickle whatever the file names.

    Raises:
        pickle.UnpicklingError: the file is no index.
    """
    with open(Path(path) / ".metadata", "rb") as file:
        index = _IndexUnpickler(file).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError(f"{path}/.metadata holds a {type(index).__name__} and no index of shards")
    return index


def stored_tensors(path: str | Path) -> dict[str, Tensor]:
    """Name, shape and dtype of every tensor in a sharded checkpoint, as tensors without values."""
    metadata = read_index(path).state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_meta(path: str | Path) -> dict[str, Any]:
    """What is not a tensor; plain values only.

    Raises:
        ValueError: the folder is no complete sharded checkpoint.
    """
    if not is_sharded(path):
        raise ValueError(
            f"{path} is no complete sharded checkpoint ({META} is missing); give the folder that a run with "
            "strategy role_fsdp2 wrote."
        )
    meta: dict[str, Any] = torch.load(Path(path) / META, map_location="cpu", weights_only=True)
    meta.pop(_DIGEST, None)
    return meta


def write_meta(meta: Mapping[str, Any], path: str | Path) -> None:
    """Write what is not a tensor, which makes the folder a checkpoint."""
    write_checkpoint({**meta, _DIGEST: _sha256(Path(path) / _INDEX)}, Path(path) / META)


def metadata_damage(path: str | Path) -> str | None:
    """What is wrong with torch's list of the pieces; None if it is as written, or its folder has no checksum of it."""
    recorded = torch.load(Path(path) / META, map_location="cpu", weights_only=True).get(_DIGEST)
    whole = recorded is None or recorded == _sha256(Path(path) / _INDEX)
    return None if whole else f"{_INDEX} has a wrong checksum"


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def begin(path: Path) -> None:
    """Clear the place in which the folder of a checkpoint is written; called by one process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    restore(path)  # what is removed here may be the only whole one
    remove(part_of(path))


def part_of(path: Path) -> Path:
    """The name of a folder before it is complete."""
    return path.with_name(f".{path.name}.shards.part")


def write_shards(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write this process' part of a folder; all processes call it.

    Raises:
        OSError: on every process, when one of them cannot write.
    """
    try:
        dcp.save(dict(tensors), checkpoint_id=part_of(path))
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        if not isinstance(reason, OSError):
            raise
        raise OSError(
            f"the checkpoint {path} cannot be written by process {rank}: {told(reason)}; repair that, earlier "
            "checkpoints are untouched."
        ) from reason


def finish(meta: Mapping[str, Any], path: Path) -> None:
    """Complete the folder that all processes have written to, and give it its name; called by one process."""
    write_meta(meta, part_of(path))
    take_place(part_of(path), path)


def from_single(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write a sharded checkpoint from what a single file holds, in one process."""
    tensors, meta = split(checkpoint)
    folder.mkdir(parents=True)
    try:
        if _ALONE:
            dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)
        else:
            dcp.save_state_dict(dict(tensors), dcp.FileSystemWriter(folder), no_dist=True)
        write_meta(meta, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def to_single(folder: Path) -> dict[str, Any]:
    """What a single file would hold, from a sharded checkpoint, in one process."""
    meta = read_meta(folder)
    tensors = {name: torch.empty_like(entry, device="cpu") for name, entry in stored_tensors(folder).items()}
    if _ALONE:
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    else:
        dcp.load_state_dict(tensors, dcp.FileSystemReader(folder), no_dist=True)
    return assemble(tensors, meta)
