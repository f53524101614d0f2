"""Losses of distribution matching against closed forms on Gaussians; expectations are exact Gauss-Hermite sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gaussians import CASES, PROCESSES, denoiser

from lightning_distill.losses.score_matching import denoising_loss, matching_weight, score_difference, surrogate
from lightning_distill.prediction import PREDICTION_TYPES, Prediction
from lightning_distill.processes import FlowMatching, VariancePreserving
from lightning_distill.streams import Stream, StreamProcess

#: student N(M, S^2) and teacher N(MU, TAU^2)
M, S, MU, TAU = -0.5, 1.3, 1.0, 0.7


def grid(n=40):
    """Nodes (z, eps) and weights of the two-dimensional standard normal, float64."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    x, w = torch.tensor(x), torch.tensor(w / math.sqrt(2 * math.pi))
    z, eps = torch.meshgrid(x, x, indexing="ij")
    return z.reshape(-1, 1), eps.reshape(-1, 1), torch.outer(w, w).reshape(-1, 1)


def diffused_kl(mean, std, alpha, sigma):
    """KL( N(mean, std^2) * noise || N(MU, TAU^2) * noise )."""
    own, target = alpha**2 * std**2 + sigma**2, alpha**2 * TAU**2 + sigma**2
    return 0.5 * (own / target + alpha**2 * (mean - MU) ** 2 / target - 1.0 + torch.log(target / own))


def expected_gradient(kind, process, t, fake=(M, S)):
    """E over (z, eps) of the loss' gradient for x = M + S z, in M and S."""
    z, eps, weight = grid()
    alpha, sigma = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (process.alpha, process.sigma))
    x = (M + S * z).requires_grad_()
    x_t = (alpha * x + sigma * eps).detach()
    times = torch.full((len(z),), t, dtype=torch.float64)
    real = denoiser(x_t, MU, TAU, alpha, sigma)
    loss = score_difference(
        x, real, denoiser(x_t, *fake, alpha, sigma), matching_weight(kind, x.detach(), real, times, process)
    )
    (gradient,) = torch.autograd.grad(loss, x)
    gradient = gradient * x.numel()  # the loss is a mean over the nodes
    return (weight * gradient).sum(), (weight * gradient * z).sum()


@pytest.mark.parametrize(("name", "t"), CASES)
def test_the_kl_weight_gives_the_gradient_of_the_diffused_kl(name, t):
    process = PROCESSES[name][0]
    alpha, sigma = (f(torch.tensor(t, dtype=torch.float64)) for f in (process.alpha, process.sigma))
    parameters = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (M, S)]
    want = torch.autograd.grad(diffused_kl(*parameters, alpha, sigma), parameters)
    for got, wanted in zip(expected_gradient("kl", process, t), want):
        assert float(got) == pytest.approx(float(wanted), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("name", "t"), CASES)
def test_other_weights_are_multiples_of_it(name, t):
    process = PROCESSES[name][0]
    alpha, sigma = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (process.alpha, process.sigma))
    kl = torch.stack(expected_gradient("kl", process, t)) * (sigma / alpha) ** 2  # now of y_F - y_T itself
    for kind, factor in (("one", 1.0), ("vsd", alpha * sigma)):
        torch.testing.assert_close(
            torch.stack(expected_gradient(kind, process, t)), factor * kl, rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize(("name", "t"), CASES)
@pytest.mark.parametrize("kind", ["kl", "vsd", "one", "dmd", "dmd_v1"])
def test_equal_distributions_have_no_gradient(kind, name, t):
    process = PROCESSES[name][0]
    z, eps, _ = grid(10)
    alpha, sigma = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (process.alpha, process.sigma))
    x = (MU + TAU * z).requires_grad_()
    y = denoiser((alpha * x + sigma * eps).detach(), MU, TAU, alpha, sigma)
    times = torch.full((len(z),), t, dtype=torch.float64)
    score_difference(x, y, y.clone(), matching_weight(kind, x, y, times, process)).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_the_gradient_points_from_student_to_teacher():
    """Gradient descent moves the mean up towards MU and the width down towards TAU."""
    for kind in ("kl", "vsd", "one"):
        in_mean, in_std = expected_gradient(kind, FlowMatching(), 0.4)
        assert in_mean < 0
        assert in_std > 0


def test_dmd_weights_are_one_number_per_sample():
    process = VariancePreserving()
    x, real = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    t = torch.tensor([0.02, 0.3, 0.5, 0.7, 0.98], dtype=torch.float64)
    weight = matching_weight("dmd", x, real, t, process)
    assert weight.shape == (5, 1, 1, 1)
    assert weight.dtype == torch.float32
    for i in range(5):
        assert float(weight[i]) == pytest.approx(1 / float((x[i] - real[i]).abs().mean()), rel=1e-6)
    paper = matching_weight("dmd_v1", x, real, t, process)
    torch.testing.assert_close(paper.flatten(), weight.flatten() * process.alpha(t).float())
    assert bool(matching_weight("dmd", x, x, t, process).isfinite().all())
    x.requires_grad_()
    assert not matching_weight("dmd", x, real, t, process).requires_grad
    with pytest.raises(ValueError, match="unknown matching weight 'sds'; choose dmd"):
        matching_weight("sds", x, real, t, process)


@pytest.mark.parametrize("n", [3, 5])
def test_the_first_dmd_weight_of_several_streams_is_one_per_element(n):
    process = StreamProcess({"video": Stream([2], 5.0), "action": Stream([1], 0.5)})
    x, real, t = torch.randn(n, 3), torch.randn(n, 3), torch.linspace(0.2, 0.9, n).double()
    want = process.alpha(t).float() / (x - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(matching_weight("dmd_v1", x, real, t, process), want)


def test_the_surrogate_has_the_given_gradient_and_nothing_else():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    loss = surrogate(x, direction)
    assert float(loss.detach()) == pytest.approx(0.5 * float(direction.detach().square().mean()))
    loss.backward()
    torch.testing.assert_close(x.grad, direction.detach() / 12, rtol=1e-12, atol=1e-15)
    assert direction.grad is None


def test_no_gradient_reaches_the_scores():
    x, real, fake = (torch.randn(4, 3, requires_grad=True) for _ in range(3))
    score_difference(x, real, fake, torch.ones(4, 1)).backward()
    assert x.grad is not None
    assert real.grad is None
    assert fake.grad is None


# ------------------------------------------------------------------------------------------------ denoising
def documented_weight(space, alpha, sigma, s):
    return {
        "epsilon": (alpha / sigma) ** 2,
        "sample": torch.ones_like(alpha),
        "v_prediction": (alpha**2 + sigma**2) ** 2 / sigma**2,
        "flow_prediction": ((alpha + sigma) / sigma) ** 2,
        "edm": (alpha**2 * s**2 + sigma**2) / (s * sigma) ** 2,
        "scaled_epsilon": alpha**4 / sigma**2,
    }[space]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("space", [None, *PREDICTION_TYPES, "edm", "scaled_epsilon"])
@pytest.mark.parametrize("name", PROCESSES)
def test_spaces_weight_the_error_of_x0_as_documented(name, space, kind):
    process, times = PROCESSES[name]
    t = torch.tensor([*times, times[1]], dtype=torch.float64)
    x0, eps, out = (torch.randn(4, 2, 3, dtype=torch.float64) for _ in range(3))
    alpha, sigma = process.alpha(t), process.sigma(t)
    prediction = Prediction(out, process.add_noise(x0, eps, t), t, process, kind)
    weight = documented_weight(space or kind, alpha, sigma, 0.5)
    want = (weight[:, None, None] * (prediction.x0 - x0).square()).mean()
    got = denoising_loss(prediction, x0, eps, space, sigma_data=0.5)
    assert float(got) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize("space", [None, *PREDICTION_TYPES, "edm", "scaled_epsilon"])
def test_the_clean_sample_has_no_error(space):
    process, t = FlowMatching(), torch.tensor([0.2, 0.7], dtype=torch.float64)
    x0, eps = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))
    prediction = Prediction.from_x0(x0, process.add_noise(x0, eps, t), t, process)
    assert float(denoising_loss(prediction, x0, eps, space)) == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_best_linear_denoiser_is_the_posterior_mean(name):
    """The loss over (x0, eps) is stationary at the exact denoiser, in every space."""
    process, times = PROCESSES[name]
    z, eps, weight = grid(20)
    x0 = MU + TAU * z
    alpha, sigma = (float(f(torch.tensor(times[1], dtype=torch.float64))) for f in (process.alpha, process.sigma))
    t = torch.full((len(z),), times[1], dtype=torch.float64)
    x_t = process.add_noise(x0, eps, t)
    for space in ("epsilon", "sample", "v_prediction", "flow_prediction", "edm", "scaled_epsilon"):
        estimate = denoiser(x_t, MU, TAU, alpha, sigma).requires_grad_()
        loss = denoising_loss(Prediction.from_x0(estimate, x_t, t, process), x0, eps, space)
        (gradient,) = torch.autograd.grad(loss, estimate)
        for direction in (torch.ones_like(x_t), x_t):
            assert float((weight * gradient * direction).sum()) == pytest.approx(0.0, abs=1e-12)
