"""Prediction types against an exact teacher."""

import pytest
import torch

from lightning_distill.networks.analytic import GaussianMixture, gaussian_flow_map
from lightning_distill.prediction import PREDICTION_TYPES, Prediction, regression_target
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving

F64 = torch.float64
PROCESSES = [
    FlowMatching(),
    VariancePreserving(),
    VariancePreserving(zero_terminal_snr=True),
    EDM(),
    TrigFlow(),
]
by_process = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "vp", "vp-ztsnr", "edm", "trig"])
by_kind = pytest.mark.parametrize("kind", PREDICTION_TYPES)


def mixture():
    means = torch.tensor([[1.0, -0.5], [-1.2, 0.4], [0.2, 1.5]], dtype=F64)
    root = torch.tensor([[[0.5, 0.0], [0.2, 0.3]], [[0.4, 0.0], [-0.3, 0.6]], [[0.3, 0], [0, 0.3]]], dtype=F64)
    return GaussianMixture(means, covariances=root @ root.mT, weights=[0.2, 0.5, 0.3])


def noisy(process, n=12):
    t = process.t_from_log_snr(torch.linspace(5.0, -4.0, n, dtype=F64))
    x0 = mixture().sample(n)[0].double()
    return process.add_noise(x0, torch.randn_like(x0), t), t


@by_process
@by_kind
def test_every_type_reads_as_the_same_estimate(process, kind):
    teacher = mixture()
    x_t, t = noisy(process)
    x0, eps = teacher.posterior(x_t, t, process)
    raw = regression_target(kind, x0, eps, process.alpha(t), process.sigma(t))
    prediction = Prediction(raw, x_t, t, process, kind)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    expected = {
        "x0": x0,
        "eps": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
        "score": teacher.score(x_t, t, process),
        "velocity": teacher.velocity(x_t, t, process),
    }
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(prediction, name), value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    for other in PREDICTION_TYPES:
        converted = Prediction(prediction.as_type(other), x_t, t, process, other)
        torch.testing.assert_close(converted.x0, x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(converted.eps, eps, rtol=1e-9, atol=1e-9)
    assert prediction.as_type(kind) is raw


@by_process
def test_score_is_the_gradient_of_the_log_density(process):
    teacher = mixture()
    x_t, t = noisy(process)
    x_t.requires_grad_()
    (gradient,) = torch.autograd.grad(teacher.log_prob(x_t, t, process).sum(), x_t)
    x0 = teacher.posterior_mean(x_t.detach(), t, process)
    score = Prediction.from_x0(x0, x_t.detach(), t, process).score
    torch.testing.assert_close(score, gradient, rtol=1e-10, atol=1e-10)


@by_process
def test_velocity_is_the_derivative_of_the_exact_flow_map(process):
    mean = torch.tensor([0.4, -0.7], dtype=F64)
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    x_t, t = noisy(process)
    _, derivative = torch.func.jvp(
        lambda r: gaussian_flow_map(mean, cov, x_t, t, r, process), (t,), (torch.ones_like(t),)
    )
    x0 = GaussianMixture(mean[None], covariances=cov[None]).posterior_mean(x_t, t, process)
    velocity = Prediction.from_x0(x0, x_t, t, process).velocity
    torch.testing.assert_close(velocity, derivative, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in PREDICTION_TYPES if kind != "epsilon"])
def test_types_stay_finite_at_zero_terminal_snr(kind):
    process = VariancePreserving(zero_terminal_snr=True)
    t = torch.ones(2, dtype=F64)
    eps, x0 = torch.randn(2, 2, 3, dtype=F64)
    raw = regression_target(kind, x0, eps, process.alpha(t), process.sigma(t))
    prediction = Prediction(raw, eps, t, process, kind)  # alpha = 0: x_t is eps
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-12)


@by_kind
def test_dtype_follows_the_samples(kind):
    x_t, raw = torch.randn(2, 4, 1, 2, 2)
    for t in (torch.rand(4), torch.rand(4, dtype=F64), torch.tensor(0.3, dtype=F64)):
        prediction = Prediction(raw, x_t, t, FlowMatching(), kind)
        for name in ("x0", "eps", "score", "velocity", "v_prediction", "flow_prediction"):
            out = getattr(prediction, name)
            assert out.dtype == torch.float32, name
            assert out.shape == x_t.shape, name


def test_unknown_types_are_refused_by_name():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"'noise'.*epsilon, sample"):
        _ = Prediction(x, x, torch.ones(1), FlowMatching(), "noise").x0
    with pytest.raises(ValueError, match=r"'noise'.*epsilon, sample"):
        regression_target("noise", x, x, torch.ones(1), torch.ones(1))
