"""TBCM, MDT-dist and AnyFlow: zeros at the exact map, what they are trained on, students that learn, messages."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from exact_students import COV, F64, FLOW, MEAN, MIXTURE, data, exact_module, loss_and_slope
from small_problems import Exact as PosteriorMean
from small_problems import gradients, mlp, ready, shift
from test_trajectory_learning import ONE_SIDED, PROCESS, distilled, error, ring_problem, student, two_times
from tiny_pipelines import MAKERS

from lightning_distill.batch import Batch
from lightning_distill.generation import generate
from lightning_distill.guidance import Guidance, IntervalGuidance, RandomGuidance
from lightning_distill.losses.flow_maps import balance_weight
from lightning_distill.losses.velocity_matching import velocity_matching_target
from lightning_distill.methods import (
    CTM,
    DMD2,
    SCM,
    TBCM,
    AnyFlow,
    AnyFlowOnPolicy,
    ArcFlow,
    FreeFlow,
    GuidanceDistillation,
    MDTDist,
    MeanFlow,
    SANASprint,
    TwinFlow,
)
from lightning_distill.methods.any_flow import flow_map_simulation
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.analytic import analytic_denoiser, gaussian_flow_map
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.second_time import second_time_of
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.parameterisations import TrajectoryMap
from lightning_distill.processes import EDM, TrigFlow, VariancePreserving, change_process
from lightning_distill.times import LogNormal, Shifted, Uniform, few_step_times

__all__ = ["ring_problem"]  # the fixture


# ------------------------------------------------------------------------------------------------ TBCM
def backward(process=FLOW, fault=0.0, update=100, **settings):
    settings = {"warmup_updates": 0, "adaptive": False, "times": LogNormal(0.0, 0.8), **settings}
    return exact_module(TBCM, process=process, fault=fault, update=update, **settings)


@pytest.mark.parametrize("process", [FLOW, EDM(0.002, 80.0), VariancePreserving(zero_terminal_snr=True), TrigFlow()])
def test_the_exact_function_has_no_tangent_on_trajectories(process):
    _, slope, exact = loss_and_slope(backward(process), Batch(size=32))
    _, away, spoilt = loss_and_slope(backward(process, 0.1), Batch(size=32))
    assert float(exact.diagnostics["tangent"]) < 1e-3
    assert float(spoilt.diagnostics["tangent"]) > 0.02
    assert abs(slope) < 0.03 * abs(away)
    assert away > 0.0


def test_states_are_those_of_the_flow_from_the_noise():
    """Against the closed-form map of the same noises; the solver's error is of first order."""
    errors = []
    for steps in (40, 80):
        module = backward(solver_steps=steps, times=Uniform(0.0, 1.0))
        points = module.consistency.points(module, Batch(size=200))
        tau = points.tau.view(200, steps).T
        noise = module.draws.normal("noise", (200, 2)).double()
        assert torch.equal(tau[0], torch.full((200,), torch.pi / 2, dtype=F64))
        assert bool((tau.diff(dim=0) <= 0).all())
        far = []
        for x, at in zip(points.x.view(200, steps, 2).transpose(0, 1), tau):
            t, scale = change_process(at, TrigFlow(), FLOW)
            want = gaussian_flow_map(MEAN, COV, noise, torch.ones_like(t), t, FLOW) / scale[:, None]
            far.append((x - want).square().mean())
        errors.append(torch.stack(far).mean().sqrt().item())
    assert errors[1] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.15)


def test_states_have_the_covariance_of_the_marginals():
    """X_{T -> tau} of noise is the noised data's distribution: cos^2 C + sin^2 I around cos m."""
    steps, n = 60, 4000
    module = backward(solver_steps=steps)
    module.consistency.times = LogNormal(0.0, 1e-3)  # all but the first state at tau = pi / 4 ...
    module.consistency.grid = lambda method, n: torch.linspace(torch.pi / 2, torch.pi / 4, steps, dtype=F64)[
        :, None
    ].expand(-1, n)  # ... which are reached in small steps
    points = module.consistency.points(module, Batch(size=n))
    last = points.x.view(n, steps, 2)[:, -1].double()
    torch.testing.assert_close(last.T.cov(), 0.5 * COV + 0.5 * torch.eye(2, dtype=F64), rtol=0, atol=0.04)
    torch.testing.assert_close(last.mean(0), 0.5**0.5 * MEAN, rtol=0, atol=0.04)


def test_times_of_all_trajectories_have_the_distribution():
    module = backward(solver_steps=6)
    tau = module.consistency.grid(module, 4000)[1:]
    u = torch.linspace(0.05, 0.95, 7, dtype=F64)
    want = LogNormal(0.0, 0.8).quantile(u, TrigFlow())
    torch.testing.assert_close(tau.flatten().quantile(u), want, rtol=0, atol=0.02)
    # one in each part
    edges = LogNormal(0.0, 0.8).quantile(torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=F64), TrigFlow())
    assert torch.equal(torch.searchsorted(edges, tau), torch.arange(4, -1, -1)[:, None].expand(-1, 4000))


def test_directions_are_the_teachers_and_cost_no_further_call():
    calls = []
    module = backward(solver_steps=5)
    module.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = Batch(size=16)
    points = module.consistency.points(module, batch)
    assert len(calls) == 5 == module.forward_counts()["student"]["teacher"]
    # dx/dtau of the TrigFlow process itself
    want = MIXTURE.velocity(points.x, points.tau, TrigFlow())
    torch.testing.assert_close(points.velocity, want, rtol=0, atol=1e-5)


def test_pure_noise_has_no_say_in_the_weights_of_times():
    """An exact student has no error, and u falls at every state but the first, where it could fall without end."""
    module = backward(solver_steps=5, adaptive=True)
    loss = module.student_loss(Batch(size=32)).losses["consistency"]
    (slope,) = torch.autograd.grad(loss, module.log_variance.outer.bias)
    assert slope.item() == pytest.approx(4 / 5, abs=1e-3)


def test_stored_states_are_used_as_they_are():
    module = backward()
    times = torch.tensor([0.9, 0.5, 0.2], dtype=F64)
    states = torch.randn(7, 3, 2, dtype=F64)
    points = module.consistency.points(module, Batch(states=states, times=times))
    tau, scale = change_process(times, FLOW, TrigFlow())
    torch.testing.assert_close(points.x.view(7, 3, 2), scale[:, None] * states)
    torch.testing.assert_close(points.tau.view(7, 3), tau.expand(7, 3))


def test_conditions_and_scales_go_with_their_trajectories():
    teacher = mlp(classes=4)
    settings = {"guidance": IntervalGuidance(3.0, 0.5, 1.0), "student": TwoTime(kind=None, guidance=True)}
    module = ready(TBCM(teacher, solver_steps=3, **settings))
    points = module.consistency.points(module, Batch(cond={"class_labels": torch.arange(4)}))
    assert points.cond["class_labels"].tolist() == [label for label in range(4) for _ in range(3)]
    # inside and outside of the interval a trajectory has one name, that of sampling
    assert points.scale.tolist() == [3.0] * 12
    random = {**settings, "guidance": RandomGuidance(1.0, 6.0)}
    points = (module := ready(TBCM(teacher, solver_steps=3, **random))).consistency.points(
        module, Batch(cond={"class_labels": torch.arange(4)})
    )
    scales = points.scale.view(4, 3)
    assert torch.equal(scales, scales[:, :1].expand(4, 3))
    assert scales[:, 0].unique().numel() == 4


def test_bad_settings_of_tbcm_are_named():
    with pytest.raises(ValueError, match=r"from_data has no place; use SCM"):
        TBCM(mlp(), from_data=True)
    with pytest.raises(ValueError, match=r"solver_steps=1: a trajectory has its noise"):
        TBCM(mlp(), solver_steps=1)
    with pytest.raises(ValueError, match="null class"):
        ready(TBCM(mlp(), guidance=Guidance(2.0)))
    assert issubclass(TBCM, SCM)


# ------------------------------------------------------------------------------------------------ MDT-dist
EXACT = {"norm": None, "tangent": "jvp", "tangent_step": None, "training_times": Uniform(0.0, 1.0)}


def transport_module(process=FLOW, fault=0.0, **settings):
    return exact_module(MDTDist, process=process, fault=fault, **{**EXACT, **settings})


@pytest.mark.parametrize("process", [FLOW, EDM(0.002, 80.0), VariancePreserving(zero_terminal_snr=True)])
def test_the_exact_transport_has_no_loss_and_no_direction(process):
    _, slope, terms = loss_and_slope(transport_module(process), data())
    _, away, spoilt = loss_and_slope(transport_module(process, 0.1), data())
    assert float(terms.losses["matching"].detach()) < 1e-6
    assert float(terms.losses["distillation"].detach()) < 1e-8
    assert float(spoilt.losses["matching"].detach()) > 1e-3
    assert away > 0.0
    assert abs(slope) < 0.02 * away


@pytest.mark.parametrize(("tangent", "step"), [("one_sided", 0.01), ("central", 0.01)])
def test_differences_are_near_the_derivative(tangent, step):
    want = loss_and_slope(transport_module(fault=0.1), data())[1]
    found = loss_and_slope(transport_module(fault=0.1, tangent=tangent, tangent_step=step), data())[1]
    assert found == pytest.approx(want, rel=0.05)


def test_the_released_norm_keeps_the_exact_map_from_being_the_solution():
    _, slope, terms = loss_and_slope(transport_module(norm=0.1), data())
    _, away, _ = loss_and_slope(transport_module(fault=0.1), data())
    assert float(terms.losses["matching"].detach()) > 1e-3
    assert abs(slope) > 0.1 * away
    assert MDTDist(mlp()).norm == 0.1


def test_distillation_is_at_the_students_own_samples():
    module = transport_module(fault=0.2)
    batch = data(16)
    calls = []
    module.teacher.register_forward_pre_hook(lambda _m, args: calls.append(args[:2]))
    terms = module.student_loss(batch)
    noise = module.draws.of_slice().normal("start", (16, 2))
    made = module.student(noise, torch.ones(16, dtype=F64)).x0
    x, t = calls[1]
    eps = module.draws.normal("distillation/noise", (16, 2))
    torch.testing.assert_close(x, FLOW.add_noise(made.detach(), eps, t))
    fault = module.student.network.fault
    own, real, at = module.velocities(batch, made.detach())
    want = torch.autograd.grad((-(1 - at)[:, None] * (own - real) * made).mean(), fault)[0]
    found = torch.autograd.grad(terms.losses["distillation"], fault)[0]
    torch.testing.assert_close(found, want)


def test_both_terms_have_their_own_guidance():
    teacher = mlp(classes=4)
    seen = []
    guidance, other = Guidance(3.0), Guidance(5.0)
    module = ready(MDTDist(teacher, guidance=guidance, distillation_guidance=other))
    for policy, name in ((guidance, "matching"), (other, "distillation")):
        policy.scales = lambda t, u, name=name, scale=policy.scale: seen.append(name) or scale
    batch = Batch(x0=torch.randn(8, 2), cond={"class_labels": torch.arange(8) % 4})
    module.student_loss(batch)
    assert seen == ["matching", "distillation"]
    with pytest.raises(ValueError, match="null class"):
        ready(MDTDist(mlp(), distillation_guidance=other))
    told = TwoTime(kind=None, guidance=True)
    with pytest.raises(ValueError, match="embeds a guidance scale"):
        ready(MDTDist(mlp(classes=4), student=told, guidance=guidance, distillation_guidance=other))
    for settings, message in (
        ({"norm": 0.0}, "give a positive constant, or None"),
        ({"sampler": "ode"}, "choose renoise"),
    ):
        with pytest.raises(ValueError, match=message):
            MDTDist(mlp(), **settings)


def test_distillation_asks_for_what_matching_has_trained():
    with pytest.raises(ValueError, match=r"Uniform\(low=0.6, high=1.0\) does not cover the matching times"):
        ready(MDTDist(mlp(), training_times=Uniform(0.6, 1.0), distillation_times=Uniform(0.0, 0.3)))
    ready(MDTDist(mlp(), training_times=Uniform(0.0, 1.0), distillation_times=Uniform(0.0, 0.3)))
    with pytest.raises(ValueError, match=r"tangent_step=0\.6: times stay at least two steps above 0"):
        ready(MDTDist(mlp(), tangent_step=0.6))
    assert ready(MDTDist(mlp(), tangent="jvp", tangent_step=0.6)).tangent_step == 0.6
    for settings, message in (
        ({"tangent_step": -0.1}, "tangent_step=-0.1: the step of a difference is positive"),
        ({"tangent": "forward"}, "tangent='forward' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            MDTDist(mlp(), **settings)


# ------------------------------------------------------------------------------------------------ AnyFlow
def any_flow(method=AnyFlow, fault=0.0, **settings):
    settings = {"from_data": False, "training_times": Uniform(0.02, 0.98), **settings}
    return exact_module(method, two_times=True, fault=fault, **settings)


@pytest.mark.parametrize("balance", [True, False])
def test_the_exact_average_has_no_loss_by_central_differences(balance):
    loss, slope, _ = loss_and_slope(any_flow(balance=balance), data())
    spoilt, away, _ = loss_and_slope(any_flow(fault=0.1, balance=balance), data())
    assert loss < 1e-3 if balance else loss < 1e-5
    assert spoilt > 5e-3
    assert away > 0.0
    assert abs(slope) < 0.1 * away


def test_differences_of_a_flow_map_are_of_second_order():
    losses = [loss_and_slope(any_flow(tangent_step=h, balance=False), data())[0] for h in (0.08, 0.04)]
    assert (losses[0] / losses[1]) ** 0.5 == pytest.approx(4.0, rel=0.35)


def test_gaps_have_their_shares():
    module = any_flow()
    t, r = module.pair_times(4000)
    assert float((t == r).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((r == 0.0).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert bool((r <= t).all())
    assert isinstance(AnyFlow(mlp()).training_times, Shifted)
    with pytest.raises(ValueError, match=r"end_share=0.5 beside equal_share=0.75"):
        MeanFlow(mlp(), end_share=0.5)
    with pytest.raises(ValueError, match="gaps of every size"):
        MeanFlow(mlp(), end_share=0.1, max_gap=0.25)


def test_wide_gaps_count_as_much_as_none():
    """Weights from the mean error at r = t of past updates; nothing of the weight has a gradient."""
    error = torch.tensor([4.0, 0.5, 0.1], dtype=F64, requires_grad=True)
    equal = torch.tensor([True, False, False])
    weight = balance_weight(error, torch.tensor(2.0), equal, eps=0.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 4.0, 20.0], dtype=F64))
    assert not weight.requires_grad
    module = any_flow(fault=0.3)
    module.student_loss(data())
    pending = module.diffusion_error_pending
    assert 20 <= float(pending[1]) <= 44  # half of 64 samples
    batch, u = data(4), torch.randn(4, 2, dtype=F64)
    t = torch.tensor([0.5, 0.5, 0.8, 0.9], dtype=F64)
    pending.zero_()
    target = torch.zeros_like(u)
    found = module.error(u, target, t, torch.tensor([0.5, 0.0, 0.8, 0.2], dtype=F64))
    own = u.square().mean(1)
    want = (own[0] + own[2] + own[1] / (own[1] + 1e-5) + own[3] / (own[3] + 1e-5)) / 4
    assert float(found) == pytest.approx(float(want), rel=1e-5)
    assert float(pending[0]) == pytest.approx(float(own[0] + own[2]), rel=1e-5)
    assert batch.size == 4


@pytest.mark.parametrize("number", [1, 2, 5])
def test_three_jumps_of_an_exact_map_are_all_its_steps(number):
    module = any_flow(AnyFlowOnPolicy, fake_score=PosteriorMean())
    calls = []
    module.student.register_forward_pre_hook(
        lambda _m, args, kwargs: calls.append((args[1], kwargs["r"])), with_kwargs=True
    )
    start = torch.randn(7, 2, dtype=F64)
    times = few_step_times(FLOW, number)
    want = MIXTURE.flow_map(start, 1.0, 0.0, FLOW)
    for interval in range(number):
        calls.clear()
        prediction, x = flow_map_simulation(TrajectoryMap(module.student), start, times, interval)
        torch.testing.assert_close(x, want, rtol=0, atol=1e-6)
        torch.testing.assert_close(prediction.x0, x)
        path = [(float(t[0]), float(r[0])) for t, r in calls]
        ends = [*times, 0.0]
        assert (times[interval], ends[interval + 1]) in path
        assert path[0][0] == 1.0
        assert path[-1][1] == 0.0
        assert all(a[1] == b[0] for a, b in pairwise(path))
        assert len(path) == 1 + (interval > 0) + (interval < number - 1)


def test_the_gradient_passes_through_every_jump():
    module = any_flow(AnyFlowOnPolicy, fault=0.2, fake_score=PosteriorMean(), rollout_steps=[4])
    fault = module.student.network.fault
    start, times = torch.randn(7, 2, dtype=F64), few_step_times(FLOW, 4)

    def total(value):
        with torch.no_grad():
            fault.fill_(value)
            return float(flow_map_simulation(TrajectoryMap(module.student), start, times, 1)[1].square().sum())

    slope = torch.autograd.grad(
        flow_map_simulation(TrajectoryMap(module.student), start, times, 1)[1].square().sum(), fault
    )[0]
    assert float(slope) == pytest.approx((total(0.2 + 1e-4) - total(0.2 - 1e-4)) / 2e-4, rel=1e-5)


def test_the_on_policy_stage_adds_a_score_difference():
    module = ready(AnyFlowOnPolicy(mlp(), rollout_steps=[2, 4], matching_from=2), update=1)
    batch = Batch(x0=torch.randn(16, 2))
    for network in (module.student, module.fake_score):
        shift(network)
    assert set(module.student_loss(batch).losses) == {"mean_flow"}
    module = ready(AnyFlowOnPolicy(mlp(), rollout_steps=[2, 4]))
    shift(module.student)
    shift(module.fake_score, seed=5)
    losses, found = gradients(module, batch)
    assert set(losses) == {"mean_flow", "matching"}
    made = module.rollout(batch, grad=False)
    torch.testing.assert_close(made.x0, module.rollout(batch).x0.detach())
    # a critic that is the teacher leaves the first stage's gradient
    module.fake_score.load_state_dict(module.teacher.state_dict())
    _, same = gradients(module, batch)
    module.loss_weights["student/matching"] = 0.0
    _, alone = gradients(module, batch)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(same, alone, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, alone, strict=True))
    assert second_time_of(module.student.network).kind == "gated_copy"
    assert second_time_of(module.fake_score.network) is None


def test_the_exact_map_of_the_exact_teacher_is_a_fixed_point():
    module = any_flow(AnyFlowOnPolicy, fake_score=PosteriorMean(), rollout_steps=[3])
    terms = module.student_loss(data())
    assert float(terms.diagnostics["score_gap"]) < 1e-12
    assert float(terms.losses["matching"].detach()) < 1e-12
    assert float(terms.losses["mean_flow"].detach()) < 1e-3


def test_bad_settings_of_any_flow_are_named():
    for method, settings, message in (
        (AnyFlow, {"power": 0.5}, "balance=True or False"),
        (AnyFlow, {"equal_share": 0.0}, "give equal_share > 0"),
        (AnyFlow, {"balance_decay": 1.0}, "from 0 to below 1"),
        (AnyFlowOnPolicy, {"rollout_steps": []}, "at least one number of steps"),
        (AnyFlowOnPolicy, {"rollout_steps": [0]}, "each 1 or more"),
        (AnyFlowOnPolicy, {"critic_condition_on": "step"}, "grids of several lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            method(mlp(), **settings)
    with pytest.raises(ValueError, match="asks no teacher"):
        ready(AnyFlow(mlp(classes=4), guidance=Guidance(2.0)))


def timestep_mlp(zero_terminal_snr, kind):
    return Denoiser(mlp().network, VariancePreserving(zero_terminal_snr=zero_terminal_snr), kind)


@pytest.mark.parametrize("zero", [False, True])
def test_central_differences_at_the_noisiest_time_of_a_timestep_model(zero):
    """A step beyond it is no step back, and no logarithm of a negative number."""
    module = ready(AnyFlow(timestep_mlp(zero, "v_prediction")))
    end = torch.full((4,), module._flow_max, dtype=F64)
    x, ones = torch.zeros(4, 2), torch.ones(4, dtype=F64)
    for beyond in (0.005, -0.005):
        time = module.native(x, end + beyond)[1]
        assert torch.isfinite(time).all()
        assert float((time - ones).abs().max()) > 1e-3
    loss = module.student_loss(Batch(x0=torch.randn(64, 2))).losses
    assert all(torch.isfinite(value) for value in loss.values())


@pytest.mark.parametrize("zero", [False, True])
def test_one_step_is_trained_from_the_noise_it_is_sampled_from(zero):
    """Without zero terminal SNR samples begin at unit noise, which is more than sigma at the last timestep."""
    for method, name, act in (
        (FreeFlow, "noise", lambda module: module.student_loss(Batch(size=8))),
        (TwinFlow, "start", lambda module: module.generated(Batch(size=8))),
    ):
        module, seen = ready(method(timestep_mlp(zero, "v_prediction"), shape=[2], ema=[])), []
        module.student.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        act(module)
        torch.testing.assert_close(seen[0], module.process.prior(module.draws.normal(name, (8, 2))))
        module.sample(8, num_steps=1, noise=torch.ones(8, 2))
        torch.testing.assert_close(seen[-1], torch.ones(8, 2))


@pytest.mark.parametrize(("method", "settings"), [(AnyFlow, {}), (MDTDist, {}), (SCM, {"tangent": "central"})])
def test_differences_of_coarse_networks_are_refused(method, settings):
    half = mlp()
    half.network.bfloat16()
    with pytest.raises(ValueError, match=r"takes differences, and ResidualMLP computes in bfloat16.*tangent='jvp'"):
        ready(method(half, student=coarse(method), **settings))
    whole = mlp()
    whole.family = replace(whole.family, integer_time=True)
    with pytest.raises(ValueError, match="takes differences in time, and ResidualMLP is told integer times"):
        ready(method(whole, **settings))


def coarse(method):
    """A student on the teacher's own half-precision backbone."""
    role = Lora(target_modules=("output",))
    return TwoTime(role) if method is AnyFlow else role


def test_samples_are_made_at_the_scale_that_distillation_tells(monkeypatch):
    teacher = mlp(classes=3)
    role = TwoTime(kind=None, guidance=True)
    module = ready(MDTDist(teacher, student=role, guidance=RandomGuidance(2.0, 8.0)))
    told = []
    forward = type(module.student).forward

    def recorded(self, x, t, cond=None, guidance=None, **options):
        if self is module.student:
            told.append(self.family.guidance_scale if guidance is None else guidance)
        return forward(self, x, t, cond, guidance=guidance, **options)

    monkeypatch.setattr(type(module.student), "forward", recorded)
    module.student_loss(Batch(x0=torch.randn(6, 2), cond={"class_labels": torch.arange(6) % 3}))
    assert len(told) > 2
    for scale in told:
        torch.testing.assert_close(torch.as_tensor(scale).double(), told[0].double())


@pytest.mark.parametrize("method", [SCM, MeanFlow, MDTDist])
def test_no_network_is_asked_below_its_first_timestep(method):
    module = ready(method(timestep_mlp(False, "epsilon")))
    if method is SCM:
        times = change_process(module.consistency.draw(module, 4000), TrigFlow(), module.process)[0]
    elif method is MDTDist:
        times = module.native(torch.zeros(4000, 2), module.drawn_times("t", Uniform(0.0, 1.0), 4000))[1]
    else:
        times = module.native(torch.zeros(4000, 2), module.pair_times(4000)[0])[1]
    assert float(module.process.index_from_t(times).min()) > -1e-6


# ------------------------------------------------------------------------------------------------ learning
def critic(parameters):
    return torch.optim.Adam(parameters, lr=2e-3, betas=(0.0, 0.99), fused=True)


#: method, settings, learning rate, batch size
LEARNED = {
    "tbcm": (TBCM, {"solver_steps": 8, "times": LogNormal(-1.0, 1.4), "warmup_updates": 100, **ONE_SIDED}, 2e-3, 64),
    "mdt_dist": (MDTDist, {"norm": None, "training_times": Uniform(0.0, 1.0)}, 1e-3, 256),
    "any_flow": (
        AnyFlowOnPolicy,
        {
            "student": two_times(kind="gated_copy"),
            "fake_score": student,
            "fake_score_optimizer": lambda: critic,
            "training_times": Uniform(0.0, 1.0),
            "from_data": False,
            "balance": False,
            "rollout_steps": [1, 2, 4],
            "matching_from": 200,
            "loss_weights": {"student/matching": 0.1},
            "tangent": "one_sided",
        },
        1e-3,
        256,
    ),
}


@pytest.mark.learn
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*eval mode")
@pytest.mark.parametrize("name", LEARNED)
def test_one_step_is_better_than_two_of_the_teacher(name, ring_problem):
    method, settings, lr, batch_size = LEARNED[name]
    mixture, _, noise, ends = ring_problem
    module = distilled(ring_problem, method, settings, lr, batch_size=batch_size)
    reference = mixture.sample(1000, torch.Generator().manual_seed(7))[0]
    two = generate(analytic_denoiser(mixture, PROCESS), noise, {}, [1.0, 0.5], "ode")
    one = module.sample(len(noise), noise=noise)
    found, want = ((error(x, ends), sliced_wasserstein(x, reference)) for x in (one, two))
    print(f"{name}: {found[0]:.3f}, {found[1]:.3f}; the teacher in two steps {want[0]:.3f}, {want[1]:.3f}")
    assert found[0] < want[0]
    assert found[1] < want[1]
    if module.capability == "two_time":  # more steps do no harm
        assert error(module.sample(len(noise), noise=noise, num_steps=4), ends) < 1.05 * found[0]


@pytest.mark.learn
@pytest.mark.slow
def test_a_derivative_of_the_wrong_sign_does_not_learn(ring_problem, monkeypatch):
    """The control of the test above, for MDT-dist."""
    right, found = velocity_matching_target, {}
    _, _, noise, ends = ring_problem
    for sign in (1.0, -1.0):
        monkeypatch.setattr(
            "lightning_distill.methods.mdt_dist.velocity_matching_target",
            lambda velocity, du_dt, t, norm, sign=sign: right(velocity, sign * du_dt, t, norm),
        )
        settings = {"norm": None, "training_times": Uniform(0.0, 1.0)}
        module = distilled(ring_problem, MDTDist, settings, 1e-3, updates=150, batch_size=128)
        found[sign] = error(module.sample(len(noise), noise=noise), ends)
    print(f"mdt_dist after 150 updates: {found[1.0]:.3f}, with the wrong sign {found[-1.0]:.3f}")
    assert found[1.0] < 0.75 * found[-1.0]


def test_pure_noise_of_the_game_is_without_a_trace_of_the_data():
    """A timestep model's noisiest data have one, and samples begin without it."""
    gan = Adversary(taps=("blocks.0",), features="teacher")
    module = ready(SANASprint(timestep_mlp(False, "epsilon"), gan=gan, largest_share=1.0))
    made = module.simulate_student(Batch(x0=torch.full((4000, 2), 50.0)), False).prediction
    assert float(made.x_t.mean().abs()) < 0.1
    assert float(made.t.min()) == 1.0


@pytest.mark.parametrize("sampler", ["renoise", "gamma"])
def test_jumps_have_no_guidance_of_their_own(sampler):
    """They were trained with it; a plain call at r = t in their place would be another function."""
    module = ready(CTM(mlp(classes=3), ema=[]))
    cond = {"class_labels": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="whose jumps were trained with their guidance"):
        generate(module.student, torch.randn(2, 2), cond, [1.0, 0.5], sampler, guidance_scale=3.0)


def test_networks_with_a_target_time_of_their_own_jump_where_they_are_trained_to():
    """AnyFlow's network: DMD2 trains it at r = t, a method of flow maps to jump."""
    asked = []
    for method in (MeanFlow, DMD2):
        tiny = MAKERS["anyflow"]()
        module = ready(method(tiny.denoiser(), ema=[]))
        network = module.student.network
        hook = network.register_forward_pre_hook(
            lambda m, a, k: asked.append(k["r_timestep"].flatten()[0].item()), with_kwargs=True
        )
        generate(module.student, torch.randn(1, *tiny.shape), tiny.cond(1), [1.0], "renoise")
        hook.remove()
    assert asked == [0.0, 1000.0]


@pytest.mark.parametrize("method", [ArcFlow, GuidanceDistillation])
def test_a_list_of_times_stands_for_its_number(method):
    """Whatever number of steps is the method's default."""
    times = [0.9, 0.6, 0.3]
    assert method(mlp(), student_times=times).student_times == times
    with pytest.raises(ValueError, match="num_steps=7 and the 3 student_times disagree"):
        method(mlp(), student_times=times, num_steps=7)
