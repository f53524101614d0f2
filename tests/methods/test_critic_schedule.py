"""Critic updates set from the measured lag: the measurement, the decisions, and what a run does with them."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from small_problems import distil, gaussian_problem, mlp, ready, shift, trained_steps

from lightning_distill.batch import Batch
from lightning_distill.callbacks.alarm import CollapseAlarm
from lightning_distill.data import InMemory, ResumableLoader
from lightning_distill.guidance import Guidance
from lightning_distill.methods import DMD2, TDM, DiffInstruct, SiD, SwiftBrush, UpdateSchedule
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.roles import Lora

pytestmark = pytest.mark.filterwarnings(
    "ignore:ConstantEMA",
    "ignore:.*eval mode",
    "ignore:Using ModelCheckpoint with manual",
    "ignore:Checkpoint directory",
)


# ------------------------------------------------------------------------------------------------ the measurement
def measured(module, batch, change, update=1):
    """Lambda of a critic that is moved from outside between the first and the last of two updates."""
    trained_steps(module)
    ready(module, "fake_score0", update)
    module.running_phase = "fake_score"
    module.fake_score_loss(batch)
    with torch.no_grad():
        change(module.fake_score.network)
    module.draws = ready(module, "fake_score1", update, slice_index=1).draws
    module.after_phase("fake_score")
    return float(module.critic_schedule.lag(module.critic_moves))


@pytest.mark.sparse(4)
@pytest.mark.parametrize(("start", "end"), [(0.5, 0.25), (0.5, -0.5), (0.5, -1.5), (-2.0, -1.9), (-2.0, -2.1)])
@pytest.mark.parametrize(("method", "space"), [(DMD2, None), (DMD2, "epsilon"), (DiffInstruct, "edm")])
def test_the_lag_is_how_far_the_critic_should_have_gone(method, space, start, end):
    """A fake score of the student's N(-.5, 1.3^2) whose mean is wrong: its prediction is linear in the mean."""
    module = gaussian_problem(
        fake=(start, 1.3), method=method, critic_schedule=UpdateSchedule(1, 2, every=2), critic_space=space
    )
    found = measured(module, Batch(size=100_000), lambda network: network.mean.fill_(end))
    want = (-0.5 - start) / (end - start)
    assert found == pytest.approx(want, rel=0.02, abs=0.02)


def test_a_critic_that_only_its_noise_moves_has_one_half():
    """Equally wrong before and after, in random directions."""
    schedule, generator = UpdateSchedule(), torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 20_000, generator=generator)
    sums = torch.stack([before.square().sum() - after.square().sum(), (after - before).square().sum()])
    assert float(schedule.lag(sums)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_critic_that_leaves_a_share_of_its_error(share):
    error = torch.randn(64, 3, dtype=torch.float64)
    sums = torch.stack([(1 - share**2) * error.square().sum(), (1 - share) ** 2 * error.square().sum()])
    assert float(UpdateSchedule().lag(sums)) == pytest.approx(1 / (1 - share))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (DMD2, {"num_steps": 2, "critic_condition_on": "step"}),
        (TDM, {"num_steps": 2}),
        (SwiftBrush, {"guidance": Guidance(3.0), "fake_score": None}),
        (SiD, {"fake_guidance": Guidance(0.0), "critic_guidance": Guidance(0.0)}),
    ],
)
def test_the_same_samples_are_predicted_again(method, settings, monkeypatch):
    """Conditions that are dropped, steps that are told and guidance are those of the first update."""
    schedule = UpdateSchedule(1, 2, every=2)
    if "fake_score" in settings:
        from lightning_distill.networks.roles import Copy

        settings = {**settings, "fake_score": Copy()}
    module = method(mlp(3), ema=[], critic_schedule=schedule, **{"fake_score_steps": 2, **settings})
    errors = []
    original = module.critic_error
    monkeypatch.setattr(module, "critic_error", lambda p, *rest: errors.append(p.x0) or original(p, *rest))
    batch = Batch(cond={"class_labels": torch.arange(8) % 3})
    measured(module, batch, lambda network: None)
    first, old, new, _ = errors
    assert torch.equal(first.detach(), old)
    assert torch.equal(old, new)
    assert torch.equal(module.critic_moves, torch.zeros(2))  # a critic that has not moved says nothing


def test_masks_of_dropout_are_no_move():
    """Their variance is in both losses and would be all of U, which says that the critic has caught up."""
    adapter = Lora(rank=2, target_modules=["inner"], dropout=0.5)
    module = DMD2(mlp(), ema=[], fake_score=adapter, critic_schedule=UpdateSchedule(1, 2, every=2))
    ready(module)
    shift(module.fake_score)
    assert module.fake_score.training
    measured(module, Batch(size=64), lambda network: None)
    assert torch.equal(module.critic_moves, torch.zeros(2))
    assert module.fake_score.training


# ------------------------------------------------------------------------------------------------ decisions
def test_levels_follow_the_lag_within_their_bounds():
    schedule = UpdateSchedule(2, 8, reach=2.0)

    def following(level, lag):
        return float(schedule.following(torch.tensor(level), torch.tensor([2 * lag - 1, 1.0])))

    assert following(4.0, 2.0) == pytest.approx(4.0)
    assert following(4.0, 2.4) == pytest.approx(4.8)
    assert following(4.0, 1.6) == pytest.approx(3.2)
    assert following(3.0, 90.0) == pytest.approx(6.0)  # at most twice
    assert following(4.0, 90.0) == 8.0
    assert following(4.0, -3.0) == 2.0
    assert float(schedule.following(torch.tensor(5.0), torch.zeros(2))) == 5.0


def test_bad_numbers_are_refused():
    for settings in ({"minimum": 0}, {"minimum": 4, "maximum": 3}):
        with pytest.raises(ValueError, match="give 1 <= minimum <= maximum"):
            UpdateSchedule(**settings)
    for settings in ({"reach": 0.5}, {"every": 1}, {"decay": 1.0}):
        with pytest.raises(ValueError, match="give a reach above 1/2"):
            UpdateSchedule(**settings)
    game = {"gan": Adversary(taps=("blocks.1",)), "gan_every": 2}
    with pytest.raises(ValueError, match="gan_every counts critic updates"):
        DMD2(mlp(), critic_schedule=UpdateSchedule(), **game).configure_model()


def test_the_loader_provides_for_the_maximum():
    module = DMD2(mlp(), critic_schedule=UpdateSchedule(1, 5), updates_per_sample=2)
    assert module.slices_per_cycle == 3
    assert module.phase_plan() == [("student", 0), *(("fake_score", k) for k in (0, 0, 1, 1, 2))]
    module.critic_levels[0] = 2.4
    assert module.slices_per_cycle == 3
    assert module.phase_plan() == [("student", 0), ("fake_score", 0), ("fake_score", 0)]


# ------------------------------------------------------------------------------------------------ runs
class Seen(Callback):
    """Critic updates of every cycle, and the schedule's state after it."""

    def __init__(self):
        self.numbers, self.moves, self.levels = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.numbers.append(len(pl_module.phase_plan()) - 1)
        if pl_module.critic_schedule is not None:
            self.moves.append(pl_module.critic_moves.clone())
            self.levels.append(pl_module.critic_levels.tolist())


def run(problem, steps=12, poison=None, **settings):
    module = DMD2(
        mlp(), student_optimizer=problem.adam, fake_score_optimizer=problem.adam, ema=[], check_data=False, **settings
    )
    plain = module.weighted_sum

    def weighted_sum(phase, terms):
        bad = phase == "fake_score" and module.draws.update == poison
        return plain(phase, terms) * (float("nan") if bad else 1.0)

    module.weighted_sum = weighted_sum
    seen = Seen()
    problem.fit(module, steps, Batch(size=64), batch_size=4, callbacks=[seen])
    return module, seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equal_bounds_are_a_fixed_number_bit_for_bit(ring4_problem, accumulate):
    settings = {"accumulate_grad_batches": accumulate}
    scheduled, seen = run(ring4_problem, critic_schedule=UpdateSchedule(3, 3, every=2), **settings)
    plain, _ = run(ring4_problem, fake_score_steps=3, **settings)
    assert seen.numbers == [3] * 12
    assert bool(scheduled.critic_moves[1] > 0)
    state = scheduled.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert set(state) - set(plain.state_dict()) == {"critic_moves", "critic_levels"}


def test_decisions_take_effect_a_cycle_later(ring4_problem):
    module, seen = run(ring4_problem, steps=14, critic_schedule=UpdateSchedule(1, 6, reach=20.0, every=3, decay=0.5))
    assert [bool(move.any()) for move in seen.moves[:4]] == [False, False, True, True]
    level = 6.0
    for update, levels in enumerate(seen.levels):
        if update and update % 3 == 0:  # decided with the student's step, from what was measured until then
            want = float(module.critic_schedule.following(torch.tensor(level), seen.moves[update - 1]))
            assert levels == pytest.approx([level, want])
        elif update > 3:
            level = seen.levels[3 * (update // 3)][1]
            assert levels == pytest.approx([level, level])
    assert seen.numbers == [round(levels[0]) for levels in seen.levels]
    assert len(set(seen.numbers)) > 1


def test_the_measurement_does_not_depend_on_micro_batches(ring4_problem):
    schedule = UpdateSchedule(1, 4, reach=20.0, every=2, decay=0.5)
    (one, seen), (other, seen_too) = (
        run(ring4_problem, steps=6, critic_schedule=schedule, accumulate_grad_batches=n) for n in (1, 4)
    )
    assert seen.numbers == seen_too.numbers
    torch.testing.assert_close(one.critic_moves, other.critic_moves, rtol=1e-3, atol=1e-6)


def test_critics_that_do_not_move_are_not_measured(ring4_problem):
    _, seen = run(ring4_problem, steps=8, poison=3, critic_schedule=UpdateSchedule(1, 2, every=2))
    assert not torch.equal(seen.moves[1], seen.moves[0])
    assert torch.equal(seen.moves[3], seen.moves[2])  # all steps of that cycle are skipped
    assert not torch.equal(seen.moves[5], seen.moves[4])


@pytest.mark.sparse(2)
@pytest.mark.parametrize("stop", [4, 6, 7, 8])
def test_resumed_runs_go_on_with_the_same_numbers(ring4_problem, tmp_path, stop):
    """Stops before a measurement, between it and its decision, before the decision takes effect, and after."""

    def steps(number, seen, **settings):
        schedule = UpdateSchedule(1, 5, reach=20.0, every=3, decay=0.5)
        module = DMD2(
            mlp(),
            student_optimizer=ring4_problem.adam,
            fake_score_optimizer=ring4_problem.adam,
            critic_schedule=schedule,
        )
        saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        data = ResumableLoader(InMemory(Batch(size=400)), 4, slices=5)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        Trainer(max_steps=number, callbacks=[seen, saving], **quiet).fit(module, data, **settings)
        return module.state_dict()

    whole, rest = Seen(), Seen()
    want = steps(11, whole)
    got = steps(11, rest, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert rest.numbers == whole.numbers[stop:]
    assert len(set(whole.numbers)) > 1
    assert all(torch.equal(value, got[key]) for key, value in want.items())


def test_a_rollback_brings_its_number_back(ring4_problem, tmp_path):
    class Rollback(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            alarm.good_step, alarm._good = 2, tmp_path / "good.ckpt"
            if trainer.global_step == 2:
                alarm._keep(trainer)
            elif trainer.global_step == 5:
                pl_module.critic_levels.fill_(1.0)
                pl_module._critic_updates, pl_module._arriving = 1, None
                alarm.rollback(trainer, pl_module)

    alarm = CollapseAlarm(action="rollback")
    module = DMD2(
        mlp(),
        student_optimizer=ring4_problem.adam,
        fake_score_optimizer=ring4_problem.adam,
        critic_schedule=UpdateSchedule(1, 5, every=100),
    )
    seen = Seen()
    ring4_problem.fit(module, 7, Batch(size=64), batch_size=4, callbacks=[Rollback(), seen])
    assert seen.levels[-1] == [5.0, 5.0]
    assert seen.numbers == [5] * 7


# ------------------------------------------------------------------------------------------------ learning
@pytest.mark.slow
@pytest.mark.learn
def test_a_slow_critic_gets_more_updates_than_a_fast_one(ring4_problem, trained_teacher):
    means, lags = [], []
    for lr in (1e-5, 3e-3):
        seen = Seen()
        distil(
            ring4_problem,
            trained_teacher.denoiser,
            50,
            critic_schedule=UpdateSchedule(1, 6),
            fake_score_optimizer=lambda ps, lr=lr: torch.optim.Adam(ps, lr=lr, betas=(0.0, 0.99), fused=True),
            fake_score_scheduler=None,
            callbacks=[seen],
        )
        means.append(sum(seen.numbers[20:]) / len(seen.numbers[20:]))
        gain, move = seen.moves[-1].tolist()
        lags.append((gain + move) / (2 * move))
    print(means, lags)
    assert means[0] > 5.5
    assert means[1] < 2.0
    assert lags[0] > 5.0 > 2.0 > lags[1]
