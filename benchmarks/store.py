"""How fast shuffled batches are read from a store, beside one ``safe_open`` per record.

    python benchmarks/store.py --records 1000000

Records are noise (float16) and bytes of 1x32x32, in shards of 1,024. Every record of an epoch is asked for once, in the
order in which ``ResumableLoader`` asks. The pages have just been written: where a store is larger than the memory the
disk sets the speed.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
from results import write_result
from safetensors import safe_open

from lightning_distill.batch import Batch
from lightning_distill.data.loader import ResumableLoader
from lightning_distill.data.store import Store, StoreWriter

SHAPE = (1, 32, 32)


def fill(folder: Path, records: int, shard_size: int) -> float:
    """Write a store of random numbers; returns the seconds."""
    block = {
        "noise": torch.randn(shard_size, *SHAPE).half(),
        "x0": torch.randint(0, 256, (shard_size, *SHAPE), dtype=torch.uint8),
    }
    start = time.perf_counter()
    writer = StoreWriter(folder, {"benchmark": "store"}, records, shard_size)
    for shard in writer.claims():
        rows = writer.rows(shard)
        writer.write(shard, {k: v[: len(rows)] for k, v in block.items()} | {"index": torch.tensor(list(rows))})
    return time.perf_counter() - start


class _Whole:
    """The store as a ``Source``."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def gather(self, indices: torch.Tensor, epoch: int) -> Batch:
        found = self.store.gather(indices)
        assert torch.equal(found["index"], indices)
        return Batch(x0=found["x0"], noise=found["noise"])


def read(store: Store, batch: int, most: int) -> float:
    """Samples per second of a shuffled epoch, or of its first ``most`` samples."""
    loader = ResumableLoader(_Whole(store), batch)
    start, seen = time.perf_counter(), 0
    for found in loader:
        seen += found.size
        if seen >= most:
            break
    return seen / (time.perf_counter() - start)


def read_one_by_one(folder: Path, records: int, shard_size: int, count: int) -> float:
    """Samples per second with one ``safe_open`` per record."""
    start = time.perf_counter()
    for index in torch.randperm(records)[:count].tolist():
        shard, row = divmod(index, shard_size)
        with safe_open(folder / f"shard_{shard:06d}.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                file.get_slice(name)[row]
    return count / (time.perf_counter() - start)


def main() -> None:
    """Write, read, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--shard-size", type=int, default=1024)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--most", type=int, default=200_000, help="samples read per row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where to write (default: the folder of temporary files)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "store"
        seconds = fill(folder, options.records, options.shard_size)
        start = time.perf_counter()
        store = Store(folder)
        opened = time.perf_counter() - start
        read(store, 1024, options.records)  # all shards mapped, all pages touched
        rows = [
            {"batch_size": batch, "samples_per_second": round(read(store, batch, options.most))}
            for batch in options.batches
        ]
        single = round(read_one_by_one(folder, options.records, options.shard_size, min(5000, options.records)))
        figures = {
            "records": options.records,
            "shard_size": options.shard_size,
            "record_bytes": sum(math.prod(store.shapes[n]) * store.dtypes[n].itemsize for n in store.names),
            "bytes": sum(file.stat().st_size for file in folder.iterdir()),
            "write_records_per_second": round(options.records / seconds),
            "open_seconds": round(opened, 3),
            "shuffled": rows,
            "safe_open_per_record_samples_per_second": single,
        }
    print(json.dumps(figures, indent=1))
    write_result("store", figures, threads=options.threads, cores=os.cpu_count())


if __name__ == "__main__":
    main()
