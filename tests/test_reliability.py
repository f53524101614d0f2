"""Training runs that are killed, stopped or meet damaged files, full disks and other runs."""

from __future__ import annotations

import os
import random
import re
import signal
import socket

import pytest
import torch
from faults import EARLY, UPDATES, Runs, equal, flip, survives
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from method_cases import CASES, trainer

from lightning_distill.checkpoint_files import write_checkpoint
from lightning_distill.checkpoints import read_checkpoint
from lightning_distill.run_checkpoints import RunStopped, StopSignals
from lightning_distill.run_safety import lock_file, memory_advice, run_lock

CONTENT = {"state_dict": {"a": torch.arange(4096.0), "b": torch.ones(3)}, "global_step": 5}


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


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


@pytest.mark.slow
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
    assert re.search(r"error: none of the 3 checkpoints in \S+ is whole", runs.log("none"))
