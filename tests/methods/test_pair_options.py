"""Options of discrete consistency: dropout of a pair, grids, schedules and their runs, targets, who is told what."""

import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import fit
from lightning.pytorch import Callback
from small_problems import mlp, ready, shift
from test_flash_wam import small as streams
from test_segment_methods import VIDEOS, at_update, heads, video_teacher
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.guidance import Guidance, RandomGuidance
from lightning_distill.losses.flow_maps import rcgm_target
from lightning_distill.methods import (
    CTM,
    DCM,
    ECT,
    ICT,
    LCM,
    MLCM,
    PCM,
    RCM,
    SPLAM,
    TBCM,
    TSCD,
    AnyFlowOnPolicy,
    ConsistencyDistillation,
    ConsistencyTraining,
    CorrectedFreeFlow,
    FlashWAM,
    PiFlow,
    ProgressiveDistillation,
    SCott,
    TwinFlow,
    twin_flow,
)
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.second_time import add_guidance
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.parameterisations import trigflow_velocity
from lightning_distill.processes import FlowMatching, TrigFlow, VariancePreserving, change_process
from lightning_distill.times import few_step_times

F64 = torch.float64


class Dropping(nn.Module):
    """A network most of whose output is its dropout's."""

    shape = (2,)

    def __init__(self, share=0.5):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 32), nn.Linear(32, 2)
        self.share, self.drop = nn.Parameter(torch.tensor(0.01)), nn.Dropout(share)

    def forward(self, x, t, r=None):
        return self.outer(self.drop(torch.relu(self.inner(x)))) + self.share * t.to(x)[:, None]


def dropping(process=None, kind="sample"):
    torch.manual_seed(0)
    return Denoiser(Dropping(), process or FlowMatching(), kind, sigma_data=1.12)


def vp(network=None, kind="epsilon", **settings):
    return Denoiser(network or mlp().network, VariancePreserving(**settings), kind, sigma_data=1.12)


def shifted():
    return Denoiser(mlp().network, FlowMatching(0.1), "flow_prediction", sigma_data=1.12)


# ------------------------------------------------------------------------------------------------ dropout
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (ConsistencyTraining, {"schedule": "fixed", "last_intervals": 9000}),
        (ICT, {"schedule": "fixed", "last_intervals": 9000}),
        (ECT, {"first_stage": 14}),
        (ConsistencyDistillation, {"intervals": 9000, "solver": "euler"}),
        (PCM, {"intervals": 9000}),
        (TSCD, {"intervals": 9000, "segments": [2, 1]}),
        (MLCM, {"intervals": 2000, "segments": [2], "trajectory_pairs": 1}),
        (SCott, {"intervals": 9000, "strength": 0.0, "target_ema": "none"}),
        (SPLAM, {"intervals": 9000}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_both_ends_of_a_pair_have_the_same_dropout(method, settings):
    module = ready(method(dropping(), shape=[2], **settings))
    batch = Batch(x0=torch.randn(64, 2))
    if method is MLCM:  # stored, so that no long trajectory is solved
        grid = torch.tensor(module.grid()[:-1], dtype=F64)
        batch = Batch(x0=batch.x0, states=batch.x0[:, None].expand(64, len(grid), 2), times=grid)
    pair = module.pair(batch)
    module.student.train()
    online, target = (end.detach() for end in module.ends(pair))
    # the ends of a short interval are as near as its times
    spread = online.std()
    assert (online - target).abs().median() < 0.02 * spread
    with torch.no_grad():  # which two masks are not
        other = module.ends(pair)[0]
    assert (online - other).abs().median() > 0.1 * spread


def test_an_adapters_dropout_is_shared_and_goes_on_from_update_to_update():
    module = ready(LCM(vp(), student=Lora(rank=4, dropout=0.5), guidance=Guidance(1.0), target_ema="none", ema=[]))
    shift(module.student)
    assert module.student.training
    batch = Batch(x0=torch.randn(8, 2))
    pair = module.pair(batch)
    x, t = pair.x_t, torch.full((8,), 0.5, dtype=F64)
    f = module.function(module.student, batch, None)
    state = torch.get_rng_state()
    with module.shared_dropout(x):
        online = f(x, t).x0
    assert torch.equal(online, module.target(x, t, batch, None))
    after = torch.get_rng_state()
    assert not torch.equal(state, after)  # the next update has other masks
    torch.set_rng_state(state)
    f(x, t)
    assert torch.equal(torch.get_rng_state(), after)


def test_generators_are_left_alone_where_nothing_is_shared():
    module = ready(ConsistencyDistillation(dropping(), target_ema=ConstantEMA(0.9), shape=[2]))
    x = torch.randn(8, 2)
    module.student.train()
    before = torch.get_rng_state()
    with module.shared_dropout(x):  # the target is an average, without dropout
        torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)
    alone = ready(ConsistencyDistillation(dropping(), shape=[2]))
    assert not alone.student.training
    before = torch.get_rng_state()
    with alone.shared_dropout(x):
        torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_flash_wam_shares_its_dropout(monkeypatch):
    module = ready(streams(target_ema="none", intervals=2))
    asked = []
    monkeypatch.setattr(module, "shared_dropout", lambda x: asked.append(x) or torch.no_grad())
    with torch.no_grad():
        module.student_loss(Batch(x0=torch.randn(4, 3)))
    assert len(asked) == 1


def test_jumps_of_a_recursion_have_the_dropout_of_the_student(monkeypatch):
    targets = []

    def spied(average, online, *rest, **settings):
        state = torch.get_rng_state()
        target = rcgm_target(average, online, *rest, **settings)
        passes = torch.get_rng_state()
        torch.set_rng_state(state)
        average(*rest[:1], rest[2], rest[3])
        assert torch.equal(torch.get_rng_state(), passes)  # as one pass leaves them
        targets.append((target - online).square().mean().sqrt().item())
        return target

    monkeypatch.setattr(twin_flow, "rcgm_target", spied)

    def change(dropout, order):
        role = TwoTime(role=Lora(rank=4, dropout=dropout), kind="scaled_difference")
        settings = {"from_data": False, "clamp": None, "order": order, "shape": [2], "ema": []}
        module = ready(TwinFlow(mlp(), student=role, **settings))
        shift(module.student)
        module.flow_map_term(Batch(x0=torch.randn(256, 2, generator=torch.Generator().manual_seed(1))))
        return targets[-1]

    for order in (1, 2, 3):
        assert change(0.1, order) == pytest.approx(change(0.0, order), rel=0.05)


# ------------------------------------------------------------------------------------------------ grids
def test_grids_fall_to_the_least_time_or_are_refused():
    module = ready(ICT(vp(), shape=[2]))
    assert module.last_intervals == 640  # the paper's 1280 is more than 1000 timesteps
    for update in (0, 80_000, 87_500, 99_999):
        grid = at_update(module, update).grid()
        assert all(r < t for t, r in pairwise(grid))
        assert grid[-1] == 1e-3
    t, r = module.pair_times(500)
    assert bool((r < t).all())
    few = ready(ICT(vp(num_train_timesteps=50), first_intervals=20, shape=[2]))
    assert few.last_intervals == 20
    for method, settings, message in (
        (ICT, {"last_intervals": 1280}, "last_intervals=1280 is a finer grid than Var.*give at most 666"),
        (ConsistencyTraining, {"last_intervals": 667}, "at most 666"),
        (ConsistencyDistillation, {"intervals": 1000, "weight": "inverse_gap"}, "intervals=1000 .* at most 666"),
        (PCM, {"intervals": 1001}, "intervals=1001 .* at most 666"),
    ):
        with pytest.raises(ValueError, match=message):
            ready(method(vp(), shape=[2], **settings))
    module = ready(ConsistencyDistillation(vp(), intervals=666, weight="inverse_gap", shape=[2]))
    assert bool(module.student_loss(Batch(x0=torch.randn(2000, 2))).losses["consistency"].isfinite())
    # that of a process with a shift ends above its least time, too
    assert all(r < t for t, r in pairwise(ready(ICT(shifted(), schedule="fixed", shape=[2])).grid()))
    ready(ECT(vp(num_train_timesteps=10), shape=[2]))  # has no grid


def test_progressive_grids_have_as_many_times_as_the_process():
    with pytest.raises(ValueError, match=r"10 takes 1024 steps of the teacher, more than Var.* can tell apart"):
        ready(ProgressiveDistillation(vp(), stages=10, shape=[2]))
    ready(ProgressiveDistillation(vp(), stages=9, shape=[2]))


def test_tuning_knows_no_time_before_the_first_timestep():
    module = ready(ECT(vp(), first_stage=2, boundary="lcm", shape=[2]))
    t, r = module.pair_times(4096)
    assert not bool(((r > 0.0) & (r < 1e-3)).any())
    assert bool(((r == 0.0) & (t < 2e-3)).any())
    # a time before it counts as it: the identity
    x = torch.randn(4, 2)
    early = torch.full((4,), 5e-4, dtype=F64)
    torch.testing.assert_close(module.function(module.student, Batch(size=4), None)(x, early).x0, x)


# ------------------------------------------------------------------------------------------------ settings
def test_targets_and_their_names():
    for method in (ConsistencyDistillation, ConsistencyTraining, PCM, TSCD, LCM, SCott):
        assert method(mlp(), target_ema="none").target_name is None
        with pytest.raises(ValueError, match=r"target_ema='no' is no average of the student; give .* or 'none'"):
            method(mlp(), target_ema="no")
    assert LCM(mlp()).target_name == SCott(mlp()).target_name == "constant_0_95"
    with pytest.raises(ValueError, match="target_ema='no'"):
        FlashWAM(mlp(), target_ema="no")
    for method in (CTM, DCM):
        with pytest.raises(ValueError, match=r"target_ema='none' is no average .* give a profile such as ConstantEMA"):
            method(mlp(), target_ema="none")


def test_settings_of_the_metric():
    assert ConsistencyDistillation(mlp(), huber=0.0, metric="pseudo_huber_elementwise").huber == 0.0
    for settings, message in (
        ({"huber": 0.1, "metric": "mse"}, "huber=0.1 is the constant of pseudo-Huber.* the metric is 'mse'"),
        ({"huber": -0.1}, "huber=-0.1"),
        ({"metric": "lpips"}, "metric='lpips' is unknown; choose one of l2, mse"),
    ):
        with pytest.raises(ValueError, match=message):
            ConsistencyDistillation(mlp(), **settings)


CASES = {
    "progressive": (ProgressiveDistillation, {"stages": 3, "stage_updates": 4}, "stage_updates", 9),
    "tscd": (TSCD, {"segments": [4, 2, 1], "segment_updates": [3, 5]}, "segment_updates", 9),
    "mlcm": (MLCM, {"segments": [4, 2], "segment_updates": 8, "intervals": 4}, "segment_updates", 9),
    "ct": (ConsistencyTraining, {"total_updates": 9}, "total_updates", 9),
    "ict": (ICT, {"total_updates": 9}, "total_updates", 9),
    "ect": (ECT, {"stage_updates": 8}, "stage_updates", 9),
    "ctm": (CTM, {"gan_from": 8, "gan": heads(), "intervals": 4, "solver_steps": 2}, "gan_from", 9),
    "rcm": (RCM, {"matching_from": 8}, "matching_from", 9),
    "any_flow": (AnyFlowOnPolicy, {"matching_from": 8, "rollout_steps": [2]}, "matching_from", 9),
    "free_flow": (CorrectedFreeFlow, {"matching_from": 8}, "matching_from", 9),
    "pi_flow": (PiFlow, {"decay_updates": 8}, "decay_updates", 9),
    "dcm": (DCM, {"semantic_updates": 8, "frame_lag": None, "intervals": 4, "semantic_intervals": 2}, None, 9),
}


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_that_is_longer_than_the_run_is_told(name):
    method, settings, setting, needed = CASES[name]
    module = method(mlp(), shape=[2], ema=[], **settings)

    def told(max_steps):
        module._trainer, module._fabric = SimpleNamespace(max_steps=max_steps), None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.on_fit_start()
        return [str(w.message) for w in caught if "student updates, and the run ends" in str(w.message)]

    (message,) = told(needed - 1)
    assert message.startswith(f"{setting or 'semantic_updates'} asks for {needed} student updates")
    assert told(needed) == told(-1) == []


def test_schedules_that_are_not_used_are_not_told():
    for module in (
        ConsistencyTraining(mlp(), schedule="fixed"),
        ECT(mlp()),
        CTM(mlp(), gan_from=100),
        DCM(mlp()),
    ):
        module._trainer, module._fabric = SimpleNamespace(max_steps=5), None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "ConstantEMA")
            module.on_fit_start()


# ------------------------------------------------------------------------------------------------ who is told what
def stored(module, scale, states=4):
    times = torch.tensor(few_step_times(module.process, states), dtype=F64)
    cond = {"class_labels": torch.arange(len(scale)) % 3}
    points = torch.randn(len(scale), states, 2)
    return Batch(x0=points[:, 0], states=points, times=times, cond=cond, predictions={"scale": scale})


def told_teacher():
    teacher = mlp(classes=3)
    teacher.null_class = 3
    return teacher


def test_stored_trajectories_name_their_own_scale():
    settings = {"student": TwoTime(kind=None, guidance=True), "guidance": RandomGuidance(2.0, 8.0), "shape": [2]}
    scale = torch.linspace(2.0, 8.0, 6)
    module = ready(MLCM(told_teacher(), segments=[2], intervals=4, trajectory_pairs=2, **settings))
    batch = stored(module, scale)
    assert module.pair(batch).scale.tolist() == scale.double().repeat_interleave(2).tolist()
    # those that are solved have the drawn one
    fresh = Batch(cond=batch.cond, predictions={"scale": scale})
    assert torch.equal(module.pair(fresh).scale, module.told_scale(torch.ones(6)).repeat_interleave(2))
    continuous = ready(TBCM(told_teacher(), solver_steps=4, **settings))
    points = continuous.consistency.points(continuous, batch)
    assert points.scale.tolist() == scale.double().repeat_interleave(4).tolist()
    # the direction is the teacher's at the scale that is told
    u = (scale.double() - 2.0) / 6.0
    teacher = continuous.require_teacher()
    x, t = batch.states[:, 1], batch.times[1:2].expand(6)
    tau = change_process(t, continuous.process, TrigFlow(), continuous.student.sigma_data)[0]
    found = points.velocity.view(6, 4, 2)[:, 1]
    want, drawn = (
        trigflow_velocity(prediction, tau, continuous.student.sigma_data)
        for prediction in (
            continuous.guidance(teacher, x, t, batch.cond, u),
            continuous.guided_teacher(batch)(x, t),
        )
    )
    torch.testing.assert_close(found, want)
    assert not torch.allclose(found, drawn, atol=1e-3)


def test_a_scale_that_the_teacher_embeds_is_not_taken_for_the_share():
    teacher = mlp(classes=3)
    add_guidance(teacher.network)
    for parameter in teacher.network.second_time.parameters():
        nn.init.normal_(parameter, std=0.3)
    module = ready(SPLAM(teacher, guidance=RandomGuidance(2.0, 5.0), intervals=4, shape=[2]))
    batch = Batch(x0=torch.randn(6, 2), cond={"class_labels": torch.arange(6) % 3})
    told = []
    hook = module.student.register_forward_pre_hook(lambda _m, _a, kw: told.append(kw["guidance"]), with_kwargs=True)
    module.student_loss(batch)
    hook.remove()
    want = 2.0 + 3.0 * module.draws.uniform("guidance", 6)
    assert len(told) == 2
    for scale in told:  # both ends
        torch.testing.assert_close(scale, want)
    assert module.student.family.guidance_scale == 3.5


# ------------------------------------------------------------------------------------------------ games
def test_a_game_that_begins_late_begins_with_weight_one():
    settings = {"intervals": 4, "solver_steps": 2, "gan_from": 3, "shape": [2], "ema": []}
    module = ready(CTM(mlp(), gan=heads(kind="hinge"), **settings))
    module._trainer, module._fabric = SimpleNamespace(world_size=1), None
    shift(module.student)
    batch, balances = Batch(x0=torch.randn(32, 2)), []
    for update in range(5):
        found = at_update(module, update).student_loss(batch).diagnostics
        balances.append({name: float(found[name]) for name in found if name.startswith("balance")})
        module.after_phase("student")
    assert [("balance_gan" in found) for found in balances] == [False] * 3 + [True] * 2
    assert balances[3]["balance_gan"] == 1.0
    assert balances[4]["balance_gan"] not in (1.0, 1e4)
    assert balances[1]["balance_denoising"] != 1.0
    # an update in which the game has no gradient leaves its weight alone
    at_update(module, 0).student_loss(batch)
    module.after_phase("student")
    assert float(module.balance[1]) == pytest.approx(float(at_update(module, 4).balance[1]))


class Movements(Callback):
    """Turn of each update, and whether the heads have moved in it."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = [p.detach().clone() for p in module.discriminator.parameters()]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        moved = any(not torch.equal(a, b) for a, b in zip(self.before, module.discriminator.parameters()))
        self.seen.append((module.turn(), moved))


@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
def test_heads_rest_in_the_turn_of_the_semantic_expert():
    settings = {"intervals": 10, "semantic_intervals": 4, "shape": [2, 5, 2, 2], "check_data": False, "ema": []}
    module = DCM(video_teacher(), gan=heads(taps=("block",), kind="hinge"), **settings)
    movements = Movements()
    fit(module, 6, VIDEOS, 4, callbacks=[movements])
    assert {turn for turn, _ in movements.seen} == {0, 1}
    assert all(moved == bool(turn) for turn, moved in movements.seen)
