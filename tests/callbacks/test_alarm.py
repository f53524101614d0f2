"""The alarm: what raises it and what does not, and rollbacks that restore the good state."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from contract_cases import CASES, differences, random_weights, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler

from lightning_distill.callbacks.alarm import CollapseAlarm
from lightning_distill.callbacks.good_state import kept_step
from lightning_distill.callbacks.health import TrainingHealth
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import FlowMatching
from lightning_distill.records import EvaluationLog, EvaluationRow
from lightning_distill.schedules import WarmupDecay

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings(
    "ignore:ConstantEMA",
    "ignore:.*eval mode",
    "ignore:CollapseAlarm",
    "ignore:Using ModelCheckpoint with manual",
    "ignore:Checkpoint directory",
    "ignore:Be aware",
    "ignore:The number of training batches",
    "ignore:Detected call of `lr_scheduler.step",
    "ignore:The epoch parameter",
)

BY_NAME = {case.name: case for case in CASES}
TEACHER = {"recall_cnn": 0.8, "coverage_cnn": 0.9, "vendi_cnn": 8.0, "fd_cnn": 3.0}


class Evaluations(Callback):
    """Rows given in advance by update, or measured by a function of the module."""

    def __init__(self, rows):
        self.history = EvaluationLog(teacher=[EvaluationRow("teacher", 1, {"recall_cnn": 0.1}), TEACHER_ROW])
        self.rows = rows

    def on_train_batch_end(self, trainer, pl_module, *_):
        figures = self.rows(pl_module) if callable(self.rows) else self.rows.get(trainer.global_step)
        if figures is not None:
            self.history.rows.append(EvaluationRow("student", 1, figures, "ema", trainer.global_step))

    def state_dict(self):
        return {"rows": [[row.metrics, row.step] for row in self.history.rows]}

    def load_state_dict(self, state_dict):
        self.history.rows = [EvaluationRow("student", 1, m, "ema", step) for m, step in state_dict["rows"]]


TEACHER_ROW = EvaluationRow("teacher", 50, TEACHER)


class At(Callback):
    """Do something to the module at the end of some updates, before the callbacks behind it."""

    def __init__(self, updates, action):
        self.updates, self.action = updates, action

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step in self.updates:
            self.action(pl_module)


@torch.no_grad()
def constant_output(module):
    """Overwrite student and averages so that every noise gives the same sample."""
    for network in (module.student, *module.student_ema.values()):
        for parameter in network.network.parameters():
            parameter.zero_()


def sample_mlp():
    """A network whose output is the sample itself, so that zero weights give one sample."""
    return Denoiser(random_weights(ResidualMLP((2,), width=8, depth=2)), FlowMatching(), "sample", sigma_data=1.12)


def run(folder, steps, *callbacks, name="one_step", logger=True, **settings):
    case = BY_NAME[name] if isinstance(name, str) else name
    settings = {"log_every_n_steps": 1, "default_root_dir": str(folder), **settings}
    overrides = settings.pop("overrides", {})
    ckpt_path = settings.pop("ckpt_path", None)
    module = case.build(folder, **overrides)
    if logger:
        settings["logger"] = CSVLogger(str(folder), name="run", version=0)
    fit = trainer(steps, callbacks=list(callbacks), **settings)
    fit.fit(module, case.loader(module), ckpt_path=ckpt_path)
    return module, fit


def kinds(alarm):
    return [entry["kind"] for entry in alarm.alarms]


def rows(recall, vendi=None, start=1):
    return {
        start + i: {"recall_cnn": r, "vendi_cnn": 8.0 if vendi is None else vendi[i], "fd_cnn": 5.0}
        for i, r in enumerate(recall)
    }


# ------------------------------------------------------------------------------------------------ evaluations
def modes_found(module):
    """How many of four directions from the mean hold samples (as recall), and their effective number (as Vendi)."""
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    samples = module.sample(200, noise=noise)
    centred = samples - samples.mean(0)
    angles = torch.atan2(centred[:, 1], centred[:, 0])[centred.norm(dim=1) > 1e-3]
    counts = torch.bincount(((angles + torch.pi) / (torch.pi / 2)).long().clamp(0, 3), minlength=4).double()
    p = counts / counts.sum().clamp_min(1)
    vendi = float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))
    return {"recall_cnn": float((counts > 0).double().mean()), "vendi_cnn": 2 * vendi if counts.any() else 1.0}


def test_mode_collapse_raises_recall_and_diversity_once(tmp_path):
    case = replace(BY_NAME["one_step"], network=sample_mlp)
    assert modes_found(case.build(tmp_path))["recall_cnn"] > 0.5
    alarm = CollapseAlarm()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, 5, At({3, 4, 5}, constant_output), Evaluations(modes_found), alarm, name=case)
    assert sorted(kinds(alarm)) == ["diversity", "recall"]
    assert {entry["step"] for entry in alarm.alarms} == {3}
    texts = [str(w.message) for w in caught if "CollapseAlarm" in str(w.message)]
    assert len(texts) == 2
    recall = next(t for t in texts if ", recall:" in t)
    assert "recall_cnn of ema at nfe 1 is 0, below 0.5 of the teacher's 0.8 (best so far " in recall
    assert "lower its learning rate or the guidance" in recall
    lines = [json.loads(line) for line in (tmp_path / "run/version_0/warnings.jsonl").read_text().splitlines()]
    assert lines == alarm.alarms
    assert set(lines[0]) == {"step", "kind", "message"}


@pytest.mark.parametrize(
    ("recall", "expected"),
    [
        ([0.0, 0.1, 0.2, 0.3, 0.5, 0.6], None),  # on its way up
        ([0.0], None),  # untrained
        ([0.6, 0.55, 0.41, 0.45], None),  # above half of the teacher's .8
        ([0.6, 0.39], 2),  # fallen
        ([0.1, 0.1, 0.1, 0.1, 0.1], 4),  # never good, no new best in three
        ([0.1, 0.1, 0.2, 0.1, 0.1, 0.3], None),
        ([0.6, float("nan")], 2),
    ],
)
def test_when_a_low_recall_counts(recall, expected, tmp_path):
    alarm = CollapseAlarm()
    run(tmp_path, 6, Evaluations(rows(recall)), alarm, logger=False)
    assert kinds(alarm) == ([] if expected is None else ["recall"])
    assert [entry["step"] for entry in alarm.alarms] == ([] if expected is None else [expected])


def test_the_fractions_are_those_given(tmp_path):
    given = rows([0.6, 0.3, 0.3], [6.0, 6.0, 3.0])
    alarm = CollapseAlarm(recall_fraction=0.3, diversity_fraction=0.4)
    run(tmp_path, 4, Evaluations(given), alarm, logger=False)
    assert kinds(alarm) == ["diversity"]


def test_patience_asks_for_findings_in_a_row(tmp_path):
    alarm = CollapseAlarm(patience=2)
    run(tmp_path, 6, Evaluations(rows([0.6, 0.2, 0.6, 0.2, 0.1])), alarm, logger=False)
    assert [(e["kind"], e["step"]) for e in alarm.alarms] == [("recall", 5)]


def test_rows_of_other_steps_networks_and_stages_do_not_count(tmp_path):
    class Mixed(Evaluations):
        def on_train_batch_end(self, trainer, pl_module, *_):
            step = trainer.global_step
            bad, good = {"recall_cnn": 0.0 if step > 1 else 0.9}, {"recall_cnn": 0.7}
            self.history.rows += [
                EvaluationRow("student", 4, bad, "ema", step),
                EvaluationRow("student", 1, bad, "student", step),
                EvaluationRow("student", 1, bad, "ema", step, stage="test"),
                EvaluationRow("student", 1, good, "ema", step),
                EvaluationRow("student", 1, bad, "ema", step + 100),
            ]

    alarm = CollapseAlarm()
    run(tmp_path, 4, Mixed({}), alarm, logger=False)
    assert alarm.alarms == []


def test_the_last_evaluation_is_judged_wherever_the_alarm_stands(tmp_path):
    alarm = CollapseAlarm()
    run(tmp_path, 3, alarm, Evaluations(rows([0.7, 0.7, 0.1])), logger=False)
    assert [(e["kind"], e["step"]) for e in alarm.alarms] == [("recall", 3)]


# ------------------------------------------------------------------------------------------------ health and losses
class Given(TrainingHealth):
    """Health figures given in advance, by update."""

    def __init__(self, figures):
        super().__init__()
        self.figures = figures

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step in self.figures:
            self.latest, self.measured_at = self.figures[trainer.global_step], trainer.global_step


def alarmed(folder, name, values, **settings):
    alarm = CollapseAlarm(**settings)
    given = Given({i + 1: {name: value} for i, value in enumerate(values)})
    run(folder, len(values) + 1, given, alarm, logger=False)
    return [(e["kind"], e["step"]) for e in alarm.alarms]


def test_health_figures(tmp_path):
    assert alarmed(tmp_path, "fake_score_lag", [0.7, 0.9, 1.0, 1.19]) == []
    assert alarmed(tmp_path, "fake_score_lag", [0.7, 1.21, 1.3]) == [("lagging_critic", 2)]
    assert alarmed(tmp_path, "fake_score_lag", [0.7, 1.21], lag_threshold=1.3) == []
    assert alarmed(tmp_path, "fake_score_lag", [float("nan")]) == [("lagging_critic", 1)]
    assert alarmed(tmp_path, "fake_score_lag", [0.5, 1.1] * 4) == [("oscillating_critic", 8)]
    assert alarmed(tmp_path, "fake_score_lag", [0.9, 1.0] * 5) == []
    assert alarmed(tmp_path, "fake_score_lag", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0]) == []
    assert alarmed(tmp_path, "score_gap", [1e-4, 0.0]) == [("frozen_critic", 2)]
    assert alarmed(tmp_path, "spread_ratio", [0.05, 0.2, 0.4, 0.8, 1.0]) == []
    assert alarmed(tmp_path, "spread_ratio", [0.9, 0.6, 0.45]) == [("collapse", 3)]
    assert alarmed(tmp_path, "spread_ratio", [0.1] * 12) == [("collapse", 11)]


def test_health_figures_of_others_are_read_from_the_logged_metrics(tmp_path):
    class Other(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.log("health/fake_score_lag", 2.0)

    alarm = CollapseAlarm()
    run(tmp_path, 2, Other(), alarm, logger=False)
    assert kinds(alarm) == ["lagging_critic"]


def test_losses_that_are_not_finite(tmp_path):
    alarm = CollapseAlarm()
    module = BY_NAME["one_step"].build(tmp_path)
    original = module.weighted_sum

    def weighted_sum(phase, terms):
        bad = module.draws.update == 2 and phase == "fake_score"
        return original(phase, terms) * (float("nan") if bad else 1.0)

    module.weighted_sum = weighted_sum
    trainer(5, callbacks=[alarm], log_every_n_steps=1).fit(module, BY_NAME["one_step"].loader(module))
    assert [(e["kind"], e["step"]) for e in alarm.alarms] == [("non_finite", 3)]
    assert "the loss of phase fake_score is nan" in alarm.alarms[0]["message"]


def test_many_skipped_steps_between_two_logs(tmp_path):
    alarm = CollapseAlarm()
    skip = At({2}, lambda module: module.skipped_steps.add_(torch.tensor([1.0, 0.0])))
    run(tmp_path, 8, skip, alarm, logger=False, log_every_n_steps=4)
    assert [(e["kind"], e["step"]) for e in alarm.alarms] == [("non_finite", 4)]
    assert "1 of the last updates of phase student" in alarm.alarms[0]["message"]


# ------------------------------------------------------------------------------------------------ stop and rollback
def test_stop(tmp_path):
    alarm = CollapseAlarm(action="stop")
    _, fit = run(tmp_path, 9, Evaluations(rows([0.7, 0.7, 0.1])), alarm)
    assert fit.global_step == 3
    assert kinds(alarm) == ["recall", "stop"]


def state_of(module, fit):
    tensors = {k: v.detach().clone() for k, v in module.state_dict().items()}
    moments = [
        {k: {n: v.clone() for n, v in s.items()} for k, s in o.state_dict()["state"].items()} for o in fit.optimizers
    ]
    return {"state_dict": tensors, "moments": moments}


class States(Callback):
    """Complete states and learning rates at the end of every update."""

    def __init__(self):
        self.states, self.rates = {}, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.states[trainer.global_step] = state_of(pl_module, trainer)
        self.rates[trainer.global_step] = [o.param_groups[0]["lr"] for o in trainer.optimizers]


@pytest.mark.sparse(2)
@pytest.mark.parametrize("name", ["one_step", "gan_fake_score", "lora", "edm_preconditioned"])
def test_rollback_restores_the_good_state_and_cuts_the_rates(name, tmp_path):
    plain = States()
    run(tmp_path / "plain", 6, plain, name=name)
    alarm, before, after = CollapseAlarm(action="rollback"), States(), States()
    evaluations = Evaluations({2: {"recall_cnn": 0.8}, 4: {"recall_cnn": 0.0}})

    def spoil(module):
        with torch.no_grad():
            for parameter in module.student.parameters():
                parameter.mul_(0.0)

    torch.manual_seed(5)
    module, fit = run(tmp_path, 6, At({4}, spoil), before, evaluations, alarm, after, name=name)
    assert kinds(alarm) == ["recall", "rollback"]
    assert alarm.rollbacks == 1
    assert alarm.good_step == 2
    assert "back to the weights of update 2 (recall), learning rates times 0.5" in alarm.alarms[-1]["message"]
    # up to the rollback the run is that without an alarm; then the good state is back, bit for bit
    assert not differences(plain.states[3], after.states[3])
    assert differences(before.states[4], after.states[2])
    assert not differences(after.states[2], after.states[4])
    assert not differences(
        torch.load(tmp_path / "run/version_0/checkpoints/good.ckpt", weights_only=True)["state_dict"],
        after.states[4]["state_dict"],
    )
    # the schedule goes on from its position, at half the height; the run ends at its own number of updates
    for step in range(1, 7):
        factor = 1.0 if step < 4 else 0.5
        assert after.rates[step] == pytest.approx([factor * rate for rate in plain.rates[step]], rel=1e-12)
    assert fit.global_step == 6
    assert all(config.scheduler.last_epoch == 6 for config in fit.lr_scheduler_configs)
    assert differences(after.states[4], after.states[6])
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_global_generators_are_left_alone(tmp_path):
    alarm, seen = CollapseAlarm(action="rollback"), {}

    class Generators(Callback):
        def __init__(self, name):
            self.name = name

        def on_train_batch_end(self, trainer, *_):
            if self.name == "before":
                torch.rand(1)  # something draws from the global generator
            seen[trainer.global_step, self.name] = torch.get_rng_state()

    run(tmp_path, 4, Evaluations(rows([0.7, 0.7, 0.1])), Generators("before"), alarm, Generators("after"))
    assert alarm.rollbacks == 1
    assert torch.equal(seen[3, "before"], seen[3, "after"])
    assert not torch.equal(seen[2, "after"], seen[3, "after"])


SCHEDULES = {
    "warmup_decay": lambda o: WarmupDecay(o, 2, 20, "cosine"),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 20)], [5]
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.sparse(3)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_no_schedule_undoes_the_cut(schedule, tmp_path):
    overrides = {"student_scheduler": schedule, "fake_score_scheduler": None}
    plain, rates = States(), States()
    run(tmp_path / "plain", 9, plain, overrides=overrides)
    alarm = CollapseAlarm(action="rollback", lr_factor=0.25)
    run(tmp_path, 9, Evaluations(rows([0.7, 0.7, 0.1])), alarm, rates, overrides=overrides)
    assert alarm.rollbacks == 1
    for step in range(1, 10):
        factor = 1.0 if step < 3 else 0.25
        assert rates.rates[step] == pytest.approx([factor * rate for rate in plain.rates[step]], rel=1e-9)


def test_rollbacks_are_limited(tmp_path):
    alarm, rates = CollapseAlarm(action="rollback", max_rollbacks=2), States()
    given = {1: {"recall_cnn": 0.8}} | {i: {"recall_cnn": 0.0} for i in (3, 5, 7, 9)}
    _, fit = run(tmp_path, 20, Evaluations(given), alarm, rates)
    assert fit.global_step == 7
    assert kinds(alarm) == ["recall", "rollback", "rollback", "stop"]
    assert "after 2 rollbacks" in alarm.alarms[-1]["message"]
    plain = States()
    run(tmp_path / "plain", 6, plain)
    assert rates.rates[6] == pytest.approx([0.25 * rate for rate in plain.rates[6]])


def test_the_start_is_good_until_an_evaluation_says_so(tmp_path):
    alarm, states = CollapseAlarm(action="rollback"), States()
    run(tmp_path, 2, Given({2: {"fake_score_lag": 5.0}}), alarm, states)
    assert alarm.good_step == 0
    start = BY_NAME["one_step"].build(tmp_path)
    assert not differences(dict(start.state_dict()), states.states[2]["state_dict"])


def test_good_checkpoints_lie_with_the_others_and_can_be_resumed_from(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=100)
    alarm = CollapseAlarm(action="rollback")
    run(tmp_path, 3, Evaluations(rows([0.7, 0.7])), alarm, saving, enable_checkpointing=True, logger=False)
    assert (tmp_path / "kept/good.ckpt").is_file()
    _, fit = run(tmp_path, 4, ckpt_path=tmp_path / "kept/good.ckpt", logger=False)
    assert fit.global_step == 4
    assert torch.load(tmp_path / "kept/good.ckpt", weights_only=True)["global_step"] == 2


def test_a_rewound_run_goes_back_to_its_own_good_state(tmp_path):
    def parts(folder):
        every = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        return CollapseAlarm(action="rollback"), every

    kept = tmp_path / "kept"
    run(tmp_path, 6, Evaluations(rows([0.7] * 6)), *parts(kept), enable_checkpointing=True, logger=False)
    assert torch.load(kept / "good.ckpt", weights_only=True)["global_step"] == 6
    want = torch.load(kept / "step=2.ckpt", weights_only=True)["state_dict"]
    alarm, every = parts(kept)
    states = States()
    bad = Evaluations({4: {"recall_cnn": 0.0}})
    settings = {"enable_checkpointing": True, "logger": False, "ckpt_path": kept / "step=2.ckpt"}
    run(tmp_path, 5, bad, alarm, states, every, **settings)
    assert alarm.rollbacks == 1
    assert alarm.good_step == 2
    assert not differences(want, states.states[4]["state_dict"])


def test_all_processes_decide_alike_whether_there_is_a_good_state(tmp_path):
    asked = []

    def broadcast(value):
        asked.append(value)
        return 3  # the first process'

    (tmp_path / "good.ckpt").write_bytes(b"another disk")
    strategy = SimpleNamespace(broadcast=broadcast)
    for first in (True, False):
        assert kept_step(SimpleNamespace(is_global_zero=first, strategy=strategy), tmp_path / "good.ckpt") == 3
    assert asked == [None, None]


def test_warn_writes_no_checkpoint(tmp_path):
    run(tmp_path, 3, Evaluations(rows([0.7, 0.1])), CollapseAlarm())
    assert not list(tmp_path.rglob("*.ckpt"))


# ------------------------------------------------------------------------------------------------ resume
@pytest.mark.filterwarnings("ignore:resuming with other settings")  # rates that the alarm has cut
def test_a_resumed_run_knows_its_alarms_and_its_cut_rates(tmp_path):
    given = {1: {"recall_cnn": 0.8}, 3: {"recall_cnn": 0.0}, 7: {"recall_cnn": 0.0}}

    def parts(folder):
        every = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        return Evaluations(given), CollapseAlarm(action="rollback"), every

    evaluations, alarm, every = parts(tmp_path / "ckpt")
    whole, fit = run(tmp_path, 8, evaluations, alarm, every, enable_checkpointing=True)
    want = state_of(whole, fit)
    assert kinds(alarm) == ["recall", "rollback", "rollback"]
    evaluations, resumed, every = parts(tmp_path / "ckpt")
    module, fit = run(
        tmp_path, 8, evaluations, resumed, every, enable_checkpointing=True, ckpt_path=tmp_path / "ckpt/step=5.ckpt"
    )
    assert not differences(want, state_of(module, fit))
    assert kinds(resumed) == kinds(alarm)
    assert resumed.rollbacks == 2
    assert resumed.alarms == alarm.alarms


def test_the_state_is_plain_and_complete(tmp_path):
    alarm = CollapseAlarm()
    run(tmp_path, 4, Evaluations(rows([0.7, 0.1, 0.1])), Given({2: {"fake_score_lag": 0.9}}), alarm, logger=False)
    other = CollapseAlarm()
    other.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    assert other.state_dict() == alarm.state_dict()
    assert other._found == {"recall": 2, "diversity": 0, "lagging_critic": 0, "oscillating_critic": 0, "non_finite": 0}


# ------------------------------------------------------------------------------------------------ settings
def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="choose warn, stop or rollback"):
        CollapseAlarm(action="panic")
    with pytest.raises(ValueError, match="fractions lie in"):
        CollapseAlarm(recall_fraction=1.5)
    with pytest.raises(ValueError, match="healthy critic is at most about 1"):
        CollapseAlarm(lag_threshold=0.9)
    with pytest.raises(ValueError, match="patience >= 1"):
        CollapseAlarm(patience=0)


def test_fast_dev_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alarm = CollapseAlarm(action="rollback")
    run(tmp_path, -1, Evaluations(rows([0.7])), alarm, logger=False, fast_dev_run=True)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert alarm.alarms == []
