"""Which rows an evaluated run has: every checkpoint and every update once, and none is lost."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from small_runs import prior, student, trainer
from torch.utils.data import DataLoader

from lightning_distill.callbacks.alarm import CollapseAlarm
from lightning_distill.callbacks.evaluation import GenerativeEvaluation
from lightning_distill.records import EvaluationLog, EvaluationRow

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*eval mode",
    "ignore:Using ModelCheckpoint with manual",
    "ignore:Checkpoint directory",
    "ignore:CollapseAlarm",
    "ignore:Be aware",
    "ignore:You called .self.log",
)


def evaluation(**settings):
    return GenerativeEvaluation(**{"num_samples": 100, "table": False, **settings})


def steps_and_stages(rows):
    return [(row.step, row.stage) for row in rows]


def test_every_checkpoint_is_measured_and_no_row_is_lost(tmp_path):
    """Each at its own update; by the Trainer of the fit, and by one that knows nothing of it."""
    every = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    callback, module = evaluation(every_n_steps=2), student()
    run = trainer(
        tmp_path, 4, callbacks=[callback, every], enable_checkpointing=True, logger=False, default_root_dir=tmp_path
    )
    run.fit(module, prior())
    two, four = (str(tmp_path / "kept" / f"step={n}.ckpt") for n in (2, 4))
    known = [(2, "fit"), (4, "fit")]
    for stage, start in (("test", run.test), ("validate", run.validate)):
        for path, step in ((two, 2), (four, 4)):
            (logged,) = start(module, prior(), ckpt_path=path, verbose=False)
            known.append((step, stage))
            (value,) = (v for k, v in logged.items() if k.endswith("fd_cnn/nfe1/ema"))
            assert value == pytest.approx(callback.history.rows[-1].metrics["fd_cnn"], rel=1e-5)
            assert steps_and_stages(callback.history.rows) == known
            assert EvaluationLog.load(tmp_path).rows == callback.history.rows
    fit, test, validate = (callback.history.rows[i : i + 2] for i in (0, 2, 4))
    for a, b, c in zip(fit, test, validate):
        assert c.metrics["fd_cnn"] == pytest.approx(a.metrics["fd_cnn"], rel=1e-5)
        assert b.metrics["fd_cnn"] != pytest.approx(a.metrics["fd_cnn"], rel=1e-5)
    other = evaluation(num_samples=210, teacher_steps=3)
    trainer(tmp_path, callbacks=[other], logger=False, default_root_dir=tmp_path).test(
        module, prior(), ckpt_path=two, verbose=False
    )
    log = EvaluationLog.load(tmp_path)
    assert steps_and_stages(log.rows) == [*known, (2, "test")]
    assert steps_and_stages(other.history.rows) == [(2, "test")]
    assert {row.nfe for row in log.baselines(log.rows[-1])} == {1, 3}
    assert log.baselines(log.rows[-1])[0].samples == (210, 1001, "held_out")
    assert log.baseline(50, log.rows[0]) == callback.history.baseline(50)


def test_an_update_is_measured_once(tmp_path):
    callback = evaluation(every_n_steps=2)
    at_validation = []

    class Seen(Callback):
        def on_validation_end(self, trainer, *_):
            at_validation.append(trainer.callback_metrics["val/fd_cnn/nfe1/ema"].item())

    run = trainer(tmp_path, 6, callbacks=[callback, Seen()], val_check_interval=3, check_val_every_n_epoch=None)
    data = prior()
    data.setup("fit")
    run.fit(student(), data.train_dataloader(), DataLoader([0]))
    rows = callback.history.rows
    assert steps_and_stages(rows) == [(2, "fit"), (3, "validate"), (4, "fit"), (6, "fit")]
    assert at_validation == pytest.approx([rows[1].metrics["fd_cnn"], rows[3].metrics["fd_cnn"]])
    assert EvaluationLog.load(run.log_dir).rows == rows


def test_samples_that_are_not_finite_do_not_end_the_run(tmp_path):
    class Break(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                with torch.no_grad():
                    for network in (pl_module.student, *pl_module.student_ema.values()):
                        next(network.parameters()).fill_(float("nan"))

    callback, alarm = evaluation(every_n_steps=1), CollapseAlarm(action="rollback")
    run = trainer(
        tmp_path, 4, callbacks=[Break(), callback, alarm], enable_checkpointing=True, default_root_dir=tmp_path
    )
    with pytest.warns(UserWarning, match="100 of 100 evaluated samples contain NaN or inf"):
        run.fit(student(), prior())
    assert run.global_step == 4
    rows = callback.history.rows
    assert [r.step for r in rows] == [1, 2, 3, 4]
    assert all(row.metrics.keys() == rows[0].metrics.keys() for row in rows)
    finite = [{k: np.isfinite(v) for k, v in row.metrics.items() if k != "samples_per_second"} for row in rows]
    assert not any(finite[1].values())
    assert all(all(finite[i].values()) for i in (0, 2, 3))
    assert (alarm.rollbacks, alarm.alarms[0]["step"]) == (1, 2)
    assert [r.step for r in EvaluationLog.load(run.log_dir).rows] == [1, 2, 3, 4]
    module = student()
    module.configure_model()
    with torch.no_grad():
        for network in (module.student, *module.student_ema.values()):
            next(network.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="contain NaN or inf; check the samples"):
        trainer(tmp_path, callbacks=[evaluation()]).test(module, prior(), verbose=False)


def test_a_run_that_goes_on_keeps_what_was_measured_meanwhile(tmp_path):
    def row(step):
        return EvaluationRow("student", 1, {"fd_cnn": 1.0}, "ema", step, "test", 300, 9, "held_out")

    def measured_elsewhere(*rows):
        log = EvaluationLog.load(tmp_path / "run")
        log.update(EvaluationLog(list(rows), [EvaluationRow("teacher", 8, {"fd_cnn": 2.0}, num_samples=300, seed=9)]))
        log.save(tmp_path / "run")

    class Meanwhile(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                measured_elsewhere(row(5))

    def fit(steps, path=None):
        callback = evaluation(every_n_steps=2)
        run = trainer(tmp_path, steps, callbacks=[callback, Meanwhile()], logger=TensorBoardLogger(tmp_path, "", "run"))
        run.fit(student(), prior(), ckpt_path=path)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return callback.history.rows

    fit(4)
    measured_elsewhere(row(2), row(4), row(6))
    # at its very end: nothing is measured again
    assert steps_and_stages(fit(4, str(tmp_path / "4.ckpt"))) == [(2, "fit"), (4, "fit")]
    rows = fit(8, str(tmp_path / "4.ckpt"))
    assert steps_and_stages(rows) == [(2, "fit"), (4, "fit"), (6, "fit"), (8, "fit")]
    after = EvaluationLog.load(tmp_path / "run")
    # the weights of update 6 are new ones
    assert after.rows == [row(2), rows[0], row(4), rows[1], row(5), rows[2], rows[3]]
    assert {other.nfe for other in after.teacher if other.num_samples == 300} == {8}
