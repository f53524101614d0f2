"""MeanFlow, flow-map distillation, shortcut models, FreeFlow, BOOT and CMT: zeros, gradients, students, messages."""

from __future__ import annotations

import pytest
import torch
from exact_students import COV, F64, FLOW, MEAN, MIXTURE, Exact, ExactAverage, data, exact_module, loss_and_slope
from jsonargparse import ArgumentParser
from small_problems import Exact as PosteriorMean
from small_problems import mlp, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.methods import (
    APEX,
    BOOT,
    CMT,
    OFTSR,
    ArcFlow,
    CorrectedFreeFlow,
    FlowMapDistillation,
    FreeFlow,
    MeanFlow,
    PiFlow,
    Shortcut,
    SnapFlow,
    TwinFlow,
)
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.networks.roles import Copy
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving, change_process
from lightning_distill.samplers import transport
from lightning_distill.times import Uniform, few_step_times

#: method, settings, largest loss of the exact map (float32 differences, or the solver's own error)
ZEROS = {
    "mean_flow": (MeanFlow, {"power": 0.0}, 1e-6),
    "mean_flow_central": (MeanFlow, {"power": 0.0, "tangent": "central", "tangent_step": 1e-3}, 1e-5),
    "mean_flow_restricted": (MeanFlow, {"power": 0.0, "max_gap": 0.25, "num_steps": 4, "equal_share": 0.1}, 1e-6),
    "lagrangian": (FlowMapDistillation, {}, 1e-6),
    "eulerian": (FlowMapDistillation, {"objective": "eulerian"}, 1e-6),
    "progressive": (FlowMapDistillation, {"objective": "progressive"}, 1e-5),
    "progressive_half": (FlowMapDistillation, {"objective": "progressive", "middle": "half"}, 1e-5),
    "shortcut": (Shortcut, {"equal_share": 0.5, "most_steps": 256}, 1e-4),
    "free_flow": (FreeFlow, {}, 1e-6),
    "boot": (BOOT, {"time_step": 0.01}, 1e-6),
    "cmt": (CMT, {"form": "flow_map", "sampler": "flow_map", "solver_steps": 48, "metric": "mse"}, 1e-4),
}


def source(name, n=64):
    return Batch(size=n) if name in ("free_flow", "boot", "cmt") else data(n)


@pytest.mark.parametrize("name", ZEROS)
def test_the_exact_map_has_no_loss_and_another_has(name):
    method, settings, limit = ZEROS[name]
    loss, slope, _ = loss_and_slope(exact_module(method, two_times=True, **settings), source(name))
    spoilt, away, _ = loss_and_slope(exact_module(method, two_times=True, fault=0.1, **settings), source(name))
    assert loss < limit
    assert spoilt > 30 * limit
    # the loss falls towards the exact map, where its slope vanishes beside that
    assert away > 0.0
    assert abs(slope) < 0.1 * away


def test_other_processes_are_reached_through_flow_matching():
    """The same student in VP, EDM and TrigFlow has the losses of flow matching at the same draws."""
    # many timesteps, as the teacher is asked at the first of them for targets below it
    angles = torch.linspace(0.0, torch.pi / 2, 20_001, dtype=F64)[1:]
    fine = VariancePreserving.from_alphas_cumprod(angles.cos().square())
    for process in (fine, TrigFlow(), EDM(0.002, 1e6)):

        class Native(ExactAverage):
            def forward(self, x, t, r=None, process=process):
                flow_t, scale = change_process(t, process, FLOW)
                flow_r = change_process(t if r is None else r, process, FLOW)[0]
                return super().forward(scale[:, None] * x, flow_t, flow_r)

        teacher = analytic_denoiser(MIXTURE, process)
        for objective in ("progressive", "lagrangian"):
            module = FlowMapDistillation(
                teacher, student=Exact(Native(), "flow_prediction"), shape=[2], ema=[], objective=objective
            )
            module = ready(module)
            with torch.no_grad():
                module.student.network.fault.fill_(0.1)
            loss, _, _ = loss_and_slope(module, data())
            want, _, _ = loss_and_slope(
                exact_module(FlowMapDistillation, two_times=True, fault=0.1, objective=objective), data()
            )
            assert loss == pytest.approx(want, rel=2e-3)


def test_mean_flow_from_data_is_right_in_the_mean():
    """One pair's loss stays large at the exact map, but its gradient vanishes over many pairs."""
    settings = {"from_data": True, "power": 0.0, "two_times": True, "equal_share": 0.5}
    loss, slope, _ = loss_and_slope(exact_module(MeanFlow, **settings), data(20_000))
    _, away, _ = loss_and_slope(exact_module(MeanFlow, fault=0.3, **settings), data(20_000))
    assert loss > 0.3
    assert abs(slope) < 0.05 * away


def test_mean_flow_weighs_as_stated():
    module = exact_module(MeanFlow, two_times=True, fault=0.1, power=1.0, constant=0.5, equal_share=0.0)
    plain = exact_module(MeanFlow, two_times=True, fault=0.1, power=0.0, equal_share=0.0)
    u = {}
    for name, m in (("weighted", module), ("plain", plain)):
        _, _, terms = loss_and_slope(m, data(1))
        u[name] = float(terms.losses["mean_flow"].detach())
    assert u["weighted"] == pytest.approx(u["plain"] / (u["plain"] + 0.5), rel=1e-5)


def test_restricted_times_stay_within_their_gap():
    module = exact_module(MeanFlow, two_times=True, max_gap=0.3, num_steps=4, equal_share=0.25)
    t, r = module.pair_times(2000)
    assert float((t - r).max()) == pytest.approx(0.3)
    assert float((t == r).double().mean()) == pytest.approx(0.25, abs=0.04)
    with pytest.raises(ValueError, match=r"no jump as wide as the 1 of the student's 1 steps"):
        exact_module(MeanFlow, two_times=True, max_gap=0.3)


def test_restricted_students_are_sampled_within_their_gap():
    settings = {"two_times": True, "max_gap": 0.3, "num_steps": 4}
    module = exact_module(MeanFlow, **settings)
    assert module.sample(2, num_steps=5).shape == (2, 2)
    with pytest.raises(ValueError, match=r"no jump as wide as the 0.5 of the student's 2 steps.*more num_steps"):
        module.sample(2, num_steps=2)
    with pytest.raises(ValueError, match=r"as wide as the 1 .* 4 steps by sampler 'renoise'; use sampler='flow_map'"):
        exact_module(MeanFlow, sampler="renoise", **settings)
    assert exact_module(MeanFlow, sampler="renoise", **{**settings, "max_gap": 1.0}).sample(2).shape == (2, 2)
    assert exact_module(MeanFlow, sampler="ode", **settings).sample(2, num_steps=1).shape == (2, 2)


def test_no_gradient_reaches_targets():
    """The gradient is that of the residual with everything but its own u held fixed."""
    module = exact_module(FlowMapDistillation, two_times=True, fault=0.1, objective="progressive")
    batch = data()
    _, slope, _ = loss_and_slope(module, batch)
    fault = module.student.network.fault

    def loss_at(value, frozen):
        module.average = lambda network, batch, scale=None: u
        calls = []

        def u(x, t, r):
            calls.append(1)
            with torch.no_grad():
                # the last call is the online one
                fault.fill_(value if len(calls) == 3 else frozen)
                return module.student(x, t, r=r).flow_prediction

        return float(module.student_loss(batch).losses["progressive"])

    h = 1e-4
    difference = (loss_at(0.1 + h, 0.1) - loss_at(0.1 - h, 0.1)) / (2 * h)
    assert slope == pytest.approx(difference, rel=1e-3)


def test_shortcut_steps_are_powers_of_two_on_their_own_grid():
    module = exact_module(Shortcut, two_times=True, most_steps=16)
    t, d = module.step_times(4000)
    assert set((2 * d).tolist()) == {1.0, 0.5, 0.25, 0.125}
    assert torch.equal((t / (2 * d)).round(), t / (2 * d))
    assert float(t.max()) == 1.0
    assert float((t - 2 * d).min()) == 0.0
    with pytest.raises(ValueError, match="power of 2"):
        Shortcut(mlp(), most_steps=12)


#: processes whose own grids are not even in flow-matching time
UNEVEN = {
    "shifted": FlowMatching(shift=3.0),
    "vp": VariancePreserving(),
    "vp_zero_snr": VariancePreserving(zero_terminal_snr=True),
    "edm": EDM(),
    "trigflow": TrigFlow(),
}


def shortcut(process, **settings):
    settings = {"two_times": True, "most_steps": 16, **settings}
    return exact_module(Shortcut, process=process, teacher=analytic_denoiser(MIXTURE, process), **settings)


def jumps(module, act):
    """Flow-matching times (t, r) of the student's calls."""
    seen = []
    hook = module.student.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args[1].expand(len(args[0])), kwargs["r"].expand(len(args[0])))),
        with_kwargs=True,
    )
    act()
    hook.remove()
    pairs = torch.stack([torch.cat(side).double() for side in zip(*seen)])
    return change_process(pairs, module.process, FLOW)[0].T


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_shortcuts_are_sampled_by_the_jumps_of_their_training(name, steps):
    process = UNEVEN[name]
    module = shortcut(process, num_steps=steps, equal_share=0.01)
    trained = jumps(module, lambda: module.student_loss(data(2000)))
    sampled = jumps(module, lambda: module.sample(1))
    assert len(sampled) == steps
    # timesteps of schedulers are rounded
    room = 5e-3 if isinstance(process, VariancePreserving) else 1e-6
    assert float(torch.cdist(sampled, trained).min(1).values.max()) < room
    if (name, steps) != ("trigflow", 2):
        assert module.student_times != few_step_times(process, steps)
    one = shortcut(process)
    times = jumps(one, lambda: one.sample(1, num_steps=steps))
    torch.testing.assert_close(times, sampled)
    assert one.student_times == [process.t_max]
    assert one.sample(1).shape == (1, 2)


def test_plain_flow_matching_has_the_shortcuts_it_had():
    for steps in (1, 2, 4, 8):
        assert shortcut(FLOW, num_steps=steps).student_times == few_step_times(FLOW, steps)
    t, d = shortcut(EDM()).step_times(500)
    assert float(t.max()) == pytest.approx(80 / 81)
    torch.testing.assert_close(t / (2 * d), (t / (2 * d)).round())


def test_steps_that_no_shortcut_is_trained_for_are_refused():
    number = r"sizes are powers of 1/2, from 1 to 0.125; give a power of 2 up to 8, or sampler='ode'"
    module = shortcut(FLOW)
    for steps in (3, 16):
        with pytest.raises(ValueError, match=f"num_steps={steps}.*{number}"):
            Shortcut(mlp(), most_steps=16, num_steps=steps)
        with pytest.raises(ValueError, match=f"num_steps={steps}.*{number}"):
            module.sample(2, num_steps=steps)
    for times, jump in (([1.0, 0.6], "1 to 0.6"), ([1.0, 0.75, 0.25], "0.75 to 0.25")):
        with pytest.raises(ValueError, match=f"'flow_map' jumps from {jump} of .*leave student_times out"):
            shortcut(FLOW, student_times=times)
    assert shortcut(FLOW, student_times=[1.0, 0.5, 0.25]).sample(2).shape == (2, 2)
    with pytest.raises(ValueError, match=r"'renoise' jumps from 0.75 to 0 .*use sampler='flow_map'"):
        shortcut(FLOW, num_steps=4, sampler="renoise")
    one = shortcut(FLOW, sampler="renoise")
    assert one.sample(2, num_steps=2).shape == (2, 2)  # 1 and 1/2 to 0 are trained
    with pytest.raises(ValueError, match=r"'renoise' jumps from 0.75 to 0"):
        one.sample(2, num_steps=4)
    assert one.student_times == [1.0]
    # the velocity is trained at every time
    assert shortcut(UNEVEN["shifted"], num_steps=3, sampler="ode").student_times == few_step_times(UNEVEN["shifted"], 3)


def test_free_flow_and_boot_learn_from_the_noise_alone():
    for method in (FreeFlow, BOOT):
        module = exact_module(method, two_times=True)
        seen = []
        module.student.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[1]))
        module.student_loss(Batch(size=8))
        assert all(torch.equal(t, torch.ones(8, dtype=F64)) for t in seen)
        with pytest.raises(ValueError, match="one step from t_max"):
            module.sample(4, num_steps=2)
    with pytest.raises(ValueError, match=r"BOOT starts from pure noise.*zero terminal SNR"):
        exact_module(BOOT, two_times=True, process=VariancePreserving())


@pytest.mark.parametrize("step", [0.04, 0.3])
def test_signals_that_others_begin_with_are_trained(step):
    """Student calls of a BOOT update: the signals asked without graph, those that are trained, the boundary."""
    module = exact_module(BOOT, two_times=True, time_step=step)
    seen = []
    module.student.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((torch.is_grad_enabled(), kwargs["r"])), with_kwargs=True
    )
    module.student_loss(Batch(size=4000))
    used = next(r for graph, r in seen if not graph)
    trained = next(r for graph, r in seen if graph)
    assert float(used.max()) == pytest.approx(1.0 - step, abs=0.01)
    assert float(trained.max()) == pytest.approx(1.0 - step, abs=0.01)
    assert float(trained.min()) == pytest.approx(0.0, abs=0.01)
    # evenly, without a hole between the two kinds of target
    share = float((trained > 1.0 - 2.0 * step).double().mean())
    assert share == pytest.approx(step / (1.0 - step), abs=0.03)


def test_the_first_step_from_the_noise_is_of_second_order():
    """Targets between 1 - 2h and 1 - h against the exact signal: an error of h^2 at most, of one Euler step h."""
    errors = []
    for h in (0.04, 0.02):
        module = exact_module(BOOT, two_times=True, time_step=h)
        module.training_times = Uniform((1.0 - 2.0 * h) / (1.0 - h), 1.0)
        errors.append(loss_and_slope(module, Batch(size=2000))[0] ** 0.5)
    assert errors[0] < 2e-3
    assert errors[0] / errors[1] > 3.5


@pytest.mark.parametrize("fault", [0.1, -0.1, 0.0])
def test_the_correction_pulls_samples_back_to_the_teacher(fault):
    """With the exact score of what the faulty student makes, a Gaussian of its own mean and covariance."""
    values, vectors = torch.linalg.eigh(COV)
    linear = vectors @ values.sqrt().diag() @ vectors.T - fault * torch.eye(2, dtype=F64)
    made = GaussianMixture((MEAN - fault)[None], covariances=(linear @ linear.T)[None])
    module = exact_module(CorrectedFreeFlow, two_times=True, fault=fault, fake_score=PosteriorMean(made))
    sample = module.rollout(Batch(size=20_000), grad=False).x0.double()
    torch.testing.assert_close(sample.mean(0), MEAN - fault, rtol=0, atol=0.02)
    torch.testing.assert_close(sample.T.cov(), linear @ linear.T, rtol=0, atol=0.03)
    terms = module.student_loss(Batch(size=2000))
    slope = torch.autograd.grad(terms.losses["matching"], module.student.network.fault)[0]
    if fault == 0.0:
        assert float(terms.diagnostics["score_gap"]) < 1e-12
        assert float(terms.losses["free_flow"].detach()) < 1e-6
    else:
        assert float(slope) * fault > 1e-3
    module.matching_from = module.draws.update + 1
    assert set(module.student_loss(Batch(size=4)).losses) == {"free_flow"}


def test_a_free_flow_of_vp_starts_where_its_sampler_does():
    module = exact_module(FreeFlow, two_times=True, process=VariancePreserving())
    seen = []
    module.student.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    module.student_loss(Batch(size=4000))
    # sigma(t_max) of unit noise; samplers of VP start from 1, of which it is 99.8 %
    assert float(seen[0].std()) == pytest.approx(0.9977, abs=0.02)


def test_cmt_solves_or_reads_its_trajectories():
    module = exact_module(CMT, solver_steps=4, solver="euler")
    states, times = module.trajectory(Batch(size=5))
    assert times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    teacher = module.teacher
    for i in range(4):
        torch.testing.assert_close(states[i + 1], transport(teacher(states[i], times[i]), times[i + 1]))
    stored = Batch(x0=states[-1], states=states[:-1].transpose(0, 1), times=times[:-1])
    again, same = module.trajectory(stored)
    torch.testing.assert_close(again, states)
    assert torch.equal(same, times)
    assert CMT(mlp()).sampler == "renoise"
    assert CMT(mlp()).metric == "pseudo_huber"
    assert CMT(mlp(), form="flow_map", student=TwoTime()).sampler == "flow_map"
    assert CMT(mlp(), form="flow_map", student=TwoTime()).metric == "mse"
    assert CMT(mlp(), form="flow_map", student=TwoTime(), sampler="renoise").sampler == "renoise"
    with pytest.raises(ValueError, match=r"metric='lpips' is unknown; choose one of l2, mse"):
        CMT(mlp(), metric="lpips")
    # a coarse solver's end is not the exact one; a finer one's error is a quarter per halving for heun
    errors = [loss_and_slope(exact_module(CMT, solver_steps=k, metric="l2"), Batch(size=64))[0] for k in (8, 16, 32)]
    assert errors[0] / errors[1] > 6.0
    assert errors[1] / errors[2] > 6.0


# ------------------------------------------------------------------------------------------------ students
def test_students_have_a_target_time_and_start_as_the_teacher():
    teacher = mlp()
    module = ready(MeanFlow(teacher))
    x, t = torch.randn(5, 2), torch.full((5,), 0.7)
    want = teacher(x, t).raw
    assert torch.equal(module.student(x, t).raw, want)
    assert torch.equal(module.student(x, t, r=torch.zeros(5)).raw, want)
    shift(module.student)
    assert not torch.equal(module.student(x, t, r=torch.zeros(5)).raw, module.student(x, t).raw)
    with pytest.raises(ValueError, match=r"MeanFlow trains a network with a target time.*TwoTime\(role=...\)"):
        ready(MeanFlow(mlp(), student=Copy()))
    with pytest.raises(ValueError, match="form='flow_map' trains a network with a target time"):
        ready(CMT(mlp(), form="flow_map", sampler="flow_map"))


def test_samples_are_the_jumps_of_the_map():
    module = exact_module(FlowMapDistillation, two_times=True)
    noise = torch.randn(6, 2, dtype=F64)
    want = MIXTURE.flow_map(noise, 1.0, 0.0, FLOW)
    for steps in (1, 3):
        torch.testing.assert_close(module.sample(6, noise=noise, num_steps=steps), want, rtol=0, atol=1e-6)
    module.sampler = "renoise"  # every step a jump to 0
    torch.testing.assert_close(module.sample(6, noise=noise), want, rtol=0, atol=1e-6)
    module.sampler = "ode"  # the direction itself, Euler
    euler = noise
    for t in (1.0, 0.5):
        euler = euler - 0.5 * MIXTURE.velocity(euler, torch.tensor(t), FLOW)
    torch.testing.assert_close(module.sample(6, noise=noise, num_steps=2), euler)


def test_bad_settings_are_named():
    for settings, message in (
        ({"objective": "euler"}, "choose lagrangian, eulerian or progressive"),
        ({"objective": "progressive", "equal_share": 0.0}, "give equal_share > 0"),
        ({"sampler": "heun"}, "choose flow_map or renoise or ode"),
        ({"objective": "progressive", "middle": "thrid"}, "middle='thrid' is unknown; choose random or half"),
        ({"tangent": "forward"}, "tangent='forward' is unknown; choose one of jvp, central"),
        ({"tangent": "central", "tangent_step": -1e-3}, "tangent_step=-0.001: the step of a difference is positive"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowMapDistillation(mlp(), **settings)
    with pytest.raises(ValueError, match="batches without x0"):
        ready(MeanFlow(mlp())).student_loss(Batch(size=4))
    with pytest.raises(ValueError, match="power of 2"):
        Shortcut(mlp(), most_steps=1, student=TwoTime())
    with pytest.raises(ValueError, match="the step of a difference is positive"):
        MeanFlow(mlp(), tangent="central", tangent_step=0.0)


@pytest.mark.parametrize("method", [APEX, ArcFlow, BOOT, OFTSR, PiFlow, Shortcut, SnapFlow, TwinFlow])
def test_methods_without_a_derivative_take_no_settings_of_one(method):
    with pytest.raises(TypeError, match="tangent"):
        method(mlp(), tangent="one_sided")
    parser = ArgumentParser()
    parser.add_class_arguments(method, "method")
    keys = {action.dest for action in parser._actions}
    assert "method.training_times" in keys
    assert not {"method.tangent", "method.tangent_step"} & keys


@pytest.mark.parametrize("objective", ["lagrangian", "eulerian", "progressive"])
@pytest.mark.parametrize("mode", ["jvp", "central", "one_sided", "semi"])
def test_calls_are_counted_in_every_mode(objective, mode):
    module = ready(FlowMapDistillation(mlp(), objective=objective, tangent=mode, ema=[]))
    calls = []
    module.student.register_forward_pre_hook(lambda *_: calls.append(1))
    module.student_loss(data(4).map(lambda x: x.float()))
    assert len(calls) == module.forward_counts()["student"]["student"]
