import math

import pytest
import torch

from lightning_distill.losses.adversarial import (
    ADVERSARIAL_KINDS,
    approximate_r1,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)


def test_best_logistic_discriminator_is_the_log_density_ratio():
    """Real N(.5, 1), fake N(-.5, 1): log p_real/p_fake = x, so the best logit has slope 1, bias 0."""
    x = torch.linspace(-12, 12, 201, dtype=torch.float64)
    w_real, w_fake = (torch.softmax(-0.5 * (x - m) ** 2, dim=0) for m in (0.5, -0.5))
    slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.full((), 0.3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [slope, bias],
        max_iter=100,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        # the expectations by quadrature: each logit alone, against a zero whose ln 2 is taken off
        zero = torch.zeros((), dtype=torch.float64)
        logits = slope * x + bias
        on_real = torch.stack([discriminator_loss(d, zero) - math.log(2) for d in logits])
        on_fake = torch.stack([discriminator_loss(zero, d) - math.log(2) for d in logits])
        loss = (w_real * on_real).sum() + (w_fake * on_fake).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert slope.item() == pytest.approx(1.0, abs=1e-6)
    assert bias.item() == pytest.approx(0.0, abs=1e-6)


def test_values_at_zero_logits():
    zero = torch.zeros(4, 3)
    for kind, d, g in (("logistic", 2 * math.log(2), math.log(2)), ("hinge", 2.0, 0.0)):
        assert discriminator_loss(zero, zero, kind).item() == pytest.approx(d)
        assert generator_loss(zero, kind).item() == pytest.approx(g)
    assert discriminator_loss(zero, zero, "relativistic").item() == pytest.approx(math.log(2))
    assert generator_loss(zero, "relativistic", real=zero).item() == pytest.approx(math.log(2))


REFERENCE = {  # one pair of logits at a time, written out
    "logistic": (
        lambda r, f: math.log1p(math.exp(-r)) + math.log1p(math.exp(f)),
        lambda r, f: math.log1p(math.exp(-f)),
    ),
    "hinge": (lambda r, f: max(0.0, 1 - r) + max(0.0, 1 + f), lambda r, f: -f),
    "relativistic": (lambda r, f: math.log1p(math.exp(f - r)), lambda r, f: math.log1p(math.exp(r - f))),
}


@pytest.mark.parametrize("kind", ADVERSARIAL_KINDS)
def test_formulas_and_gradients(kind):
    real, fake = (torch.randn(5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    d_ref, g_ref = REFERENCE[kind]
    pairs = list(zip(real.flatten().tolist(), fake.flatten().tolist()))
    assert discriminator_loss(real, fake, kind).item() == pytest.approx(sum(d_ref(*p) for p in pairs) / 10)
    assert generator_loss(fake, kind, real=real).item() == pytest.approx(sum(g_ref(*p) for p in pairs) / 10)
    assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(r, f, kind), (real, fake))
    assert torch.autograd.gradcheck(lambda f, r: generator_loss(f, kind, real=r), (fake, real))
    # the student raises its logits, the discriminator lowers them and raises the real ones
    (up,) = torch.autograd.grad(generator_loss(fake, kind, real=real), fake)
    assert (up < 0).all()
    on_real, on_fake = torch.autograd.grad(discriminator_loss(real, fake, kind), (real, fake))
    assert (on_real <= 0).all()
    assert (on_fake >= 0).all()
    assert on_real.min() < 0 < on_fake.max()


def test_hinge_stops_at_the_margin():
    real, fake = torch.tensor([2.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    loss = discriminator_loss(real, fake, "hinge")
    loss.backward()
    assert loss.item() == 0.0
    assert real.grad.item() == fake.grad.item() == 0.0


@pytest.mark.parametrize("kind", ADVERSARIAL_KINDS)
def test_narrow_logits_are_widened(kind):
    logits = torch.full((3,), 100.0, dtype=torch.bfloat16)
    for loss in (discriminator_loss(logits, logits, kind), generator_loss(logits, kind, real=logits)):
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)


def test_approximate_r1_has_the_mean_of_r1():
    """For D(x) = sin(w.x) and small noise the mean of the finite difference is E |w cos(w.x)|^2."""
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    x = torch.randn(40_000, 3, dtype=torch.float64, requires_grad=True)
    logits = (x @ w).sin()
    exact = r1_penalty(logits[:, None], x)
    want = (w.square().sum() * (x @ w).cos().square()).mean()
    assert exact.item() == pytest.approx(want.item(), rel=1e-12)
    noise = torch.randn_like(x)
    got = approximate_r1(logits, ((x + 1e-3 * noise) @ w).sin(), noise_std=1e-3)
    assert got.item() == pytest.approx(want.item(), rel=0.03)
    undivided = approximate_r1(logits, ((x + 1e-3 * noise) @ w).sin())
    assert undivided.item() == pytest.approx(got.item() * 1e-6, rel=1e-9)


@pytest.mark.parametrize("heads", [1, 3])
def test_both_penalties_of_equal_heads_are_that_of_one(heads):
    w, x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.randn(40_000, 3, dtype=torch.float64)
    x.requires_grad_()
    near = x + 1e-3 * torch.randn_like(x)
    logits, moved = ((v @ w)[:, None].expand(-1, heads) for v in (x, near))
    want = float(w.square().sum())
    assert r1_penalty(logits, x).item() == pytest.approx(want, rel=1e-12)
    assert approximate_r1(logits, moved, 1e-3).item() == pytest.approx(want, rel=0.03)


def test_r1_trains_the_discriminator():
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(r1_penalty((x @ w)[:, None], x), w)
    assert torch.allclose(gradient, 2 * w)


def test_bad_input():
    a, b = torch.zeros(2, 1), torch.zeros(3, 1)
    with pytest.raises(ValueError, match="'wgan' is unknown; choose one of logistic, hinge, relativistic"):
        discriminator_loss(a, a, "wgan")
    with pytest.raises(ValueError, match="'wgan' is unknown"):
        generator_loss(a, "wgan")
    with pytest.raises(ValueError, match="pairs real and fake logits"):
        discriminator_loss(a, b, "relativistic")
    with pytest.raises(ValueError, match="but got None"):
        generator_loss(a, "relativistic")
    with pytest.raises(ValueError, match="logits of the same samples"):
        approximate_r1(a, b)
    with pytest.raises(ValueError, match="must be positive"):
        approximate_r1(a, a, 0.0)
