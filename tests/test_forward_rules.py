"""Forward derivatives by torch's own kernels: equal to torch's formulas, with and without a graph beside them."""

from __future__ import annotations

import pytest
import torch
from small_problems import mlp, ready, shift
from test_tangents import MAKERS, enable_activation_checkpointing, output, point, relative
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from lightning_distill.attention import differentiable_attention
from lightning_distill.batch import Batch
from lightning_distill.forward_rules import forward_rules
from lightning_distill.methods import SCM, MeanFlow
from lightning_distill.tangents import tangent, value_and_tangent

F64 = torch.float64


def weighted(function, *shapes):
    """The function with random weights behind its first argument."""
    weights = [nn.Parameter(torch.randn(shape, dtype=F64)) for shape in shapes]
    return lambda x: function(x, *weights)


def in_place(x):
    y = 2 * x
    y += 1.0
    return y.add_(x).add_(x, alpha=2.0).add_(other=x).mul(3.0)


LAYERS = {
    "conv1d": ((2, 4, 6), weighted(lambda x, w, b: F.conv1d(x, w, b, padding=1), (5, 4, 3), (5,))),
    "conv2d": ((2, 4, 6, 6), weighted(lambda x, w: F.conv2d(x, w, groups=2, stride=2), (4, 2, 3, 3))),
    "conv3d": ((2, 3, 4, 4, 4), weighted(lambda x, w, b: F.conv3d(x, w, bias=b), (2, 3, 3, 3, 3), (2,))),
    "transposed": (
        (2, 4, 5, 5),
        weighted(lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), (4, 3, 2, 2), (3,)),
    ),
    "linear": ((2, 7, 4), weighted(lambda x, w, b: F.linear(x, w, bias=b), (5, 4), (5,))),
    "product": ((3, 4), weighted(lambda x, w, v: v @ torch.matmul(x @ w, other=w.T), (4, 5), (2, 3))),
    "silu": ((2, 5), F.silu),
    "gelu": ((2, 5), lambda x: F.gelu(x, approximate="tanh") + F.gelu(x)),
    "group norm": ((2, 6, 4, 4), weighted(lambda x, w, b: F.group_norm(x, 3, w, b), (6,), (6,))),
    "plain group norm": ((2, 6, 5), lambda x: F.group_norm(x, 2, eps=0.1)),
    "layer norm": ((2, 5, 6), weighted(lambda x, w, b: F.layer_norm(x, (6,), w, b), (6,), (6,))),
    "plain layer norm": ((2, 5, 6), lambda x: F.layer_norm(x, (5, 6))),
    "in place": ((2, 3), in_place),
    "attention": ((2, 3, 8, 4), weighted(lambda x, k: F.scaled_dot_product_attention(x, k, k), (2, 3, 6, 4))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    shape, layer = LAYERS[name]
    x, dx = torch.randn(2, *shape, dtype=F64)
    want, change = torch.func.jvp(layer, (x,), (dx,)) if name != "attention" else tangent(layer, (x,), (dx,), "central")
    close = {"rtol": 1e-10, "atol": 1e-12} if name != "attention" else {"rtol": 1e-6, "atol": 1e-7}
    with torch.no_grad(), forward_ad.dual_level(), differentiable_attention(), forward_rules():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.clone(), dx)))
    torch.testing.assert_close(found.primal, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.tangent, change.detach(), **close)
    # beside a graph, which only the value has
    source = x.clone().requires_grad_()
    value, beside = value_and_tangent(layer, (source,), (dx,), one_pass=True)
    assert not beside.requires_grad
    torch.testing.assert_close(beside, change.detach(), **close)
    got = torch.autograd.grad(value.square().sum(), source)[0]
    torch.testing.assert_close(got, torch.autograd.grad(layer(source).square().sum(), source)[0], **close)


def test_weights_that_move_are_left_to_torch():
    x, w = torch.randn(3, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    moves = torch.randn_like(x), torch.randn_like(w)
    want = torch.func.jvp(F.linear, (x, w), moves)[1]
    with torch.no_grad():
        torch.testing.assert_close(tangent(F.linear, (x, w), moves)[1], want)
    torch.testing.assert_close(value_and_tangent(F.linear, (x, w), moves, one_pass=True)[1], want)


@pytest.mark.sparse(3)
@pytest.mark.parametrize("name", list(MAKERS))
def test_one_pass_is_two_passes(name):
    tiny = MAKERS[name]()
    denoiser = tiny.denoiser()
    x, t, dx = point(tiny.shape)
    f = output(denoiser, tiny.cond(2))
    grads, found = [], []
    for one_pass in (False, True):
        value, change = value_and_tangent(f, (x, t), (dx, 1.0), one_pass=one_pass)
        assert not change.requires_grad
        loss = (value - (value + change).detach()).square().sum()
        wanted = [p for p in denoiser.parameters() if p.requires_grad]
        found.append(change)
        grads.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    assert relative(found[1], found[0]) < 1e-5
    assert [one is None for one in grads[0]] == [two is None for two in grads[1]]
    one, two = (torch.cat([g.flatten() for g in made if g is not None]) for made in grads)
    assert relative(two, one) < 1e-5


def test_one_pass_calls_the_network_once_and_refuses_what_it_cannot():
    tiny = MAKERS["sd3"]()
    denoiser = tiny.denoiser()
    x, t, dx = point(tiny.shape)
    f, calls = output(denoiser, tiny.cond(2)), []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    value_and_tangent(f, (x, t), (dx, 1.0), one_pass=True)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):  # too coarse for a tangent, so that there are two
        value_and_tangent(f, (x, t), (dx, 1.0), one_pass=True)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="one_pass=True is for the exact derivative"):
        value_and_tangent(f, (x, t), (dx, 1.0), "central", one_pass=True)
    enable_activation_checkpointing(denoiser)
    denoiser.train()
    with pytest.raises(RuntimeError, match="leave one_pass=False"):
        value_and_tangent(f, (x, t), (dx, 1.0), one_pass=True)


@pytest.mark.parametrize("method", [SCM, MeanFlow])
def test_methods_have_the_same_update_in_one_pass(method):
    batch, made = Batch(x0=torch.randn(16, 2)), []
    for one_pass in (False, True):
        module = ready(method(mlp(), one_pass=one_pass, shape=(2,)), update=20_000)
        shift(module.student.network)
        calls = []
        module.student.network.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        terms = module.student_loss(batch)
        assert len(calls) == module.forward_counts()["student"]["student"] == 2 - one_pass
        loss = module.weighted_sum("student", terms)
        wanted = list(module.student.network.parameters())
        slopes = torch.autograd.grad(loss, wanted, allow_unused=True)
        made.append(torch.cat([g.flatten() for g in slopes if g is not None]))
    assert relative(made[1], made[0]) < 1e-5
    assert made[0].norm() > 1e-6
    with pytest.raises(ValueError, match="one_pass=True is for the exact derivative"):
        method(mlp(), tangent="one_sided", one_pass=True, shape=(2,))
