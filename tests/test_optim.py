"""Guarded steps: clipping, and skipping what is not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_distill.optim import default_optimizer, guard_step, is_fused

OPTIMIZERS = {
    "fused AdamW": default_optimizer(1e-2),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "plain AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=False),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def gradients(net, scale=1.0):
    loss = scale * net(torch.ones(5, 3)).square().sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", ["loss", "one gradient", "also"])
def test_a_step_that_is_not_finite_changes_nothing(name, bad):
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    for _ in range(2):  # with a state that could be spoiled
        loss = gradients(net)
        guard_step(optimizer, loss, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    weights = copy.deepcopy(net.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    loss, also = gradients(net), [torch.tensor(1.0)]
    if bad == "loss":
        loss = torch.tensor(float("inf"))
    elif bad == "also":
        also.append(torch.tensor(float("nan")))
    else:
        net[0].weight.grad[0, 0] = float("nan")
    _, skipped = guard_step(optimizer, loss, 1.0, also)
    optimizer.step()
    optimizer.zero_grad()
    assert float(skipped) == 1.0
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    for key, values in optimizer.state_dict()["state"].items():
        for field, value in values.items():
            assert value is state["state"][key][field] or torch.equal(value, state["state"][key][field])
    # and the next good step goes on
    loss = gradients(net)
    _, skipped = guard_step(optimizer, loss, 1.0)
    optimizer.step()
    assert float(skipped) == 0.0
    assert not torch.equal(net[0].weight, weights["0.weight"])
    assert all(bool(p.isfinite().all()) for p in net.parameters())


SCALED = [name for name in OPTIMIZERS if name.startswith("fused")]


def scaled_step(net, optimizer, scaler, clip, loss=None, factor=1.0):
    """As Lightning does in 16-mixed with an optimizer that unscales in its own step."""
    value = net(torch.ones(5, 3)).square().sum()
    scaler.scale(factor * value).backward()
    found = guard_step(optimizer, value.detach() if loss is None else loss, clip, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return found


@pytest.mark.parametrize("enabled", [True, False], ids=["scaled", "disabled"])
@pytest.mark.parametrize("clip", [0.5, None])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_losses_give_the_same_steps_and_norms(name, clip, enabled):
    plain, scaled = network(), network()
    scaled.load_state_dict(plain.state_dict())
    one, other = (OPTIMIZERS[name](net.parameters()) for net in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=enabled)
    for _ in range(3):
        norm, _ = guard_step(one, gradients(plain), clip)
        one.step()
        one.zero_grad()
        found, skipped = scaled_step(scaled, other, scaler, clip)
        assert float(found) == pytest.approx(float(norm), rel=1e-5)
        assert float(skipped) == 0.0
    for a, b in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", ["loss", "overflow"])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_steps_that_are_not_finite_change_nothing(name, bad):
    net = network()
    optimizer, scaler = OPTIMIZERS[name](net.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaled_step(net, optimizer, scaler, 0.5)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    settings = {"loss": torch.tensor(float("inf"))} if bad == "loss" else {"factor": 1e35}
    _, skipped = scaled_step(net, optimizer, scaler, 0.5, **settings)
    assert float(skipped) == 1.0
    assert scaler.get_scale() == 2.0**15
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    for key, values in optimizer.state_dict()["state"].items():
        assert all(v is state[key][k] or torch.equal(v, state[key][k]) for k, v in values.items())
    _, skipped = scaled_step(net, optimizer, scaler, 0.5)
    assert float(skipped) == 0.0
    assert not torch.equal(net[0].weight, weights["0.weight"])


def test_norms_are_clipped_over_all_groups_together():
    first, second = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizer = torch.optim.SGD([{"params": first.parameters()}, {"params": second.parameters()}], lr=0.1)
    second(first(torch.ones(4, 3))).sum().mul(100).backward()
    before = [p.grad.clone() for p in (*first.parameters(), *second.parameters())]
    total = torch.cat([g.flatten() for g in before]).norm()
    norm, skipped = guard_step(optimizer, torch.tensor(0.0), 2.0)
    assert float(norm) == pytest.approx(float(total))
    assert float(skipped) == 0.0
    for parameter, gradient in zip((*first.parameters(), *second.parameters()), before):
        torch.testing.assert_close(parameter.grad, gradient * 2.0 / total, rtol=1e-4, atol=1e-6)
    unclipped = [p.grad.clone() for p in first.parameters()]
    guard_step(optimizer, torch.tensor(0.0), None)
    guard_step(optimizer, torch.tensor(0.0), 1e6)
    assert all(torch.equal(p.grad, g) for p, g in zip(first.parameters(), unclipped))


def test_parameters_without_gradient_are_left_out():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    norm, skipped = guard_step(optimizer, torch.tensor(1.0), 1.0)
    assert (float(norm), float(skipped)) == (0.0, 0.0)
    net[0](torch.ones(1, 3)).sum().backward()
    norm, _ = guard_step(optimizer, torch.tensor(1.0), None)
    assert float(norm) > 0


def test_the_default_is_fused_adamw():
    optimizer = default_optimizer(3e-4, betas=(0.0, 0.99), weight_decay=0.1)(network().parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert is_fused(optimizer)
    assert {k: optimizer.param_groups[0][k] for k in ("lr", "betas", "weight_decay")} == {
        "lr": 3e-4,
        "betas": (0.0, 0.99),
        "weight_decay": 0.1,
    }
    assert not is_fused(torch.optim.SGD(network().parameters(), lr=0.1))
