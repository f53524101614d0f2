"""Flow-map objectives: zero at the exact map, wrong formulas noticed, gradients those of the stated surrogate."""

import pytest
import torch
from exact_maps import F64, FLOW, MAPS
from torch import nn

from lightning_distill.losses.flow_maps import (
    adaptive_weight,
    boot_boundary,
    boot_target,
    eulerian_residual,
    flow_jump,
    free_flow_target,
    lagrangian_residual,
    mean_flow_directions,
    mean_flow_loss,
    mean_flow_target,
    rcgm_target,
    semigroup_residual,
    shortcut_target,
)
from lightning_distill.tangents import tangent, value_and_tangent

by_map = pytest.mark.parametrize("exact", list(MAPS.values()), ids=list(MAPS))


def draws(n=6):
    """Samples and times t > s > r."""
    x = torch.randn(n, 2, dtype=F64)
    t = torch.linspace(0.5, 0.95, n, dtype=F64)
    return x, t, 0.6 * t, 0.2 * t


def largest(residual):
    return residual.abs().max().item()


# ------------------------------------------------------------------------------------------------ zeros
@by_map
def test_boundaries_of_the_reference(exact):
    x, t, _, r = draws()
    assert largest(exact.jump(x, t, t) - x) < 1e-12
    assert torch.equal(exact.average(x, t, t), exact.velocity(x, t))
    near = exact.average(x, t, t - 1e-4)
    assert largest(near - exact.velocity(x, t)) < 1e-3
    torch.testing.assert_close(flow_jump(x, exact.average(x, t, r), t, r), exact.jump(x, t, r))


@pytest.mark.sparse(2)
@by_map
def test_eulerian_identity_of_mean_flow(exact):
    x, t, _, r = draws()
    v = exact.velocity(x, t)
    u, du_dt = tangent(exact.average, (x, t, r), mean_flow_directions(v))
    assert largest(mean_flow_target(v, du_dt, t, r) - u) < exact.tolerance
    residual = eulerian_residual(v, u, du_dt, t, r)
    assert largest(residual) < exact.tolerance
    # the same as the derivative of the map itself
    along = tangent(exact.jump, (x, t, r), (v, 1.0, None))[1]
    assert largest(along - residual) < exact.tolerance

    # a network of (x, t, t - r) needs the other directions, and notices the wrong ones
    def by_difference(x, t, d):
        return exact.average(x, t, t - d)

    u, du_dt = tangent(by_difference, (x, t, t - r), mean_flow_directions(v, "difference"))
    assert largest(mean_flow_target(v, du_dt, t, r) - u) < exact.tolerance
    u, du_dt = tangent(by_difference, (x, t, t - r), mean_flow_directions(v))
    assert largest(mean_flow_target(v, du_dt, t, r) - u) > 0.05


@pytest.mark.sparse(2)
@by_map
def test_lagrangian_identity(exact):
    x, t, _, r = draws()
    end, dx_dr = tangent(lambda r: exact.jump(x, t, r), (r,), (1.0,))
    assert largest(lagrangian_residual(dx_dr, exact.velocity(end, r))) < exact.tolerance
    assert largest(lagrangian_residual(dx_dr, exact.velocity(x, r))) > 0.05


@by_map
def test_semigroup_and_shortcuts(exact):
    x, t, s, r = draws()
    assert largest(semigroup_residual(exact.average, exact.average, x, t, s, r)) < exact.tolerance
    step = (t - r) / 2
    assert largest(shortcut_target(exact.average, x, t, step, clamp=None) - exact.average(x, t, r)) < exact.tolerance

    # jumping from the wrong time is noticed
    def shifted(x, t, r):
        return exact.average(x, t, 0.9 * r)

    assert largest(semigroup_residual(exact.average, shifted, x, t, s, r)) > 1e-2
    assert largest(shortcut_target(lambda x, t, r: 9.0 + 0 * x, x, t, step)) == 4.0


@pytest.mark.sparse(2)
@by_map
def test_recursive_target_is_first_order_and_exact_with_an_exact_step(exact):
    x, t, _, r = draws()
    u, v = exact.average(x, t, r), exact.velocity(x, t)
    for order, spacing in ((1, "near"), (2, "near"), (3, "near"), (2, "even"), (3, "even")):
        recursion = {"order": order, "clamp": None, "spacing": spacing}
        errors = [(rcgm_target(exact.average, u, x, v, t, r, h, **recursion) - u).norm().item() for h in (2e-2, 1e-2)]
        assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)
        perfect = exact.average(x, t, t - 1e-2)
        off = rcgm_target(exact.average, u, x, perfect, t, r, 1e-2, **recursion) - u
        assert largest(off) < 100 * exact.tolerance
    # the paper's limit bounds the change; samples without room for the steps are left alone
    wrong = u + 5.0
    assert largest(rcgm_target(exact.average, wrong, x, v, t, r) - wrong) == pytest.approx(1.0)
    assert torch.equal(rcgm_target(exact.average, wrong, x, v, t, t - 0.005), wrong)


@by_map
def test_generating_velocity(exact):
    eps = torch.randn(6, 2, dtype=F64)
    one, d = torch.ones(6, dtype=F64), torch.linspace(0.1, 0.9, 6, dtype=F64)
    u, du_dr = tangent(exact.average, (eps, one, 1 - d), (None, None, 1.0))
    end = flow_jump(eps, u, one, 1 - d)
    assert largest(free_flow_target(exact.velocity(end, 1 - d), -du_dr, d) - u) < 10 * exact.tolerance
    assert largest(free_flow_target(exact.velocity(end, 1 - d), du_dr, d) - u) > 1e-2


@by_map
def test_bootstrapped_signal(exact):
    eps = torch.randn(6, 2, dtype=F64)
    one, t = torch.ones(6, dtype=F64), torch.linspace(0.2, 0.8, 6, dtype=F64)

    def signal(t):
        x_t = exact.jump(eps, one, t)
        return (x_t - t[:, None] * eps) / (1 - t)[:, None]

    y, dy_dt = tangent(signal, (t,), (1.0,))
    clean = exact.mixture.posterior_mean(exact.jump(eps, one, t), t, FLOW)
    # the ODE itself: the target is linear in the step
    assert largest((y - boot_target(y, clean, t, 0.01)) / 0.01 - dy_dt) < 100 * exact.tolerance
    errors = [(boot_target(y, clean, t, h) - signal(t - h)).norm().item() for h in (4e-2, 2e-2)]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.2)
    top = exact.mixture.posterior_mean(eps, one, FLOW)
    near = torch.full_like(t, 1 - 1e-6)
    assert boot_boundary(signal(near), top).item() < 1e-8


def test_targets_of_single_pairs_are_right_in_the_mean():
    """MeanFlow from data: the residual at the exact map is of order one, its mean given x_t is zero."""
    exact, n = MAPS["gaussian"], 100_000
    x0 = exact.mixture.sample(n, torch.Generator().manual_seed(0))[0].double()
    eps = torch.randn(n, 2, dtype=F64)
    t, r = torch.full((n,), 0.7, dtype=F64), torch.full((n,), 0.2, dtype=F64)
    x = FLOW.add_noise(x0, eps, t)
    u, du_dt = tangent(exact.average, (x, t, r), mean_flow_directions(eps - x0))
    residual = u - mean_flow_target(eps - x0, du_dt, t, r)
    assert residual.square().mean().sqrt() > 0.5
    # E[residual h(x)] for several h
    for weight in (torch.ones_like(x), x, x.square(), x.sin()):
        assert (weight * residual).mean(0).abs().max() < 3e-2


# ------------------------------------------------------------------------------------------------ gradients
class Net(nn.Module):
    """A tiny smooth u(x, t, r)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(4, 8, dtype=F64)
        self.second = nn.Linear(8, 2, dtype=F64)

    def forward(self, x, t, r):
        times = torch.stack([t, r], 1).expand(len(x), 2)
        return self.second(torch.tanh(self.first(torch.cat([x, times], 1))))


def check_gradient(net, surrogate, targets):
    """The autograd gradient of a loss is that of its surrogate with the targets held fixed."""
    surrogate(*targets).backward()
    for parameter in net.parameters():
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, flat.numel(), 5):
            h, value = 1e-6, flat[i].item()
            flat[i] = value + h
            after = surrogate(*targets).item()
            flat[i] = value - h
            before = surrogate(*targets).item()
            flat[i] = value
            assert grad[i].item() == pytest.approx((after - before) / (2 * h), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["mean_flow", "semigroup", "shortcut", "rcgm", "free_flow", "boot"])
def test_gradients_flow_through_the_student_once(name):
    net, exact = Net(), MAPS["gaussian"]
    x, t, s, r = draws()
    v = exact.velocity(x, t)
    if name == "mean_flow":
        target = mean_flow_target(v, value_and_tangent(net, (x, t, r), (v, 1.0, None))[1], t, r)
    elif name == "semigroup":
        residual = semigroup_residual(net, net, x, t, s, r)
        target = (net(x, t, r) - residual).detach()
        assert torch.allclose(
            torch.autograd.grad(residual.square().sum(), net.first.weight)[0],
            torch.autograd.grad((net(x, t, r) - target).square().sum(), net.first.weight)[0],
        )
    elif name == "shortcut":
        target = shortcut_target(net, x, t, (t - r) / 2)
    elif name == "rcgm":
        target = rcgm_target(net, net(x, t, r).detach(), x, v, t, r)
        assert not rcgm_target(net, net(x, t, r).detach(), x, v, t, r).requires_grad
    elif name == "free_flow":
        target = free_flow_target(net(x, t, r), net(x, t, s), 1 - r)
    else:
        target = boot_target(net(x, t, r), net(x, t, s), t, 0.02)
    assert not target.requires_grad
    check_gradient(net, lambda target: (net(x, t, r) - target).square().mean(), [target])


def test_mean_flow_loss_and_its_weight():
    net = Net()
    x, t, _, r = draws()
    target = torch.randn(6, 2, dtype=F64)
    u = net(x, t, r)
    error = (u - target).square().sum(1)
    loss = mean_flow_loss(u, target, p=1.0)
    assert loss.item() == pytest.approx((error / (error + 1e-2)).mean().item())
    assert mean_flow_loss(u, target, p=0.0).item() == pytest.approx(error.mean().item())
    # the weight has no gradient
    grad = torch.autograd.grad(loss, net.second.bias)[0]
    weight = adaptive_weight(error)
    assert not weight.requires_grad
    expected = torch.autograd.grad((weight * (net(x, t, r) - target).square().sum(1)).mean(), net.second.bias)[0]
    torch.testing.assert_close(grad, expected)
    trained = target.clone().requires_grad_()
    mean_flow_loss(net(x, t, r), trained).backward()
    assert trained.grad is None


def test_the_lagrangian_loss_trains_the_derivative():
    net = Net()
    x, t, _, r = draws()

    def jump(r):
        return flow_jump(x, net(x, t, r), t, r)

    def loss():
        end, dx_dr = tangent(jump, (r,), (1.0,))
        return lagrangian_residual(dx_dr, goal if goal is not None else net(end, r, r)).square().mean()

    goal = None
    with torch.no_grad():
        fixed = net(jump(r), r, r)
    one = torch.autograd.grad(loss(), net.first.weight)[0]
    goal = fixed
    torch.testing.assert_close(one, torch.autograd.grad(loss(), net.first.weight)[0])
    check_gradient(net, lambda: loss(), [])


def test_bad_input():
    x, t, _, r = draws()
    with pytest.raises(ValueError, match="time_input"):
        mean_flow_directions(x, "gap")
    with pytest.raises(ValueError, match="at least one step"):
        rcgm_target(Net(), x, x, x, t, r, order=0)
    with pytest.raises(ValueError, match="choose near or even"):
        rcgm_target(Net(), x, x, x, t, r, spacing="wide")
