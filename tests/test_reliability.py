"""Training runs that are killed, stopped or meet damaged files, full disks and other runs."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
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
from lightning_distill.commands.run_folder import find_checkpoint
from lightning_distill.run_checkpoints import RunStopped, StopSignals
from lightning_distill.run_safety import lock_file, memory_advice, run_lock
from lightning_distill.strategies import sharded_files

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent / "contracts"))
from faults import EARLY, UPDATES, Runs, equal, flip, survives
from method_cases import CASES, trainer

CONTENT = {"state_dict": {"a": torch.arange(4096.0), "b": torch.ones(3)}, "global_step": 5}


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


# ------------------------------------------------------------------------------------------------ folder and memory
def test_two_runs_do_not_share_a_folder(tmp_path):
    with run_lock(tmp_path / "run"):
        with (
            pytest.raises(FileExistsError, match=rf"process {os.getpid()} on host {re.escape(socket.gethostname())}"),
            run_lock(tmp_path / "run"),
        ):
            pass
        with run_lock(tmp_path / "other"):
            pass
    with run_lock(tmp_path / "run"):
        assert [f.name for f in tmp_path.iterdir()] == [".run.lock"]
    assert not list(tmp_path.iterdir())
    with run_lock(tmp_path / "run", inside=True):
        assert list((tmp_path / "run").iterdir()) == [lock_file(tmp_path / "run", inside=True)]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"run folder .* cannot be written: (not a directory|file exists)"):  # noqa: SIM117
        with run_lock(tmp_path / "file" / "run"):
            pass
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written: (not a directory|file exists)"):
        write_checkpoint(CONTENT, tmp_path / "file" / "last.ckpt")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(OSError, match="permission denied"), run_lock(tmp_path / "locked"):
            pass


def test_errors_of_the_run_pass_the_lock(tmp_path):
    with pytest.raises(OSError, match=r"^of the run$"), run_lock(tmp_path):
        raise OSError("of the run")


def test_too_little_memory_names_the_knobs():
    message = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 GiB"
    with pytest.raises(torch.OutOfMemoryError, match=r"20\.00 MiB") as caught, memory_advice():
        raise torch.OutOfMemoryError(message)
    for knob in ("accumulate_grad_batches", "batch_size", "activation_checkpointing", "Lora", "quantize", " plan "):
        assert knob in str(caught.value)
    with pytest.raises(torch.OutOfMemoryError, match="the memory does not suffice"), memory_advice():
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), memory_advice():
        raise RuntimeError("size mismatch")


# ------------------------------------------------------------------------------------------------ signals
class SignalAt(Callback):
    """Sends a signal to this process at the beginning of a batch."""

    def __init__(self, index, number):
        self.index, self.number = index, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.index:
            os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_end_a_run_between_two_updates(tmp_path, capfd, number):
    """With a ``ModelCheckpoint`` that would have saved nothing."""
    case = next(c for c in CASES if c.name == "one_step")
    handler = signal.getsignal(number)
    other = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=100)

    def fit(callbacks, path=None):
        module = case.build(tmp_path)
        run = trainer(4, callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
        run.fit(module, case.loader(module), ckpt_path=path)
        return module.state_dict()

    want = fit([ModelCheckpoint(dirpath=tmp_path / "whole", every_n_train_steps=100)])
    with pytest.raises(RunStopped) as stopped:
        fit([SignalAt(1, number), other, StopSignals()])
    assert stopped.value.code == 128 + number
    saved = tmp_path / "interrupted.ckpt"
    told = capfd.readouterr().err
    assert f"stopped by {number.name} after update 2; continue with --ckpt_path {saved}" in told
    assert read_checkpoint(saved)["global_step"] == 2
    assert signal.getsignal(number) == handler
    assert equal(want, fit([other, StopSignals()], saved))
    assert rank_zero_only.rank == 0


# ------------------------------------------------------------------------------------------------ whole runs
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("runs"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(runs):
    assert runs.run("whole") == 0
    return runs.final("whole")


def test_killed_while_a_checkpoint_is_written(runs, whole):
    """The first file of the third update is written, flushed and not renamed; the lock and the part stay behind."""
    folder = runs.checkpoints("replaced")
    assert runs.run("replaced", ("trap('replace', 5, 'kill')",)) == -signal.SIGKILL
    assert lock_file(folder.parent).exists()
    assert list(folder.glob(".*.part"))
    assert runs.run("replaced") == 0, runs.log("replaced")
    assert equal(whole, runs.final("replaced"))
    assert not lock_file(folder.parent).exists()
    assert not list(folder.glob(".*.part"))


def test_damaged_last_checkpoint_and_a_second_run(runs, whole):
    """SIGTERM within a cycle; last.ckpt is then damaged; another run has the folder for a while."""
    assert runs.run("harmed", ("signal_at(4, 15)",)) == 128 + signal.SIGTERM
    folder = runs.checkpoints("harmed")
    assert "stopped by SIGTERM after update 4; continue with" in runs.log("harmed")
    flip(folder / "last.ckpt")
    with run_lock(folder.parent):
        assert runs.run("harmed") == 2
    assert f"another run (process {os.getpid()} on host {socket.gethostname()})" in runs.log("harmed")
    assert runs.run("harmed") == 0
    assert re.search(
        r"last\.ckpt \(.*wrong checksum\) cannot be used; \S+step4\.ckpt is the newest", runs.log("harmed")
    )
    assert equal(whole, runs.final("harmed"))


@pytest.mark.slow
def test_killed_at_random_moments(runs, whole):
    draw = random.Random(1)
    for index in range(5):
        found = survives(runs, f"random{index}", whole, delay=draw.uniform(0.2, 2.0))
        assert found in ("", EARLY)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_killed_around_every_kind_of_write(runs, whole, place):
    draw = random.Random(2)
    for count in draw.sample(range(1, 2 * UPDATES), 3):
        assert survives(runs, f"{place}{count}", whole, before=(f"trap({place!r}, {count}, 'kill')",)) == ""


@pytest.mark.slow
def test_full_disk_and_full_memory_are_one_sentence(runs, whole):
    assert runs.run("full", ("trap('fsync', 7, '28')",)) == 2
    log = runs.log("full")
    assert "Traceback" not in log
    assert re.search(
        r"error: the checkpoint \S+ cannot be written: no space left on device.*checkpoint is \S+ckpt", log
    )
    assert runs.run("full") == 0
    assert equal(whole, runs.final("full"))
    assert runs.run("memory", ("out_of_memory()",)) == 2
    assert "accumulate_grad_batches" in runs.log("memory")
    assert "Traceback" not in runs.log("memory")


@pytest.mark.slow
def test_no_whole_checkpoint_is_an_error(runs, whole):
    assert runs.run("none", ("signal_at(2, 15)",)) == 128 + signal.SIGTERM
    for file in runs.checkpoints("none").glob("*.ckpt"):
        cut(file)
    assert runs.run("none") == 2
    assert re.search(r"error: none of the 2 checkpoints in \S+ is whole", runs.log("none"))
