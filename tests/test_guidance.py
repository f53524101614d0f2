"""Classifier-free guidance: its convention, its cost and its known stationary laws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_distill.guidance import Guidance, IntervalGuidance, RandomGuidance, guided
from lightning_distill.losses.score_matching import matching_weight, score_difference
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import FlowMatching

B = 6


@pytest.fixture
def denoiser():
    network = ResidualMLP((2,), width=8, depth=1, num_classes=3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return Denoiser(network.double(), FlowMatching(), "flow_prediction")


@pytest.fixture
def batch():
    x_t = torch.randn(B, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, B, dtype=torch.float64)
    return x_t, t, {"class_labels": torch.arange(B) % 3}


def branches(denoiser, x_t, t, cond):
    null = {"class_labels": torch.full((len(x_t),), 3)}
    return denoiser(x_t, t, cond).x0, denoiser(x_t, t, null).x0


def calls(denoiser):
    seen = []
    denoiser.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_is_uncond_plus_w_times_the_difference(denoiser, batch, w):
    with_cond, without = branches(denoiser, *batch)
    torch.testing.assert_close(guided(denoiser, *batch, w).x0, without + w * (with_cond - without))


@pytest.mark.parametrize("kind", ["eps", "flow_prediction", "v_prediction", "velocity"])
def test_it_is_the_same_in_every_parameterisation(denoiser, batch, kind):
    x_t, t, cond = batch
    with_cond = getattr(denoiser(x_t, t, cond), kind)
    without = getattr(denoiser(x_t, t, denoiser.null_cond(cond)), kind)
    got = getattr(guided(denoiser, x_t, t, cond, 3.0), kind)
    torch.testing.assert_close(got, without + 3.0 * (with_cond - without), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("w", "samples"), [(1.0, B), (0.0, B), (2.0, 2 * B), (-1.0, 2 * B)])
def test_every_scale_is_one_pass(denoiser, batch, w, samples):
    seen = calls(denoiser)
    guided(denoiser, *batch, w)
    assert seen == [samples]


def test_scales_can_differ_by_sample(denoiser, batch):
    w = torch.linspace(0.0, 5.0, B, dtype=torch.float64)
    got = guided(denoiser, *batch, w).x0
    for i in range(B):
        x_t, t, cond = batch
        one = (x_t[i : i + 1], t[i : i + 1], {"class_labels": cond["class_labels"][i : i + 1]})
        torch.testing.assert_close(got[i : i + 1], guided(denoiser, *one, float(w[i])).x0)


def test_policies(denoiser, batch):
    x_t, t, cond = batch
    u = torch.linspace(0.05, 0.95, B, dtype=torch.float64)
    with_cond, without = branches(denoiser, *batch)

    def check(policy, scales):
        want = without + torch.as_tensor(scales, dtype=torch.float64).reshape(-1, 1) * (with_cond - without)
        torch.testing.assert_close(policy(denoiser, x_t, t, cond, u).x0, want)

    check(Guidance(4.0), [4.0] * B)
    check(IntervalGuidance(4.0, 0.3, 0.6), [4.0 if 0.3 <= s <= 0.6 else 1.0 for s in t.tolist()])
    check(RandomGuidance(2.0, 4.0), 2.0 + 2.0 * u)
    assert not Guidance(1.0).needs_null
    assert Guidance(0.0).needs_null
    assert RandomGuidance(0.5, 1.5).needs_null  # although the mean scale is 1
    for policy in (IntervalGuidance, RandomGuidance):
        arguments = (3.0, 0.6, 0.3) if policy is IntervalGuidance else (0.6, 0.3)
        with pytest.raises(ValueError, match="needs low < high"):
            policy(*arguments)


def test_without_conditions_or_null_class_the_reason_is_given(batch):
    x_t, t, cond = batch
    plain = Denoiser(ResidualMLP((2,), 8, 1), FlowMatching(), "flow_prediction")
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs conditions"):
        guided(plain, x_t, t, {}, 2.0)
    assert guided(plain, x_t, t, {}, 1.0).x0.shape == x_t.shape
    with pytest.raises(ValueError, match=r"unconditional value for 'class_labels'.*null_class"):
        guided(plain, x_t, t, cond, 2.0)


def test_gradients_reach_the_samples(denoiser, batch):
    x_t, t, cond = batch
    x_t.requires_grad_()
    guided(denoiser, x_t, t, cond, 2.0).x0.sum().backward()
    assert bool((x_t.grad != 0).all())


class TwoGaussians(nn.Module):
    """The class N(1, .25) and, without a class, N(0, 1.25)."""

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.laws = [GaussianMixture([[1.0]], std=0.5), GaussianMixture([[0.0]], std=1.25**0.5)]

    def forward(self, x, t, class_labels):
        both = [law.posterior_mean(x, t, self.process) for law in self.laws]
        return torch.where(class_labels[:, None] == 0, *both)


@pytest.mark.parametrize(("w", "mean", "variance"), [(1.2, 1.102, 0.148), (1.5, 1.227, 0.0227)])
def test_guided_matching_has_another_fixed_point_than_the_class(w, mean, variance):
    """At one matching time t = .5 the student's law with zero direction is shifted and narrowed by guidance.

    With linear gains c = .5 v / (.25 v + .25): c_w = c_u + w (c_c - c_u), v = c_w / (2 - c_w), and the mean solves
    m (1 - c_w / 2) = .8 w. For w >= 2 the gain, and with it the variance, is negative: there is no such law.
    """
    process = FlowMatching()
    teacher = Denoiser(TwoGaussians(process), process, "sample", null_class=1)
    c_class, c_null = 2 * 0.25 / 1.25, 2 * 1.25 / 2.25
    gain = c_null + w * (c_class - c_null)
    v, m = gain / (2 - gain), 0.8 * w / (1 - 0.5 * gain)
    assert (m, v) == (pytest.approx(mean, abs=1e-3), pytest.approx(variance, abs=1e-3))
    x_t = torch.linspace(-4, 4, 41, dtype=torch.float64)[:, None]
    t = torch.full((41,), 0.5, dtype=torch.float64)
    cond = {"class_labels": torch.zeros(41, dtype=torch.long)}
    real = guided(teacher, x_t, t, cond, w).x0

    def direction(law_mean, law_variance):
        student = analytic_denoiser(GaussianMixture([[law_mean]], std=law_variance**0.5), process)
        x = torch.zeros(41, 1, dtype=torch.float64, requires_grad=True)
        weight = matching_weight("one", x.detach(), real, t, process)
        score_difference(x, real, student(x_t, t).x0, weight).backward()
        return 41 * x.grad

    assert float(direction(m, v).abs().max()) < 1e-12
    assert float(direction(1.0, 0.25).abs().max()) > 0.1
    assert c_null + 2.0 * (c_class - c_null) < 0
