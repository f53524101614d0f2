"""Runs that go on with other settings than they began with: told line by line, or refused."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from method_cases import CASES, trainer

from lightning_distill.checkpoints import read_checkpoint
from lightning_distill.cli import main
from lightning_distill.ema import ConstantEMA

CONFIG = Path(__file__).parents[1] / "configs" / "method" / "dmd2_ring4.yaml"
WIDTH = "init_args.spec.init_args.network.init_args.width=8"
TOLD = "resuming with other settings"


def adam(parameters, lr=1e-2, **settings):
    return torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.99), **settings)


# ------------------------------------------------------------------------------------------------ in Python
def fit(folder, steps, path=None, **overrides):
    (case,) = (c for c in CASES if c.name == "one_step")
    module = case.build(folder, **{"student_optimizer": adam, **overrides})
    saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer(steps, callbacks=[saving], enable_checkpointing=True)
    run.fit(module, case.loader(module), ckpt_path=path)
    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A checkpoint of a schedule's second update."""
    folder = tmp_path_factory.mktemp("stopped")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(folder, 2)
    return folder / "step=2.ckpt"


def lines(caught):
    (text,) = [str(w.message) for w in caught if TOLD in str(w.message)]
    return [line.strip() for line in text.splitlines()[1:]]


@pytest.mark.filterwarnings("ignore")
def test_the_same_settings_are_no_news(stopped, tmp_path, recwarn):
    """Other ways of computing the same are none either."""
    fit(tmp_path, 3, stopped, student_optimizer=partial(adam, foreach=True))
    assert not [w for w in recwarn if TOLD in str(w.message)]


def test_every_difference_is_told_with_the_value_that_is_used(stopped, tmp_path):
    changes = {"student_optimizer": partial(adam, lr=1e-7, weight_decay=0.5), "loss_weights": {"student/matching": 7.0}}
    with pytest.warns(UserWarning, match=TOLD) as caught:
        run = fit(tmp_path, 3, stopped, **changes, seed=5, num_steps=2)
    assert lines(caught) == [
        "model.student_optimizer.lr: 0.01 in the checkpoint, 1e-07 now; the checkpoint's value is used.",
        "model.student_optimizer.weight_decay: 0 in the checkpoint, 0.5 now; the checkpoint's value is used.",
        "model.num_steps: 1 in the checkpoint, 2 now; the new value is used.",
        "model.loss_weights.student/matching: nothing in the checkpoint, 7.0 now; the new value is used.",
        "model.seed: 0 in the checkpoint, 5 now; the new value is used.",
    ]
    # and so it is
    (group,) = run.optimizers[0].param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (0.01, 0)
    module = run.lightning_module
    assert (module.loss_weights["student/matching"], module.streams.seed, len(module.student_times)) == (7.0, 5, 2)
    # so that the next to resume is compared with what was in force
    with pytest.warns(UserWarning, match=TOLD) as caught:
        fit(tmp_path / "again", 4, tmp_path / "step=3.ckpt", student_optimizer=partial(adam, lr=1e-7))
    assert "model.student_optimizer.lr: 0.01 in the checkpoint, 1e-07 now" in lines(caught)[0]


def test_another_optimizer_is_refused(stopped, tmp_path):
    with pytest.raises(ValueError, match=r"holds the state of Adam for the phase student, which SGD cannot continue"):
        fit(tmp_path, 3, stopped, student_optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"phase fake_score, which AdamW cannot"):
        fit(tmp_path, 3, stopped, fake_score_optimizer=partial(torch.optim.AdamW, lr=0.1))


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_without_settings_are_resumed(stopped, tmp_path, recwarn):
    """Those of earlier versions."""
    content = read_checkpoint(stopped)
    del content["lightning_distill"]["settings"]
    torch.save(content, tmp_path / "old.ckpt")
    fit(tmp_path, 3, tmp_path / "old.ckpt", seed=5)
    assert not [w for w in recwarn if TOLD in str(w.message)]


@pytest.mark.filterwarnings("ignore")
def test_what_is_recorded_is_plain(stopped):
    recorded = read_checkpoint(stopped)["lightning_distill"]["settings"]
    assert recorded["model"] is None
    assert recorded["arguments"]["ema"] == [ConstantEMA(0.5).name]
    assert recorded["optimizers"]["student"]["class"] == "Adam"
    (group,) = recorded["optimizers"]["student"]["groups"]
    assert group["lr"] == 0.01  # where the schedule starts from, not where it is
    assert group["betas"] == [0.0, 0.99]


# ------------------------------------------------------------------------------------------------ the command line
@pytest.mark.slow
def test_every_argument_of_the_command_line_counts(tmp_path):
    def run(steps, *words):
        common = ["--trainer.accelerator=cpu", f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={tmp_path}"]
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--data.batch_size=8"]
        small = [f"--model.student.{WIDTH}", f"--model.fake_score.{WIDTH}", "--trainer.logger.init_args.version=0"]
        return main(["fit", "-c", str(CONFIG), *common, *quiet, *small, *words])

    schedule = "--model.student_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR"
    with warnings.catch_warnings(record=True) as first:
        warnings.simplefilter("always")
        assert run(2, schedule, "--model.student_scheduler.T_max=10") == 0
        assert run(3, schedule, "--model.student_scheduler.T_max=10", "--ckpt_path=last") == 0
    assert not [w for w in first if TOLD in str(w.message)]
    changes = ["--model.fake_score_steps=3", "--model.student_scheduler.T_max=20"]
    with pytest.warns(UserWarning, match=TOLD) as caught:
        assert run(4, schedule, *changes, "--ckpt_path=last") == 0
    assert [line for line in lines(caught) if "fake_score_steps" in line or "T_max" in line] == [
        "model.fake_score_steps: 2 in the checkpoint, 3 now; the new value is used.",
        "model.student_scheduler.T_max: 10 in the checkpoint, 20 now; the checkpoint's value is used.",
    ]
