"""What keeps a run from being ruined in silence: its settings, its folder, its lock, and the signals it gets."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from fault_runs import NAME, UPDATES, Runs
from faults import equal
from lightning.pytorch.callbacks import ModelCheckpoint
from method_cases import CASES, Batches, trainer
from sampling_of_cases import long

from lightning_distill.checkpoint_files import last_good
from lightning_distill.checkpoints import read_checkpoint
from lightning_distill.collectives import max_over_processes, mean_over_processes
from lightning_distill.data import claims
from lightning_distill.methods import guards
from lightning_distill.run_checkpoints import StudentCheckpoint
from lightning_distill.run_safety import lock_file, memory_advice, run_lock


def case_named(name):
    return next(case for case in CASES if case.name == name)


# ------------------------------------------------------------------------------------------------ settings
@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_norms_that_would_ruin_the_weights_are_refused(tmp_path, norm):
    with pytest.raises(ValueError, match=r"gradient_clip_val=.*give a positive norm, or null for no clipping"):
        case_named("flow").build(tmp_path, gradient_clip_val=norm)
    for good in (None, 1e-3, float("inf")):
        case_named("flow").build(tmp_path, gradient_clip_val=good)


@pytest.mark.parametrize("most", [0, -3])
def test_a_healthy_run_is_not_stopped_by_its_own_limit(tmp_path, most):
    with pytest.raises(ValueError, match=rf"max_skipped_steps={most}: give .* 1 or more"):
        case_named("flow").build(tmp_path, max_skipped_steps=most)


def told_of_weights(tmp_path, given, steps=4, **settings):
    module = case_named("flow").build(tmp_path, loss_weights=given)
    run = trainer(steps, log_every_n_steps=1, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, case_named("flow").loader(module))
    return [str(w.message) for w in caught if "loss_weights has" in str(w.message)]


def test_weights_of_terms_that_nothing_returns_are_told_once(tmp_path, monkeypatch):
    assert told_of_weights(tmp_path, {"student/denoising": 2.0}) == []
    (at_end,) = told_of_weights(tmp_path, {"student/denoisin": 2.0})
    assert "'student/denoisin', which has done nothing in 4 updates" in at_end
    assert at_end.endswith("returned 'student/denoising' only; did you mean 'student/denoising'?")
    assert told_of_weights(tmp_path, {"student/gan": 2.0}) == []  # a term that may begin later
    monkeypatch.setattr(guards, "PATIENCE", 2)
    (early,) = told_of_weights(tmp_path, {"student/denoisin": 2.0, "student/denoising": 1.0})
    assert "in 2 updates" in early


def test_a_bad_batch_does_not_end_a_run_that_goes_on(tmp_path):
    """The data are compared with their declared scale in the first two updates of a run, not of each resumption."""
    case = case_named("flow")
    batches = list(case.loader(case.build(tmp_path)))[:6]
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1)
    trainer(3, callbacks=[saving], enable_checkpointing=True).fit(case.build(tmp_path), Batches(batches))
    batches[0].x0[1, 0] = float("nan")  # this loader begins again
    module = case.build(tmp_path)
    trainer(5).fit(module, Batches(batches), ckpt_path=saving.best_model_path)
    assert module.skipped_steps.tolist() == [1.0]
    with pytest.raises(ValueError, match=r"NaN|finite"):
        trainer(1).fit(case.build(tmp_path), Batches(batches))


# ------------------------------------------------------------------------------------------------ processes
def _reduce(rank, folder, found):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    calls = []
    original = dist.barrier
    dist.barrier = lambda *a, **k: calls.append(a) or original(*a, **k)
    mean = mean_over_processes(torch.tensor(float("nan") if rank else 1.0))
    third = mean_over_processes(torch.tensor([1.0 + rank, 0.1]))
    found.put((rank, mean.item(), third.tolist(), max_over_processes(torch.tensor(15.0 * rank)).item(), len(calls)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_flags_of_two_processes_are_added_without_a_barrier(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    torch.multiprocessing.spawn(_reduce, (str(tmp_path), found), nprocs=2)
    for _, mean, third, largest, barriers in sorted(found.get() for _ in range(2)):
        assert mean != mean, "not finite anywhere: skipped everywhere"
        assert third == pytest.approx([1.5, 0.1])
        assert (largest, barriers) == (15.0, 0)
    alone = torch.tensor(3.0)
    assert mean_over_processes(alone) is alone


# ------------------------------------------------------------------------------------------------ locks
def owned(folder, **owner):
    """The lock that another process left in a run's place."""
    file = lock_file(folder)
    content = {**claims._machine(), "pid": os.getpid(), "started": claims._started(os.getpid()), "time": 0.0}
    file.write_text(json.dumps({**content, **owner}))
    return file


@pytest.fixture
def hurried(monkeypatch):
    """Locks that grow old within a second."""
    monkeypatch.setattr(claims, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(claims, "_LOOK_SECONDS", 0.05)


@pytest.mark.parametrize(
    "elsewhere", [{"host": "another"}, long({"pids": "pid:[1]"}), long({"boot": "an earlier one"})]
)
def test_a_requeued_job_waits_for_the_lock_of_its_earlier_life(tmp_path, hurried, capfd, elsewhere):
    file = owned(tmp_path / "run", **elsewhere)
    started = time.monotonic()
    with run_lock(tmp_path / "run"):
        assert json.loads(file.read_text())["host"] == socket.gethostname()
    assert 0.5 < time.monotonic() - started < 10.0
    told = capfd.readouterr().err
    assert told.count("watching for at most 1 s") == 1
    assert f"locked by process {os.getpid()} on host" in told


def test_a_lock_that_another_machine_touches_is_respected(tmp_path, hurried):
    file = owned(tmp_path / "run", host="another")
    beat = threading.Timer(0.4, os.utime, (file,))
    beat.start()
    started = time.monotonic()
    with (
        pytest.raises(FileExistsError, match=r"another run \(process \d+ on host another\)"),
        run_lock(tmp_path / "run"),
    ):
        pass
    assert 0.3 < time.monotonic() - started < 0.9, "it does not wait for longer than it has to"
    assert file.exists()
    beat.join()


def test_locks_of_this_machine_are_decided_at_once(tmp_path):
    started = time.monotonic()
    file = owned(tmp_path / "run")
    with pytest.raises(FileExistsError, match="another run"), run_lock(tmp_path / "run"):
        pass
    file.write_text(json.dumps({**json.loads(file.read_text()), "started": "of another process"}))
    with run_lock(tmp_path / "run"):
        pass
    assert time.monotonic() - started < 5.0


def test_a_suspended_run_keeps_its_lock(tmp_path, monkeypatch):
    """However long its lock was not touched, its process is there; where starts are not known, the age decides."""
    file = owned(tmp_path / "run")
    os.utime(file, (1, 1))
    with pytest.raises(FileExistsError, match="another run"), run_lock(tmp_path / "run"):
        pass
    monkeypatch.setattr(claims, "_started", lambda _pid: "")
    file = owned(tmp_path / "run")
    os.utime(file, (1, 1))
    with run_lock(tmp_path / "run"):
        pass


# ------------------------------------------------------------------------------------------------ memory
def test_too_little_memory_names_what_was_used():
    message = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 GiB"
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"20\.00 MiB; .*peak [\d.]+ GiB.*[\d.]+ GiB; batch of 8") as caught,
        memory_advice(lambda: "batch of 8 in 2 micro-batches"),
    ):
        raise torch.OutOfMemoryError(message)
    assert "AdamW8bit" in str(caught.value)
    assert len(str(caught.value)) < 600


# ------------------------------------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize("settings", [{"every_n_train_steps": 0}, {"every_n_train_steps": -1}, {"keep": 0}])
def test_checkpoints_that_would_never_be_written_are_refused(settings):
    with pytest.raises(ValueError, match=r"StudentCheckpoint\((every_n_train_steps|keep)=-?\d\): give 1 or more"):
        StudentCheckpoint(**settings)


@pytest.mark.filterwarnings("ignore")
def test_the_newest_files_stay_whatever_was_left_behind(tmp_path):
    case = case_named("flow")

    def fit(steps, path=None, **settings):
        module = case.build(tmp_path)
        saving = StudentCheckpoint(1, **settings)
        options = {"callbacks": [saving], "enable_checkpointing": True, "default_root_dir": tmp_path}
        trainer(steps, **options).fit(module, case.loader(module), ckpt_path=path)
        return {file.name for file in (tmp_path / "checkpoints").iterdir()}

    assert fit(5, keep=3) == {"step3.ckpt", "step4.ckpt", "step5.ckpt", "last.ckpt"}
    folder = tmp_path / "checkpoints"
    # one step back: the abandoned future stays until it is replaced, what is too old does not
    assert fit(4, folder / "step3.ckpt") == {"step3.ckpt", "step4.ckpt", "step5.ckpt", "last.ckpt"}
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 4
    assert last_good(folder).name == "last.ckpt"  # not step5.ckpt, which is another future's
    (folder / "last.ckpt").unlink()
    assert last_good(folder).name == "step4.ckpt"
    shutil.copy(folder / "step4.ckpt", folder / "last.ckpt")
    assert fit(7, folder / "last.ckpt") == {"step6.ckpt", "step7.ckpt", "last.ckpt"}
    rewinds = [read_checkpoint(file)["callbacks"]["StudentCheckpoint"]["rewinds"] for file in folder.iterdir()]
    assert rewinds == [1, 1, 1]


def test_a_run_that_goes_back_says_so(tmp_path):
    case = case_named("flow")
    module = case.build(tmp_path)
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    trainer(3, callbacks=[StudentCheckpoint(1)], **options).fit(module, case.loader(module))
    again = trainer(3, callbacks=[StudentCheckpoint(1)], **options)
    with pytest.warns(UserWarning, match="goes back from update 3 to 2"):
        again.fit(case.build(tmp_path), case.loader(module), ckpt_path=tmp_path / "checkpoints" / "step2.ckpt")


# ------------------------------------------------------------------------------------------------ whole runs
class Asked(Runs):
    """Runs whose command line can be changed: ``without`` are beginnings of words, ``more`` is added."""

    without: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    def words(self, run, updates=UPDATES, processes=1):
        words = super().words(run, updates, processes)
        return [word for word in words if not (self.without and word.startswith(self.without))] + list(self.more)

    def asked(self, run, before=(), updates=UPDATES, without=(), more=()):
        self.without, self.more = tuple(without), tuple(more)
        try:
            return self.run(run, tuple(before), updates)
        finally:
            self.without, self.more = (), ()


#: in the run: a signal, or more of them, in the cycle that makes an update, once
SIGNALS = """
import shutil
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from lightning_distill.methods import DMD2
original, sent = DMD2.student_loss, []
def trapped(self, batch):
    if self.trainer.global_step == UPDATE - 1 and not sent:
        sent.extend(NUMBERS)
        for number in NUMBERS:
            os.kill(os.getpid(), number)
    return original(self, batch)
DMD2.student_loss = trapped
"""


def signals_in(update, *numbers):
    return "UPDATE, NUMBERS = " + repr((update, tuple(map(int, numbers)))) + SIGNALS


DEFAULT = ("--trainer.callbacks",)
VERSION = ("--trainer.logger.init_args.version",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Asked(tmp_path_factory.mktemp("runs"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(runs):
    assert runs.run("whole") == 0
    return runs.final("whole")


@pytest.mark.long
def test_ctrl_c_saves_and_a_second_one_does_not_wait(runs, whole):
    assert runs.asked("interrupted", [signals_in(4, signal.SIGINT)], without=DEFAULT) == 128 + signal.SIGINT
    log = runs.log("interrupted")
    assert "once more interrupts it at once" in log
    assert "stopped by SIGINT after update 4; continue with --ckpt_path" in log
    assert runs.run("interrupted") == 0
    assert equal(whole, runs.final("interrupted"))
    twice = signals_in(4, signal.SIGINT, signal.SIGINT)
    assert runs.asked("impatient", [twice], without=DEFAULT) in (1, 130)
    assert "stopped by" not in runs.log("impatient")


def test_a_run_that_saves_nothing_says_what_is_lost(runs):
    more = ["--trainer.enable_checkpointing=false"]
    status = runs.asked("unsaved", [signals_in(4, signal.SIGTERM)], without=(*DEFAULT, "--ckpt_path"), more=more)
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after update 4; nothing was saved, so all 4 updates are lost" in runs.log("unsaved")


def test_nothing_to_train_is_said(runs):
    assert runs.asked("idle", without=DEFAULT, more=["--trainer.limit_train_batches=0"]) == 0
    assert "nothing is trained: trainer.limit_train_batches" in runs.log("idle")


@pytest.mark.slow
def test_a_longer_run_replaces_the_last_checkpoint(runs, whole):
    assert runs.asked("longer", updates=4, without=DEFAULT) == 0
    assert runs.asked("longer", without=DEFAULT, updates=UPDATES + 2) == 0
    names = {file.name for file in runs.checkpoints("longer").iterdir()}
    assert names == {"step6.ckpt", "step8.ckpt", "last.ckpt"}
    assert read_checkpoint(runs.checkpoints("longer") / "last.ckpt")["global_step"] == UPDATES + 2


@pytest.mark.long
def test_last_without_a_version_continues_the_newest_run(runs, whole):
    assert runs.run("newest", updates=3) == 0
    assert runs.asked("newest", without=VERSION) == 0
    assert "version_0 is the newest run with checkpoints and goes on" in runs.log("newest")
    assert [f.name for f in (runs.folder / "newest" / NAME).iterdir() if f.is_dir()] == ["version_0"]
    assert equal(whole, runs.final("newest"))


def rows(file):
    with open(file, newline="") as stream:
        return [(int(row["step"]), row["train/student/matching"]) for row in csv.DictReader(stream)]


@pytest.mark.slow
def test_the_curve_of_the_earlier_part_stays(runs):
    def curve(run, updates, before=()):
        folder = runs.folder / run
        csv_logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={folder}"]
        named = [f"--trainer.logger.name={NAME}", "--trainer.logger.version=0", "--trainer.log_every_n_steps=1"]
        status = runs.asked(run, before, updates, without=("--trainer.logger.",), more=[*csv_logger, *named])
        return status, rows(folder / NAME / "version_0" / "metrics.csv")

    status, want = curve("curve", UPDATES)
    assert (status, [step for step, _ in want]) == (0, list(range(UPDATES)))
    status, found = curve("parts", UPDATES, [signals_in(4, signal.SIGTERM)])
    assert status == 128 + signal.SIGTERM
    assert found == want[:4]
    (runs.checkpoints("parts") / "last.ckpt").unlink()  # goes on one update earlier, and makes that again
    os.utime(runs.checkpoints("parts") / "step3.ckpt")
    assert curve("parts", UPDATES) == (0, want)
    assert curve("parts", UPDATES) == (0, want), "nothing was left to do"


@pytest.mark.slow
def test_a_slurm_job_is_requeued_and_starts_from_its_own_state(runs, whole, tmp_path):
    """Another job's ``hpc_ckpt_1.ckpt`` lies in the folder in which both were started."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    scontrol.chmod(0o755)
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "distill", "SLURM_JOB_ID": "77", "SLURM_NODELIST": "localhost"}
    ranks = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    started = [
        f"os.chdir({str(tmp_path)!r})",
        f"os.environ.update({ {**job, **ranks, 'SLURM_NTASKS_PER_NODE': '1', 'SLURM_NNODES': '1'}!r})",
        f"os.environ['PATH'] = {str(tmp_path)!r} + ':' + os.environ['PATH']",
    ]
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes((runs.checkpoints("whole") / "last.ckpt").read_bytes())
    assert runs.asked("job", [*started, signals_in(4, signal.SIGUSR1, signal.SIGTERM)]) == 128 + signal.SIGUSR1
    assert (tmp_path / "called").read_text() == "requeue 77\n"
    assert "scontrol requeue 77: done" in runs.log("job")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["called", "hpc_ckpt_1.ckpt", "scontrol"]
    assert read_checkpoint(runs.checkpoints("job") / "last.ckpt")["global_step"] == 4
    assert runs.asked("job", started) == 0
    assert equal(whole, runs.final("job"))
