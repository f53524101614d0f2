"""Diagnostics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_distill.losses import diagnostics as d


def posterior_mean(x_t, t, mean, std):
    """E[x | x_t] of N(mean, std^2) under flow matching."""
    gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    return mean + gain * (x_t - (1 - t) * mean)


def gaussian_state(fake, t=0.6, n=400_000):
    """Student N(-.5, 1.3^2), teacher N(1, .7^2), a critic that is exact for N(*fake)."""
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    x = -0.5 + 1.3 * x
    x_t = (1 - t) * x + t * eps
    return d.critic_state(x, posterior_mean(x_t, t, 1.0, 0.7), posterior_mean(x_t, t, *fake))


# ------------------------------------------------------------------------------------------------ critic
def test_an_exact_critic():
    state = gaussian_state((-0.5, 1.3))
    assert float(state.lag) < 1
    assert float(state.residual) == pytest.approx(0.0, abs=0.005)
    assert float(state.gap) ** 2 == pytest.approx(1 - float(state.lag), abs=0.005)
    # error of the exact critic in closed form: the posterior variance
    t, variance = 0.6, 1.3**2
    exact = variance * t**2 / ((1 - t) ** 2 * variance + t**2)
    generator = torch.Generator().manual_seed(1)
    x, eps = (torch.randn(400_000, generator=generator, dtype=torch.float64) for _ in range(2))
    x = -0.5 + 1.3 * x
    teacher = (posterior_mean((1 - t) * x + t * eps, t, 1.0, 0.7) - x).square().mean()
    assert float(state.lag) == pytest.approx(exact / float(teacher), rel=0.01)


def test_a_critic_that_stays_behind_and_one_that_has_not_left():
    behind = gaussian_state((-3.5, 1.3))  # the samples have moved from -3.5 to -.5, towards the teacher at 1
    assert float(behind.lag) > 1.2
    assert float(behind.residual) > 0.3
    teacher_like = gaussian_state((0.5, 0.9))
    assert 0.5 < float(teacher_like.lag) < 1
    assert float(teacher_like.residual) < -0.3


def test_equal_predictions_are_a_gap_of_exactly_zero():
    x, y = torch.randn(8, 3), torch.randn(8, 3)
    state = d.critic_state(x, y, y.clone())
    assert (float(state.lag), float(state.residual), float(state.gap)) == (1.0, 0.0, 0.0)


# ------------------------------------------------------------------------------------------------ guidance
def test_the_guidance_split_adds_up():
    cond, uncond, fake = torch.randn(3, 16, 2, 4, 4, dtype=torch.float64)
    w = torch.linspace(0.5, 4.0, 16, dtype=torch.float64)
    extra = (w - 1)[:, None, None, None] * (cond - uncond)
    matching = cond - fake
    direction = uncond + w[:, None, None, None] * (cond - uncond) - fake
    torch.testing.assert_close(extra + matching, direction)
    split = d.guidance_split(cond, uncond, fake, w)
    a, m = extra.square().mean().sqrt(), matching.square().mean().sqrt()
    assert float(split.share) == pytest.approx(float(a / (a + m)))
    assert float(split.cosine) == pytest.approx(float((extra * matching).mean() / (a * m)))


def test_without_guidance_there_is_no_augmentation():
    cond, uncond, fake = torch.randn(3, 4, 5)
    assert float(d.guidance_split(cond, uncond, fake, 1.0).share) == 0.0
    # at a fixed point the two parts cancel
    balanced = d.guidance_split(cond, uncond, cond + 2.0 * (cond - uncond), 3.0)
    assert float(balanced.share) == pytest.approx(0.5)
    assert float(balanced.cosine) == pytest.approx(-1.0)


# ------------------------------------------------------------------------------------------------ discriminator
def test_logit_statistics():
    real, fake = torch.tensor([[2.0], [1.0], [-1.0], [0.0]]), torch.tensor([[-3.0], [1.0], [-1.0], [-1.0]])
    found = d.logit_statistics(real, fake)
    assert float(found.accuracy) == pytest.approx((2.5 + 3) / 8)
    assert float(found.real_mean) == pytest.approx(0.5)
    assert float(found.fake_std) == pytest.approx(math.sqrt(2.0))
    # pairs: 2 > -3, 1 = 1, -1 = -1, 0 > -1
    assert float(d.logit_statistics(real, fake, "relativistic").accuracy) == pytest.approx(3 / 4)


# ------------------------------------------------------------------------------------------------ gradients, weights
def test_gradient_cosines_and_norms():
    a = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    b = [torch.tensor([0.0, 2.0]), torch.tensor([[-1.0]])]
    zero = [torch.zeros(2), torch.zeros(1, 1)]
    norms = d.gradient_norms({"a": a, "b": b, "c": zero})
    assert [float(norms[k]) for k in "abc"] == pytest.approx([5.0, math.sqrt(5.0), 0.0])
    cosines = d.gradient_cosines({"a": a, "b": b, "c": zero})
    assert set(cosines) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert float(cosines["a", "b"]) == pytest.approx(-4 / (5 * math.sqrt(5.0)))
    assert float(cosines["a", "c"]) == 0.0
    assert float(d.gradient_cosines({"a": a, "b": [-2 * g for g in a]})["a", "b"]) == pytest.approx(-1.0)


def test_weight_distance():
    current = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    average = [torch.tensor([3.0, 1.0]), torch.tensor([4.0])]
    assert float(d.weight_distance(average, current)) == pytest.approx(0.2)
    assert float(d.weight_distance(current, current)) == 0.0
    assert float(d.weight_distance(average, [p.bfloat16() for p in current])) == pytest.approx(0.2)


# ------------------------------------------------------------------------------------------------ samples
def test_sample_moments_of_known_images():
    pattern = torch.linspace(-1, 1, 3 * 16).reshape(1, 3, 4, 4)
    same = d.sample_moments(pattern.expand(10, -1, -1, -1))
    assert float(same.spread) == 0.0  # equal images with texture
    assert float(same.std) == pytest.approx(float(pattern.std(correction=0)), rel=1e-6)
    assert float(same.channel_spread) == pytest.approx(float(pattern.std(dim=1, correction=0).mean()), rel=1e-6)
    grey = d.sample_moments(torch.randn(500, 1, 4, 4).expand(-1, 3, -1, -1) * 2 + 0.5)
    assert float(grey.channel_spread) == pytest.approx(0.0, abs=1e-7)
    assert float(grey.spread) == pytest.approx(2.0, rel=0.05)
    assert float(grey.mean) == pytest.approx(0.5, abs=0.1)
    points = d.sample_moments(torch.randn(500, 2))
    assert points.channel_spread is None
    assert set(points.figures()) == {"mean", "std", "spread"}
    assert float(d.sample_moments(torch.randn(1, 2)).spread) == 0.0


# ------------------------------------------------------------------------------------------------ histories
def test_oscillation():
    size, crossings = d.oscillation([0.5, 2.0] * 4)
    assert size == pytest.approx(math.log(2.0))
    assert crossings == 7
    size, crossings = d.oscillation([0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.0])
    assert size < 0.15
    assert crossings == 1
    assert d.oscillation([1.0]) == (0.0, 0)
