"""Uni-Instruct: the gradient of the expanded divergence, its special case, and learning four modes."""

from __future__ import annotations

import math

import pytest
import torch
from small_problems import distil, gaussian_problem, learns_soon, mlp, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.losses.f_divergences import divergence
from lightning_distill.methods import SiD, UniInstruct
from lightning_distill.methods.base import Terms
from lightning_distill.networks.adversary import Adversary
from lightning_distill.times import Uniform

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def log_normal(x, mean, variance):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * variance.log()


@pytest.mark.sparse(2, test=2)
@pytest.mark.parametrize("name", ["rkl", "kl", "js", "hellinger"])
def test_with_the_exact_ratio_the_gradient_is_that_of_the_expansion(name, monkeypatch):
    """Student N(.3, 1.1^2), teacher N(1, .7^2), flow time .6: E[h |score_F - score_T|^2] by quadrature."""
    time, a0, b0 = 0.6, 1.1, 0.3
    module = ready(
        gaussian_problem(
            a0,
            b0,
            method=UniInstruct,
            divergence=name,
            weight="fisher",
            ratio_limit=20.0,
            gan=Adversary(taps=("input",), width=8),
            matching_times=Uniform(time, time + 1e-6),
            critic_times=Uniform(time, time + 1e-6),
        )
    )
    target, own = (torch.tensor((1 - time) ** 2 * s**2 + time**2, dtype=torch.float64) for s in (0.7, a0))

    def exact(features, cond):
        x_t = features["input"].double()
        return log_normal(x_t, (1 - time) * 1.0, target) - log_normal(x_t, (1 - time) * b0, own)

    monkeypatch.setattr(module, "heads", exact)
    student = module.student.network
    loss = module.student_loss(Batch(size=400_000)).losses["expansion"]
    got = torch.stack(torch.autograd.grad(loss, (student.b, student.a))).double()
    b, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (b0, a0))
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    variance = (1 - time) ** 2 * a**2 + time**2
    x_t = (1 - time) * b + variance.sqrt() * z
    u = log_normal(x_t, (1 - time) * 1.0, target) - log_normal(x_t, (1 - time) * b, variance)
    difference = -(x_t - (1 - time) * b) / variance + (x_t - (1 - time) * 1.0) / target
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    want = torch.stack(torch.autograd.grad((density * divergence(name).weight(u) * difference**2).sum(), (b, a)))
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.01)


def small(method, **settings):
    module = ready(method(mlp(), **settings))
    shift(module.fake_score)
    return module


def test_the_reverse_kl_is_sid_with_alpha_one_half():
    def gradient(module, term):
        loss = module.student_loss(Batch(size=32)).losses[term]
        found = torch.autograd.grad(loss, list(module.student.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    gan = Adversary(taps=("blocks.0",), width=4)
    got = gradient(small(UniInstruct, divergence="rkl", gan=gan), "expansion")
    want = gradient(small(SiD, alpha=0.5), "fisher")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("through", [True, False])
def test_the_ratio_carries_gradients_unless_told_not_to(through):
    module = small(UniInstruct, divergence="kl", gan=Adversary(taps=("input",), width=4), through_ratio=through)
    loss = module.student_loss(Batch(size=32)).losses["expansion"]
    found = torch.autograd.grad(loss, list(module.discriminator.parameters()), allow_unused=True)
    assert any(g is not None for g in found) == through  # passed on to x_t; the phase freezes the heads themselves


def test_equal_networks_have_no_gradient():
    module = ready(UniInstruct(mlp(), gan=Adversary(taps=("blocks.0",), width=4)))
    loss = module.student_loss(Batch(size=12)).losses["expansion"]
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in module.student.parameters())


def test_settings_that_cannot_work_are_refused():
    gan = Adversary(taps=("blocks.0",))
    with pytest.raises(ValueError, match="UniInstruct reads density ratios from a discriminator; give gan"):
        UniInstruct(mlp()).configure_model()
    with pytest.raises(ValueError, match="divergence 'w2' is unknown"):
        UniInstruct(mlp(), gan=gan, divergence="w2")
    with pytest.raises(ValueError, match=r"ratio_limit=0\.0"):
        UniInstruct(mlp(), gan=gan, ratio_limit=0.0)


class SignFlipped(UniInstruct):
    """Negative control: up the divergence."""

    def student_loss(self, batch):
        terms = super().student_loss(batch)
        return Terms({"expansion": -terms.losses["expansion"]}, terms.diagnostics)


@pytest.mark.learn
def test_it_soon_learns_four_modes(ring4_problem, trained_teacher):
    gan = Adversary(taps=("blocks.2",))
    run = learns_soon(ring4_problem, trained_teacher.denoiser, UniInstruct, gan=gan)
    assert run.distance < 0.28
    assert all(0.15 < share < 0.35 for share in run.shares), run.shares


@pytest.mark.slow
@pytest.mark.learn
def test_it_learns_four_modes(ring4_problem, trained_teacher):
    gan = Adversary(taps=("blocks.2",))
    run = distil(ring4_problem, trained_teacher.denoiser, 300, method=UniInstruct, gan=gan)
    assert run.distance < 0.17
    assert all(0.18 < share < 0.32 for share in run.shares), run.shares


@pytest.mark.slow
@pytest.mark.learn
def test_the_other_direction_does_not(ring4_problem, trained_teacher):
    gan = Adversary(taps=("blocks.2",))
    assert distil(ring4_problem, trained_teacher.denoiser, 100, method=SignFlipped, gan=gan).distance > 0.7


@pytest.mark.slow
@pytest.mark.learn
@pytest.mark.parametrize(("name", "through"), [("js", True), ("kl", False)])
def test_other_settings_learn_them_too(name, through, ring4_problem, trained_teacher):
    gan = Adversary(taps=("blocks.2",))
    settings = {"gan": gan, "divergence": name, "through_ratio": through}
    run = distil(ring4_problem, trained_teacher.denoiser, 600, method=UniInstruct, **settings)
    assert run.distance < 0.16
    assert all(0.18 < share < 0.32 for share in run.shares), run.shares
