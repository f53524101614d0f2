"""ADM and AC-DMD: the points that scores lead to, by hand and against DMD2."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_problems import Affine, Gaussian, Given, assert_same_cycle, mlp, posterior, ready, sgd, shift

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.losses.subinterval import cps_step
from lightning_distill.methods import ACDMD, ADM, DMD2
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.prediction import Prediction
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving
from lightning_distill.randomness import Draws
from lightning_distill.samplers import transport
from lightning_distill.times import t_min

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def heads(**settings):
    return Adversary(**{"taps": ("input",), "features": "teacher", "width": 8, **settings})


# ------------------------------------------------------------------------------------------------ ADM
def gaussians(a, b, kind="hinge"):
    """Student N(b, a^2), teacher N(1, .7^2), exact fake score."""
    return ready(
        ADM(
            analytic_denoiser(GaussianMixture([[1.0]], std=0.7), FlowMatching()),
            student=Given(Affine(a, b)),
            fake_score=Given(Gaussian(b, a)),
            gan=heads(kind=kind),
            shape=[1],
            ema=[],
            student_optimizer=sgd,
            fake_score_optimizer=sgd,
        )
    )


def test_both_sides_see_the_euler_step():
    module = gaussians(1.3, -0.5)
    batch = Batch(size=64)
    captured = []
    module.logits = lambda x, t, cond: captured.append((x, t)) or 0.3 * x
    module.student_loss(batch)
    z = module.streams.normal("slice0/start", 0, 0, (64, 1)).double()
    x = 1.3 * z - 0.5

    def euler(phase, name, mean, std):
        t = 0.02 + 0.96 * module.streams.uniform(f"{phase}/{name}/time", 0, 0, (64,))[:, None]
        x_t = (1 - t) * x + t * module.streams.normal(f"{phase}/{name}/noise", 0, 0, (64, 1)).double()
        y = posterior(x_t, t, mean, std)
        r = torch.maximum(t - 1 / 64, t / 2)
        return x_t + (r - t) * (x_t - y) / t, r

    got, r = captured[0]
    want, when = euler("student0", "matching", -0.5, 1.3)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(r[:, None], when)
    captured.clear()
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    losses = module.fake_score_loss(batch).losses
    torch.testing.assert_close(captured[0][0].double(), euler("fake_score0", "gan", 1.0, 0.7)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(captured[1][0].double(), euler("fake_score0", "gan", -0.5, 1.3)[0], atol=1e-5, rtol=1e-5)
    real, fake = (0.3 * x for x, _ in captured)
    torch.testing.assert_close(losses["gan"], (F.relu(1 - real) + F.relu(1 + fake)).mean())


@pytest.mark.parametrize(("b", "sign"), [(-0.5, 1.0), (2.5, -1.0)])
def test_a_linear_discriminator_points_from_the_student_to_the_teacher(b, sign):
    """D = c x with c fitted to the two means: the student's mean moves towards the teacher's."""
    module = gaussians(0.7, b)
    weight = torch.zeros((), requires_grad=True)
    module.logits = lambda x, t, cond: weight * x
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    (slope,) = torch.autograd.grad(module.fake_score_loss(Batch(size=4096)).losses["gan"], weight)
    module.draws = Draws(module.streams, 0, 0, "student0")
    module._rollouts.clear()
    module.logits = lambda x, t, cond: -slope * x
    (of_mean,) = torch.autograd.grad(module.student_loss(Batch(size=4096)).losses["gan"], module.student.network.b)
    assert -float(of_mean) * sign > 0


def test_equal_scores_give_the_discriminator_nothing():
    module = ready(ADM(mlp(), gan=heads(kind="hinge", taps=("blocks.0",))))  # fake score and teacher are one function
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    terms = module.fake_score_loss(Batch(size=32))
    assert terms.diagnostics["logit_real"] == terms.diagnostics["logit_fake"]
    if float(terms.diagnostics["logit_real"].abs()) < 1:
        assert float(terms.losses["gan"].detach()) == pytest.approx(2.0, abs=0.2)


def test_the_gradient_passes_through_the_fake_score_into_the_sample():
    module = gaussians(1.3, -0.5)
    module.logits = lambda x, t, cond: x
    module.student_loss(Batch(size=256)).losses["gan"].backward()
    t = 0.02 + 0.96 * module.streams.uniform("student0/matching/time", 0, 0, (256,))
    r = torch.maximum(t - 1 / 64, t / 2)
    gain = (1 - t) * 1.69 / ((1 - t) ** 2 * 1.69 + t**2)
    through = (1 - t) * (1 + (r - t) * (1 - gain) / t)
    assert float(module.student.network.b.grad) == pytest.approx(-float(through.mean()), rel=1e-4)


def test_adm_is_refused_without_its_discriminator():
    for gan in (None, Adversary(taps=("input",)), heads(kind="relativistic")):
        with pytest.raises(ValueError, match="ADM learns from a discriminator on the teacher's features"):
            ADM(mlp(), gan=gan)
    with pytest.raises(ValueError, match="step_share=0"):
        ADM(mlp(), gan=heads(), step_share=0.0)


# ------------------------------------------------------------------------------------------------ AC-DMD
@pytest.mark.parametrize("process", [FlowMatching(), EDM(0.02, 10.0)], ids=["flow", "edm"])
def test_a_coefficient_preserving_step_is_between_ode_and_renoising(process):
    x_t, y, n = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3)
    t, r = torch.full((5,), 0.8 * process.t_max).double(), torch.full((5,), 0.3 * process.t_max).double()
    prediction = Prediction.from_x0(y, x_t, t, process)
    torch.testing.assert_close(cps_step(prediction, r, 0.0, n), transport(prediction, r))
    torch.testing.assert_close(cps_step(prediction, r, 1.0, n), transport(prediction, r, n), atol=1e-6, rtol=1e-6)
    c, s = math.cos(0.45 * math.pi), math.sin(0.45 * math.pi)
    assert c**2 + s**2 == pytest.approx(1.0)
    want = transport(prediction, r, c * prediction.eps + s * n)
    torch.testing.assert_close(cps_step(prediction, r, 0.9, n), want)
    # the same noise leaves no trace in a difference
    other = Prediction.from_x0(y + 1, x_t, t, process)
    gaps = [cps_step(other, r, 0.9, m) - cps_step(prediction, r, 0.9, m) for m in (n, torch.randn(5, 3))]
    torch.testing.assert_close(*gaps, atol=1e-5, rtol=1e-5)


def test_one_step_without_consistency_is_dmd2():
    one = ACDMD(mlp(), fake_score_steps=2, loss_weights={"fake_score/consistency": 0.0}, guidance=Guidance(1.0))
    other = DMD2(mlp(), fake_score_steps=2)
    for module in (one, other):
        module.configure_model()
    assert_same_cycle(one, other, Batch(size=16), tolerance=1e-6)


def test_consistency_is_an_unbiased_square():
    """With fixed x_t the mean over noise is the square of the mean defect."""
    module = ready(ACDMD(mlp(), num_steps=2, eta=0.8, consistency_span=0.3, critic_condition_on="none"), "fake_score0")
    shift(module.fake_score)
    n = 40_000
    x_t, t = torch.tensor([[0.7, -0.4]]).expand(n, 2), torch.full((n,), 0.8, dtype=torch.float64)
    with torch.no_grad():
        prediction = module.fake_score(x_t, t)
        module.draws.uniform = lambda name, k: torch.full((k,), 0.9, dtype=torch.float64)
        got = float(module.consistency(prediction, torch.full((n,), 0.5).double(), Batch(size=n)))
        r = torch.full((n,), 0.8 - 0.9 * 0.3, dtype=torch.float64)
        defects = module.fake_score(cps_step(prediction, r, 0.8, torch.randn(n, 2)), r).x0 - prediction.x0
    square, biased = float(defects.mean(0).square().mean()), float(defects.square().mean())
    spread = float(defects.var()) / n**0.5
    assert got == pytest.approx(square, abs=5 * spread)
    assert abs(biased - square) > 20 * spread


@pytest.mark.parametrize("process", [EDM(0.02, 10.0), VariancePreserving()], ids=["edm", "vp"])
def test_no_network_is_asked_below_its_least_time(process):
    source = Denoiser(ResidualMLP((2,), 8, 1), process, "v_prediction", network_process=TrigFlow(), sigma_data=1.1)
    for method, settings in ((ACDMD, {"num_steps": 2}), (ADM, {"gan": heads()})):
        module = ready(method(source, shape=[2], ema=[], fake_score_steps=1, **settings), "fake_score0")
        seen = []
        for role in (module.fake_score, module.require_teacher()):
            role.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(float(args[1].min())))
        if method is ADM:
            module.logits = lambda x, t, cond, seen=seen: seen.append(float(t.min())) or x
        for update in range(20):
            module.draws = Draws(module.streams, update, 0, "fake_score0")
            module._rollouts.clear()
            module.fake_score_loss(Batch(size=64))
        assert min(seen) >= t_min(process) * (1 - 1e-9)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="eta=2"):
        ACDMD(mlp(), eta=2.0)
    with pytest.raises(ValueError, match="consistency_span=0"):
        ACDMD(mlp(), consistency_span=0.0)
