"""sCM's tangent: zero at the exact map, cos(t) df/dt for any network, finite at both ends."""

import math

import pytest
import torch
from exact_maps import F64, FLOW, MAPS
from torch import nn

from lightning_distill.losses.continuous import (
    continuous_loss,
    normalise_tangent,
    rcm_tangent,
    scm_directions,
    scm_tangent,
    tangent_warmup,
    training_velocity,
    trig_weight,
)
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.parameterisations import trigflow_consistency, trigflow_input, trigflow_velocity
from lightning_distill.prediction import Prediction
from lightning_distill.processes import EDM, TrigFlow, VariancePreserving, change_process
from lightning_distill.tangents import tangent

TRIG = TrigFlow()
by_map = pytest.mark.parametrize("exact", list(MAPS.values()), ids=list(MAPS))


def draws(n=6):
    return torch.randn(n, 2, dtype=F64), torch.linspace(0.1, 1.4, n, dtype=F64)


def exact_student(exact):
    """F of the exact consistency function f = X_{t->0}: (cos x - f) / sin."""

    def student(x, t):
        flow_t, scale = change_process(t, TRIG, FLOW)
        f = exact.jump(scale[:, None] * x, flow_t, torch.zeros_like(t))
        return (t.cos()[:, None] * x - f) / t.sin()[:, None]

    return student


def teacher(exact):
    denoiser = analytic_denoiser(exact.mixture, TRIG)
    return lambda x, t: denoiser(x, t).velocity


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.Sequential(nn.Linear(3, 8, dtype=F64), nn.Tanh(), nn.Linear(8, 2, dtype=F64))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], 1))


@by_map
def test_the_tangent_is_zero_at_the_exact_map(exact):
    x, t = draws()
    student, v = exact_student(exact), teacher(exact)(x, t)
    out, derivative = tangent(student, (x, t), scm_directions(v, t))
    assert scm_tangent(x, t, out, v, derivative).abs().max() < exact.tolerance * 10
    assert rcm_tangent(x, t, out, v, derivative).abs().max() < exact.tolerance * 10
    # a wrong velocity is noticed
    assert scm_tangent(x, t, out, 1.1 * v, derivative).abs().max() > 1e-2


def test_the_tangent_is_the_scaled_derivative_of_any_consistency_function():
    x, t = draws()
    net, v = Net(), teacher(MAPS["mixture"])(x, t)
    out, derivative = tangent(net, (x, t), scm_directions(v, t))
    g = scm_tangent(x, t, out, v, derivative)
    along = tangent(lambda x, t: trigflow_consistency(x, net(x, t), t), (x, t), (v, 1.0))[1]
    torch.testing.assert_close(g, t.cos()[:, None] * along, rtol=0, atol=1e-13)
    torch.testing.assert_close(rcm_tangent(x, t, out, v, derivative), g, rtol=0, atol=1e-13)
    assert not g.requires_grad


def test_warm_up():
    assert [tangent_warmup(k, 4) for k in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert tangent_warmup(0, 0) == 1.0
    x, t = draws()
    out, v, derivative = (torch.randn(6, 2, dtype=F64) for _ in range(3))
    # at 0 the student follows the teacher; rCM keeps the derivative
    cos = t.cos()[:, None]
    torch.testing.assert_close(scm_tangent(x, t, out, v, derivative, 0.0), -(cos**2) * (out - v))
    torch.testing.assert_close(rcm_tangent(x, t, out, v, derivative, 0.0), -cos * (out - v) - derivative)


def test_everything_is_finite_at_both_ends():
    t = torch.tensor([0.0, math.pi / 2], dtype=F64)
    x = torch.randn(2, 2, dtype=F64)
    net = Net()
    v = teacher(MAPS["gaussian"])(x[1:], t[1:])
    v = torch.cat([v, v])
    out, derivative = tangent(net, (x, t), scm_directions(v, t))
    assert scm_tangent(x, t, out, v, derivative).isfinite().all()
    # at pure noise nothing is left: cos = 0
    assert scm_tangent(x, t, out, v, derivative)[1].abs().max() < 1e-12


def test_normalisation():
    g = torch.randn(3, 4, 5)
    full, rms = normalise_tangent(g), normalise_tangent(g, norm="rms")
    length = g.flatten(1).norm(dim=1)
    torch.testing.assert_close(full.flatten(1).norm(dim=1), length / (length + 0.1))
    torch.testing.assert_close(normalise_tangent(g, c=0.0, norm="rms") / 20**0.5, normalise_tangent(g, c=0.0))
    assert (rms.flatten(1).square().mean(1) < 1).all()
    assert torch.equal(normalise_tangent(torch.zeros(2, 3)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="full or rms"):
        normalise_tangent(g, norm="l2")


def test_gradient_is_the_negative_tangent_through_the_jacobian():
    x, t = draws()
    net = Net()
    g = normalise_tangent(torch.randn(6, 2, dtype=F64)).requires_grad_()
    weight, u = trig_weight(t), torch.linspace(-1, 1, 6, dtype=F64).requires_grad_()
    continuous_loss(net(x, t), g, weight, u).backward()
    assert g.grad is None
    scale = (-2 / 2 * (-u).exp() * weight / 6)[:, None].detach()
    expected = torch.autograd.grad((scale * g.detach() * net(x, t)).sum(), list(net.parameters()))
    for parameter, value in zip(net.parameters(), expected):
        torch.testing.assert_close(parameter.grad, value)
    # the optimum of the log-variance is the logarithm of the error
    error = weight * g.detach().square().mean(1)
    torch.testing.assert_close(u.grad, (1 - (-u).exp() * error).detach() / 6)
    assert continuous_loss(net(x, t), g).item() == pytest.approx(g.square().mean().item())
    torch.testing.assert_close(trig_weight(t), 1 / t.tan())


def test_velocities_of_single_pairs_are_right_in_the_mean():
    exact, n = MAPS["gaussian"], 100_000
    x0 = exact.mixture.sample(n, torch.Generator().manual_seed(0))[0].double()
    eps = torch.randn(n, 2, dtype=F64)
    t = torch.full((n,), 0.8, dtype=F64)
    x = TRIG.add_noise(x0, eps, t)
    v = training_velocity(x0, eps, t)
    out, derivative = tangent(exact_student(exact), (x, t), scm_directions(v, t))
    g = scm_tangent(x, t, out, v, derivative)
    assert g.square().mean().sqrt() > 0.1
    for weight in (torch.ones_like(x), x, x.square()):
        assert (weight * g).mean(0).abs().max() < 2e-2


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("process", [FLOW, VariancePreserving(), EDM(), TRIG], ids=["flow", "vp", "edm", "trig"])
def test_velocity_through_a_denoiser_of_any_process(process, sigma_data):
    """The same F from a teacher in any process, for data of any scale."""
    t = torch.linspace(0.1, 1.4, 6, dtype=F64)
    mixture = MAPS["mixture"].mixture
    x0, eps = mixture.sample(6)[0].double(), torch.randn(6, 2, dtype=F64)
    x = TRIG.add_noise(x0 / sigma_data, eps, t)
    seen, native = trigflow_input(x, t, process, sigma_data)
    torch.testing.assert_close(seen, process.add_noise(x0, eps, native), rtol=1e-9, atol=1e-9)
    found = trigflow_velocity(analytic_denoiser(mixture, process)(seen, native), t, sigma_data)
    # the same mixture, divided by sigma_data, in TrigFlow itself
    scaled = GaussianMixture(mixture.means / sigma_data, std=mixture.eigenvalues[:, 0].sqrt() / sigma_data)
    torch.testing.assert_close(found, scaled.velocity(x, t, TRIG), rtol=0, atol=1e-9)
    if process is FLOW:
        v = analytic_denoiser(mixture, FLOW)(seen, native).velocity
        if sigma_data == 1.0:
            s, n = native[:, None], (native**2 + (1 - native) ** 2).sqrt()[:, None]
            torch.testing.assert_close(found, ((1 - 2 * s) * seen + (1 - 2 * s + 2 * s**2) * v) / n)


def test_derivatives_through_a_flow_matching_network_are_finite_at_both_ends():
    exact = MAPS["mixture"]
    denoiser = analytic_denoiser(exact.mixture, FLOW)
    t, x = torch.tensor([0.0, math.pi / 2], dtype=F64), torch.randn(2, 2, dtype=F64)

    def student(x, t):
        seen, native = trigflow_input(x, t, FLOW, 0.5)
        return trigflow_velocity(Prediction(denoiser(seen, native).x0 + seen, seen, native, FLOW, "flow_prediction"), t)

    value, change = tangent(student, (x, t), (x, 1.0))
    assert value.isfinite().all()
    assert change.isfinite().all()
