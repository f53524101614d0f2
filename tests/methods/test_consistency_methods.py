"""Discrete consistency: distillation, training, tuning, LCM, phases, progressive distillation, truncation."""

from __future__ import annotations

import math

import pytest
import torch
from exact_students import F64, FLOW, MIXTURE, ExactEnd, data, exact_module, loss_and_slope
from small_problems import mlp, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.guidance import Guidance, RandomGuidance
from lightning_distill.losses.consistency import (
    cm_ema_decay,
    cm_steps,
    distance,
    ect_time,
    ict_probabilities,
    progressive_target,
)
from lightning_distill.methods import (
    ECT,
    ICT,
    LCM,
    PCM,
    TCM,
    ConsistencyDistillation,
    ConsistencyTraining,
    ProgressiveDistillation,
)
from lightning_distill.methods.consistency_training import ScheduledEMA
from lightning_distill.methods.progressive import middle_time
from lightning_distill.networks.analytic import analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving
from lightning_distill.randomness import Draws
from lightning_distill.samplers import transport
from lightning_distill.times import few_step_times

PROCESSES = {
    "flow": FLOW,
    "edm": EDM(0.002, 80.0),
    "vp": VariancePreserving(),
    "trig": TrigFlow(),
}
by_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))


def vp_mlp():
    torch.manual_seed(0)
    network = ResidualMLP((2,), width=8, depth=2, num_classes=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Denoiser(network, VariancePreserving(), "epsilon", sigma_data=1.12)


# ------------------------------------------------------------------------------------------------ distillation
@by_process
def test_the_exact_function_has_the_solvers_error_and_another_more(process):
    def loss(intervals, solver="heun", fault=0.0):
        settings = {"intervals": intervals, "metric": "l2", "solver": solver}
        module = exact_module(ConsistencyDistillation, process=process, fault=fault, **settings)
        return loss_and_slope(module, data(256))[0]

    coarse, fine = loss(8), loss(32)
    euler = loss(32, "euler")
    assert fine < 0.02 * coarse
    assert fine < 0.3 * euler
    # a wrong function is wrong whatever the grid is
    assert loss(128, fault=0.3) > 3.0 * loss(128)


def test_the_target_has_no_gradient_and_the_boundary_is_by_hand():
    module = exact_module(ConsistencyDistillation, fault=0.2, intervals=2, solver="euler", metric="l2")
    t, r = module.pair_times(64)
    assert set(t.tolist()) == {1.0, 0.5}
    assert set(r.tolist()) == {0.5, 1e-4}
    x = torch.randn(64, 2, dtype=F64)
    target = module.target(x, r, Batch(size=64), None)
    assert not target.requires_grad
    at_end = r == 1e-4
    assert torch.equal(target[at_end], x[at_end])
    torch.testing.assert_close(target[~at_end], module.student(x, r).x0.detach()[~at_end])


def test_the_target_can_be_an_average_of_its_own():
    module = ready(ConsistencyDistillation(mlp(), target_ema=ConstantEMA(0.9), ema=[ConstantEMA(0.5)]))
    assert [p.name for p in module.ema_profiles] == ["constant_0_5", "constant_0_9"]
    shift(module.student)
    x, r = torch.randn(8, 2), torch.full((8,), 0.4, dtype=F64)
    frozen = module.teacher(x, r).x0  # the average has not moved yet
    torch.testing.assert_close(module.target(x, r, Batch(size=8), None), frozen)
    assert module.sampling_network() is module.student_ema["constant_0_5"]


def test_consistency_students_are_not_sampled_along_the_ode():
    with pytest.raises(ValueError, match="trained for jumps to clean data"):
        ready(ConsistencyDistillation(mlp(), sampler="ode", num_steps=2))
    with pytest.raises(ValueError, match="batches without x0"):
        ready(ConsistencyDistillation(mlp())).student_loss(Batch(size=4))
    with pytest.raises(ValueError, match="euler or heun"):
        ConsistencyDistillation(mlp(), solver="rk4")


# ------------------------------------------------------------------------------------------------ from data
def inputs(module, batch):
    seen = []
    handle = module.student.register_forward_pre_hook(lambda _m, args: seen.append((args[0].detach(), args[1])))
    terms = module.student_loss(batch)
    handle.remove()
    return seen, terms


def test_pairs_of_training_share_data_and_noise():
    module = exact_module(ConsistencyTraining, schedule="fixed", last_intervals=20)
    batch = data()
    (late, early), _ = inputs(module, batch)
    (x_t, t), (x_r, r) = late, early
    noise = [(x - (1 - s)[:, None] * batch.x0) / s[:, None] for x, s in ((x_t, t), (x_r, r))]
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-7)
    assert bool((r < t).all())
    assert module.forward_counts()["student"]["teacher"] == 0
    with pytest.raises(ValueError, match="asks no teacher, so guidance has no effect"):
        ready(ConsistencyTraining(mlp(), guidance=Guidance(2.0)))


def test_the_grid_grows_as_the_papers_do():
    module = ready(ConsistencyTraining(mlp(), total_updates=100, first_intervals=2, last_intervals=150))
    for k in (0, 37, 99):
        module.draws = Draws(module.streams, k, 0, "student0")
        assert len(module.grid()) == cm_steps(k, 100) == module.current_intervals() + 1
    improved = ready(ICT(mlp(), total_updates=800, first_intervals=10, last_intervals=1280))
    counts = []
    for k in range(0, 800, 100):
        improved.draws = Draws(improved.streams, k, 0, "student0")
        counts.append(improved.current_intervals())
    assert counts == [10, 20, 40, 80, 160, 320, 640, 1280]
    # gaps go with the noise on EDM's grid alone
    assert improved.weight == "inverse_c_out"
    assert exact_module(ICT, process=EDM(), schedule="fixed", last_intervals=12).weight == "inverse_gap"
    assert ready(ICT(mlp(), total_updates=8, weight="one")).weight == "one"
    assert ready(ICT(mlp())).last_intervals == 1280
    profile = ScheduledEMA(100)
    assert profile.beta(1, 8) == cm_ema_decay(2)
    assert profile.beta(101, 8) == cm_ema_decay(151)


def test_intervals_have_the_lognormal_probabilities():
    module = exact_module(ICT, process=EDM(0.002, 80.0), schedule="fixed", last_intervals=12)
    n = 40_000
    t, r = module.pair_times(n)
    grid = torch.tensor(module.grid(), dtype=F64).flip(0)
    index = torch.searchsorted(grid, r.contiguous())
    assert torch.equal(grid[index + 1], t)
    counted = index.bincount(minlength=12) / n
    torch.testing.assert_close(counted.double(), ict_probabilities(grid), rtol=0, atol=0.01)


def test_tuning_starts_as_denoising_and_ends_as_consistency():
    module = exact_module(ECT, process=EDM(0.002, 80.0), stage_updates=10, metric="l2", weight="one")
    t, r = module.pair_times(2000)
    assert float((r == 0).double().mean()) == pytest.approx(0.81, abs=0.02)  # level below ln 7
    torch.testing.assert_close(r, ect_time(t, 0))
    batch = data(256)
    (late, _), terms = inputs(module, batch)
    clean = (module.pair_times(256)[1] == 0)[:, None]
    error = (module.student(*late).x0.detach() - batch.x0).square()
    # where r = 0 the loss is that of denoising
    target = module.target(late[0], torch.zeros(256, dtype=F64), batch, None)
    assert torch.equal(target, batch.x0)
    assert float(terms.losses["consistency"].detach()) > float(torch.where(clean, error, 0.0).sum() / 256) * 0.999
    module.draws = Draws(module.streams, 65, 0, "student0")
    t, r = module.pair_times(2000)
    assert module.stage() == 6
    assert float(((t - r) / t).max()) < 0.08
    assert not exact_module(ECT).pair_times(500)[1].any()  # flow-matching times are below ln 7


def test_a_truncated_student_meets_the_first_stage_at_its_boundary():
    process = EDM(0.002, 80.0)
    module = exact_module(TCM, process=process, fault=0.2, metric="l2", first_stage=2)
    assert module.boundary_time == pytest.approx(1.0)
    batch = data(512)
    seen, terms = inputs(module, batch)
    (x_t, t), (_, r) = seen
    assert float(t.min()) == 1.0  # the student is trained nowhere below
    at_edge = t == 1.0
    assert float(at_edge.double().mean()) == pytest.approx(0.25, abs=0.06)
    # from t' the pair leads to the first stage's function at r(t') = 1 - (1 + 8 sigmoid(-1)) / 8
    assert r[at_edge].tolist() == pytest.approx([1.0 - (1.0 + 8.0 / (1.0 + math.e)) / 8.0] * int(at_edge.sum()))
    (x_r, _) = seen[1]
    own, first = module.student(x_r, r).x0.detach(), module.teacher(x_r, r).x0
    target = torch.where((r < 1.0)[:, None], first, own)
    each = distance(module.student(x_t, t).x0.detach(), target, "l2") / (t - r)
    assert float(terms.losses["boundary"].detach()) == pytest.approx(float(each[at_edge].sum() / 128), rel=1e-6)
    assert float(terms.losses["consistency"].detach()) == pytest.approx(float(each[~at_edge].sum() / 384), rel=1e-6)
    assert bool(((r < 1.0) & ~at_edge).any())
    # with the student's own function as first stage, what is left vanishes with the gap
    stage = Denoiser(ExactEnd(process), process, "sample")
    left = [
        float(
            exact_module(TCM, process=process, teacher=stage, metric="l2", weight="one", first_stage=k)
            .student_loss(batch)
            .losses["boundary"]
            .detach()
        )
        for k in (4, 12)
    ]
    assert left[1] < 0.01 * left[0]
    alone = exact_module(TCM, process=process, teacher=stage, boundary_share=0.0)
    assert set(alone.student_loss(batch).losses) == {"consistency"}
    with pytest.raises(ValueError, match=r"trained for times of at least 1 and would be sampled at 0.5"):
        exact_module(TCM, process=process, student_times=[80.0, 0.5])


# ------------------------------------------------------------------------------------------------ LCM
def test_lcm_tells_each_sample_its_scale_and_steps_with_it():
    module = ready(LCM(vp_mlp(), guidance=RandomGuidance(2.0, 5.0), intervals=10))
    n = 32
    batch = Batch(x0=torch.randn(n, 2), cond={"class_labels": torch.arange(n) % 3})
    told = []
    hook = module.student.register_forward_pre_hook(lambda _m, _a, kw: told.append(kw["guidance"]), with_kwargs=True)
    module.student_loss(batch)
    hook.remove()
    u = module.draws.uniform("guidance", n)
    torch.testing.assert_close(told[0], 2.0 + 3.0 * u)
    # the solver's guidance is the one that is told
    x, t = torch.randn(n, 2), torch.full((n,), 0.6, dtype=F64)
    teacher = module.teacher
    null = {"class_labels": torch.full((n,), 3)}
    with_cond, without = teacher(x, t, batch.cond).x0, teacher(x, t, null).x0
    want = without + told[0].float()[:, None] * (with_cond - without)
    torch.testing.assert_close(module.guided_teacher(batch)(x, t).x0, want, rtol=1e-4, atol=1e-4)
    # sampled at the middle of the range
    shift(module.student)
    noise = torch.randn(6, 2)
    cond = {"class_labels": torch.arange(6) % 3}
    want = module.student(noise, torch.ones(6), cond, guidance=torch.full((6,), 3.5)).x0
    torch.testing.assert_close(module.sample(6, cond, noise=noise, weights="student"), want)
    indices = [round(module.process.num_train_timesteps * t) - 1 for t in module.grid()]
    assert indices == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, 0]


def test_lcm_is_the_identity_at_the_last_timestep_and_refuses_other_processes():
    module = ready(LCM(vp_mlp(), guidance=RandomGuidance(2.0, 5.0), intervals=10, target_ema="none"))
    assert module.target_name is None
    x, first = torch.randn(4, 2), torch.full((4,), 0.001, dtype=F64)
    cond = Batch(cond={"class_labels": torch.zeros(4, dtype=torch.long)})
    torch.testing.assert_close(module.function(module.student, cond, None)(x, first).x0, x)
    with pytest.raises(ValueError, match="LCM is written for variance-preserving models"):
        ready(LCM(mlp(classes=3), boundary="plain"))


def test_adapters_are_told_nothing():
    module = ready(LCM(vp_mlp(), student=Lora(rank=2), guidance=Guidance(3.0), target_ema="none"))
    assert module.told_scale(torch.ones(4)) is None


# ------------------------------------------------------------------------------------------------ phases
def test_phases_end_on_the_grid_and_are_sampled_there():
    module = ready(PCM(mlp(), num_steps=4, intervals=10))
    assert module.edges == module.student_times == pytest.approx([1.0, 0.7, 0.5, 0.2])
    with pytest.raises(ValueError, match="edges as times"):
        module.sample(3, num_steps=2)
    noise = torch.randn(5, 2)
    x = noise
    for t, r in zip(module.edges, [*module.edges[1:], 0.0]):
        x = transport(module.sampling_network()(x, torch.tensor(t)), r)
    torch.testing.assert_close(module.sample(5, noise=noise), x.detach())
    with pytest.raises(ValueError, match="5 phases do not fit a grid of 3 times"):
        ready(PCM(mlp(), num_steps=5, intervals=3))


def test_targets_of_phases_are_carried_to_the_end_of_their_own_phase():
    module = ready(PCM(mlp(), num_steps=2, intervals=4))
    assert module.edges == [1.0, 0.5]
    x = torch.randn(4, 2)
    r = torch.tensor([0.75, 0.5, 0.25, 1e-4], dtype=F64)
    end = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=F64)
    got = module.carried(x, r, end, Batch(size=4), None)
    network = module.student
    torch.testing.assert_close(got[0], (x + (end - r)[:, None].float() * network(x, r).raw)[0].detach())
    torch.testing.assert_close(got[2], network(x, r).x0[2].detach())
    assert torch.equal(got[[1, 3]], x[[1, 3]])


# ------------------------------------------------------------------------------------------------ progressive
def test_one_step_is_compared_with_two_of_the_predecessor():
    module = exact_module(ProgressiveDistillation, teacher=analytic_denoiser(MIXTURE, FLOW), stages=2, fault=0.1)
    module.draws = Draws(module.streams, 0, 0, "student0")
    assert module.grid(0) == [1.0, 0.0]
    assert module.grid(2) == [1.0, 0.75, 0.5, 0.25, 0.0]
    batch = data()
    (late,), terms = inputs(module, batch)
    x_t, t = late
    assert set(t.tolist()) == {1.0, 0.5}
    x, teacher = x_t, module.teacher
    for s, r in ((t, t - 0.25), (t - 0.25, t - 0.5)):
        x = transport(teacher(x, s), r)
    target = progressive_target(x_t, x, t, t - 0.5, FLOW)
    weight = ((1 - t) / t).square().clamp_min(1.0)[:, None]
    want = (weight * (module.student(x_t, t).x0.detach() - target).square()).mean()
    assert float(terms.losses["progressive"].detach()) == pytest.approx(float(want), rel=1e-6)


def test_each_stage_learns_from_the_student_of_the_one_before():
    module = ready(ProgressiveDistillation(mlp(), stages=3, stage_updates=10, ema=[]))
    teacher = [p.clone() for p in module.teacher.parameters()]
    shift(module.student)

    def finish(update):
        module.draws = Draws(module.streams, update, 0, "student0")
        module.after_phase("student")
        return [torch.equal(a, b) for a, b in zip(module.source.parameters(), module.student.parameters())]

    assert not all(finish(8))
    assert all(finish(9))
    shift(module.student, seed=5)
    assert not all(finish(15))
    assert all(finish(19))
    shift(module.student, seed=6)
    assert not any(finish(29))  # the last stage goes on
    module.draws = Draws(module.streams, 12, 0, "student0")
    assert module.stage() == 1
    x = torch.randn(6, 2)
    times = tuple(torch.full((6,), s, dtype=F64) for s in (1.0, 0.75, 0.5))
    two = module.two_steps(x, times, Batch(size=6), None)
    want = x
    for t, r in ((1.0, 0.75), (0.75, 0.5)):
        want = transport(module.source(want, torch.tensor(t)), r)
    torch.testing.assert_close(two, want)
    assert all(torch.equal(a, b) for a, b in zip(teacher, module.teacher.parameters()))
    with pytest.raises(ValueError, match=r"give student=Copy\(\)"):
        ready(ProgressiveDistillation(mlp(), student=Lora(rank=2)))


def test_middles_lie_on_the_few_step_grids():
    assert middle_time(1.0, 0.5, FlowMatching()) == 0.75
    shifted = FlowMatching(3.0)
    even = [float(shifted.warp(torch.tensor(s))) for s in (1.0, 0.75, 0.5)]
    assert middle_time(even[0], even[2], shifted) == pytest.approx(even[1])
    assert middle_time(1.0, 0.5, VariancePreserving()) == 0.75
    edm = EDM(0.002, 80.0)
    module = ready(ProgressiveDistillation(Denoiser(mlp().network, edm, "sample"), stages=5, ema=[]))
    for k in range(6):  # down to sigma_min, as the grids of sampling
        assert module.grid(k) == pytest.approx([*few_step_times(edm, 2**k), 0.0])
    assert 0.0 < middle_time(1e-3, 0.0, edm) < 1e-3
    assert middle_time(1.0, 0.5, TrigFlow()) == 0.75


def test_a_guided_teacher_needs_its_null_condition():
    with pytest.raises(ValueError, match="null class"):
        ready(ConsistencyDistillation(mlp(), guidance=Guidance(3.0)))
