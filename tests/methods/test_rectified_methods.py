"""Methods on the teacher's trajectories: reflow, regression of samples, knots, key points, guidance."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import fit
from sampling_of_cases import long, slow
from small_problems import Exact, Given, mlp, ready

from lightning_distill.batch import Batch
from lightning_distill.checkpoints import fingerprint
from lightning_distill.cli import trainer_cli
from lightning_distill.commands.export import export_module
from lightning_distill.commands.quickstart import evaluate_student
from lightning_distill.configs import config_path
from lightning_distill.ema import PowerEMA
from lightning_distill.generation import generate
from lightning_distill.guidance import Guidance, IntervalGuidance, RandomGuidance, guided
from lightning_distill.methods import (
    BOSS,
    CMT,
    AccVideo,
    GuidanceDistillation,
    HiPA,
    InstaFlow,
    KnowledgeDistillation,
    LearnedSolver,
    Reflow,
    RFPlusPlus,
    SlimFlow,
    SlimFlowDistillation,
    Straightening,
)
from lightning_distill.methods.learned_solver import StepSizes
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser, ring
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.merging import base_state_dict
from lightning_distill.networks.roles import Copy, Explicit, Lora
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import NewDenoiser, ZooDenoiser
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving, change_process
from lightning_distill.samplers import adams_coefficients, ode
from lightning_distill.schedules import WarmupDecay
from lightning_distill.strategies import RoleFSDP2
from lightning_distill.times import Uniform, validate_times
from lightning_distill.trajectories import run_solver

N = 6
HEADS = {"taps": ("blocks.0",), "features": "teacher", "width": 4}


class StraightMap(torch.nn.Module):
    """x0-prediction of the straight flow eps -> mean + std eps, in flow matching."""

    def __init__(self, mean=0.7, std=0.4, bias=0.0):
        super().__init__()
        self.mean, self.std, self.bias = mean, std, torch.nn.Parameter(torch.tensor(bias))

    def forward(self, x, t):
        t = t.to(x)[:, None]
        eps = (x - (1 - t) * self.mean) / (t + (1 - t) * self.std)
        return self.mean + self.std * eps + self.bias


def gaussian(process=None):
    return analytic_denoiser(GaussianMixture([[0.7]], std=0.4), process or FlowMatching())


def straight(method, bias=0.0, teacher=None, **settings):
    return ready(method(teacher or gaussian(), student=Given(StraightMap(bias=bias)), shape=[1], ema=[], **settings))


def exact_pairs(n=N):
    noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(1))
    return Batch(noise=noise, x0=0.7 + 0.4 * noise)


# ------------------------------------------------------------------------------------------------ reflow
@pytest.mark.parametrize("method", [Reflow, RFPlusPlus])
def test_reflow_of_a_gaussian_is_the_straight_map(method):
    assert straight(method).student_loss(exact_pairs()).losses["velocity"].item() < 1e-11
    wrong = straight(method, bias=0.1).student_loss(exact_pairs())
    assert wrong.losses["velocity"].item() > 1e-3
    assert wrong.diagnostics["straightness"].item() > 1e-3


def test_pairs_made_in_training_are_the_solver_s():
    module = straight(Reflow, solver_steps=200)
    noise, x0 = module.pairs(Batch(size=N))
    assert noise.shape == (N, 1)
    assert torch.allclose(x0, 0.7 + 0.4 * noise, atol=2e-4)


@pytest.mark.parametrize("process", [VariancePreserving(), EDM()], ids=["vp", "edm"])
def test_the_loss_is_in_flow_matching_coordinates_whatever_the_process(process):
    """The exact denoiser of a Gaussian has the same loss in every process."""

    def loss(process):
        settings = {"student": Exact(), "times": Uniform(0.1, 0.9), "shape": [1], "ema": []}
        return ready(Reflow(gaussian(process), **settings)).student_loss(exact_pairs(500)).losses["velocity"].item()

    assert loss(FlowMatching()) > 0.01
    assert loss(process) == pytest.approx(loss(FlowMatching()), rel=1e-4)


def test_the_coupling_matters():
    """Independent pairs leave the bent flow's straightness, coupled ones none."""
    independent = Batch(noise=torch.randn(4000, 1), x0=0.7 + 0.4 * torch.randn(4000, 1))
    module = straight(Reflow)
    assert module.student_loss(independent).diagnostics["straightness"] > 0.05
    assert module.student_loss(exact_pairs(4000)).diagnostics["straightness"] < 1e-10


def test_data_without_noise_is_refused():
    with pytest.raises(ValueError, match="yields data without noise"):
        straight(Reflow).student_loss(Batch(x0=torch.randn(N, 1)))


def test_slim_flow_starts_as_flow_matching_and_ends_as_reflow():
    pairs = exact_pairs(4000)
    start = straight(SlimFlow, annealing_updates=10)
    noise, x0 = start.coupled(pairs)
    assert abs(torch.corrcoef(torch.stack([noise[:, 0], x0[:, 0]]))[0, 1].item()) < 0.05
    end = ready(straight(SlimFlow, annealing_updates=10), update=10)
    noise, x0 = end.coupled(pairs)
    assert noise is pairs.noise
    plain = ready(Reflow(gaussian(), student=Given(StraightMap()), shape=[1], ema=[]), update=10)
    assert torch.equal(end.student_loss(pairs).losses["velocity"], plain.student_loss(pairs).losses["velocity"])


def test_flips_are_those_of_noise_and_data():
    module = ready(
        SlimFlow(gaussian(), student=Given(StraightMap()), shape=[1, 2, 2], ema=[], annealing_updates=0, flip=1.0)
    )
    pairs = Batch(noise=torch.randn(3, 1, 2, 2), x0=torch.randn(3, 1, 2, 2))
    noise, x0 = module.coupled(pairs)
    assert torch.equal(noise, pairs.noise.flip(-1))
    assert torch.equal(x0, pairs.x0.flip(-1))


# ------------------------------------------------------------------------------------------------ regression of samples
def test_regression_of_pairs_is_zero_at_the_map():
    assert straight(KnowledgeDistillation).student_loss(exact_pairs()).losses["regression"].item() < 1e-6
    assert straight(InstaFlow, bias=0.1).student_loss(exact_pairs()).losses["regression"].item() > 0.05


def test_several_steps_regress_the_states_at_the_students_times():
    module = straight(KnowledgeDistillation, num_steps=2, solver_steps=8)
    inputs, x0 = module.starts(Batch(size=N))
    assert inputs.shape == (2, N, 1)
    states, times = module.trajectory(Batch(size=N))
    assert torch.equal(inputs[1], states[times.tolist().index(0.5)])
    assert torch.equal(x0, states[-1])


def test_student_times_that_are_not_on_the_grid_are_made_part_of_it():
    module = straight(KnowledgeDistillation, student_times=[1.0, 0.4321], solver_steps=4)
    assert module.solver_times() == [1.0, 0.75, 0.5, 0.4321, 0.25]


def test_stored_states_must_be_at_the_students_times():
    module = straight(KnowledgeDistillation, num_steps=2)
    stored = Batch(
        noise=torch.randn(N, 1),
        x0=torch.randn(N, 1),
        states=torch.randn(N, 2, 1),
        times=torch.tensor([1.0, 0.7], dtype=torch.float64),
    )
    with pytest.raises(ValueError, match=r"no state at the student's time 0\.5"):
        module.student_loss(stored)
    with pytest.raises(ValueError, match="no states at the student's 2 times"):
        module.student_loss(exact_pairs())


@pytest.mark.parametrize("method", [CMT, BOSS, Straightening])
def test_pairs_have_no_states_to_learn_from(method):
    """They were set aside without a word, and trajectories solved in training in their place."""
    module = straight(method, num_steps=2)
    with pytest.raises(ValueError, match=f"{method.__name__} learns from states on the way"):
        module.trajectory(exact_pairs())


def test_insta_flow_is_for_one_step():
    with pytest.raises(ValueError, match="InstaFlow distils to one step"):
        straight(InstaFlow, num_steps=2)


def test_slim_flow_s_guidance_vanishes_for_the_straight_teacher_and_its_map():
    teacher = Denoiser(StraightMap(), FlowMatching(), "sample")
    terms = straight(SlimFlowDistillation, teacher=teacher).student_loss(exact_pairs())
    assert terms.losses["guidance"].item() < 1e-6
    # a bent teacher corrects the map, and a wrong student is corrected
    assert straight(SlimFlowDistillation).student_loss(exact_pairs()).losses["guidance"].item() > 0.01


# ------------------------------------------------------------------------------------------------ knots
def bent(**settings):
    torch.manual_seed(0)
    return ready(BOSS(gaussian(), student=Given(StraightMap()), shape=[1], ema=[], **settings))


def test_knots_are_found_on_the_first_batch_and_kept_in_checkpoints():
    module = bent(num_steps=3, solver_steps=24)
    uniform = module.student_times
    module.student_loss(Batch(size=64))
    found = module.student_times
    assert found != uniform
    assert found[0] == 1.0
    grid = [1.0 - i / 24 for i in range(24)]
    assert all(min(abs(t - g) for g in grid) < 1e-9 for t in found)
    module.student_loss(Batch(size=64))
    assert module.student_times == found
    again = bent(num_steps=3, solver_steps=24)
    again.load_state_dict(module.state_dict())
    assert again.student_times == found


def test_euler_on_the_knots_is_better_than_on_the_uniform_grid():
    """The teacher itself, before any training."""
    module = bent(num_steps=4, solver_steps=48)
    uniform = module.student_times
    module.student_loss(Batch(size=256))
    eps = torch.randn(4000, 1, generator=torch.Generator().manual_seed(3))
    exact = 0.7 + 0.4 * eps
    errors = [
        (ode(gaussian(), eps, times, FlowMatching()) - exact).square().mean().item()
        for times in (module.student_times, uniform)
    ]
    assert errors[0] < 0.8 * errors[1], (errors, module.student_times)


def test_given_times_are_not_searched():
    module = bent(student_times=[1.0, 0.4], solver_steps=10)
    module.student_loss(Batch(size=N))
    assert module.student_times == [1.0, 0.4]
    with pytest.raises(ValueError, match="give more"):
        bent(num_steps=12, solver_steps=10)


def test_chords_of_the_teacher_are_what_straightening_learns():
    module = ready(
        Straightening(gaussian(), student=Given(StraightMap()), shape=[1], ema=[], num_steps=2, solver_steps=64)
    )
    states, times = module.trajectory(Batch(size=N))
    rows = module.rows_of_steps(times)
    made, goal = module.chords(Batch(size=N), states[rows], times[rows])
    assert made.shape == goal.shape == (2 * N, 1)
    first = (states[0] - states[times.tolist().index(0.5)]) / 0.5
    assert torch.allclose(goal[:N], first, atol=1e-6)


# ------------------------------------------------------------------------------------------------ learned times
def test_step_sizes_are_what_was_placed():
    sizes = StepSizes(3, 0.9)
    sizes.place([0.9, 0.5, 0.2])
    assert torch.allclose(sizes(), torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64), atol=1e-7)
    with torch.no_grad():
        sizes.logits.add_(torch.tensor([3.0, -2.0, 0.5]))
    times = sizes()
    assert times[0] == 0.9
    assert times[-1] == 0.0
    assert bool((times.diff() < 0).all())


def solver(process=None, **settings):
    torch.manual_seed(0)
    return ready(LearnedSolver(gaussian(process), shape=[1], **{"num_steps": 3, "solver_steps": 48, **settings}))


def test_learning_starts_at_the_knots_and_the_loss_is_that_of_the_sampler():
    module, knots = solver(), bent(num_steps=3, solver_steps=48, solver="heun")
    batch = Batch(size=256)
    loss = module.student_loss(batch).losses["end"]
    knots.student_loss(batch)
    assert module.student_times == pytest.approx(knots.student_times)
    noise, x0 = module.pairs(batch)
    sampled = module.sample(256, noise=noise)
    assert loss.item() == pytest.approx((sampled - x0).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("rounded", [False, True])
def test_the_gradient_is_that_of_the_end_point_in_the_times(rounded):
    """Also for networks that are otherwise told whole numbers, as DiT is."""
    torch.manual_seed(0)
    teacher, batch = gaussian(VariancePreserving(zero_terminal_snr=True) if rounded else None), Batch(size=64)
    teacher.family = replace(teacher.family, integer_time=rounded)
    module = ready(LearnedSolver(teacher, shape=[1], num_steps=3, solver_steps=48))
    module.student_loss(batch)
    logits = module.schedule.logits
    logits.grad = None
    module.student_loss(batch).losses["end"].backward()
    for i in range(3):
        ends = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                logits[i] += step
                ends.append(module.student_loss(batch).losses["end"].item())
                logits[i] -= step
        assert logits.grad[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.05, abs=1e-5)
    assert all(p.grad is None for p in module.teacher.parameters())


@pytest.mark.parametrize("coefficients", ["differences", "all"])
@pytest.mark.parametrize("process", [FlowMatching(), EDM(), VariancePreserving()], ids=["flow", "edm", "vp"])
def test_learned_coefficients_are_those_the_sampler_uses(coefficients, process):
    module, batch = solver(process, coefficients=coefficients), Batch(size=256)
    assert module.sampler == "adams"
    rounding = 0.05 if isinstance(process, VariancePreserving) else 1e-4  # timesteps are whole numbers there
    module.student_loss(batch)
    schedule = module.schedule
    assert schedule.differences.tolist() == pytest.approx(adams_coefficients(schedule())[1].tolist(), abs=1e-6)
    with torch.no_grad():
        schedule.factors.mul_(torch.tensor([0.9, 1.1, 1.05]))
        schedule.differences.add_(torch.tensor([0.0, 0.1, -0.2]))
    loss = module.student_loss(batch).losses["end"]
    noise, x0 = module.pairs(batch)
    assert loss.item() == pytest.approx((module.sample(256, noise=noise) - x0).square().mean().item(), rel=rounding)
    loss.backward()
    assert schedule.differences.grad[1:].abs().min() > 0
    assert schedule.differences.grad[0] == 0  # there is no earlier velocity
    assert (schedule.factors.grad is None) == (coefficients == "differences")
    times = module.student_times
    assert torch.equal(schedule.coefficients_at(times), schedule.coefficients())
    assert schedule.coefficients_at([*times[:-1], 0.99 * times[-1]]) is None
    assert schedule.coefficients_at(times[1:]) is None
    again = solver(process, coefficients=coefficients)
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again.sample(16, noise=noise[:16]), module.sample(16, noise=noise[:16]))


@pytest.mark.parametrize("coefficients", ["none", "all"])
@pytest.mark.parametrize("policy", [Guidance(3.0), IntervalGuidance(3.0, 0.2, 0.7)], ids=["scale", "interval"])
def test_a_guided_solver_samples_with_its_guidance(coefficients, policy, tmp_path):
    settings = {"shape": [2], "num_steps": 3, "solver_steps": 8, "guidance": policy, "coefficients": coefficients}
    teacher, batch = classes(), replace(labelled(), x0=None, size=N)
    with torch.no_grad():
        for p in teacher.network.output.parameters():  # it begins near zero
            p.normal_(std=0.2)
    module = ready(LearnedSolver(teacher, **settings))
    loss = module.student_loss(batch).losses["end"]
    noise, x0 = module.pairs(batch)
    assert loss.item() == pytest.approx(
        (module.sample(len(noise), batch.cond, noise=noise) - x0).square().mean().item()
    )
    plain = generate(module.teacher, noise, batch.cond, module.student_times, module.sampler)
    assert (plain - x0).square().mean().item() > 1.5 * loss.item()
    reason = {"none": "has no stock diffusers pipeline", "all": "adams"}[coefficients]
    if coefficients == "none" and type(policy) is IntervalGuidance:
        reason = "guide every step by one"
    with pytest.raises(ValueError, match=reason):
        export_module(module, tmp_path / "exported")


def test_coefficients_have_a_name_and_no_stock_scheduler(tmp_path):
    with pytest.raises(ValueError, match="choose none, differences or all"):
        solver(coefficients="some")
    with pytest.raises(ValueError, match="adams"):
        export_module(solver(coefficients="all"), tmp_path / "exported")


@pytest.mark.parametrize("process", [VariancePreserving(), EDM()], ids=["vp", "edm"])
def test_times_of_other_processes_are_their_own(process):
    module = solver(process)
    module.student_loss(Batch(size=64))
    times = module.student_times
    assert times[0] == pytest.approx(process.t_max)
    if isinstance(process, VariancePreserving):
        assert all((t * 1000) == round(t * 1000) for t in times)
    again = solver(process)
    again.load_state_dict(module.state_dict())
    assert again.student_times == times


def test_a_student_of_its_own_is_refused():
    with pytest.raises(ValueError, match="leave out student and ema"):
        solver(student=Copy())


def test_it_is_not_sharded():
    module = LearnedSolver(gaussian(), shape=[1])
    module._trainer = SimpleNamespace(strategy=RoleFSDP2(), precision="32-true", callbacks=[])
    with pytest.raises(ValueError, match="use one process or strategy=role_ddp"):
        module.setup("fit")


# ------------------------------------------------------------------------------------------------ high frequencies
def test_hipa_needs_images():
    with pytest.raises(ValueError, match="spatial frequencies of images"):
        ready(HiPA(mlp(), shape=[2], student=Lora(rank=2)))
    with pytest.raises(ValueError, match=r"radius=0\.8"):
        HiPA(mlp(), radius=0.8)


def test_hipa_weighs_fine_detail_and_no_constant():
    module = HiPA(mlp(), student=Given(torch.nn.Identity()), shape=[1, 8, 8], ema=[])
    goal = torch.randn(3, 1, 8, 8)
    assert module.terms_of(goal + 0.5, goal, {}, 3)["high_frequency"].item() < 1e-12
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2 - 0.5
    assert module.terms_of(goal + checks, goal, {}, 3)["high_frequency"].item() == pytest.approx(0.25, rel=1e-4)


# ------------------------------------------------------------------------------------------------ key points
def key_points(**settings):
    torch.manual_seed(0)
    options = {"gan": Adversary(**HEADS), "shape": [2], "ema": [], "num_steps": 2, "solver_steps": 4, **settings}
    return ready(AccVideo(mlp(), **options))


def test_steps_end_at_the_teacher_s_states_along_its_chords():
    module = key_points()
    states, times = module.trajectory(Batch(size=N))
    rows = module.rows_of_steps(times)
    _, goal = module.chords(Batch(size=N), states[rows], times[rows])
    ends = module.step_ends(states[rows], times[rows], goal)
    assert torch.allclose(ends, states[rows][1:], atol=1e-5)


def test_without_the_game_accvideo_is_straightening():
    with_game = key_points(loss_weights={"student/gan": 0.0})
    without = ready(Straightening(mlp(), shape=[2], ema=[], num_steps=2, solver_steps=4))
    a, b = (m.student_loss(Batch(size=N)).losses["velocity"] for m in (with_game, without))
    assert torch.equal(a, b)


def test_every_key_point_has_heads_of_its_own():
    module = key_points()
    module.student_loss(Batch(size=N))
    real, fake, times = module._steps[0, 0]
    logits = module.logits(fake, times, Batch(size=N))
    logits[:N].sum().backward()
    assert all(p.grad is not None for p in module.discriminator[0].parameters())
    assert all(p.grad is None or not p.grad.any() for p in module.discriminator[1].parameters())
    assert real.shape == fake.shape == (2, N, 2)


def test_the_game_reaches_the_student_and_the_teacher_keeps_its_weights():
    module = key_points()
    terms = module.student_loss(Batch(size=N))
    terms.losses["gan"].backward()
    assert any(p.grad is not None and p.grad.any() for p in module.student.parameters())
    assert all(p.grad is None for p in module.teacher.parameters())
    module.zero_grad()
    module.discriminator_loss(Batch(size=N)).losses["gan"].backward()
    assert all(p.grad is None for p in module.student.parameters())


@pytest.mark.parametrize(
    "gan", [None, Adversary(("blocks.0",)), Adversary(**HEADS, kind="relativistic")], ids=["none", "other", "paired"]
)
def test_accvideo_refuses_other_games(gan):
    with pytest.raises(ValueError, match="features='teacher'"):
        key_points(gan=gan)


# ------------------------------------------------------------------------------------------------ guidance
def classes():
    return mlp(classes=3)


def labelled(n=N):
    return Batch(x0=torch.randn(n, 2), cond={"class_labels": torch.arange(n) % 3})


def guidance(**settings):
    return ready(GuidanceDistillation(classes(), shape=[2], ema=[], **{"guidance": Guidance(3.0), **settings}))


def test_the_goal_is_the_guided_teacher():
    module, batch = guidance(), labelled()
    x, t, goal, cond, scale = module.examples(batch)
    expected = guided(module.teacher, x, t, batch.cond, 3.0).flow_prediction
    assert torch.equal(goal, expected)
    assert scale is None
    assert cond["class_labels"] is batch.cond["class_labels"]
    # at initialisation the student is the conditional teacher
    plain = module.teacher(x, t, batch.cond).flow_prediction
    assert module.student_loss(batch).losses["guidance"].item() == pytest.approx((plain - goal).square().mean().item())


def test_scales_are_told_and_equal_the_teacher_s():
    module = guidance(guidance=RandomGuidance(1.0, 4.0), student=TwoTime(Copy(), kind=None, guidance=True))
    batch = labelled(64)
    x, t, goal, _, scale = module.examples(batch)
    assert scale.min() > 1.0
    assert scale.max() > 3.0
    expected = guided(module.teacher, x, t, batch.cond, scale).flow_prediction
    assert torch.allclose(goal, expected, atol=1e-6)


def test_stored_guided_records_need_no_teacher_call():
    module = guidance()
    calls = []
    module.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = Batch(
        cond={"class_labels": torch.arange(N) % 3},
        noise=torch.randn(N, 2),
        x0=torch.randn(N, 2),
        states=torch.randn(N, 4, 2),
        times=torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64),
        predictions={"guided": torch.randn(N, 4, 2), "unguided": torch.randn(N, 4, 2), "scale": torch.full((N,), 3.0)},
    )
    x, t, goal, cond, _ = module.examples(batch)
    assert not calls
    assert torch.equal(x[5], batch.states[1, 1])
    assert t[5] == 0.75
    assert torch.equal(goal[5], batch.predictions["guided"][1, 1])
    assert cond["class_labels"][5] == batch.cond["class_labels"][1]


def test_guidance_from_noise_alone_uses_states_of_guided_trajectories():
    module = guidance(solver_steps=4)
    batch = Batch(cond={"class_labels": torch.arange(N) % 3})
    x, t, goal, _, _ = module.examples(batch)
    states, times = module.trajectory(batch)
    for i in range(N):
        row = times.tolist().index(t[i].item())
        assert torch.equal(x[i], states[row, i])
    assert goal.shape == x.shape


@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_an_adapter_is_enough_and_leaves_the_shared_weights_alone():
    """LoRA guidance distillation: student and teacher are one set of weights in memory."""
    module = guidance(student=Lora(rank=2), check_data=False)
    before = {k: v.clone() for k, v in base_state_dict(module.teacher.network).items()}
    fit(module, 3, labelled(64), 16)
    after = base_state_dict(module.teacher.network)
    assert all(torch.equal(before[k], after[k]) for k in before)
    backbone = next(p for p in module.teacher.network.parameters() if not p.requires_grad)
    assert backbone.data_ptr() in {p.data_ptr() for p in module.student.network.parameters()}
    x, t = torch.randn(4, 2), torch.full((4,), 0.5, dtype=torch.float64)
    cond = {"class_labels": torch.tensor([0, 1, 2, 0])}
    assert not torch.equal(module.student(x, t, cond).raw, module.teacher(x, t, cond).raw)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": Guidance(1.0)}, "nothing to distil"),
        ({"guidance": RandomGuidance(1.0, 3.0)}, "must be told to the student"),
        ({"sampler": "renoise"}, "sampler='renoise' is unknown"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        guidance(**settings)


# ------------------------------------------------------------------------------------------------ learning
PROCESS = FlowMatching()
UPDATES = 400


def network():
    return Explicit(NewDenoiser(lambda: ResidualMLP((2,), 128, 3), PROCESS, "flow_prediction", sigma_data=1.436))


@pytest.fixture(scope="module")
def ring_problem():
    """The teacher, and noises with their exact ends."""
    mixture = ring()
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    return analytic_denoiser(mixture, PROCESS), noise, mixture.flow_map(noise, 1.0, 0.0, PROCESS)


@pytest.fixture(scope="module")
def ring_pairs(ring_problem):
    """The teacher's pairs, its states at ten times among them."""
    teacher, _, _ = ring_problem
    noise = torch.randn(8192, 2, generator=torch.Generator().manual_seed(5))
    times = [1.0 - i / 40 for i in range(40)]
    run = run_solver(teacher, noise, {}, times, "heun", keep=range(0, 40, 4))
    grid = torch.tensor(times[::4], dtype=torch.float64)
    return Batch(noise=noise, x0=run.x0, states=run.states, times=grid)


def rmse(samples, ends) -> float:
    return (samples - ends).square().sum(1).mean().sqrt().item()


def learned(teacher, data, method, lr=2e-3, updates=UPDATES, **settings):
    torch.manual_seed(0)

    def optimizer(parameters):
        return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99), fused=True)

    def decay(optimizer):
        return WarmupDecay(optimizer, 20, updates, "linear", decay_start=updates // 3, final=0.02)

    module = method(
        teacher,
        **{"student": network(), "ema": [PowerEMA(0.05)], **settings},
        student_optimizer=optimizer,
        student_scheduler=decay,
        check_data=False,
    )
    fit(module, updates, data, 256)
    return module


#: method, settings, steps of the student, largest share of the teacher's error in twice as many steps
LEARNS = {
    "reflow": (Reflow, {}, 2, 0.9),
    "rf_plus_plus": (RFPlusPlus, {}, 2, 1.0),
    "slim_flow": (SlimFlow, {"annealing_updates": UPDATES // 2}, 2, 0.9),
    "knowledge_distillation": (KnowledgeDistillation, {}, 1, 0.5),
    "insta_flow": (InstaFlow, {"metric": "mse"}, 1, 0.5),
    "boss": (BOSS, {"num_steps": 2}, 2, 0.9),
    "accvideo": (
        AccVideo,
        {
            "student_times": [1.0, 0.5],
            "gan": Adversary(("input",), features="teacher", width=32),
            "discriminator_optimizer": lambda p: torch.optim.Adam(p, lr=2e-3, betas=(0.0, 0.99)),
        },
        2,
        0.9,
    ),
}
#: run by ``make test`` and by CI; the others by ``make matrix``
FAST, LONG = ("boss", "insta_flow"), ("reflow",)


@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
@pytest.mark.parametrize("name", [n if n in FAST else long(n) if n in LONG else slow(n) for n in LEARNS])
def test_students_beat_the_teacher_s_own_steps(name, ring_problem, ring_pairs):
    teacher, noise, ends = ring_problem
    method, settings, steps, share = LEARNS[name]
    module = learned(teacher, ring_pairs, method, **settings)
    times = module.student_times if len(module.student_times) == steps else None
    found = rmse(module.sample(len(noise), noise=noise, num_steps=None if times else steps), ends)
    twice = rmse(generate(teacher, noise, {}, [1.0 - i / (2 * steps) for i in range(2 * steps)], "ode"), ends)
    print(f"{name}: {found:.3f} in {steps}, the teacher {twice:.3f} in {2 * steps}")
    assert found < share * twice


@pytest.mark.long
@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_learned_times_are_better_than_even_ones_wherever_learning_starts(ring_problem, ring_pairs):
    teacher, noise, ends = ring_problem
    even = rmse(generate(teacher, noise, {}, [1.0, 2 / 3, 1 / 3], "ode"), ends)
    found = []
    for start in ([1.0, 2 / 3, 1 / 3], [1.0, 0.9, 0.2]):
        settings = {"student": None, "ema": [], "lr": 5e-2, "updates": 200, "student_times": start}
        module = learned(teacher, ring_pairs, LearnedSolver, **settings)
        found.append(rmse(module.sample(len(noise), noise=noise), ends))
        assert module.student_times == pytest.approx([1.0, 0.579, 0.303], abs=0.01)
    print(f"learned_solver: {found} in 3, evenly {even:.3f}")
    assert max(found) < 0.97 * even


@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_learned_coefficients_are_better_than_any_times(ring_problem, ring_pairs):
    teacher, noise, ends = ring_problem
    grid = [1.0, 0.579, 0.303]
    settings = {"student": None, "ema": [], "lr": 5e-2, "updates": 200, "student_times": grid, "coefficients": "all"}
    module = learned(teacher, ring_pairs, LearnedSolver, **settings)
    found = rmse(module.sample(len(noise), noise=noise), ends)
    best, adams = (rmse(generate(teacher, noise, {}, grid, sampler), ends) for sampler in ("ode", "adams"))
    print(f"learned_solver: {found:.3f} with coefficients, {best:.3f} without, Adams-Bashforth {adams:.3f}")
    assert found < 0.7 * min(best, adams)


@pytest.mark.slow
@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
def test_reflow_on_shuffled_pairs_is_no_straighter(ring_problem, ring_pairs):
    """The negative control: what matters is which noise belongs to which sample."""
    teacher, noise, _ = ring_problem
    order = torch.randperm(8192, generator=torch.Generator().manual_seed(2))
    shuffled = Batch(noise=ring_pairs.noise[order], x0=ring_pairs.x0)
    reference = teacher.network.mixture.sample(1000, torch.Generator().manual_seed(7))[0]
    one = sliced_wasserstein(generate(teacher, noise, {}, [1.0], "ode"), reference)
    found = sliced_wasserstein(learned(teacher, shuffled, Reflow).sample(1000, noise=noise), reference)
    right = sliced_wasserstein(learned(teacher, ring_pairs, Reflow).sample(1000, noise=noise), reference)
    print(f"one step: shuffled {found:.3f}, coupled {right:.3f}, the teacher {one:.3f}")
    assert found > 0.8 * one
    assert right < 0.5 * one


@pytest.mark.parametrize("logits", [[0.0, 0.0, -9.0], [-8.0, 0.0, 0.0], [9.0, 0.0, 0.0], [-9.0, 9.0, -9.0]])
def test_rounded_times_stay_apart_and_above_0(logits):
    process = VariancePreserving()
    sizes = StepSizes(3, 1.0, process)
    with torch.no_grad():
        sizes.logits.copy_(torch.tensor(logits))
    times = sizes.native_times()
    validate_times(times, process)
    steps = [t * process.num_train_timesteps for t in times]
    assert steps == pytest.approx([round(step) for step in steps])
    assert all(a - b > 0.99 for a, b in zip([*steps], [*steps[1:], 0.0]))
    free = change_process(sizes()[:-1].detach(), FlowMatching(), process)[0]
    assert (torch.tensor(times, dtype=torch.float64) - free).abs().max() < 3.0 / process.num_train_timesteps


def test_stored_states_say_where_learning_starts():
    module = solver(solver_steps=12)
    states, times = module.trajectory(Batch(size=64))
    want = list(module._given_times)
    stored = solver(solver_steps=12)
    even = list(stored.student_times)
    kept = Batch(x0=states[-1], noise=states[0], states=states[:-1].transpose(0, 1), times=times[:-1])
    stored.student_loss(kept)
    assert stored.student_times == pytest.approx(want)
    assert stored.student_times != pytest.approx(even)


@pytest.mark.learn
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_adapters_learn_one_step_of_the_digits(tmp_path):
    words = ["fit", "-c", str(config_path("method/hipa_digits.yaml")), "--trainer.enable_progress_bar=false"]
    module = trainer_cli([*words, f"--trainer.logger.init_args.save_dir={tmp_path}"]).model.eval()
    row, _ = evaluate_student(module, 2500)
    print(f"hipa: progress {row.metrics['progress_cnn']:.3f}")
    assert row.metrics["progress_cnn"] > 0.85
    teacher = ZooDenoiser("digits").build()
    assert fingerprint(base_state_dict(module.teacher.network).values()) == fingerprint(
        base_state_dict(teacher.network).values()
    )
