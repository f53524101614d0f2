"""Frozen weights in few bits, adapters on them, and the 8-bit optimizer; what needs torchao is skipped without it."""

import copy
import importlib.util

import pytest
import torch
from diffusers import DDPMScheduler
from test_lora import Plain, checkpoint_all, inputs
from torch import nn

from lightning_distill import checkpoints
from lightning_distill.methods import DMD2
from lightning_distill.networks import quantisation
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import add_adapter, add_adapter_copy
from lightning_distill.networks.merging import base_state_dict, merged_network
from lightning_distill.networks.quantisation import (
    KINDS,
    QuantisedLinear,
    dequantise,
    plain_tensors,
    quantisable,
    quantise,
    quantised_bytes,
)
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.small import small_dit
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.networks.weightless import weightless
from lightning_distill.optim import AdamW8bit, guard_step
from lightning_distill.processes import FlowMatching, VariancePreserving
from lightning_distill.schedules import WarmupDecay

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="the extra 'quant'")

#: largest relative error of a linear layer's output, for normal weights and inputs
ERRORS = {"int8": 0.01, "fp8": 0.04, "nf4": 0.12}


def wide_dit(dtype=torch.float32):
    torch.manual_seed(0)
    network = small_dit(8, 2, 5, patch_size=2, num_layers=2, num_attention_heads=2, attention_head_dim=64)
    for p in network.parameters():
        nn.init.normal_(p, std=0.08)
    return Denoiser(
        nn.Module.to(network, dtype).eval(), FlowMatching(), "flow_prediction", null_class=5
    ).requires_grad_(False)


def quantised(kind, dtype=torch.float32):
    denoiser = wide_dit(dtype)
    quantise(denoiser.network, kind, denoiser.family.blocks)
    return denoiser


def shake(role, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in role.adapter_parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))


# ------------------------------------------------------------------------------------------------ without torchao
def test_missing_torchao_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^quantize='int8' needs torchao; install it with: pip install 'light"):
        PretrainedDenoiser("anywhere", quantize="int8").check()
    with pytest.raises(ImportError, match=r"^AdamW8bit needs torchao; install it with: pip"):
        AdamW8bit([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="quantize='int3' is unknown; choose one of int8, fp8, nf4"):
        PretrainedDenoiser("anywhere", quantize="int3").check()


def test_layers_that_are_meant():
    denoiser = wide_dit()
    names = set(quantisable(denoiser.network, "int8", denoiser.family.blocks))
    assert names
    assert all(name.startswith("transformer_blocks.") for name in names)
    everywhere = quantisable(denoiser.network, "int8")
    assert set(everywhere) > names  # the last projections
    assert all(m.weight.numel() >= quantisation.SMALLEST for m in everywhere.values())
    assert all(m.weight.numel() % 16384 == 0 for m in quantisable(denoiser.network, "nf4").values())
    with (
        weightless(),
        pytest.raises(ValueError, match="quantize='int8': Plain has no linear layer in its blocks of 4096"),
    ):
        quantise(Plain(), "int8")


# ------------------------------------------------------------------------------------------------ layers
@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_error_bytes_and_gradient_of_a_layer(kind):
    torch.manual_seed(0)
    linear = nn.Linear(256, 384)
    layer = QuantisedLinear(linear, kind)
    x = torch.randn(2, 7, 256, requires_grad=True)
    wanted, got = linear(x), layer(x)
    assert 1e-4 < (got - wanted).norm() / wanted.norm() < ERRORS[kind]
    # exactly the product with the dequantised weight, and its gradient
    full = layer.dequantize()
    assert torch.equal(got, torch.nn.functional.linear(x, full, linear.bias))
    g = torch.randn_like(got)
    (gradient,) = torch.autograd.grad(got, x, g)
    torch.testing.assert_close(gradient, g @ full, rtol=1e-5, atol=1e-5)
    assert not layer.weight.requires_grad
    size = sum(t.nbytes for t in plain_tensors(layer.weight).values())
    assert size == quantised_bytes(kind, 384, 256)
    assert size < {"int8": 0.27, "fp8": 0.27, "nf4": 0.14}[kind] * linear.weight.nbytes
    narrow = QuantisedLinear(nn.Linear(256, 384, dtype=torch.bfloat16), kind)
    assert sum(t.nbytes for t in plain_tensors(narrow.weight).values()) == quantised_bytes(kind, 384, 256, 2)


@needs_torchao
def test_nothing_of_a_weight_is_kept_for_the_backward_pass():
    layer = QuantisedLinear(nn.Linear(256, 384), "int8")
    x = torch.randn(4, 256, requires_grad=True)
    live = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (live.append(t.shape), t)[1], lambda t: t):
        y = layer(x * 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            z = layer(x * 1.0)
    assert all(shape.numel() < 256 * 384 for shape in live)
    assert (y.dtype, z.dtype) == (torch.float32, torch.bfloat16)
    a, b = torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(z.float().sum(), x)[0]
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.1)
    assert a.abs().max() > 1


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_a_quantised_backbone(kind, dora):
    x, t, cond = inputs()
    wanted = wide_dit()(x, t, cond).raw
    teacher = quantised(kind)
    before = teacher(x, t, cond).raw
    error = (before - wanted).norm() / wanted.norm()
    assert 1e-5 < error < {"int8": 0.02, "fp8": 0.1, "nf4": 0.3}[kind]
    fingerprint = checkpoints.fingerprint(base_state_dict(teacher.network).values())
    student, fake = add_adapter(teacher, "student", rank=3, dora=dora), add_adapter(teacher, "fake", rank=2)
    assert torch.equal(student(x, t, cond).raw, before)
    shake(student)
    shake(fake, 2)
    moved = student(x, t, cond).raw
    assert (moved - before).abs().max() > 1e-2
    assert torch.equal(teacher(x, t, cond).raw, before), "adapters off: the quantised network bit for bit"
    moved.square().mean().backward()
    ours = {id(p) for _, p in student.adapter_parameters()}
    assert all((p.grad is not None) == (id(p) in ours) for p in teacher.network.parameters())
    kept = [p.grad.clone() for _, p in student.adapter_parameters()]
    assert all(g.abs().max() > 0 for g in kept)
    checkpoint_all(student)
    again = torch.autograd.grad(student(x, t, cond).raw.square().mean(), [p for _, p in student.adapter_parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(kept, again))
    average = add_adapter_copy(student, "ema")
    torch.testing.assert_close(average(x, t, cond).raw, moved, atol=1e-5, rtol=1e-5)
    merged = merged_network(student)
    assert not any(isinstance(m, QuantisedLinear) for m in merged.modules())
    plain = Denoiser(merged, FlowMatching(), "flow_prediction", null_class=5)
    torch.testing.assert_close(plain(x, t, cond).raw, moved, atol=1e-4, rtol=1e-4)
    assert checkpoints.fingerprint(base_state_dict(teacher.network).values()) == fingerprint
    other = copy.deepcopy(nn.ModuleDict({"teacher": teacher, "student": student}))["student"]
    assert torch.equal(other(x, t, cond).raw, student(x, t, cond).raw)


@needs_torchao
def test_gradients_of_adapters_equal_those_on_the_dequantised_network():
    teacher, plain = quantised("int8"), quantised("int8")
    dequantise(plain.network)
    x, t, cond = inputs()
    gradients = []
    for source in (teacher, plain):
        role = add_adapter(source, "student", rank=2)
        shake(role)
        loss = role(x, t, cond).raw.square().mean()
        gradients.append(torch.autograd.grad(loss, [p for _, p in role.adapter_parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@needs_torchao
def test_devices_and_dtypes():
    teacher = quantised("int8")
    x, t, cond = inputs()
    before = teacher(x, t, cond).raw
    nn.Module.to(teacher.network, "cpu")
    assert torch.equal(teacher(x, t, cond).raw, before)
    nn.Module.to(teacher.network, torch.bfloat16)  # the rest of the network is; codes and scales are as they were
    narrow = teacher(x, t, cond).raw
    assert narrow.dtype == torch.float32
    assert (narrow - before).norm() / before.norm() < 0.02


# ------------------------------------------------------------------------------------------------ from a folder
@pytest.fixture
def folder(tmp_path):
    network = wide_dit().network
    network.save_pretrained(tmp_path / "transformer")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    return str(tmp_path)


@needs_torchao
def test_a_method_on_a_quantised_teacher(folder):
    module = DMD2(PretrainedDenoiser(folder, quantize="int8"), student=Lora(rank=2), fake_score=Lora(rank=2))
    module.configure_model()
    assert sum(isinstance(m, QuantisedLinear) for m in module.teacher.network.modules()) > 4
    assert module.teacher.network is module.student.network is module.fake_score.network
    state = module.state_dict()
    assert all(".adapter." in key or "." not in key or "lora_alpha" in key for key in state)
    assert len(module.teacher_fingerprint()) == 64
    full = PretrainedDenoiser(folder).build()
    x, t, cond = inputs()
    error = (module.student(x, t, cond).raw - full(x, t, cond).raw).norm() / full(x, t, cond).raw.norm()
    assert 0 < error < 0.02
    copied = Copy().build(module.teacher)
    torch.testing.assert_close(copied(x, t, cond).raw, module.teacher(x, t, cond).raw, atol=1e-5, rtol=1e-5)
    assert isinstance(copied.process, VariancePreserving)
    assert all(p.requires_grad for p in copied.parameters())


# ------------------------------------------------------------------------------------------------ optimizer
@needs_torchao
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "from_older_states"])
def test_no_weight_of_an_8_bit_step_leaps(resumed):
    """Gradients of a block that span six orders of magnitude, and change from step to step."""
    g = torch.Generator().manual_seed(0)
    start, sizes = 0.27 * torch.randn(16, 256, generator=g), 10.0 ** (-6 * torch.rand(16, 256, generator=g))
    parameter = nn.Parameter(start.clone())
    optimizer, moved = AdamW8bit([parameter], lr=1e-2, weight_decay=0.0), []
    with torch.compiler.set_stance("force_eager"):
        for k in range(6):
            parameter.grad = sizes * torch.randn(16, 256, generator=g)
            parameter.grad[:, 0] = 1.0
            before = parameter.detach().clone()
            optimizer.step()
            moved.append(float((parameter.detach() - before).abs().max()))
            if resumed and k == 1:
                old = optimizer.state_dict()
                old["state"][0]["exp_avg_sq"]["qmap"][0] = 0.0  # as torchao's
                optimizer.load_state_dict(old)
    assert max(moved) < 2e-2  # AdamW's: 1.01e-2
    # and small blocks of gradients are stepped in as AdamW does
    assert float((parameter.detach() - start)[:, 0].abs().max()) == pytest.approx(6e-2, rel=0.05)


@needs_torchao
def test_adamw_8bit_follows_adamw_and_resumes_exactly(tmp_path):
    torch.manual_seed(0)
    shapes = [(64, 128), (7,), (65, 65)]  # quantised; too small; a number that 256 does not divide
    start = [torch.randn(s) for s in shapes]

    def fresh(kind):
        parameters = [nn.Parameter(p.clone()) for p in start]
        return parameters, kind(parameters, lr=1e-2, weight_decay=0.1)

    (ours, small), (theirs, full) = fresh(AdamW8bit), fresh(torch.optim.AdamW)
    assert isinstance(small, AdamW8bit)
    schedule = WarmupDecay(small, warmup_steps=2)

    def step(parameters, optimizer, seed):
        g = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=g)
        _, skipped = guard_step(optimizer, torch.zeros(()), None)
        assert not skipped
        optimizer.step()

    with torch.compiler.set_stance("force_eager"):
        for k in range(3):
            step(ours, small, k)
            for group in full.param_groups:
                group["lr"] = [0.005, 0.01, 0.01][k]
            step(theirs, full, k)
            schedule.step()
        for a, b, p in zip(ours, theirs, start):
            moved = (b - p).abs().max()
            assert (a - b).abs().max() < (0.1 if p.numel() == 8192 else 1e-3) * moved
        sizes = [t.nbytes for s in small.state.values() for v in s.values() for t in plain_tensors(v).values()]
        assert sum(sizes) == AdamW8bit.state_bytes(ours)
        assert AdamW8bit.state_bytes([torch.empty(4096, 1024)]) < 0.26 * 8 * 4096 * 1024
        torch.save(small.state_dict(), tmp_path / "o.pt")
        saved = torch.load(tmp_path / "o.pt", weights_only=True)
        kinds = {type(v) for v in saved["state"][0]["exp_avg"].values()}
        assert kinds == {torch.Tensor, bool}
        again = [nn.Parameter(p.detach().clone()) for p in ours]
        resumed = AdamW8bit(again, lr=1.0)
        resumed.load_state_dict(saved)
        step(ours, small, 9)
        step(again, resumed, 9)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
