"""Tangents of networks: exact ones against the MATH attention backend and central differences, and their cost."""

import copy
import dataclasses
import inspect

import pytest
import torch
from tiny_pipelines import MAKERS, random_network
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill.attention import _plain_attention, attention, differentiable_attention
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import add_adapter, enable_activation_checkpointing
from lightning_distill.networks.small import ResidualMLP, small_dit, small_unet
from lightning_distill.processes import FlowMatching
from lightning_distill.tangents import DEFAULT_STEPS, discrepancy, tangent, value_and_tangent

F64 = torch.float64
#: classes whose layers compute in float32 even where weights and samples are float64: differences see that rounding
ROUGH = {"sd3", "sana", "sana_sprint", "lumina2", "z_image", "flux", "flux2", "qwen_image", "wan", "anyflow", "ltx"}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def output(denoiser, cond):
    # not the velocity: that of the discrete VP process has a kink in time at every index
    return lambda x, t: denoiser(x, t, cond).raw


def point(shape, n=2, dtype=torch.float32):
    x, dx = torch.randn(2, n, *shape, dtype=F64)
    return x.to(dtype), torch.linspace(0.3505, 0.6005, n, dtype=F64), dx.to(dtype)


# ------------------------------------------------------------------------------------------------ every model class
@pytest.mark.sparse(3)
@pytest.mark.parametrize("name", list(MAKERS))
def test_exact_tangents_of_stock_networks_equal_the_math_backend(name):
    tiny = MAKERS[name]()
    f = output(tiny.denoiser(), tiny.cond(2))
    x, t, dx = point(tiny.shape)
    value, exact = tangent(f, (x, t), (dx, 1.0))
    copy.deepcopy(tiny.network)  # nothing is left in it that cannot be copied
    with sdpa_kernel(SDPBackend.MATH):
        expected_value, expected = torch.func.jvp(f, (x, t), (dx, torch.ones_like(t)))
    assert relative(value, expected_value) < 1e-5
    assert relative(exact, expected) < 1e-5
    torch.testing.assert_close(value, f(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.sparse(3)
@pytest.mark.parametrize("name", list(MAKERS))
def test_exact_tangents_of_stock_networks_equal_central_differences(name):
    """In the sample, in float64; in time, whose embeddings diffusers computes in float32, with a wider step."""
    tiny = MAKERS[name]()
    tiny.network.double()
    f = output(tiny.denoiser(), tiny.cond(2))
    x, t, dx = point(tiny.shape, dtype=F64)
    exact, approximate = (
        tangent(f, (x, t), (dx, None), m, **k)[1] for m, k in (("jvp", {}), ("central", {"step": 1e-4}))
    )
    assert relative(approximate, exact) < (3e-3 if name in ROUGH else 1e-4)
    # embeddings have waves of frequency 1000
    exact = tangent(f, (x, t), (None, 1.0))[1]
    assert relative(tangent(f, (x, t), (None, 1.0), "central", step=1e-4)[1], exact) < 2e-2


@pytest.mark.parametrize(
    "network",
    [small_unet(8, block_out_channels=(8, 16), attention_head_dim=8), small_dit(8, num_layers=2, attention_head_dim=8)],
)
def test_exact_tangents_of_unet2d_and_dit(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network = network.double().eval()
    labels = {"class_labels": torch.tensor([1, 3])} if hasattr(network, "transformer_blocks") else {}

    def f(x, t):
        out = network(x, t, **labels).sample
        return out

    x, t, dx = point((1, 8, 8), dtype=F64)
    exact = tangent(f, (x, 1000 * t), (dx, 3.0))[1]
    assert relative(tangent(f, (x, 1000 * t), (dx, 3.0), "central", step=3e-4)[1], exact) < 2e-2
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(f, (x, 1000 * t), (dx, torch.full_like(t, 3.0)))[1]
    assert relative(exact, expected) < 1e-10


def test_networks_of_integer_times_refuse_a_time_derivative():
    denoiser = Denoiser(small_dit(8, num_layers=1), FlowMatching(), "flow_prediction")
    x, t, dx = point((1, 8, 8))
    cond = {"class_labels": torch.tensor([1, 3])}
    with pytest.raises(ValueError, match="integer"):
        tangent(output(denoiser, cond), (x, t), (dx, 1.0))
    assert tangent(output(denoiser, cond), (x, t), (dx, None))[1].shape == x.shape
    denoiser.family = dataclasses.replace(denoiser.family, integer_time=False)
    assert tangent(output(denoiser, cond), (x, t), (dx, 1.0))[1].shape == x.shape


# ------------------------------------------------------------------------------------------------ attention
def attention_inputs(kind):
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 5)
    settings = {}
    if kind == "causal":
        settings["is_causal"] = True
    if kind == "scale":
        settings["scale"] = 0.7
    if kind == "bool":
        mask = torch.rand(2, 1, 7, 9) < 0.6
        mask[:, :, 2] = False  # a query that sees nothing
        settings["attn_mask"] = mask
    if kind == "float":
        settings["attn_mask"] = torch.randn(7, 9).double()
    if kind == "one_row":
        settings["attn_mask"] = torch.rand(2, 1, 1, 9) < 0.7
    if kind == "gqa":
        k, v, settings["enable_gqa"] = k[:, :2], v[:, :2], True
    return [a.double() for a in (q, k, v)], settings


@pytest.mark.parametrize("kind", ["plain", "causal", "scale", "bool", "float", "one_row", "gqa"])
@pytest.mark.parametrize("function", [attention, "plain"])
def test_attention_equals_the_math_backend(kind, function, monkeypatch):
    monkeypatch.setattr("lightning_distill.attention._rows", lambda q, k: 3)  # three chunks, the last one short
    inputs, settings = attention_inputs(kind)
    tangents = [torch.randn_like(a) for a in inputs]

    def ours(q, k, v):
        if function is attention:
            return attention(q, k, v, **settings)
        scale = settings.get("scale", q.shape[-1] ** -0.5)
        flags = settings.get("is_causal", False), scale, settings.get("enable_gqa", False)
        return _plain_attention(q, k, v, settings.get("attn_mask"), *flags)

    def reference(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **settings)

    def everything(attend):
        """Value, tangent, and the gradients of both."""
        leaves = [a.clone().requires_grad_() for a in inputs]
        value, change = torch.func.jvp(attend, tuple(leaves), tuple(tangents))
        weight = torch.linspace(-1, 1, value.numel(), dtype=F64).reshape(value.shape)
        through_value = torch.autograd.grad((weight * value).sum(), leaves, retain_graph=True)
        through_tangent = torch.autograd.grad((weight * change).sum(), leaves)
        return [value, change, *through_value, *through_tangent]

    for mine, theirs in zip(everything(ours), everything(reference)):
        assert mine.isfinite().all()
        # torch's own second derivatives are nan where a query sees no key
        torch.testing.assert_close(mine, torch.where(theirs.isnan(), mine, theirs), rtol=1e-9, atol=1e-10)
        assert kind == "bool" or theirs.isfinite().all()


def test_attention_tangent_of_single_arguments_and_of_a_bias():
    (q, k, v), _ = attention_inputs("plain")
    mask = torch.randn(7, 9, dtype=F64)
    for i in range(4):
        arguments = [q, k, v, mask]

        def along(moved, attend, i=i, arguments=arguments):
            return attend(*[moved if j == i else a for j, a in enumerate(arguments)])

        direction = torch.randn_like(arguments[i])
        with sdpa_kernel(SDPBackend.MATH):
            expected = torch.func.jvp(lambda m: along(m, F.scaled_dot_product_attention), (arguments[i],), (direction,))
        ours = torch.func.jvp(lambda m: along(m, attention), (arguments[i],), (direction,))
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    leaf = mask.clone().requires_grad_()
    grads = [torch.autograd.grad(a(q, k, v, leaf).square().sum(), leaf)[0] for a in (attention, reference_attention)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def reference_attention(*arguments):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*arguments)


def test_attention_refuses_dropout_and_serves_multihead_attention():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="dropout"), differentiable_attention():
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x, dx = torch.randn(2, 3, 5, 8, dtype=F64)
    exact, central = (tangent(lambda a: layer(a, a, a)[0], (x,), (dx,), mode)[1] for mode in ("jvp", "central"))
    assert relative(central, exact) < 1e-8


# ------------------------------------------------------------------------------------------------ modes
def wave(x, t, r):
    return torch.sin(x * t[:, None]) * torch.exp(r)[:, None]


def test_modes_of_a_known_function():
    x, dx = torch.randn(2, 3, 2, dtype=F64)
    t, r = torch.rand(2, 3, dtype=F64)
    primals = (x, t, r)
    expected = torch.exp(r)[:, None] * (
        torch.cos(x * t[:, None]) * (dx * t[:, None] + x * 2.0) - 0.5 * torch.sin(x * t[:, None])
    )
    for mode, tolerance in (("jvp", 1e-14), ("central", 1e-8), ("one_sided", 1e-6), ("semi", 1e-8)):
        value, change = tangent(wave, primals, (dx, 2.0, -0.5), mode)
        torch.testing.assert_close(value, wave(*primals), rtol=0, atol=1e-14)
        torch.testing.assert_close(change, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(value_and_tangent(wave, primals, (dx, 2.0, -0.5), mode)[1], change)
    # order of the differences: curvature is all that is left
    for mode, order in (("central", 4.0), ("one_sided", 2.0)):
        errors = [(tangent(wave, primals, (dx, 2.0, -0.5), mode, step=h)[1] - expected).norm() for h in (2e-2, 1e-2)]
        assert errors[0] / errors[1] == pytest.approx(order, rel=0.05)


def test_semi_is_exact_in_the_sample():
    def kinked(x, t):  # a difference in x across the kink would see half a slope
        return x.relu() * t[:, None]

    x, dx = torch.tensor([[1e-4]], dtype=F64), torch.tensor([[1.0]], dtype=F64)
    t = torch.tensor([0.5], dtype=F64)
    assert tangent(kinked, (x, t), (dx, 1.0), "semi", step=1e-2)[1].item() == pytest.approx(0.5 + 1e-4, abs=1e-12)
    assert tangent(kinked, (x, t), (dx, 1.0), "central", step=1e-2)[1].item() < 0.3
    assert tangent(kinked, (x, t), (dx, None), "semi")[1].item() == 0.5
    assert tangent(kinked, (x, t), (None, 1.0), "semi")[1].item() == pytest.approx(1e-4, abs=1e-12)


def mlp(dropout=0.0):
    torch.manual_seed(3)
    network = ResidualMLP((2,), width=16, depth=2)
    nn.init.normal_(network.output.weight)
    if dropout:
        network.blocks[0].inner = nn.Sequential(network.blocks[0].inner, nn.Dropout(dropout))
    return network


@pytest.mark.parametrize("name", ["mlp", "sd3", "sd15"])
def test_default_steps_fit_networks_that_embed_a_thousand_times_t(name):
    if name == "mlp":
        denoiser, cond, shape = Denoiser(mlp(), FlowMatching(), "flow_prediction"), {}, (2,)
    else:
        tiny = MAKERS[name]()
        denoiser, cond, shape = tiny.denoiser(), tiny.cond(2), tiny.shape
    x, t, dx = point(shape, n=64 if name == "mlp" else 2)  # rounding of four numbers alone is chance
    f = output(denoiser, cond)
    with torch.no_grad():
        exact = tangent(f, (x, t), (dx, 1.0))[1]
        for mode, limit in (("central", 5e-3), ("one_sided", 3e-2), ("semi", 5e-3)):
            assert relative(tangent(f, (x, t), (dx, 1.0), mode)[1], exact) < limit
        wide = relative(tangent(f, (x, t), (dx, 1.0), "central", step=3e-3)[1], exact)
    assert (wide > 0.1) == (name != "mlp")
    assert discrepancy(f, (x, t), (dx, 1.0)).item() < 5e-3


@pytest.mark.parametrize("mode", ["jvp", "central", "one_sided", "semi"])
def test_passes_share_their_random_numbers(mode):
    network = mlp(dropout=0.5).train()
    x, t, dx = point((2,), n=64)
    torch.manual_seed(7)
    value = network(x, t)
    after = torch.rand(1)
    torch.manual_seed(7)
    made, change = value_and_tangent(network, (x, t), (dx, 1.0), mode)
    assert torch.equal(made, value)
    assert torch.equal(torch.rand(1), after)  # as after one pass
    torch.manual_seed(7)
    made, again = tangent(network, (x, t), (dx, 1.0), mode)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(made, value)
    torch.manual_seed(7)
    exact = tangent(network, (x, t), (dx, 1.0))[1]
    for found in (change, again):
        assert relative(found, exact) < 5e-2


def test_two_passes_have_the_gradients_of_one():
    network = mlp().double()
    x, t, dx = point((2,), n=8, dtype=F64)
    grads = []
    for make in (tangent, value_and_tangent):
        value, change = make(network, (x, t), (dx, 1.0))
        loss = (value - (value + change).detach()).square().sum()
        grads.append(torch.autograd.grad(loss, list(network.parameters())))
        if make is value_and_tangent:
            assert not change.requires_grad
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_the_tangent_has_a_graph_of_its_own():
    """Lagrangian self-distillation trains the derivative itself."""
    network = mlp().double()
    x, t, dx = point((2,), n=4, dtype=F64)
    parameter = network.blocks[0].inner.weight
    grads = {
        mode: torch.autograd.grad(tangent(network, (x, t), (dx, 1.0), mode)[1].square().sum(), parameter)[0]
        for mode in ("jvp", "central", "semi")
    }
    for mode in ("central", "semi"):
        assert relative(grads[mode], grads["jvp"]) < 1e-6


# ------------------------------------------------------------------------------------------------ surroundings
def test_autocast_is_off_inside_and_comes_back():
    network = small_unet(8, block_out_channels=(8, 16), attention_head_dim=8).eval()
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    x, t, dx = point((1, 8, 8))
    f = output(denoiser, {})
    expected = {mode: tangent(f, (x, t), (dx, 1.0), mode)[1].detach() for mode in ("jvp", "central", "one_sided")}
    with torch.autocast("cpu", torch.bfloat16):
        rounded = f(x, t)
        for mode, exact in expected.items():
            value, change = value_and_tangent(f, (x, t), (dx, 1.0), mode)
            assert relative(change, exact) < 1e-5
            assert torch.equal(value, rounded)  # the graded pass keeps the caller's precision
        value.sum().backward()
    assert all(p.grad is not None for p in network.conv_in.parameters())
    transformer = MAKERS["sd3"]()
    f = output(transformer.denoiser(), transformer.cond(2))
    x, t, dx = point(transformer.shape)
    exact = tangent(f, (x, t), (dx, None))[1]
    with torch.autocast("cpu", torch.bfloat16):
        rough = tangent(f, (x, t), (dx, None), autocast=True)[1]
    assert 1e-4 < relative(rough, exact) < 0.1


def test_adapter_roles():
    tiny = MAKERS["sd3"]()
    teacher = tiny.denoiser()
    student = add_adapter(teacher, "student", rank=2)
    for _, parameter in student.adapter_parameters():
        nn.init.normal_(parameter, std=0.3)
    x, t, dx = point(tiny.shape)
    f = output(student, tiny.cond(2))
    value, change = value_and_tangent(f, (x, t), (dx, 1.0))
    assert relative(change, output_jvp_math(f, x, t, dx)) < 1e-5
    assert relative(change, tangent(output(teacher, tiny.cond(2)), (x, t), (dx, 1.0))[1]) > 1e-2
    (value - change).square().mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert sum(p.grad.abs().sum() > 0 for p in student.parameters()) > 0.8 * len(list(student.parameters()))


def output_jvp_math(f, x, t, dx):
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        return torch.func.jvp(f, (x, t), (dx, torch.ones_like(t)))[1]


def test_activation_checkpointing():
    tiny = MAKERS["sd3"]()
    denoiser = tiny.denoiser()
    x, t, dx = point(tiny.shape)
    f = output(denoiser, tiny.cond(2))
    value, change = value_and_tangent(f, (x, t), (dx, 1.0))
    expected = torch.autograd.grad((value * change).sum(), denoiser.network.pos_embed.proj.weight)[0]
    enable_activation_checkpointing(denoiser)
    denoiser.train()
    with pytest.raises(RuntimeError, match="use value_and_tangent"):
        tangent(f, (x, t), (dx, 1.0))
    value, change = value_and_tangent(f, (x, t), (dx, 1.0))
    found = torch.autograd.grad((value * change).sum(), denoiser.network.pos_embed.proj.weight)[0]
    torch.testing.assert_close(found, expected)


class OneAttention(nn.Module):
    """The smallest network with what a compiler has to see through."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x, t):
        q, k, v = (self.project(x) * torch.cos(t)[:, None, None]).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_inside_a_compiled_function():
    network = OneAttention()
    x, dx = torch.randn(2, 3, 6, 4)
    t = torch.rand(3)

    def both(x, t, dx):
        with torch.no_grad():
            return tangent(network, (x, t), (dx, 1.0))

    expected = both(x, t, dx)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    found = torch.compile(both, backend=counter, fullgraph=True)(x, t, dx)
    assert counter.frame_count == 1
    for mine, theirs in zip(found, expected):
        assert relative(mine, theirs) < 1e-5


# ------------------------------------------------------------------------------------------------ cost
def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_floating_point_operations_of_an_update():
    network = random_network(
        "SD3Transformer2DModel", sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=64, pooled_projection_dim=16,
        out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    cond = {"encoder_hidden_states": torch.randn(2, 8, 16), "pooled_projections": torch.randn(2, 16)}
    x, t, dx = point((4, 16, 16))
    f = output(denoiser, cond)
    plain = flops(lambda: f(x, t).sum().backward())

    def update(mode):
        return flops(lambda: value_and_tangent(f, (x, t), (dx, 1.0), mode)[0].sum().backward())

    ratios = {mode: update(mode) / plain for mode in ("jvp", "central", "one_sided")}
    assert ratios["jvp"] <= 2.1
    assert ratios["central"] <= 1.7
    assert ratios["one_sided"] <= 1.4
    assert ratios["jvp"] > ratios["central"] > ratios["one_sided"] > 1.2


def test_memory_does_not_grow_with_the_square_of_the_sequence():
    """Bytes allocated at once by the tangent of one attention, counted by the profiler of the CPU allocator."""

    def peak(attend, length):
        q = torch.randn(1, 4, length, 16)
        live = top = 0
        with (
            torch.no_grad(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        ):
            torch.func.jvp(attend, (q, q, q), (q, q, q))
        for event in sorted(
            (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
        ):
            live += event.nbytes()
            top = max(top, live)
        return top

    lengths = (1024, 2048)
    ours = [peak(attention, n) for n in lengths]
    theirs = [peak(reference_attention, n) for n in lengths]
    assert theirs[1] / theirs[0] > 3.5
    assert ours[1] / ours[0] < 2.5
    assert ours[1] < theirs[1] / 3


# ------------------------------------------------------------------------------------------------ bad input
def test_bad_input():
    x, t = torch.randn(2, 3), torch.rand(2)

    def f(x, t):
        return x * t[:, None]

    with pytest.raises(ValueError, match="unknown"):
        tangent(f, (x, t), (x, 1.0), "fd")
    with pytest.raises(ValueError, match="2 tangents"):
        tangent(f, (x, t), (x,))
    with pytest.raises(ValueError, match="shape"):
        tangent(f, (x, t), (t, 1.0))
    with pytest.raises(ValueError, match="no argument moves"):
        tangent(f, (x, t), (None, 0))
    with pytest.raises(ValueError, match="positive"):
        tangent(f, (x, t), (x, 1.0), "central", step=0.0)
    with pytest.raises(ValueError, match="bfloat16"):
        tangent(f, (x.bfloat16(), t), (x, 1.0), "central")
    with pytest.raises(ValueError, match="autocast"):
        tangent(f, (x, t), (x, 1.0), "central", autocast=True)
    assert set(DEFAULT_STEPS) == {"central", "one_sided", "semi"}


def test_the_attention_function_takes_torchs_arguments():
    """A new argument of torch's function would be dropped silently by a wrapper that did not know it."""
    documented = F.scaled_dot_product_attention.__doc__
    for name in inspect.signature(attention).parameters:
        assert name in documented
