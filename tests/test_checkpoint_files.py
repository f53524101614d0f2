"""Checkpoint files and folders: whole or not there, damage is known, the newest is found."""

from __future__ import annotations

import errno
import os
import pickle
import random
import re
import resource
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import equal, flip
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_distill.checkpoint_files import (
    AtomicCheckpointIO,
    damage,
    last_good,
    remove_parts,
    take_place,
    write_checkpoint,
)
from lightning_distill.checkpoints import read_checkpoint
from lightning_distill.commands.convert import convert
from lightning_distill.commands.run_folder import find_checkpoint
from lightning_distill.strategies import RoleFSDP2, sharded_files

CONTENT = {"state_dict": {"a": torch.arange(4096.0), "b": torch.ones(3)}, "global_step": 5}


SHARDED = {**CONTENT, "optimizer_states": [], "lightning_distill": {}}


def cut(file, fraction=0.5):
    os.truncate(file, int(file.stat().st_size * fraction))


def dated(file, seconds):
    os.utime(file, (1e9 + seconds, 1e9 + seconds))


# ------------------------------------------------------------------------------------------------ files
def test_written_files_are_whole_and_replace_the_earlier_one(tmp_path):
    file = tmp_path / "new" / "last.ckpt"
    write_checkpoint({"global_step": 1}, file)
    write_checkpoint(CONTENT, file)
    assert damage(file) is None
    assert equal(CONTENT, torch.load(file, weights_only=True))
    assert [f.name for f in file.parent.iterdir()] == ["last.ckpt"]


def test_a_flipped_bit_is_found_though_torch_reads_it(tmp_path):
    file = tmp_path / "last.ckpt"
    write_checkpoint(CONTENT, file)
    shutil.copy(file, tmp_path / "copy.ckpt")
    os.symlink("copy.ckpt", tmp_path / "link.ckpt")
    flip(tmp_path / "copy.ckpt")
    assert not equal(CONTENT, torch.load(tmp_path / "copy.ckpt", weights_only=True))  # silently
    for name in ("copy.ckpt", "link.ckpt"):
        assert re.search(r"entry data/\d+ has a wrong checksum", damage(tmp_path / name))
        with pytest.raises(ValueError, match=r"wrong checksum.*newest whole checkpoint is .*last\.ckpt"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / name)
        with pytest.raises(ValueError, match=r"wrong checksum"):
            read_checkpoint(tmp_path / name)
    assert equal(CONTENT, AtomicCheckpointIO().load_checkpoint(file, weights_only=True))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, fraction):
    file = tmp_path / "last.ckpt"
    write_checkpoint(CONTENT, file)
    cut(file, fraction)
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read .*truncated.*no whole checkpoint beside it"):
        read_checkpoint(file)


def test_every_single_byte_of_the_tensors_counts(tmp_path):
    """A random byte of a tensor's record is changed; a file that changes is read again."""
    file = tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {"a": torch.arange(4096.0)}}, file)
    whole = file.read_bytes()
    start = whole.find(torch.arange(4096.0).numpy().tobytes())
    draw = random.Random(0)
    for _ in range(20):
        content = bytearray(whole)
        content[start + draw.randrange(4 * 4096)] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        assert "wrong checksum" in damage(file)
    file.write_bytes(whole)
    assert damage(file) is None


def test_the_newest_whole_checkpoint_is_chosen_and_said_so(tmp_path):
    folder = tmp_path / "checkpoints"
    for seconds, name in enumerate(("step1", "step2", "last", "good")):
        write_checkpoint(CONTENT, folder / f"{name}.ckpt")
        dated(folder / f"{name}.ckpt", seconds)
    (folder / "gone.ckpt").symlink_to("nowhere.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_good(folder).name == "last.ckpt"
        assert find_checkpoint(tmp_path).name == "last.ckpt"
    cut(folder / "last.ckpt")
    dated(folder / "last.ckpt", 2)
    with pytest.warns(UserWarning, match=r"last\.ckpt \(not a torch archive.*step2\.ckpt is the newest"):
        assert find_checkpoint(tmp_path).name == "step2.ckpt"
    flip(folder / "step2.ckpt")
    cut(folder / "step1.ckpt")
    assert last_good(folder, told_of=False).name == "good.ckpt"
    cut(folder / "good.ckpt")
    assert last_good(folder) is None


def test_sharded_checkpoints_are_looked_at(tmp_path):
    state = {"state_dict": CONTENT["state_dict"], "global_step": 5, "optimizer_states": [], "lightning_distill": {}}
    folder = tmp_path / "last.ckpt"
    sharded_files.from_single(state, folder)
    assert damage(folder) is None
    assert last_good(tmp_path) == folder
    cut(next(folder.glob("*.distcp")))
    assert "is truncated" in damage(folder)
    (folder / "meta.pt").unlink()
    assert "meta.pt is missing" in damage(folder)


class Command:
    """Something whose unpickling would run code."""

    ran: list = []

    def __reduce__(self):
        return (Command.ran.append, (1,))


def test_an_index_of_shards_that_would_run_code_is_refused(tmp_path):
    folder = tmp_path / "last.ckpt"
    sharded_files.from_single(SHARDED, folder)
    before = sharded_files.read_index(folder)
    assert before.state_dict_metadata.keys() == sharded_files.stored_tensors(folder).keys()
    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Command()}))
    with pytest.raises(pickle.UnpicklingError, match="which is no part of an index"):
        sharded_files.to_single(folder)
    assert damage(folder) is not None
    assert last_good(tmp_path, told_of=False) is None
    assert Command.ran == []


def test_a_flipped_bit_in_a_folder_of_shards_is_found(tmp_path):
    """In any piece of any tensor, and in torch's list of the pieces."""
    folder = tmp_path / "last.ckpt"
    sharded_files.from_single(SHARDED, folder)
    assert damage(folder) is None
    file = next(folder.glob("*.distcp"))
    whole = file.read_bytes()
    draw = random.Random(0)
    for tensor in CONTENT["state_dict"].values():
        start = whole.find(tensor.numpy().tobytes())
        content = bytearray(whole)
        content[start + draw.randrange(4 * len(tensor))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        assert re.search(rf"{file.name}, state_dict\.[ab]: its entry data/0 has a wrong checksum", damage(folder))
        assert last_good(tmp_path) is None
        with pytest.raises(ValueError, match=r"last\.ckpt cannot be read .*wrong checksum"):
            convert(folder, tmp_path / "one.ckpt")
    file.write_bytes(whole)
    assert damage(folder) is None
    index = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(index.replace(b"state_dict.a", b"state_dict.c"))
    assert ".metadata has a wrong checksum" in damage(folder)
    (folder / ".metadata").write_bytes(index)
    # written before there was a checksum of the list
    write_checkpoint(sharded_files.read_meta(folder), folder / "meta.pt")
    assert damage(folder) is None
    assert equal(SHARDED, sharded_files.to_single(folder))


def test_processes_but_the_first_leave_the_contents_to_it(tmp_path, monkeypatch):
    folder = tmp_path / "last.ckpt"
    sharded_files.from_single(SHARDED, folder)
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[bytes(content).find(CONTENT["state_dict"]["a"].numpy().tobytes()) + 100] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert damage(folder) is None
    cut(file)
    assert "truncated" in damage(folder)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_the_newest_is_told_by_its_updates(tmp_path, form):
    """Dates lie after a copy; they only decide among equals."""
    for seconds, (name, updates) in enumerate({"step10": 10, "again": 10, "step9": 9, "foreign": None}.items()):
        path, content = tmp_path / f"{name}.ckpt", {**SHARDED, "global_step": updates}
        if updates is None:
            del content["global_step"]
        sharded_files.from_single(content, path) if form == "folder" else write_checkpoint(content, path)
        dated(path, seconds)
    assert last_good(tmp_path).name == "again.ckpt"
    shutil.rmtree(tmp_path / "again.ckpt") if form == "folder" else (tmp_path / "again.ckpt").unlink()
    assert last_good(tmp_path).name == "step10.ckpt"


def test_damaged_older_files_are_not_told_of(tmp_path, recwarn):
    for seconds, name in enumerate(("step1", "step2")):
        write_checkpoint({**CONTENT, "global_step": seconds}, tmp_path / f"{name}.ckpt")
    cut(tmp_path / "step1.ckpt")
    dated(tmp_path / "step1.ckpt", 1)
    assert last_good(tmp_path).name == "step2.ckpt"
    assert not recwarn.list


@pytest.mark.parametrize("thing", [os.system, Path("a")], ids=["function", "object"])
def test_pickled_code_is_never_chosen_nor_loaded(tmp_path, thing):
    write_checkpoint(CONTENT, tmp_path / "step5.ckpt")
    file = tmp_path / "last.ckpt"
    torch.save({**CONTENT, "global_step": 6, "more": thing}, file)
    assert re.search(r"holds pickled code or objects( \([\w.]+\))?, which are never loaded", damage(file))
    with pytest.warns(UserWarning, match=r"last\.ckpt \(it holds pickled code.*step5\.ckpt is the newest"):
        assert last_good(tmp_path).name == "step5.ckpt"
    for load in (
        lambda: AtomicCheckpointIO().load_checkpoint(file, weights_only=False),
        lambda: AtomicCheckpointIO().load_checkpoint(f"file://{file}", weights_only=False),
        lambda: read_checkpoint(file),
        lambda: convert(file, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="pickled code or objects") as caught:
            load()
        assert "weights_only" not in str(caught.value)


def test_truncated_folders_are_not_converted(tmp_path):
    folder = tmp_path / "last.ckpt"
    sharded_files.from_single(SHARDED, folder)
    cut(next(folder.glob("*.distcp")))
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read .*distcp is truncated"):
        convert(folder, tmp_path / "one.ckpt")
    assert not (tmp_path / "one.ckpt").exists()


def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    """The system itself refuses to let the file grow."""
    file = tmp_path / "last.ckpt"
    write_checkpoint(CONTENT, file)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt cannot be written: file too large.*checkpoint is .*last\.ckpt"):
            write_checkpoint({"state_dict": {"a": torch.zeros(1 << 18)}}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_is_no_failure_to_write_is_raised_as_it_is(tmp_path):
    with pytest.raises(Exception, match="pickle") as caught:
        write_checkpoint({"state_dict": lambda: None}, tmp_path / "last.ckpt")
    assert not isinstance(caught.value, OSError)
    assert not list(tmp_path.iterdir())


def test_unfinished_files_are_removed(tmp_path):
    write_checkpoint(CONTENT, tmp_path / "last.ckpt")
    (tmp_path / ".last.ckpt.0123.part").write_bytes(b"PK")
    (tmp_path / ".last.ckpt.shards.part").mkdir()
    (tmp_path / ".last.ckpt.shards.part" / "0.distcp").write_bytes(b"PK")
    remove_parts(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["last.ckpt"]


class Killed(BaseException):
    """What stands for SIGKILL: nothing is tidied up."""


@pytest.mark.parametrize("finder", ["restart", "next save"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "unfinished"])
def test_killed_between_the_two_renames_of_a_folder(tmp_path, monkeypatch, finder, whole):
    """The new folder gets its name if it is whole, the old one otherwise."""
    path = tmp_path / "last.ckpt"
    part = sharded_files.part_of(path)
    sharded_files.from_single({**SHARDED, "global_step": 1}, path)
    sharded_files.from_single({**SHARDED, "global_step": 2}, part)
    original, count = os.replace, iter(range(9))

    def replace(source, target):
        if next(count) == 1:
            raise Killed
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        take_place(part, path)
    monkeypatch.setattr(os, "replace", original)
    assert not path.exists()
    if not whole:
        cut(next(part.glob("*.distcp")))
    dated(part, 0)
    with pytest.warns(UserWarning, match=r"last\.ckpt was being written when its process was killed"):
        remove_parts(tmp_path) if finder == "restart" else sharded_files.begin(path)
    assert damage(path) is None
    assert sharded_files.read_meta(path)["global_step"] == (2 if whole else 1)
    if finder == "restart":
        assert [f.name for f in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_get_its_name_is_not_removed(tmp_path, monkeypatch):
    part = sharded_files.part_of(tmp_path / "last.ckpt")
    sharded_files.from_single(SHARDED, part)

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    remove_parts(tmp_path)
    assert damage(part) is None


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", ["file", "folder", "link to a folder", "nothing"])
def test_files_and_folders_replace_each_other(tmp_path, old, new):
    part, path = tmp_path / "part", tmp_path / "last.ckpt"
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "meta.pt").write_bytes(b"old")
    if old == "file":
        path.write_bytes(b"old")
    elif old == "folder":
        path.mkdir()
        (path / "meta.pt").write_bytes(b"old")
    elif old == "link to a folder":
        path.symlink_to("kept")
    if new == "folder":
        part.mkdir()
    (part / "meta.pt" if new == "folder" else part).write_bytes(b"new")
    take_place(part, path)
    assert (path / "meta.pt" if new == "folder" else path).read_bytes() == b"new"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["kept", "last.ckpt"]
    assert (tmp_path / "kept" / "meta.pt").read_bytes() == b"old"


# ------------------------------------------------------------------------------------------------ several processes
@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError("full"), OSError, "^full$"),
        (ValueError("bad"), ValueError, "^bad$"),
        (FileNotFoundError(2, "gone"), OSError, "gone"),
        (KeyError("name"), RuntimeError, "first process failed with KeyError: 'name'"),
        (torch.OutOfMemoryError("memory"), RuntimeError, "OutOfMemoryError: memory"),
    ],
)
def test_whatever_fails_on_the_first_process_fails_on_all(error, kind, text):
    sent = []

    def deed():
        raise error

    first = SimpleNamespace(is_global_zero=True, broadcast=lambda value: sent.append(value) or value)
    with pytest.raises(kind, match=text):
        RoleFSDP2._first(first, deed)
    other = SimpleNamespace(is_global_zero=False, broadcast=lambda _: pickle.loads(pickle.dumps(sent[0])))
    with pytest.raises(kind, match=text):
        RoleFSDP2._first(other, deed)
