"""Records on disk, in shards: written by many processes, resumable at any moment, read through memory maps.

    store.json                      what the records are (the key), how many, and how many per shard
    shard_000000.safetensors        the records 0 .. shard_size - 1, one tensor (rows, ...) per name
    shard_000000.jsonl              optional facts of the same records, one JSON object per line
    shard_000000.json               written last: size and SHA-256 of the shard's files, shapes and dtypes

Every file is written beside its place, flushed to the disk and renamed, so that a reader sees a whole file or none.
A shard without its last file, or one whose size or checksum is another, counts as missing and is written again.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from lightning_distill.data.claims import claimed, sweep
from lightning_distill.data.shards import (
    DTYPES,
    FORMAT,
    HEADER,
    Layout,
    difference,
    explained,
    listed,
    plain_key,
    read_header,
    shard_name,
    told,
    write_file,
)

__all__ = ["Store", "StoreWriter", "is_store", "record_weight"]


def record_weight(fact: Mapping[str, Any]) -> float:
    """How often a record of prompts is drawn beside the others; 0 for never."""
    return float(fact.get("weight", 1.0))


def is_store(path: str | Path) -> bool:
    """Whether a path is the folder of a store."""
    return (Path(path).expanduser() / HEADER).is_file()


class StoreWriter(Layout):
    """Creates a store, or goes on with one.

        writer = StoreWriter(folder, key, num_records)
        for shard in writer.missing():
            with writer.claim(shard) as mine:
                if mine:
                    writer.write(shard, make(writer.rows(shard)))

    Any number of processes may do so at the same time.

    Args:
        folder: made if it does not exist.
        key: everything the records depend on, as plain values (JSON): the same key means the same records.
        num_records: records of the complete store.
        shard_size: records per shard.

    Raises:
        ValueError: the folder holds a store of another key or something else; a size is not positive.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any], num_records: int, shard_size: int = 1024) -> None:
        if num_records < 1 or shard_size < 1:
            raise ValueError(f"num_records={num_records} and shard_size={shard_size} of a store must be 1 or more.")
        super().__init__(Path(folder).expanduser(), num_records, shard_size)
        self.key = plain_key(key)
        self._tensors: dict[str, Any] | None = None
        wanted = {"format": FORMAT, "key": self.key, "num_records": num_records, "shard_size": shard_size}
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._begin(wanted)
        found = read_header(self.folder)
        differing = difference(
            {**found["key"], **{k: found[k] for k in ("num_records", "shard_size")}},
            {**self.key, "num_records": num_records, "shard_size": shard_size},
        )
        if differing is not None:
            name, theirs, ours = differing
            raise ValueError(
                f"{self.folder} holds a store with {name}={theirs}, not {ours}; give the settings it was begun with, "
                "another folder, or remove this one."
            )

    def _begin(self, header: dict[str, Any]) -> None:
        """Write the header unless it is there; of several processes one does, and all compare with it afterwards."""
        file = self.folder / HEADER
        while not file.is_file():
            if any(not other.name.startswith((".", HEADER)) for other in self.folder.iterdir()):
                if file.is_file():  # written meanwhile, and the first shards too
                    return
                raise ValueError(f"{self.folder} holds files but no store; give a new or an empty folder.")
            with claimed(file.with_name(f"{HEADER}.lock")) as mine:
                if not mine:
                    time.sleep(0.02)
                elif not file.is_file():
                    write_file(file, (json.dumps(header, indent=1) + "\n").encode())

    def missing(self) -> list[int]:
        """Shards that are not written yet, or damaged: of another size or checksum than was written down.

        Reads every finished shard once; those that have not changed since are not read again by this object.
        """
        return self.broken(checksums=True)

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Have a shard to oneself while the block runs.

        Yields:
            True: write it now. False: another process is writing it, or it is there already.
        """
        self.rows(shard)
        name = shard_name(shard)
        with ExitStack() as stack:
            with explained(self.folder):  # not what the caller does with the claim
                mine = stack.enter_context(claimed(self.folder / f"{name}.lock"))
                if mine and self.is_whole(shard, checksums=True):
                    mine = False
                elif mine:
                    for part in self.folder.glob(f".{name}.*.part"):  # of killed processes
                        if ".lock." not in part.name:
                            part.unlink(missing_ok=True)
            yield mine

    def claims(self, shards: Sequence[int] | None = None, poll_seconds: float = 1.0) -> Iterator[int]:
        """Shards to write, one after the other, each claimed until the next is asked for.

        Ends when all of them are written, by whichever process: it waits for those that others are writing, and takes
        over what a killed process leaves.

        Args:
            shards: those to see to; None is ``missing()``.
            poll_seconds: pause between two looks at what others are writing.
        """
        left = list(self.missing() if shards is None else shards)
        while left:
            worked = False
            for shard in left:
                with self.claim(shard) as mine:
                    if mine:
                        worked = True
                        yield shard
            left = [shard for shard in left if not self.is_whole(shard, checksums=True)]
            if left and not worked:
                time.sleep(poll_seconds)
        sweep(self.folder)

    def write(
        self, shard: int, tensors: Mapping[str, Tensor], facts: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Write one shard.

        Args:
            shard: its number.
            tensors: by name, each with one row per record of ``rows(shard)``.
            facts: further plain facts, one mapping per record.

        Raises:
            ValueError: not one row per record, an unsupported dtype, or other tensors than in the other shards.
            OSError: the disk is full or cannot be written.
        """
        count, name = len(self.rows(shard)), shard_name(shard)
        if not tensors:
            raise ValueError(f"shard {shard} of {self.folder} has no tensors.")
        layout = {}
        for key, value in tensors.items():
            dtype = str(value.dtype).removeprefix("torch.")
            if value.ndim < 1 or len(value) != count or dtype not in DTYPES:
                raise ValueError(
                    f"{key} of shard {shard} is {dtype} of shape {tuple(value.shape)}; a store keeps numbers with one "
                    f"row per record, here {count}."
                )
            layout[key] = {"dtype": dtype, "shape": list(value.shape[1:])}
        if facts is not None and len(facts) != count:
            raise ValueError(f"shard {shard} has {count} records, but {len(facts)} facts.")
        self._check_layout(shard, layout)
        files: dict[str, bytes] = {
            f"{name}.safetensors": save({k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}),
        }
        if facts is not None:
            files[f"{name}.jsonl"] = "".join(json.dumps(dict(f), sort_keys=True) + "\n" for f in facts).encode()
        record = {
            "files": {
                file: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for file, data in files.items()
            },
            "tensors": layout,
        }
        with explained(self.folder):
            for file, data in files.items():
                write_file(self.folder / file, data)
            write_file(self.folder / f"{name}.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
            self._intact[shard] = self._state(record)

    def _check_layout(self, shard: int, layout: dict[str, Any]) -> None:
        if self._tensors is None:
            others = (self.record(s) for s in range(self.num_shards) if s != shard)
            self._tensors = next((record["tensors"] for record in others if record is not None), layout)
        if self._tensors != layout:
            raise ValueError(
                f"shard {shard} of {self.folder} would hold {told(layout)}, but the others hold {told(self._tensors)}."
            )


class Store(Layout):
    """A written store, read through memory maps: nothing is held in memory but what is asked for.

    Args:
        folder: folder of the store.
        complete: refuse a store of which shards are missing or have another size than was written down.

    Attributes:
        key: what the records depend on.
        names: names of the tensors.
        shapes: shape of one record, by name.
        dtypes: by name.

    Raises:
        FileNotFoundError: the folder is no store, or nothing has been written to it.
        ValueError: its files are damaged, or it is not complete.
    """

    def __init__(self, folder: str | Path, complete: bool = True) -> None:
        path = Path(folder).expanduser()
        header = read_header(path)
        super().__init__(path, header["num_records"], header["shard_size"])
        self.key: dict[str, Any] = header["key"]
        if complete and (broken := self.broken(checksums=False)):
            raise ValueError(
                f"the store {path} is not complete: {len(broken)} of {self.num_shards} shards are missing or damaged "
                f"({listed(broken)}); run the command that writes it again."
            )
        first = next((r for s in range(self.num_shards) if (r := self.record(s)) is not None), None)
        if first is None:
            raise FileNotFoundError(f"the store {path} has no finished shard; run the command that writes it.")
        self.names: list[str] = sorted(first["tensors"])
        self.shapes = {name: tuple(first["tensors"][name]["shape"]) for name in self.names}
        self.dtypes = {name: DTYPES[first["tensors"][name]["dtype"]] for name in self.names}
        self._sizes = {n: int(np.prod(self.shapes[n], dtype=np.int64)) * self.dtypes[n].itemsize for n in self.names}
        self._rows: dict[int, dict[str, np.ndarray[Any, Any]]] = {}

    def __len__(self) -> int:
        return self.num_records

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": {}}  # maps are opened anew in another process

    def verify(
        self,
        shards: Sequence[int] | None = None,
        threads: int = 1,
        report: Callable[[int], None] = lambda shard: None,
    ) -> list[int]:
        """Shards that are missing or damaged by their checksums; reads everything.

        Args:
            shards: those to read; None is all.
            threads: that read and hash at the same time.
            report: told each shard that was read, in order.
        """
        wanted = range(self.num_shards) if shards is None else shards
        for shard in wanted:
            self._intact.pop(shard, None)
        broken = []
        with ThreadPoolExecutor(threads) as pool:
            for shard, whole in zip(wanted, pool.map(lambda shard: self.is_whole(shard, checksums=True), wanted)):
                report(shard)
                if not whole:
                    broken.append(shard)
        return broken

    def gather(self, indices: Tensor | Sequence[int], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Records in any order.

        Args:
            indices: (B,), integers in [0, len).
            names: tensors wanted; None is all.

        Returns:
            by name (B, ...), in the stored dtype and the order of ``indices``.

        Raises:
            IndexError: an index outside the store.
            KeyError: an unknown name.
            ValueError: a shard that is missing or damaged.
        """
        wanted = self.names if names is None else list(names)
        if unknown := sorted(set(wanted) - set(self.names)):
            raise KeyError(f"the store {self.folder} has no {unknown[0]!r}; it has {', '.join(self.names)}.")
        where = np.asarray(torch.as_tensor(indices, device="cpu"), dtype=np.int64).reshape(-1)
        if len(where) and not (where.min() >= 0 and where.max() < self.num_records):
            raise IndexError(f"the store {self.folder} has the records 0 to {self.num_records - 1}.")
        out = {name: np.empty((len(where), self._sizes[name]), np.uint8) for name in wanted}
        order = np.argsort(where, kind="stable")
        shards, rows = np.divmod(where[order], self.shard_size)
        bounds = np.flatnonzero(np.diff(shards)) + 1
        for start, stop in zip([0, *bounds.tolist()], [*bounds.tolist(), len(where)]):
            if start == stop:
                continue
            maps = self._shard(int(shards[start]))
            places = order[start:stop]
            for name in wanted:
                if stop - start == 1:  # the usual case of shuffled batches
                    out[name][places[0]] = maps[name][rows[start]]
                else:
                    out[name][places] = maps[name][rows[start:stop]]
        return {
            name: torch.from_numpy(data.reshape(-1)).view(self.dtypes[name]).reshape(len(where), *self.shapes[name])
            for name, data in out.items()
        }

    def facts(self, indices: Tensor | Sequence[int]) -> list[dict[str, Any]]:
        """The facts written beside the tensors, in the order of ``indices``; empty mappings where there are none."""
        read: dict[int, list[str]] = {}
        found = []
        for index in torch.as_tensor(indices).reshape(-1).tolist():
            shard, row = divmod(index, self.shard_size)
            if shard not in read:
                self.rows(shard)
                file = self.folder / f"{shard_name(shard)}.jsonl"
                read[shard] = file.read_text().splitlines() if file.is_file() else []
            found.append(json.loads(read[shard][row]) if read[shard] else {})
        return found

    def _shard(self, shard: int) -> dict[str, np.ndarray[Any, Any]]:
        """The rows of a shard as bytes by name, (rows, bytes of a record), mapped on first use."""
        if shard not in self._rows:
            if not self.is_whole(shard, checksums=False):
                raise ValueError(
                    f"shard {shard} of the store {self.folder} is missing or damaged; run the command that writes it "
                    "again."
                )
            count = len(self.rows(shard))
            with open(self.folder / f"{shard_name(shard)}.safetensors", "rb") as stream:
                data = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            # safetensors: length of the header (8 bytes, little-endian), header as JSON, data
            length = int.from_bytes(data[:8].tobytes(), "little")
            try:
                header = json.loads(data[8 : 8 + length].tobytes())
                maps = {}
                for name in self.names:
                    begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
                    maps[name] = data[begin:end].reshape(count, self._sizes[name])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"shard {shard} of the store {self.folder} is damaged; run the command that writes it again."
                ) from None
            self._rows[shard] = maps
        return self._rows[shard]
