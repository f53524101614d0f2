"""A target time on networks of one time: equal to the original where it should be, learned where it should be."""

import pytest
import torch
from tiny_pipelines import MAKERS
from torch import nn

from lightning_distill.checkpoints import fingerprint
from lightning_distill.export import export_weights
from lightning_distill.networks.analytic import analytic_denoiser, ring
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import (
    add_adapter,
    enable_activation_checkpointing,
    load_role_state,
    role_state,
    trainable_parameters,
)
from lightning_distill.networks.merging import base_state_dict, merged_network
from lightning_distill.networks.roles import Copy, Lora, averaged_copy
from lightning_distill.networks.second_time import (
    SecondTime,
    add_guidance,
    add_second_time,
    second_time_of,
)
from lightning_distill.networks.small import ResidualMLP, small_dit, small_unet
from lightning_distill.networks.time_embeddings import TimeEmbedding
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving
from lightning_distill.tangents import tangent

F64 = torch.float64
ONE_TIME = [name for name in MAKERS if name not in ("anyflow", "cogvideox_wide", "cogvideox_patches", "sd21")]
KINDS = ["zero_init", "scaled_difference", "gated_copy"]


def call(denoiser, tiny, **settings):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, *tiny.shape, generator=generator)
    t = torch.tensor([0.4, 0.7], dtype=F64)
    with torch.no_grad():
        return denoiser(x, t, tiny.cond(2), **settings).raw


def mlp(**settings):
    torch.manual_seed(1)
    network = ResidualMLP((2,), width=16, depth=2, **settings)
    nn.init.normal_(network.output.weight)
    return Denoiser(network, FlowMatching(), "flow_prediction").eval()


def points(n=5):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(n, 2, generator=generator)
    t = torch.linspace(0.3, 0.9, n, dtype=F64)
    return x, t, t / 3


def learned(denoiser):
    """As after training: every parameter of the branch has moved."""
    with torch.no_grad():
        for parameter in second_time_of(denoiser.network).parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return denoiser


# ------------------------------------------------------------------------------------------------ equality
@pytest.mark.sparse(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ONE_TIME)
def test_stock_networks_are_unchanged_bit_for_bit(name, kind):
    tiny = MAKERS[name]()
    denoiser = tiny.denoiser()
    before = call(denoiser, tiny)
    installed = add_second_time(tiny.network, kind)
    t = torch.tensor([0.4, 0.7], dtype=F64)
    assert torch.equal(call(denoiser, tiny), before)  # no r is r = t
    assert torch.equal(call(denoiser, tiny, r=t), before)
    elsewhere = call(denoiser, tiny, r=0.3 * t)
    assert torch.equal(elsewhere, before) == (kind == "zero_init")
    assert elsewhere.isfinite().all()
    assert call(denoiser, tiny, r=torch.zeros(2)).isfinite().all()
    learned(denoiser)
    assert not torch.equal(call(denoiser, tiny, r=0.3 * t), before)
    assert torch.equal(call(denoiser, tiny, r=t), before) == (kind == "scaled_difference")
    assert installed is tiny.network.second_time


@pytest.mark.parametrize("name", ONE_TIME)
def test_guidance_of_stock_networks_starts_as_nothing(name):
    tiny = MAKERS[name]()
    denoiser = tiny.denoiser()
    before = call(denoiser, tiny)
    installed = add_guidance(tiny.network)
    w = torch.tensor([2.0, 7.0])
    native = tiny.guidance is not None
    assert (installed is None) == (native or name in ("sd15", "sdxl"))
    assert torch.equal(call(denoiser, tiny), before)
    if not native:
        assert torch.equal(call(denoiser, tiny, guidance=w), before)
    branch = tiny.network.time_embedding.cond_proj if name in ("sd15", "sdxl", "lcm") else installed
    if branch is not None:
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert not torch.equal(call(denoiser, tiny, guidance=w), call(denoiser, tiny, guidance=w + 1))


def test_unets_with_the_embedding_of_latent_consistency_models_load_in_stock_diffusers(tmp_path):
    tiny = MAKERS["sd15"]()
    add_guidance(tiny.network)
    with torch.no_grad():
        tiny.network.time_embedding.cond_proj.weight.normal_()
    tiny.network.save_pretrained(tmp_path)
    again = type(tiny.network).from_pretrained(tmp_path)
    assert again.config.time_cond_proj_dim == 256
    assert torch.equal(again.time_embedding.cond_proj.weight, tiny.network.time_embedding.cond_proj.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_networks(kind):
    denoiser = mlp()
    x, t, r = points()
    before = denoiser(x, t).raw
    add_second_time(denoiser.network, kind)
    assert torch.equal(denoiser(x, t, r=t).raw, before)
    learned(denoiser)
    assert not torch.allclose(denoiser(x, t, r=r).raw, before)
    # one row does not see another's times
    alone = denoiser(x[1:2], t[1:2], r=r[1:2]).raw
    torch.testing.assert_close(denoiser(x, t, r=r).raw[1:2], alone)


def test_what_the_branch_adds():
    """The formulas of the table, from the parts."""
    for kind, which in (("zero_init", "r"), ("zero_init", "difference"), ("scaled_difference", "r")):
        denoiser = mlp()
        installed = add_second_time(denoiser.network, kind, input=which)
        learned(denoiser)
        x, t, r = points()
        seen = {}
        denoiser.network.time_embedding.register_forward_hook(lambda m, a, out, seen=seen: seen.update(out=out))
        denoiser(x, t, r=r)
        value = (t - r if which == "difference" else r).float()
        angles = value[:, None] * installed.time.waves.frequencies
        hidden = nn.functional.silu(installed.time.inner(torch.cat([angles.cos(), angles.sin()], 1)))
        added = installed.time.outer(hidden)
        if kind == "scaled_difference":
            added = (t - r).float()[:, None] * added
        plain = denoiser.network.time_embedding[0](denoiser.network.time_proj(t.float()))
        plain = denoiser.network.time_embedding[2](nn.functional.silu(plain))
        torch.testing.assert_close(seen["out"], plain + added)


def test_gated_copy_is_a_blend():
    denoiser = mlp()
    x, t, r = points()
    one = denoiser(x, r.clone()).raw
    add_second_time(denoiser.network, "gated_copy", gate=1.0)
    # the gate open, the copy untouched: the network sees r in the place of t
    torch.testing.assert_close(denoiser(x, t, r=r).raw, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("process", [VariancePreserving(), EDM(), TrigFlow()])
def test_target_times_are_finite_in_every_process(process):
    inner = TrigFlow() if isinstance(process, EDM) else None
    denoiser = Denoiser(mlp().network, process, "v_prediction", network_process=inner, sigma_data=0.5)
    add_second_time(denoiser.network)
    learned(denoiser)
    t = torch.tensor([0.1, 0.9], dtype=F64) * process.t_max
    x = torch.randn(2, 2)
    values = [denoiser(x, t, r=r).raw for r in (torch.zeros(2), 0.5 * t, t)]
    for value in values:
        assert value.isfinite().all()
    assert not torch.allclose(values[0], values[2])


def test_derivatives_in_both_times_are_finite_at_both_ends():
    denoiser = mlp().double()
    add_second_time(denoiser.network, "zero_init")
    learned(denoiser)
    x = torch.randn(2, 2, dtype=F64)
    t, r = torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)

    def f(x, t, r):
        return denoiser(x, t, r=r).raw

    for direction in ((x, 1.0, None), (None, None, 1.0), (x, 1.0, 1.0)):
        exact = tangent(f, (x, t, r), direction)[1]
        assert exact.isfinite().all()
        difference = tangent(f, (x, t, r), direction, "central")[1]
        torch.testing.assert_close(exact, difference, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ roles
def test_copies_averages_and_checkpoints(tmp_path):
    teacher = mlp()
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = TwoTime(Copy(), guidance=True).build(teacher, "student")
    assert second_time_of(teacher.network) is None  # the teacher stays as it was
    x, t, r = points()
    w = torch.full((5,), 3.0)
    assert torch.equal(student(x, t, r=r, guidance=w).raw, teacher(x, t).raw)
    names = [name for name, _ in trainable_parameters(student)]
    assert any("second_time.time.outer" in name for name in names)
    assert any("second_time.guidance.outer" in name for name in names)
    learned(student)
    out = student(x, t, r=r, guidance=w).raw
    average = averaged_copy(student, "ema")
    assert torch.equal(average(x, t, r=r, guidance=w).raw, out)
    assert not any(p.requires_grad for p in average.parameters())
    assert second_time_of(average.network) is not second_time_of(student.network)
    learned(student)  # the copy has its own hooks and weights
    assert torch.equal(average(x, t, r=r, guidance=w).raw, out)
    other = TwoTime(Copy(), guidance=True).build(teacher, "student")
    load_role_state(other, role_state(average))
    assert torch.equal(other(x, t, r=r, guidance=w).raw, out)
    for key, value in state.items():
        assert torch.equal(teacher.state_dict()[key], value)
    # exported weights fit a network with the same settings
    export_weights(average.network, FlowMatching(), "flow_prediction", [1.0], "ode", tmp_path / "out")
    from safetensors.torch import load_model

    fresh = mlp()
    for name, settings in second_time_of(average.network).settings.items():
        {"add_second_time": add_second_time, "add_guidance": add_guidance}[name](fresh.network, **settings)
    load_model(fresh.network, str(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(fresh(x, t, r=r, guidance=w).raw, out)


@pytest.mark.sparse(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_adapters_on_a_shared_backbone(name, kind):
    tiny = MAKERS[name]()
    teacher = tiny.denoiser()
    before, original = call(teacher, tiny), fingerprint(base_state_dict(teacher.network).values())
    student = TwoTime(Lora(rank=4), kind, guidance=True).build(teacher, "student")
    assert isinstance(second_time_of(teacher.network), SecondTime)
    assert torch.equal(call(teacher, tiny), before)
    assert torch.equal(call(student, tiny), before)
    fake = TwoTime(Lora(rank=4), kind, guidance=True).build(teacher, "fake")  # a second role of the same backbone
    mark = fingerprint(base_state_dict(teacher.network).values())
    assert mark == original  # stored trajectories know their teacher by it
    assert any("second_time" in key for key in base_state_dict(merged_network(student)))  # there they are its own
    trained = [key for key, _ in trainable_parameters(student) if "second_time" in key]
    assert len(trained) == len([key for key, _ in trainable_parameters(fake) if "second_time" in key])
    assert any(".time." in key for key in trained)
    t = torch.tensor([0.4, 0.7], dtype=F64)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    x = torch.randn(2, *tiny.shape)
    for _ in range(2):
        student(x, t, tiny.cond(2), r=0.3 * t, guidance=torch.full((2,), 3.0)).raw.square().mean().backward()
        optimizer.step()
    grads = [p.grad for key, p in student.named_parameters() if "second_time.time" in key and "lora_B" in key]
    assert grads
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    assert torch.equal(call(teacher, tiny), before)
    assert fingerprint(base_state_dict(teacher.network).values()) == mark
    out = call(student, tiny, r=0.3 * t)
    assert not torch.equal(out, call(student, tiny, r=t))
    average = averaged_copy(student, "ema")
    assert torch.equal(call(average, tiny, r=0.3 * t), out)
    merged = Denoiser(merged_network(student), student.process, student.prediction_type, family=student.family)
    torch.testing.assert_close(call(merged.eval(), tiny, r=0.3 * t), out, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ bad input
def test_activation_checkpointing():
    tiny = MAKERS["sd3"]()
    denoiser = tiny.denoiser()
    add_second_time(tiny.network)
    learned(denoiser)
    x, t = torch.randn(2, *tiny.shape), torch.tensor([0.4, 0.7], dtype=F64)
    parameter = tiny.network.second_time.time.inner.weight

    def grad():
        return torch.autograd.grad(denoiser(x, t, tiny.cond(2), r=0.5 * t).raw.sum(), parameter)[0]

    expected = grad()
    enable_activation_checkpointing(denoiser)
    denoiser.train()
    torch.testing.assert_close(grad(), expected)
    dit = Denoiser(small_dit(8, num_layers=1), FlowMatching(), "flow_prediction")
    add_second_time(dit.network)
    enable_activation_checkpointing(dit)
    nn.Module.train(dit)
    out = dit(torch.randn(2, 1, 8, 8), t, {"class_labels": torch.tensor([1, 2])}, r=0.5 * t).raw
    with pytest.raises(RuntimeError, match="activation checkpointing off"):
        out.sum().backward()


def test_features_and_errors_leave_no_state_behind():
    denoiser = mlp()
    installed = add_second_time(denoiser.network)
    x, t, r = points()
    denoiser(x, t, r=r, taps=("blocks.0",), features_only=True)
    assert installed._call is None
    with pytest.raises(ValueError, match="shape"):
        denoiser(torch.randn(5, 3), t, r=r)
    assert installed._call is None


def test_bad_input():
    network = mlp().network
    for settings, message in (
        ({"kind": "film"}, "unknown"),
        ({"kind": "gated_copy", "input": "difference"}, "does not go with"),
        ({"gate": 0.0}, "gate"),
        ({"features": 3}, "even"),
    ):
        with pytest.raises(ValueError, match=message):
            add_second_time(network, **settings)
    add_second_time(network)
    with pytest.raises(ValueError, match="already"):
        add_second_time(network)
    add_guidance(network)
    with pytest.raises(ValueError, match="already"):
        add_guidance(network)
    with pytest.raises(ValueError, match="TimeEmbedding"):
        add_second_time(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no time embedding at"):
        add_second_time(mlp().network, embedding=TimeEmbedding("nowhere"))
    for depth in (4, 1):
        with pytest.raises(ValueError, match="embeds its time in every block"):
            add_second_time(small_dit(8, num_layers=depth), "gated_copy")
    unet = Denoiser(small_unet(8, block_out_channels=(8, 32)), EDM(), "sample").eval()
    add_second_time(unet.network, "gated_copy")
    with pytest.raises(ValueError, match="ln sigma"):
        unet(torch.randn(1, 1, 8, 8), torch.ones(1), r=torch.zeros(1))
    with pytest.raises(ValueError, match="adds nothing"):
        TwoTime(kind=None)
    with pytest.raises(ValueError, match="add_second_time"):
        analytic_denoiser(ring(), FlowMatching())(torch.randn(1, 2), torch.ones(1), r=torch.zeros(1))


def test_any_module_with_an_embedding_of_its_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(1, 8)
            self.out = nn.Linear(10, 2)

        def forward(self, x, t):
            return self.out(torch.cat([x, self.embed(t.float()[:, None])], 1))

    denoiser = Denoiser(Net(), FlowMatching(), "flow_prediction")
    add_second_time(denoiser.network, embedding=TimeEmbedding("embed"))
    x, t, r = points()
    before = denoiser(x, t).raw
    learned(denoiser)
    assert not torch.equal(denoiser(x, t, r=r).raw, before)
    student = add_adapter(denoiser, rank=2)
    assert any("second_time" in key for key, _ in student.named_parameters())


def test_frequencies_keep_their_precision_beside_half_precision_weights():
    network = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction")
    denoiser.network.to(torch.bfloat16)
    add_second_time(denoiser.network, "zero_init")
    installed = second_time_of(denoiser.network)
    assert {p.dtype for p in installed.parameters()} == {torch.bfloat16}
    buffers = list(installed.buffers())
    assert buffers
    assert {b.dtype for b in buffers} == {torch.float32}
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.9, 0.4]).double()
    assert denoiser(x, t, r=t / 2).x0.isfinite().all()
