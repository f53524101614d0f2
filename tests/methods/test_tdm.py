"""TDM and Phased DMD: samples where a step ends, the special cases that are DMD2, and learning."""

from __future__ import annotations

import math

import pytest
import torch
from small_problems import assert_same_cycle, distil, gaussian_problem, learns_soon, mlp, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.losses.subinterval import subinterval_target, transition
from lightning_distill.methods import DMD2, TDM, PhasedDMD
from lightning_distill.methods.base import Terms
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import Experts
from lightning_distill.prediction import Prediction
from lightning_distill.processes import EDM, FlowMatching, TrigFlow
from lightning_distill.randomness import Draws
from lightning_distill.time_coverage import restricted
from lightning_distill.times import Uniform

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


# ------------------------------------------------------------------------------------------------ experts
def test_an_interval_does_not_train_an_expert_of_the_one_before_it():
    def built(boundaries, updates, subintervals=(2, 2), times=(1.0, 0.75, 0.5, 0.25)):
        settings = {"subintervals": subintervals, "subinterval_updates": updates, "student_times": list(times)}
        ready(PhasedDMD(mlp(), student=Experts(boundaries=boundaries), ema=[], **settings))

    with pytest.raises(ValueError, match=r"go to the experts \[0, 0, 0, 1\].*boundaries=\[0.625\]"):
        built([0.5], [10])
    with pytest.raises(ValueError, match=r"boundaries=\[0.875, 0.375\]"):
        built([0.7, 0.4], [3, 3], (1, 2, 1))
    built([0.625], [10])
    built([0.5], None)  # all intervals at once
    built([0.9, 0.6, 0.3], [10])  # two experts of its own for each interval
    built([0.6], [3, 3], (1, 1, 2))  # the first two share one, as a single network would be shared


# ------------------------------------------------------------------------------------------------ special cases
@pytest.mark.parametrize("method", [TDM, PhasedDMD])
@pytest.mark.parametrize("weight", ["dmd", "kl"])
def test_one_step_is_dmd2_bit_for_bit(method, weight):
    settings = {"weight": weight, "fake_score_steps": 1, "ema": []}
    assert_same_cycle(method(mlp(), **settings), DMD2(mlp(), **settings), Batch(size=16))


def test_one_interval_of_several_steps_is_dmd2_bit_for_bit():
    settings = {"num_steps": 3, "ema": []}
    phased = PhasedDMD(mlp(), subintervals=[3], critic_condition_on="none", **settings)
    assert_same_cycle(phased, DMD2(mlp(), **settings), Batch(size=16))


# ------------------------------------------------------------------------------------------------ where steps end
@pytest.mark.parametrize("sampler", ["renoise", "ode"])
def test_samples_lie_where_the_step_ends(sampler):
    module = ready(PhasedDMD(mlp(), num_steps=2, sampler=sampler, rollout_step="sample", ema=[]))
    rollout = module.rollout(Batch(size=64), grad=False)
    x_u, u = module.where_it_ends(rollout)
    assert torch.equal(u, torch.tensor([0.5, 0.0], dtype=torch.float64)[rollout.steps])
    eps = rollout.prediction.eps if sampler == "ode" else module.draws.of_slice().normal("end", x_u.shape)
    c = u.float()[:, None]
    torch.testing.assert_close(x_u, (1 - c) * rollout.x0 + c * eps)
    assert torch.equal(x_u[rollout.steps == 1], rollout.x0[rollout.steps == 1])
    again, _ = module.where_it_ends(module.rollout(Batch(size=64), grad=False))
    assert torch.equal(again, x_u)  # the critic gets the student's samples


def test_intervals_of_several_steps_end_together():
    module = ready(PhasedDMD(mlp(), num_steps=5, subintervals=[2, 3], ema=[]))
    assert module.step_ends() == pytest.approx([0.6, 0.6, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(("within", "top"), [("step", [1.0, 0.5]), ("all", [1.0, 1.0])])
def test_times_lie_between_the_end_of_the_step_and(within, top):
    module = ready(TDM(mlp(), num_steps=2, times_within=within, matching_times=Uniform(0.02, 0.98), ema=[]))
    rollout = module.rollout(Batch(size=4000), grad=False)
    x_u, u = module.where_it_ends(rollout)
    x_t, t, n = module.noised(x_u, u, rollout, module.matching_times, "matching")
    for step, (low, high) in enumerate(zip((0.5, 0.02), (min(top[0], 0.98), min(top[1], 0.98)))):
        own = t[rollout.steps == step]
        low = low + 0.01 * (high - low) * (step == 0)
        assert low <= float(own.min()) < low + 0.01
        assert high - 0.01 < float(own.max()) <= high
        middle = float((own < 0.5 * (low + high)).double().mean())
        assert middle == pytest.approx(0.5, abs=0.05)
    a, s = transition(u, t, FlowMatching())
    torch.testing.assert_close(x_t, a.float()[:, None] * x_u + s.float()[:, None] * n)


def test_restricted_times_are_the_conditional_distribution():
    process, u = FlowMatching(), torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    low, high = torch.full_like(u, 0.3), torch.full_like(u, 0.6)
    t = restricted(Uniform(0.1, 0.9), u, low, high, process)
    torch.testing.assert_close(t, 0.3 + 0.3 * u)
    assert torch.equal(restricted(Uniform(0.1, 0.9), u, 0 * low, 0 * low + 1, process), 0.1 + (0.9 - 0.1) * u)
    margin = restricted(Uniform(0.1, 0.9), u, low, high, process, margin=0.1)
    torch.testing.assert_close(margin, 0.33 + 0.27 * u)
    assert bool((restricted(Uniform(0.5, 0.9), u, 0 * low, 0 * low + 0.2, process) == 0.2).all())


# ------------------------------------------------------------------------------------------------ critic
def test_critic_targets_are_those_asked_for():
    for target in ("ambient", "x0", "x0_is"):
        module = ready(TDM(mlp(), num_steps=2, critic_target=target, ema=[]), "fake_score0")
        rollout = module.rollout(Batch(size=32), grad=False)
        x_t, t, x0, eps, weight = module.critic_samples(rollout)
        torch.testing.assert_close(FlowMatching().add_noise(x0, eps, t), x_t, atol=1e-4, rtol=1e-4)
        x_u, u = module.where_it_ends(rollout)
        if target == "ambient":
            n = module.draws.normal("critic/noise", x_u.shape)
            want, _ = subinterval_target(x_u, u, t, n, FlowMatching())
            assert torch.equal(x0, want)
            assert bool((weight[rollout.steps == 1] == 1).all())
        else:
            assert torch.equal(x0, rollout.x0)
            assert (weight is None) == (target == "x0")


@pytest.mark.parametrize("method", [TDM, PhasedDMD])
@pytest.mark.parametrize("name", ["flow", "edm"])
def test_the_noise_of_the_targets_has_one_size_in_all_steps(name, method):
    """What is left of the gradient where a critic knows each clean sample, in units of its space."""
    teacher = mlp()
    if name == "edm":
        teacher = Denoiser(teacher.network, EDM(), "v_prediction", network_process=TrigFlow(), sigma_data=0.5)
    settings = {"num_steps": 4, "sampler": "renoise", "rollout_step": "sample", "ema": []}

    def noise(**how):
        module = ready(method(teacher, **settings, **how), "fake_score0")
        rollout = module.rollout(Batch(size=4000), grad=False)
        x_t, t, x0, eps, weight = module.critic_samples(rollout)
        found = []
        for k in range(4):
            own = rollout.steps == k
            knowing = Prediction.from_x0(rollout.x0[own], x_t[own], t[own], module.process)
            found.append(float(module.critic_error(knowing, x0[own], eps[own], weight[own].square())) ** 0.5)
        return found

    found = noise()
    assert max(found) < 1.1
    assert min(found[:-1]) > 0.3
    assert found[-1] < 1e-3
    assert noise(critic_weight="clamped")[0] > (3.0 if name == "flow" else 30.0)


def test_weights_relative_to_each_other_need_two_samples():
    module = ready(TDM(mlp(), num_steps=2, critic_target="x0_is", ema=[]), "fake_score0")
    with pytest.raises(ValueError, match="this one has 1, whose weight is always 1"):
        module.fake_score_loss(Batch(size=1))
    with pytest.raises(ValueError, match="critic_weight='one' is unknown"):
        TDM(mlp(), critic_weight="one")


def test_the_exact_gradient_is_that_of_the_clean_prediction():
    """x_u = alpha_u x0_S + fresh noise: moving x_u along its own gradient moves x0_S along its."""
    settings = {"num_steps": 3, "weight": "kl", "sampler": "renoise", "rollout_step": "sample", "ema": []}
    gradients = []
    for module in (PhasedDMD(mlp(), **settings), TDM(mlp(), times_within="all", **settings)):
        ready(module)
        shift(module.fake_score)
        loss = module.student_loss(Batch(size=64)).losses["matching"]
        gradients.append(torch.autograd.grad(loss, list(module.student.parameters())))
        assert any(bool(g.any()) for g in gradients[-1])
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------------------------ phases
def test_intervals_are_trained_one_after_the_other():
    module = ready(PhasedDMD(mlp(), num_steps=4, subintervals=[1, 2, 1], subinterval_updates=[3, 2], ema=[]))
    for update, want in enumerate([[0]] * 3 + [[1, 2]] * 2 + [[3]] * 3):
        module.draws = Draws(module.streams, update, 0, "student0")
        assert module.stops() == want
        module._rollouts.clear()
        assert module.rollout(Batch(size=2)).step in want
    assert PhasedDMD(mlp(), num_steps=2).stops() is None


@pytest.mark.long
@pytest.mark.sparse(2)
@pytest.mark.parametrize(
    ("method", "sampler"),
    [pytest.param(PhasedDMD, "ode", marks=pytest.mark.slow), (PhasedDMD, "renoise"), (TDM, "ode")],
)
def test_the_first_interval_of_gaussians_converges_to_its_known_map(method, sampler, ring4_problem):
    """x_u must have the variance alpha_u^2 tau^2 + sigma_u^2; with predicted noise x_u = (alpha_u a + sigma_u) z."""
    settings = {"num_steps": 2, "sampler": sampler, "critic_condition_on": "none"}
    if method is PhasedDMD:
        settings["subinterval_updates"] = [10_000]
    else:
        settings |= {"rollout_step": "batch"}

    class FirstStep(method):
        def stops(self):
            return [0]

    module = gaussian_problem(0.9, 0.5, method=FirstStep, fake=(0.5, 0.9), fake_score_steps=2, weight="one", **settings)
    module.optimizer_factories["student"] = lambda p: torch.optim.SGD(p, lr=0.3)
    module.optimizer_factories["fake_score"] = lambda p: torch.optim.SGD(p, lr=0.2)  # its weight is about 1/2
    ring4_problem.fit(module, 120, Batch(size=4096), batch_size=512)
    a, b = (float(v.detach()) for v in (module.student.network.a, module.student.network.b))
    want = 0.7 if sampler == "renoise" else (math.sqrt(0.25 * 0.49 + 0.25) - 0.5) / 0.5
    assert a == pytest.approx(want, abs=0.08)
    assert b == pytest.approx(1.0, abs=0.08)


# ------------------------------------------------------------------------------------------------ bad input
def test_settings_that_cannot_work_are_refused():
    def refused(message, method=PhasedDMD, **settings):
        with pytest.raises(ValueError, match=message):
            method(mlp(), **settings).configure_model()

    refused(r"subintervals=\[1, 2\] must be positive and add up to the student's 4", num_steps=4, subintervals=[1, 2])
    refused("subinterval_updates=.* has 1 positive", num_steps=2, subinterval_updates=[3, 4])
    refused("interval_margin=1.0", interval_margin=1.0)
    refused(
        "first step ends at t=0.5, but the matching times reach only 0.4", num_steps=2, matching_times=Uniform(0, 0.4)
    )
    refused("critic_target='eps' is unknown", TDM, critic_target="eps")
    refused("times_within='none' is unknown", TDM, times_within="none")


# ------------------------------------------------------------------------------------------------ learning
class SignFlipped(TDM):
    """Negative control: away from the teacher."""

    def student_loss(self, batch):
        terms = super().student_loss(batch)
        return Terms({"matching": -terms.losses["matching"]}, terms.diagnostics)


@pytest.mark.learn
@pytest.mark.parametrize("method", [TDM, PhasedDMD])
def test_two_steps_learn_four_modes(method, ring4_problem, trained_teacher):
    run = learns_soon(ring4_problem, trained_teacher.denoiser, method, student_times=[10.0, 1.0])
    assert run.distance < 0.3
    assert all(0.15 < share < 0.35 for share in run.shares), run.shares


@pytest.mark.slow
@pytest.mark.learn
def test_the_other_direction_does_not(ring4_problem, trained_teacher):
    run = distil(ring4_problem, trained_teacher.denoiser, 100, method=SignFlipped, student_times=[10.0, 1.0])
    assert run.distance > 0.7
