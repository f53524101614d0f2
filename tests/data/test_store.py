"""The store: what is written is read, whoever writes it and whenever writing is stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_distill.data import CachedConditions, checksums, claims, shards
from lightning_distill.data.checksums import damage, verify_stores
from lightning_distill.data.store import Store, StoreWriter, is_store

KEY = {"kind": "test", "settings": {"steps": 8, "scales": [1.0, 2.5]}, "name": None}
NUM, SIZE = 100, 16
FORK = multiprocessing.get_context("fork")


def rows_of(rows: range, width: int = 8) -> dict[str, torch.Tensor]:
    """Records as a function of their index."""
    index = torch.tensor(list(rows))
    return {
        "half": (index[:, None, None] + torch.arange(2 * width).view(2, width) / 64).half(),
        "bytes": (index[:, None] * 7 + torch.arange(3)).to(torch.uint8),
        "brain": index.bfloat16()[:, None],
        "index": index,
        "flag": index % 3 == 0,
    }


def fill(folder, width=8, num=NUM, size=SIZE, log=None, delay=0.0):
    writer = StoreWriter(folder, KEY, num, size)
    for shard in writer.claims(poll_seconds=0.01):
        writer.write(shard, rows_of(writer.rows(shard), width))
        if log is not None:
            with open(log, "a") as stream:
                stream.write(f"{shard}\n")
        time.sleep(delay)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "cache"))


def flip(file):
    """One bit, as a disk does it: size and time stay."""
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}


@pytest.fixture
def filled(tmp_path):
    fill(tmp_path / "store")
    return tmp_path / "store"


# ----------------------------------------------------------------------------------------------- reading
def test_records_come_in_the_order_asked_for_and_in_their_dtypes(filled):
    store = Store(filled)
    indices = torch.tensor([99, 0, 50, 50, 3, 16, 15, 98])
    found, want = store.gather(indices), rows_of(range(NUM))
    assert len(store) == NUM
    assert store.names == sorted(want)
    for name, values in want.items():
        assert found[name].dtype == store.dtypes[name] == values.dtype
        assert store.shapes[name] == tuple(values.shape[1:])
        assert torch.equal(found[name], values[indices])
    assert store.gather([], ["half"])["half"].shape == (0, 2, 8)
    assert set(store.gather([1], ["index"])) == {"index"}
    assert store.key == KEY
    assert is_store(filled)
    assert not is_store(filled.parent)


def test_every_record_is_found_once_in_a_shuffled_epoch(filled):
    store, order = Store(filled), torch.randperm(NUM)
    seen = torch.cat([store.gather(order[i : i + 7])["index"] for i in range(0, NUM, 7)])
    assert torch.equal(seen, order)


def test_shards_are_plain_safetensors_and_a_store_can_be_sent_to_a_process(filled):
    plain = load_file(filled / "shard_000002.safetensors")
    assert torch.equal(plain["index"], torch.arange(32, 48))
    store = Store(filled)
    store.gather([0])
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.gather([7])["half"], store.gather([7])["half"])


def test_what_is_read_may_be_changed_without_changing_the_store(filled):
    store = Store(filled)
    store.gather([0])["half"].fill_(-1)
    assert torch.equal(store.gather([0])["half"], rows_of(range(1))["half"])


def test_facts_stand_beside_the_tensors(tmp_path):
    writer = StoreWriter(tmp_path / "s", {}, 5, 2)
    for shard in writer.missing():
        rows = writer.rows(shard)
        writer.write(shard, {"x": torch.tensor(list(rows))}, [{"prompt": f"é {i}"} for i in rows])
    assert Store(tmp_path / "s").facts([4, 0, 3]) == [{"prompt": f"é {i}"} for i in (4, 0, 3)]
    (tmp_path / "s" / "shard_000001.jsonl").write_text("{}\n{}\n")
    assert StoreWriter(tmp_path / "s", {}, 5, 2).missing() == [1]


def test_bad_questions_are_refused(filled, tmp_path):
    store = Store(filled)
    for index in (-1, NUM):
        with pytest.raises(IndexError, match="records 0 to 99"):
            store.gather([index])
    with pytest.raises(KeyError, match="no 'latents'; it has brain, bytes"):
        store.gather([0], ["latents"])
    with pytest.raises(FileNotFoundError, match=r"is not a store: it has no store\.json"):
        Store(tmp_path)
    (filled / "store.json").write_text('{"format": 1, "key"')
    with pytest.raises(ValueError, match=r"store\.json is damaged"):
        Store(filled)
    (filled / "store.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match="format 7; this version reads 1"):
        Store(filled)


# ----------------------------------------------------------------------------------------------- writing
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": {**KEY, "settings": {"steps": 9, "scales": [1.0, 2.5]}}}, r"settings\.steps=8, not 9"),
        ({"key": {**KEY, "extra": 1}}, "extra=nothing, not 1"),
        ({"key": {"kind": "test", "settings": KEY["settings"]}}, "name=None, not nothing"),
        ({"num": 99}, "num_records=100, not 99"),
        ({"size": 32}, "shard_size=16, not 32"),
    ],
)
def test_another_key_is_refused_by_the_entry_that_differs(filled, change, message):
    before = digests(filled)
    with pytest.raises(ValueError, match=message):
        StoreWriter(filled, change.get("key", KEY), change.get("num", NUM), change.get("size", SIZE))
    assert digests(filled) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_size": 0}, "shard_size is 0, not a positive integer"),
        ({"num_records": "16"}, "num_records is '16', not a positive integer"),
        ({"num_records": -3}, "num_records is -3, not a positive integer"),
        ({"num_records": True}, "num_records is True, not a positive integer"),
        ({"key": [1]}, "its key is no mapping"),
    ],
    ids=["no-size", "text", "negative", "bool", "key"],
)
def test_a_header_that_makes_no_sense_is_refused(filled, change, message):
    header = Path(filled) / "store.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"store\.json is damaged \({message}\); remove the folder"):
        Store(filled)


def test_a_folder_with_other_files_is_no_place_for_a_store(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds files but no store"):
        StoreWriter(tmp_path, KEY, 1)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    writer = StoreWriter(tmp_path / "s", KEY, 10, 4)
    with pytest.raises(ValueError, match=r"x of shard 2 is float32 of shape \(4, 1\).*one row per record, here 2"):
        writer.write(2, {"x": torch.zeros(4, 1)})
    writer.write(0, {"x": torch.zeros(4, 1)})
    for other in ({"x": torch.zeros(4, 2)}, {"x": torch.zeros(4, 1).half()}, {"y": torch.zeros(4, 1)}):
        with pytest.raises(ValueError, match=r"but the others hold x float32 \(1,\)"):
            StoreWriter(tmp_path / "s", KEY, 10, 4).write(1, other)
    with pytest.raises(ValueError, match="has no tensors"):
        writer.write(1, {})
    with pytest.raises(ValueError, match="complex64"):
        writer.write(1, {"x": torch.zeros(4, 1, dtype=torch.complex64)})
    with pytest.raises(IndexError, match="shards 0 to 2, not 3"):
        writer.rows(3)
    with pytest.raises(TypeError, match="numbers, strings, lists and mappings only"):
        StoreWriter(tmp_path / "t", {"x": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match="must be 1 or more"):
        StoreWriter(tmp_path / "t", {}, 0)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "longer", "gone", "no record", "damaged record"])
def test_a_damaged_shard_is_found_named_and_made_again(filled, damage):
    whole = digests(filled)
    file, record = filled / "shard_000003.safetensors", filled / "shard_000003.json"
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[:-10])
    elif damage == "flipped":
        data[-5] ^= 4
        file.write_bytes(data)
    elif damage == "longer":
        file.write_bytes(data + b"\0")
    elif damage == "gone":
        file.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:40])
    if damage == "flipped":  # of the right size: only its checksum tells
        assert Store(filled).verify() == [3]
    else:
        with pytest.raises(ValueError, match=r"not complete: 1 of 7 shards are missing or damaged \(3\); run the"):
            Store(filled)
    partial = Store(filled, complete=False)
    assert partial.verify() == [3]
    assert torch.equal(partial.gather([0, 99])["index"], torch.tensor([0, 99]))
    if damage != "flipped":
        with pytest.raises(ValueError, match=r"shard 3 of the store .* is missing or damaged"):
            partial.gather([0, 50])
    assert StoreWriter(filled, KEY, NUM, SIZE).missing() == [3]
    fill(filled)
    assert digests(filled) == whole
    assert Store(filled).verify() == []


def test_a_finished_shard_is_read_for_its_checksum_once(filled, monkeypatch):
    reads = []
    real = shards._sha256
    monkeypatch.setattr(shards, "_sha256", lambda file: reads.append(file.name) or real(file))
    writer = StoreWriter(filled, KEY, NUM, SIZE)
    assert writer.missing() == []
    assert writer.missing() == []
    assert len(reads) == writer.num_shards == 7
    os.utime(filled / "shard_000001.safetensors", (1, 1))
    assert writer.missing() == []
    assert len(reads) == 8


# ----------------------------------------------------------------------------------------- before training
@pytest.fixture
def reads(monkeypatch):
    """Names of the files that are hashed."""
    names, real = [], shards._sha256
    monkeypatch.setattr(shards, "_sha256", lambda file: names.append(file.name) or real(file))
    return names


def test_unchanged_shards_are_read_once_per_machine(filled, reads, tmp_path):
    verify_stores([Store(filled)], "verify=false")
    assert sorted(reads) == [f"shard_00000{i}.safetensors" for i in range(7)]
    verify_stores([Store(filled)], "verify=false")
    assert len(reads) == 7
    os.utime(filled / "shard_000001.safetensors", (1, 1))
    verify_stores([Store(filled)], "verify=false")
    assert reads[7:] == ["shard_000001.safetensors"]
    (file,) = (tmp_path / "cache" / "verified").iterdir()
    found = json.loads(file.read_text())["shards"]["shard_000001"]["shard_000001.safetensors"]
    data = filled / "shard_000001.safetensors"
    assert found == [data.stat().st_size, 10**9, digests(filled)[data.name]]
    for spoilt in (
        "{",
        "[]",
        '{"folder": 1}',
        json.dumps({"folder": str(filled.resolve()), "shards": {"shard_000000": 3}}),
    ):
        file.write_text(spoilt)
        del reads[:]
        verify_stores([Store(filled)], "verify=false")
        assert len(reads) == 7
    verify_stores([Store(filled)], "verify=false", tmp_path / "another_machine")
    assert len(reads) == 14


def test_a_flipped_bit_is_refused_and_only_its_shard_is_read_again(filled, reads):
    flip(filled / "shard_000004.safetensors")
    store = Store(filled)
    sentence = (
        r"shard_000004\.safetensors does not match its checksum; run the command that wrote the store "
        r"\(lightning-distill cache \.\.\. --out .*store\) once more, .*, or leave the comparison out with "
        r"verify=false\."
    )
    for hashed in (7, 1):
        del reads[:]
        with pytest.raises(ValueError, match=sentence):
            verify_stores([store], "verify=false")
        assert set(reads[:hashed]) >= {"shard_000004.safetensors"}
        assert len(set(reads)) == hashed
    flip(filled / "shard_000001.safetensors")
    verified = Path(os.environ["LIGHTNING_DISTILL_CACHE"]) / "verified"
    next(verified.iterdir()).unlink()
    with pytest.raises(ValueError, match=r"shard_000001.* \(and 1 more of its shards are damaged\); run the"):
        verify_stores([store], "verify=false")
    fill(filled)
    verify_stores([Store(filled)], "verify=false")


def test_every_kind_of_damage_has_its_words(filled):
    writer = StoreWriter(filled, KEY, NUM, SIZE)
    files = [filled / f"shard_{i:06d}.safetensors" for i in range(7)]
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].unlink()
    flip(files[2])
    (filled / "shard_000003.json").write_text("{")
    (filled / "shard_000004.json").unlink()  # as an interrupted command leaves it
    size = files[5].stat().st_size
    assert damage(writer, 0) == f"{files[0]} has 100 bytes instead of {size}"
    assert damage(writer, 1) == f"{files[1]} is missing"
    assert damage(writer, 2) == f"{files[2]} does not match its checksum"
    assert damage(writer, 3) == f"{filled / 'shard_000003.json'} cannot be read"
    assert [damage(writer, i) for i in (4, 5)] == [None, None]
    missing = writer.missing()
    assert missing == [0, 1, 2, 3, 4]
    assert [line.rsplit("; ", 1)[1] for line in checksums.damages(writer, missing)] == ["made again"] * 4


def test_data_modules_compare_before_training(filled, reads):
    data = CachedConditions(str(filled), cond_keys=["half"])
    data.prepare_data()
    assert len(reads) == 7
    flip(filled / "shard_000006.safetensors")
    os.utime(filled / "shard_000006.safetensors")
    CachedConditions(str(filled), verify=False).prepare_data()
    assert len(reads) == 7
    with pytest.raises(ValueError, match=r"shard_000006\.safetensors does not match its checksum"):
        data.prepare_data()


def test_a_large_store_says_that_it_is_read(filled, monkeypatch, caplog):
    monkeypatch.setattr(checksums, "LARGE", 1000)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        verify_stores([Store(filled)], "verify=false")
        assert "of its shards" not in caplog.text
        assert "with their checksums, once on this machine" in caplog.text
        assert "GB/s" in caplog.text
        caplog.clear()
        verify_stores([Store(filled)], "verify=false")
        assert not caplog.text


def test_a_cache_that_cannot_be_written_only_warns(filled, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written .*so that stores are read at every start"):
        verify_stores([Store(filled)], "verify=false", tmp_path / "file")


# ------------------------------------------------------------------------------------------ several processes
def test_two_processes_share_the_work(tmp_path):
    fill(tmp_path / "alone", num=640)
    log = tmp_path / "log"
    both = [FORK.Process(target=fill, args=(tmp_path / "both", 8, 640, SIZE, log, 0.002)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    assert digests(tmp_path / "both") == digests(tmp_path / "alone")
    written = [int(line) for line in log.read_text().split()]
    assert sorted(written) == list(range(40)), "every shard was written, and once"


def test_a_store_survives_kill_9_at_any_moment(tmp_path):
    """Many lives: whatever a killed process leaves, the next one goes on, and the result is the same to the byte."""
    width, num, size = 4096, 480, 8
    start = time.monotonic()
    calm = FORK.Process(target=fill, args=(tmp_path / "calm", width, num, size))
    calm.start()
    calm.join()
    whole_life = time.monotonic() - start
    folder, chance = tmp_path / "killed", random.Random(0)
    left, lives = [60], 0
    while left[-1] and lives < 10:
        process = FORK.Process(target=fill, args=(folder, width, num, size))
        process.start()
        time.sleep(chance.uniform(0.01, 0.3) * whole_life)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lives += 1
        if is_store(folder):
            writer = StoreWriter(folder, KEY, num, size)
            left.append(len(writer.missing()))
            finished = [s for s in range(writer.num_shards) if writer.record(s) is not None]
            assert all(writer.is_whole(s, checksums=True) for s in finished), "a shard with a record is whole"
    assert lives >= 3, "too fast to be killed in the middle"
    assert left == sorted(left, reverse=True)
    assert left[-1] < 60, "killed before anything was written"
    fill(folder, width, num, size)
    # killed before it could write its name, the maker of an empty lock is unknown, which is kept for a while
    empty = [path for path in folder.glob(".*.lock.*.part") if path.stat().st_size == 0]
    for path in empty:
        path.unlink()
    assert len(empty) <= lives
    assert digests(folder) == digests(tmp_path / "calm")


def test_a_lock_is_ours_alone_and_passes_on_when_its_holder_is_killed(tmp_path):
    writer = StoreWriter(tmp_path / "s", KEY, NUM, SIZE)
    held = FORK.Event()

    def hold():
        with writer.claim(0) as mine:
            assert mine
            held.set()
            time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    assert held.wait(10)
    with writer.claim(0) as mine:
        assert not mine
    with writer.claim(1) as mine:
        assert mine
        with writer.claim(1) as again:
            assert not again, "not even for the same process"
    os.kill(process.pid, signal.SIGKILL)
    for _ in range(200):  # a zombie now: nobody has asked for its exit status
        if claims._started(process.pid) == "":
            break
        time.sleep(0.01)
    with writer.claim(0) as mine:
        assert mine
        writer.write(0, rows_of(writer.rows(0)))
    with writer.claim(0) as mine:
        assert not mine, "there already"
    process.join()
    assert not list((tmp_path / "s").glob("*.lock"))


def test_locks_of_other_machines_are_left_alone_until_nobody_touches_them(tmp_path):
    writer = StoreWriter(tmp_path / "s", KEY, NUM, SIZE)
    lock = tmp_path / "s" / "shard_000000.lock"
    foreign = json.dumps({"host": "elsewhere", "boot": "", "pids": "", "pid": 1, "started": "", "time": 0})
    for content in (foreign, ""):
        lock.write_text(content)
        with writer.claim(0) as mine:
            assert not mine
        assert lock.read_text() == content
        old = time.time() - claims.STALE_SECONDS - 5
        os.utime(lock, (old, old))
        with writer.claim(0) as mine:
            assert mine
        assert not lock.exists()


def test_a_held_lock_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.02)
    lock = tmp_path / "x.lock"
    with claims.claimed(lock) as mine:
        assert mine
        os.utime(lock, (1, 1))
        time.sleep(0.2)
        assert lock.stat().st_mtime > 1e9
    assert not lock.exists()
    assert threading.active_count() < 10


def test_a_claim_is_given_back_when_making_fails(tmp_path):
    writer = StoreWriter(tmp_path / "s", KEY, NUM, SIZE)

    def make():
        with writer.claim(0):
            raise PermissionError(errno.EACCES, "a picture may not be read")

    with pytest.raises(PermissionError, match="picture"):
        make()
    with writer.claim(0) as mine:
        assert mine


# ---------------------------------------------------------------------------------------------- no room
def test_a_full_disk_is_one_sentence_and_leaves_whole_shards(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / "s", KEY, NUM, SIZE)
    writer.write(0, rows_of(writer.rows(0)))
    before = digests(tmp_path / "s")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", full)
        with pytest.raises(OSError, match=r"the store .* cannot be written: the disk is full; free some space"):
            writer.write(1, rows_of(writer.rows(1)))
    assert digests(tmp_path / "s") == before
    fill(tmp_path / "s")
    assert Store(tmp_path / "s").verify() == []


def test_a_limit_of_the_system_is_one_sentence(tmp_path):
    writer = StoreWriter(tmp_path / "s", KEY, NUM, SIZE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="may not become that large here; choose a smaller shard size"):
            writer.write(0, rows_of(writer.rows(0), width=4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "s").glob(".*"))


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="a part of the path is a file; give another folder"):
        StoreWriter(tmp_path / "file" / "s", KEY, NUM)
    with pytest.raises(OSError, match="there is a file of that name"):
        StoreWriter(tmp_path / "file", KEY, NUM)

    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(OSError, match="the file system is read-only; give another folder"):
        StoreWriter(tmp_path / "s", KEY, NUM)
