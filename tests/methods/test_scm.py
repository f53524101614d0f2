"""sCM, rCM and SANA-Sprint: the tangent's zero, the gradient, the times, and what the terms are."""

from __future__ import annotations

import math

import pytest
import torch
from exact_students import F64, FLOW, MIXTURE, data, exact_module, loss_and_slope
from small_problems import Exact as PosteriorMean
from small_problems import mlp, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.losses.continuous import normalise_tangent, trig_weight
from lightning_distill.methods import RCM, SCM, SANASprint
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.parameterisations import trigflow_consistency, trigflow_input, trigflow_velocity
from lightning_distill.processes import EDM, TrigFlow, VariancePreserving
from lightning_distill.randomness import Draws
from lightning_distill.tangents import tangent
from lightning_distill.times import LogNormal

PROCESSES = {"flow": FLOW, "edm": EDM(0.002, 80.0), "trig": TrigFlow()}


def continuous(process=FLOW, fault=0.0, update=100, **settings):
    settings = {"warmup_updates": 0, "adaptive": False, "weight": "trig", "times": LogNormal(0.0, 0.8), **settings}
    return exact_module(SCM, process=process, fault=fault, update=update, **settings)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))
@pytest.mark.parametrize("mode", ["jvp", "central"])
def test_the_exact_function_has_no_tangent_and_another_has(process, mode):
    settings = {"tangent": mode, "tangent_step": 1e-3}
    _, slope, exact = loss_and_slope(continuous(process, **settings), data())
    _, away, spoilt = loss_and_slope(continuous(process, 0.1, **settings), data())
    assert float(exact.diagnostics["tangent"]) < 2e-4
    assert float(spoilt.diagnostics["tangent"]) > 0.02
    assert abs(slope) < 0.02 * abs(away)
    assert away > 0.0


def test_the_gradient_is_along_the_derivative_of_the_function():
    """-2/D w J^T cos(tau) df/dtau / (|cos df/dtau| + c), from f itself."""
    module = continuous(fault=0.1)
    batch = data(16)
    _, slope, _ = loss_and_slope(module, batch)
    tau = module.consistency.draw(module, 16)
    eps = module.draws.normal("noise", (16, 2)).double()
    x = TrigFlow().add_noise(batch.x0, eps, tau)
    velocity = trigflow_velocity(module.teacher(*trigflow_input(x, tau, FLOW)), tau)

    def flow(x, tau):
        return trigflow_velocity(module.student(*trigflow_input(x, tau, FLOW)), tau)

    rate = tangent(lambda x, tau: trigflow_consistency(x, flow(x, tau), tau), (x, tau), (velocity, 1.0))[1].detach()
    g = normalise_tangent(tau.cos()[:, None] * rate)
    surrogate = -2.0 * (trig_weight(tau)[:, None] * g * flow(x, tau)).mean()
    want = torch.autograd.grad(surrogate, module.student.network.fault)[0]
    assert slope == pytest.approx(float(want), rel=1e-4)


def test_from_data_is_right_in_the_mean():
    settings = {"from_data": True, "constant": 1e6, "weight": "one"}  # an unnormalised tangent, whose mean is exact
    _, slope, terms = loss_and_slope(continuous(**settings), data(20_000))
    _, away, _ = loss_and_slope(continuous(fault=0.3, **settings), data(20_000))
    assert float(terms.diagnostics["tangent"]) > 0.1
    assert abs(slope) < 0.05 * abs(away)
    assert continuous(**settings).forward_counts()["student"]["teacher"] == 0


def test_the_tangent_warms_up_from_diffusion():
    module = continuous(fault=0.2, update=0, warmup_updates=100, constant=1e6, weight="one")
    batch = data(32)
    _, _, start = loss_and_slope(module, batch)
    module.draws = Draws(module.streams, 100, 0, "student0")
    _, _, end = loss_and_slope(module, batch)
    # the function is wrong by less than the diffusion it is first trained to be
    assert float(start.diagnostics["tangent"]) > float(end.diagnostics["tangent"]) > 0.0


def test_times_end_at_the_noisiest_of_the_process():
    vp = VariancePreserving()
    module = continuous(vp, times=LogNormal(4.0, 3.0))
    tau = module.consistency.draw(module, 500)
    largest = math.atan2(float(vp.sigma(torch.tensor(1.0))), float(vp.alpha(torch.tensor(1.0))))
    assert float(tau.max()) == pytest.approx(largest)
    _, t = trigflow_input(torch.zeros(500, 2, dtype=F64), tau, vp)
    assert float(t.max()) == pytest.approx(1.0)


def test_the_learned_weight_is_at_its_optimum_where_it_balances_the_error():
    module = ready(SCM(mlp(), warmup_updates=0), update=3)
    shift(module.student)
    batch = Batch(x0=torch.randn(64, 2))
    before = module.student_loss(batch).losses["consistency"]
    gradient = torch.autograd.grad(before, module.log_variance.outer.bias)[0]
    # d/du mean(e^-u error + u) at u = 0
    assert float(gradient) == pytest.approx(1.0 - float(before.detach()), rel=1e-4)
    assert module.role_parameters("log_variance")
    assert ready(SCM(mlp(), adaptive=False)).role_parameters("log_variance") == []


@pytest.mark.parametrize("norm", ["full", "rms"])
def test_the_loss_of_a_normalised_tangent_begins_near_one(norm):
    """At every time: with 1 / (D tan) the learned weight has log D to fall first, and not as far at all times."""
    made = {}
    for weight in ("unit", "trig"):
        module = ready(SCM(mlp(), warmup_updates=0, norm=norm, constant=1e-6, weight=weight), update=3)
        shift(module.student)
        made[weight] = module.student_loss(Batch(x0=torch.randn(64, 2))).losses["consistency"]
        slope = torch.autograd.grad(made[weight], module.log_variance.outer.bias)[0]
        assert (abs(float(slope)) < 1e-3) == (weight == "unit")
    assert float(made["unit"].detach()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": "snr"}, "weight='snr' trig, one or unit"),
        ({"norm": "half"}, "norm='half' is unknown; choose full or rms"),
        ({"tangent": "forward"}, "tangent='forward' is unknown; choose one of jvp, central"),
        ({"tangent": "central", "tangent_step": -1.0}, "tangent_step=-1.0: the step of a difference is positive"),
        ({"constant": -1.0}, "constant=-1.0 .* give a positive constant"),
        ({"warmup_updates": -5}, "warmup_updates=-5: .* a number of updates from 0"),
    ],
)
def test_bad_settings_are_named_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        SCM(mlp(), **settings)
    known = {"tangent", "tangent_step", "warmup_updates"}
    if set(settings) <= known:
        with pytest.raises(ValueError, match=message):
            RCM(mlp(), **settings)


def test_matching_begins_at_an_update():
    with pytest.raises(ValueError, match="matching_from=-3: give a student update, 0 for the first"):
        RCM(mlp(), matching_from=-3)


# ------------------------------------------------------------------------------------------------ compositions
def test_rcm_is_scm_and_distribution_matching():
    settings = {"warmup_updates": 4, "times": LogNormal(0.7, 1.6)}
    module = ready(RCM(mlp(), matching_from=2, **settings), update=1)
    batch = Batch(x0=torch.randn(16, 2))
    for network in (module.student, module.fake_score):
        shift(network, seed=len(module.phases))
    early = module.student_loss(batch)
    assert set(early.losses) == {"consistency"}
    module.draws = Draws(module.streams, 2, 0, "student0")
    terms = module.student_loss(batch)
    assert set(terms.losses) == {"consistency", "matching"}
    total = 100.0 * terms.losses["consistency"] + terms.losses["matching"]
    torch.testing.assert_close(module.weighted_sum("student", terms), total)
    # a fake score that is the teacher has no say: the student's gradient is that of sCM
    module.fake_score.load_state_dict(module.teacher.state_dict())
    both = torch.autograd.grad(module.student_loss(batch).losses["matching"], module.role_parameters("student"))
    assert all(float(g.abs().max()) < 1e-6 for g in both)


def test_rcm_has_the_zero_of_both_terms():
    """The exact function of the exact teacher, whose samples' score the fake score has."""
    module = exact_module(RCM, fake_score=PosteriorMean(), warmup_updates=0, matching_from=0, times=LogNormal(0.0, 0.8))
    terms = module.student_loss(data())
    assert float(terms.diagnostics["tangent"]) < 2e-4
    assert float(terms.diagnostics["score_gap"]) < 1e-12


def test_sana_sprint_judges_what_is_made_of_noised_data():
    gan = Adversary(taps=("blocks.0",), width=4, kind="hinge", features="teacher")
    module = ready(SANASprint(mlp(), gan=gan, largest_share=0.5, student=TwoTime(kind=None, guidance=True)))
    n = 400
    batch = Batch(x0=torch.randn(n, 2))
    rollout = module.rollout(batch)
    t = rollout.prediction.t
    assert float((t == 1.0).double().mean()) == pytest.approx(0.5, abs=0.08)
    assert rollout.x0.requires_grad
    terms = module.student_loss(batch)
    assert set(terms.losses) == {"consistency", "gan"}
    assert module.loss_weights["student/gan"] == 0.5
    module.draws = Draws(module.streams, 0, 0, "discriminator0")
    again = module.rollout(batch, grad=False)
    torch.testing.assert_close(again.x0, rollout.x0.detach())
    # where the time is t_max the input is pure noise
    noisy = rollout.prediction.x_t[t == 1.0]
    drawn = module.draws.of_slice().normal("noise", (n, 2))[t == 1.0]
    torch.testing.assert_close(noisy, drawn, rtol=0, atol=1e-6)


def test_the_fault_of_the_exact_student_is_a_fault():
    """Guards the tests above: the student is the map of the mixture, and a spoilt one is not."""
    module = exact_module(SCM, adaptive=False)
    noise = torch.randn(32, 2, dtype=F64)
    want = MIXTURE.flow_map(noise, 1.0, 0.0, FLOW)
    torch.testing.assert_close(module.sample(32, noise=noise), want, rtol=0, atol=1e-6)
    spoilt = exact_module(SCM, fault=0.1, adaptive=False)
    assert float((spoilt.sample(32, noise=noise) - want).abs().max()) > 0.05
