"""Health figures: right values, left out where they make no sense, and no trace in the training."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from contract_cases import CASES, Synchronisations, differences, trainer
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from sampling_of_cases import long
from small_problems import Affine, Gaussian, Given

from lightning_distill.batch import Batch
from lightning_distill.callbacks.alarm import CollapseAlarm
from lightning_distill.callbacks.health import TrainingHealth
from lightning_distill.data import InMemory, ResumableLoader
from lightning_distill.methods import DMD2, TDM, PhasedDMD, TeacherTraining
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.processes import FlowMatching
from lightning_distill.randomness import Draws

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings(
    "ignore:ConstantEMA", "ignore:.*eval mode", "ignore:CollapseAlarm", "ignore:Using ModelCheckpoint with manual"
)

BY_NAME = {case.name: case for case in CASES}


def small_health(**settings):
    return TrainingHealth(**{"every_n_steps": 2, "terms_every_n_steps": 2, "num_samples": 8, **settings})


# ------------------------------------------------------------------------------------------------ no trace
def complete_state(case, folder, *callbacks):
    torch.manual_seed(3)
    module = case.build(folder)
    fit = trainer(4, callbacks=list(callbacks))
    fit.fit(module, case.loader(module))
    fit.save_checkpoint(folder / "run.ckpt")
    state = torch.load(folder / "run.ckpt", weights_only=True)
    return {k: state[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "lightning_distill")}


@pytest.mark.sparse(12)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.method.__name__}-{c.name}")
def test_training_is_the_same_bit_for_bit(case, tmp_path):
    health = small_health()
    plain = complete_state(case, tmp_path)
    watched = complete_state(case, tmp_path, health, CollapseAlarm())
    assert not differences(plain, watched)
    assert health.measured_at == 4
    assert all(math.isfinite(v) for v in health.latest.values())


class Traces(Callback):
    """What a callback after this one must leave as it was."""

    def __init__(self):
        self.seen = []

    def look(self, module):
        return {
            "modes": [part.training for part in module.modules()],
            "requires_grad": [p.requires_grad for p in module.parameters()],
            "grad": [p.grad is None for p in module.parameters()],
            "draws": module.draws,
            "rollouts": module._rollouts,
            "skipped": module.skipped_steps.clone(),
        }

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(self.look(pl_module))


@pytest.mark.parametrize("name", ["gan_fake_score", "gan_teacher", "lora", "two_step_vp", "unet_gan", "flow"])
def test_modes_draws_and_gradients_are_put_back(name, tmp_path):
    case = BY_NAME[name]
    module, before, after = case.build(tmp_path), Traces(), Traces()
    fit = trainer(2, callbacks=[before, small_health(), after])
    fit.fit(module, case.loader(module))
    for one, other in zip(before.seen, after.seen, strict=True):
        assert one["draws"] is other["draws"]
        assert one["rollouts"] is other["rollouts"]
        assert torch.equal(one["skipped"], other["skipped"])
        assert all(one[k] == other[k] for k in ("modes", "requires_grad", "grad"))
    assert all(before.seen[-1]["grad"])


@pytest.mark.parametrize("name", ["gan_fake_score", "lora", "guidance", "flow"])
def test_cycles_in_between_never_wait_for_the_device(name, tmp_path):
    case = BY_NAME[name]
    module = case.build(tmp_path)
    health, alarm, mode = small_health(every_n_steps=4, terms_every_n_steps=4), CollapseAlarm(), Synchronisations()
    seen = []

    def watched(callback):
        original = callback.on_train_batch_end

        def on_train_batch_end(trainer, *args):
            if trainer.global_step % 4 == 0:
                return original(trainer, *args)
            seen.append(trainer.global_step)
            with mode:
                return original(trainer, *args)

        callback.on_train_batch_end = on_train_batch_end

    step = module.training_step

    def training_step(batch, batch_idx):
        if batch_idx < 2:  # the first batches are checked for their scaling
            return step(batch, batch_idx)
        with mode:
            return step(batch, batch_idx)

    module.training_step = training_step
    watched(health)
    watched(alarm)
    trainer(5, callbacks=[health, alarm]).fit(module, case.loader(module))
    assert seen == [1, 1, 2, 2, 3, 3, 5, 5]
    assert mode.calls > 100
    assert mode.found == []


# ------------------------------------------------------------------------------------------------ which figures
def figures(name, folder, steps=2, **settings):
    case = BY_NAME[name]
    module, health = case.build(folder), small_health(**settings)
    fit = trainer(steps, callbacks=[health])
    fit.fit(module, case.loader(module))
    logged = {k.removeprefix("health/"): float(v) for k, v in fit.callback_metrics.items() if k.startswith("health/")}
    assert logged == pytest.approx(health.latest)
    return module, health.latest


def test_figures_exist_where_they_mean_something(tmp_path):
    levels = [f"/level_{q}" for q in ("0.1", "0.3", "0.5", "0.7", "0.9")]
    critic = {f"{name}{level}" for name in ("fake_score_lag", "score_gap") for level in ["", *levels]}
    guidance = {f"guidance_{name}{level}" for name in ("share", "cosine") for level in ["", *levels]}
    gan = {"logit_real", "logit_fake_std", "discriminator_accuracy", "cosine/matching_gan", "term_norm/gan"}
    drift = {"brightness_drift", "contrast_ratio", "spread_ratio", "samples/spread", "duplicates"}

    one = set(figures("one_step", tmp_path)[1])
    assert critic | drift | {"time/student", "time/fake_score", "time/other", "samples_per_second"} <= one
    assert {"skipped/student", "skipped/fake_score", "ema_distance/constant_0_5"} <= one
    assert not one & (guidance | gan)
    assert not any(name.startswith(("term_norm", "cosine", "saturation")) for name in one)

    assert critic | guidance | drift <= set(figures("guidance", tmp_path)[1])
    for name in ("gan_fake_score", "gan_teacher", "gan_input", "told_heads_of_the_critic"):
        assert critic | gan | drift <= set(figures(name, tmp_path)[1])
    assert drift | gan - {"cosine/matching_gan"} <= set(figures("unet_gan", tmp_path)[1])

    training = set(figures("vp_dropout", tmp_path)[1])
    assert {"time/student", "samples_per_second", "ema_distance/power_0_1", "skipped/student"} <= training
    assert not training & (critic | guidance | gan | drift)


def test_ranges(tmp_path):
    _, found = figures("guidance", tmp_path)
    assert 0 < found["guidance_share"] < 1
    assert -1 <= found["guidance_cosine"] <= 1
    shares = [v for k, v in found.items() if k.startswith("time/")]
    assert sum(shares) == pytest.approx(1.0, abs=0.02)
    assert min(shares) > 0
    _, found = figures("gan_fake_score", tmp_path)
    assert 0 <= found["discriminator_accuracy"] <= 1
    assert -1 <= found["cosine/matching_gan"] <= 1
    # untrained heads on the same kind of points: term norms are weighted, and gan's weight is a thousandth
    assert found["term_norm/gan"] < found["term_norm/matching"]


def test_no_drift_without_a_reference(tmp_path):
    _, found = figures("one_step", tmp_path, reference_steps=0)
    assert "samples/spread" in found
    assert "spread_ratio" not in found


def test_every_logger_gets_the_figures_at_their_own_update(tmp_path):
    class Memory(DummyLogger):
        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, set(metrics)))

    case, memory = BY_NAME["one_step"], Memory()
    module = case.build(tmp_path)
    trainer(4, callbacks=[small_health()], logger=memory).fit(module, case.loader(module))
    health = [(step, names) for step, names in memory.rows if any(n.startswith("health/") for n in names)]
    assert [step for step, _ in health] == [2, 4]
    assert all("health/fake_score_lag" in names for _, names in health)


# ------------------------------------------------------------------------------------------------ right values
def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def gaussian_run(steps, lr, critic_lr, *callbacks, a=1.3, b=-0.5, fake=None, method=DMD2, **settings):
    """Student N(b, a^2), fake score exact for it at the start, teacher N(1, .7^2)."""
    module = method(
        analytic_denoiser(GaussianMixture([[1.0]], std=0.7), FlowMatching()),
        student=Given(Affine(a, b)),
        fake_score=Given(Gaussian(*(fake or (b, a)))),
        shape=[1],
        ema=[],
        student_optimizer=sgd(lr),
        fake_score_optimizer=sgd(critic_lr),
        fake_score_steps=2,
        weight="one",
        **settings,
    )
    fit = trainer(steps, callbacks=list(callbacks))
    fit.fit(module, ResumableLoader(InMemory(Batch(size=2560)), 256, slices=module.slices_per_cycle))
    return module


def test_lag_and_gap_of_an_exact_critic_in_closed_form():
    health = TrainingHealth(every_n_steps=1, num_samples=256, levels=[0.2, 0.6, 0.8])
    lags, gaps = [], []

    class Collect(Callback):
        def on_train_batch_end(self, *_):
            lags.append([health.latest[f"fake_score_lag/level_{q}"] for q in (0.2, 0.6, 0.8)])
            gaps.append([health.latest[f"score_gap/level_{q}"] for q in (0.2, 0.6, 0.8)])

    gaussian_run(40, 0.0, 0.0, health, Collect())
    t = 0.02 + 0.96 * torch.tensor([0.2, 0.6, 0.8])
    s2, T2 = 1.3**2, 0.7**2
    exact = s2 * t**2 / ((1 - t) ** 2 * s2 + t**2)
    # teacher: y = 1 + k (x_t - (1 - t)), so y - x = (1 - k (1 - t)) (1 - x) + k t eps
    k = (1 - t) * T2 / ((1 - t) ** 2 * T2 + t**2)
    teacher = (1 - k * (1 - t)) ** 2 * (1.5**2 + s2) + (k * t) ** 2
    lag = torch.tensor(lags).mean(0)
    torch.testing.assert_close(lag, exact / teacher, rtol=0.05, atol=0)
    torch.testing.assert_close(torch.tensor(gaps).square().mean(0), 1 - exact / teacher, rtol=0.05, atol=0)
    assert health.latest["fake_score_lag"] == pytest.approx(math.exp(sum(map(math.log, lags[-1])) / 3), rel=1e-4)


@pytest.mark.parametrize("method", [TDM, long(PhasedDMD)])
@pytest.mark.parametrize("sampler", ["ode", long("renoise")])
def test_a_critic_that_is_exact_where_a_step_ends_is_exact_here(method, sampler, monkeypatch):
    """x_u = (1 - u) x0 + u eps of a deterministic step, with the noise that x0 was made of, has another variance."""
    monkeypatch.setattr(method, "stops", lambda self: [0])
    a, u = 1.3, 0.5
    std = a if sampler == "renoise" else math.sqrt(((1 - u) * a + u) ** 2 - u**2) / (1 - u)
    health, found = TrainingHealth(every_n_steps=1, num_samples=256, levels=[0.3, 0.7]), []

    class Collect(Callback):
        def on_train_batch_end(self, *_):
            names = ("fake_score_lag/level_0.7", "score_gap/level_0.7", "fake_score_residual")
            found.append([health.latest[name] for name in names])

    settings = {"num_steps": 2, "sampler": sampler, "rollout_step": "batch", "critic_condition_on": "none"}
    gaussian_run(40, 0.0, 0.0, health, Collect(), a=a, fake=(-0.5, std), method=method, **settings)
    lag, gap, residual = torch.tensor(found).T
    assert lag.mean() < 0.95
    assert float(gap.square().mean()) == pytest.approx(1 - float(lag.mean()), abs=0.03)
    assert float(residual.mean()) == pytest.approx(0.0, abs=0.03)


@pytest.mark.long
def test_a_healthy_run_has_a_lag_of_one_and_raises_no_alarm(recwarn):
    health, alarm = TrainingHealth(every_n_steps=25, num_samples=256), CollapseAlarm()
    module = gaussian_run(200, 0.1, 0.1, health, alarm)
    assert float(module.student.network.b.detach()) == pytest.approx(1.0, abs=0.1)
    assert health.latest["fake_score_lag"] == pytest.approx(1.0, abs=0.05)
    assert abs(health.latest["brightness_drift"]) < 0.2
    assert health.latest["spread_ratio"] == pytest.approx(1.0, abs=0.2)
    assert alarm.alarms == []
    assert not any("CollapseAlarm" in str(w.message) for w in recwarn)


def test_a_critic_that_does_not_learn_lags_and_raises_the_alarm():
    health, alarm, lags = TrainingHealth(every_n_steps=25, num_samples=256), CollapseAlarm(), []

    class Collect(Callback):
        def on_train_batch_end(self, *_):
            lags.append(health.latest.get("fake_score_lag", 0.0))

    with pytest.warns(UserWarning, match="lagging_critic: the fake score's denoising error .* times the teacher's"):
        gaussian_run(200, 0.1, 0.0, health, alarm, Collect())
    assert max(lags) > 1.2
    # past the teacher both are wrong and the lag is blind again; drift and spread tell
    assert health.latest["fake_score_lag"] < 1
    assert health.latest["brightness_drift"] > 2
    assert "collapse" in [a["kind"] for a in alarm.alarms]
    assert [a["kind"] for a in alarm.alarms].count("lagging_critic") == 1


def test_a_critic_equal_to_the_teacher_is_noticed(tmp_path):
    case, health, alarm = BY_NAME["one_step"], small_health(), CollapseAlarm()
    module = DMD2(case.network(), student_optimizer=sgd(0.1), fake_score_optimizer=sgd(0.0), fake_score_steps=2)
    with pytest.warns(UserWarning, match="frozen_critic"):
        trainer(2, callbacks=[health, alarm]).fit(module, case.loader(module))
    assert health.latest["score_gap"] == 0.0
    assert health.latest["fake_score_lag"] == 1.0


def test_samples_of_a_constant_student_have_no_spread(tmp_path):
    health = TrainingHealth(every_n_steps=1, num_samples=64)
    gaussian_run(1, 0.0, 0.0, health, a=0.0, b=3.0)
    assert health.latest["samples/spread"] == pytest.approx(0.0, abs=1e-6)
    assert health.latest["spread_ratio"] == pytest.approx(0.0, abs=1e-6)
    # the reference is the teacher's own samples, N(1, .7^2)
    assert health.latest["brightness_drift"] == pytest.approx(2 / 0.7, rel=0.25)
    assert health.latest["samples/mean"] == pytest.approx(3.0)
    assert health.latest["duplicates"] == 1.0


# ------------------------------------------------------------------------------------------------ the module's part
def test_term_gradients_add_up_to_the_gradient_of_the_loss(tmp_path):
    case = BY_NAME["gan_fake_score"]
    module = case.build(tmp_path)
    trainer(1).fit(module, case.loader(module))
    module.loss_weights["student/gan"] = 0.3
    batch = next(iter(case.loader(module))).rows(0, 8)
    found = module.term_gradients(batch, "test")
    assert list(found) == ["matching", "gan"]
    assert all(p.grad is None for p in module.parameters())
    module.draws = Draws(module.streams, module.global_step, 0, "test", -1)
    module._rollouts.clear()
    parameters = module.role_parameters("student")
    want = torch.autograd.grad(module.weighted_sum("student", module.student_loss(batch)), parameters)
    for total, *parts in zip(want, *found.values(), strict=True):
        torch.testing.assert_close(sum(parts), total)
    assert all(bool(g.abs().sum() > 0) for g in (found["gan"][0], found["matching"][0]))
    single = BY_NAME["one_step"].build(tmp_path)
    trainer(1).fit(single, case.loader(single))
    assert single.term_gradients(Batch(size=8), "test") == {}


def test_probing_restores_buffers_even_after_an_error(tmp_path):
    module = BY_NAME["one_step"].build(tmp_path)
    trainer(1).fit(module, BY_NAME["one_step"].loader(module))
    draws, rollouts = module.draws, module._rollouts

    def spoil():
        with module.probing("test"):
            module.skipped_steps += 5
            module.rollout(Batch(size=4))
            assert module._rollouts
            raise KeyError

    with pytest.raises(KeyError):
        spoil()
    assert module.draws is draws
    assert module._rollouts is rollouts
    assert not module._rollouts
    assert module.skipped_steps.tolist() == [0.0, 0.0]


def test_phase_seconds_grow_with_the_cycles(tmp_path):
    case, seen = BY_NAME["gan_fake_score"], []
    module = case.build(tmp_path)

    class Collect(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.phase_seconds)

    trainer(3, callbacks=[Collect()]).fit(module, case.loader(module))
    assert all(set(s) == {"student", "fake_score"} for s in seen)
    for phase in ("student", "fake_score"):
        assert 0 < seen[0][phase] < seen[1][phase] < seen[2][phase]


# ------------------------------------------------------------------------------------------------ configuration
def test_the_reference_survives_a_resume(tmp_path):
    first = TrainingHealth(every_n_steps=1, num_samples=32)
    gaussian_run(2, 0.0, 0.0, first)
    second = TrainingHealth(every_n_steps=1, num_samples=32, reference_steps=0)
    second.load_state_dict(first.state_dict())
    gaussian_run(2, 0.0, 0.0, second)
    assert second.latest["spread_ratio"] == pytest.approx(first.latest["spread_ratio"])
    assert second.latest["brightness_drift"] == pytest.approx(first.latest["brightness_drift"])


def test_the_reference_is_the_mean_over_the_data_seen(tmp_path):
    case, health = BY_NAME["gan_fake_score"], small_health(every_n_steps=1)
    module = case.build(tmp_path)
    batches = list(case.loader(module))[:3]
    trainer(3, callbacks=[health]).fit(module, case.loader(module))
    want = sum(b.x0.double().std(correction=0) for b in batches) / 3
    assert health.state_dict()["reference"]["std"] == pytest.approx(float(want), rel=1e-5)


def test_both_are_built_from_yaml():
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    entries = [
        {"class_path": "lightning_distill.callbacks.health.TrainingHealth", "init_args": {"levels": [0.5]}},
        {"class_path": "lightning_distill.callbacks.alarm.CollapseAlarm", "init_args": {"action": "rollback"}},
    ]
    health, alarm = parser.instantiate_classes(parser.parse_object({"callbacks": entries})).callbacks
    assert health.levels == (0.5,)
    assert alarm.action == "rollback"


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="at least 1 update, 2 samples"):
        TrainingHealth(every_n_steps=0)
    with pytest.raises(ValueError, match="quantiles between 0 and 1"):
        TrainingHealth(levels=[0.5, 1.0])


def test_teacher_training_needs_no_teacher(tmp_path):
    _, found = figures("flow", tmp_path)
    assert BY_NAME["flow"].method is TeacherTraining
    assert "samples_per_second" in found
