import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.methods import DMD2
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import (
    AdapterCheckpoint,
    AdapterDenoiser,
    adapter_bank,
    add_adapter,
    add_adapter_copy,
    enable_activation_checkpointing,
    load_role_state,
    role_state,
    trainable_parameters,
)
from lightning_distill.networks.merging import base_state_dict, merged_network, without_adapters
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import ZooDenoiser
from lightning_distill.processes import FlowMatching
from lightning_distill.randomness import Draws


def unet():
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=6,
    )


def dit():
    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_num_groups=4,
    )
    for p in net.parameters():  # the zero-initialised gates would hide the blocks
        nn.init.normal_(p, std=0.2)
    return net


class Plain(nn.Module):
    """Convolutions and linear layers; recomputes its middle in the backward pass when told to."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.middle = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())
        self.time = nn.Linear(1, 8)
        self.last = nn.Conv2d(8, 2, 1)
        self.checkpointing = False

    def forward(self, x, t, class_labels=None):
        h = self.first(x) + self.time(t[:, None].to(x.dtype))[..., None, None]
        call = AdapterCheckpoint(adapter_bank(self)) if self.checkpointing else lambda m, h: m(h)
        return self.last(call(self.middle, h))


NETWORKS = {"unet": unet, "dit": dit, "plain": Plain}


def teacher_of(kind, dtype=torch.float32):
    torch.manual_seed(1)
    net = NETWORKS[kind]().to(dtype).eval()
    return Denoiser(net, FlowMatching(), "flow_prediction", null_class=5)


def inputs(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, 8, 8, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0.1, 0.5, 0.9]), {"class_labels": torch.tensor([0, 3, 5])}


def fill(role, seed):
    """Nonzero B, so that the adapter does something."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in role.adapter_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))


def checkpoint_all(denoiser):
    if isinstance(denoiser.network, Plain):
        denoiser.network.checkpointing = True
    else:
        enable_activation_checkpointing(denoiser)


@pytest.mark.parametrize("kind", NETWORKS)
def test_adapter_starts_at_teacher_bit_for_bit_and_teacher_never_changes(kind):
    teacher = teacher_of(kind)
    x, t, cond = inputs()
    before = teacher(x, t, cond).raw.detach()
    weights = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    student, fake = add_adapter(teacher, "student", rank=3), add_adapter(teacher, "fake_score", rank=3)
    for role in (teacher, student, fake):
        assert torch.equal(role(x, t, cond).raw, before)
    optimizer = torch.optim.SGD([p for r in (student, fake) for _, p in trainable_parameters(r)], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (student(x, t, cond).raw.square().mean() - fake(x, t, cond).raw.square().mean()).backward()
        optimizer.step()
    assert not torch.allclose(student(x, t, cond).raw, before, atol=1e-3)
    assert not torch.allclose(student(x, t, cond).raw, fake(x, t, cond).raw, atol=1e-3)
    assert torch.equal(teacher(x, t, cond).raw, before)
    assert torch.equal(Denoiser(teacher.network, FlowMatching(), "flow_prediction")(x, t, cond).raw, before)
    after = base_state_dict(teacher.network)
    assert list(after) == list(weights)
    assert all(torch.equal(after[k], v) for k, v in weights.items())


def separate_copy(teacher, role):
    """The same adapter alone on its own copy of the network, injected by peft and always on."""
    net = copy.deepcopy(teacher.network)
    net = without_adapters(net)
    if getattr(net, "is_gradient_checkpointing", False):
        net.disable_gradient_checkpointing()
    if isinstance(net, Plain):
        net.checkpointing = False
    paths = list(role.config.target_modules)
    config = LoraConfig(r=role.config.r, lora_alpha=role.config.lora_alpha, target_modules=paths)
    inject_adapter_in_model(config, net, "default")
    own = dict(net.named_parameters())
    with torch.no_grad():
        for name, value in role.adapter_parameters():
            own[name.replace(".weight", ".default.weight")].copy_(value)
    return Denoiser(net.double(), teacher.process, teacher.prediction_type, null_class=5), own


@pytest.mark.sparse(4)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_equal_those_of_separate_copies(kind, checkpointing):
    """Student forward, fake-score and teacher forwards, then both backwards: each sees its own adapter."""
    teacher = teacher_of(kind, torch.float64)
    student = add_adapter(teacher, "student", rank=2, alpha=3.0)
    fake = add_adapter(teacher, "fake_score", rank=2)
    fill(student, 1)
    fill(fake, 2)
    (alone_s, own_s), (alone_f, own_f) = separate_copy(teacher, student), separate_copy(teacher, fake)
    if checkpointing:
        checkpoint_all(student)
    x, t, cond = inputs(torch.float64)

    def losses(teacher, student, fake):
        sample = student(x, t, cond).x0
        score = fake(sample.detach(), t, cond).x0.square().mean()
        through = fake(sample, t, cond).x0.sin().mean() + teacher(sample, t, cond).x0.cos().mean()
        return sample.square().mean() + through, score

    plain = Denoiser(without_adapters(teacher.network), FlowMatching(), "flow_prediction", null_class=5)
    for got, want in zip(losses(teacher, student, fake), losses(plain, alone_s, alone_f)):
        assert torch.allclose(got, want, rtol=1e-12)
        got.backward()
        want.backward()
    for role, own in ((student, own_s), (fake, own_f)):
        for name, p in role.adapter_parameters():
            want = own[name.replace(".weight", ".default.weight")].grad
            assert want.abs().max() > 1e-12, name
            assert torch.allclose(p.grad, want, rtol=1e-8, atol=1e-13), name
    # nothing else has collected a gradient
    ours = {id(p) for r in (student, fake) for _, p in r.adapter_parameters()}
    assert all(p.grad is None for p in teacher.network.parameters() if id(p) not in ours)


def test_checkpointing_recomputes_and_survives_retained_graphs():
    teacher = teacher_of("unet")
    student = add_adapter(teacher, "student", rank=2)
    fill(student, 1)
    enable_activation_checkpointing(teacher)
    x, t, cond = inputs()
    calls = []
    teacher.network.mid_block.resnets[1].conv1.base_layer.register_forward_hook(
        lambda *_: calls.append(student.bank.active)
    )
    loss = student(x, t, cond).raw.square().mean()
    teacher(x, t, cond)
    assert calls == ["student", None]
    (first,) = torch.autograd.grad(loss, [student.adapter_parameters()[0][1]], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [student.adapter_parameters()[0][1]])
    assert calls == ["student", None, "student", "student"]
    assert torch.equal(first, second)
    assert student.bank.active is None


def test_checkpointing_enabled_before_injection_is_taken_over():
    teacher = teacher_of("unet", torch.float64)
    teacher.network.enable_gradient_checkpointing()
    student, fake = add_adapter(teacher, "student", rank=2), add_adapter(teacher, "fake", rank=2)
    fill(student, 1)
    fill(fake, 2)
    x, t, cond = inputs(torch.float64)
    grads = []
    for on in (True, False):
        if not on:
            teacher.network.disable_gradient_checkpointing()
        loss = student(x, t, cond).raw.square().mean()
        fake(x, t, cond)
        grads.append(torch.autograd.grad(loss, [p for _, p in student.adapter_parameters()]))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(*grads))


def test_requires_grad_is_never_touched_by_calls(monkeypatch):
    teacher = teacher_of("unet")
    student, fake = add_adapter(teacher, "student", rank=2), add_adapter(teacher, "fake", rank=2)
    average = add_adapter_copy(student, "student.ema")
    flags = {n: p.requires_grad for n, p in teacher.network.named_parameters()}
    assert {n.split(".")[-2] for n, on in flags.items() if on} == {"student", "fake"}
    x, t, cond = inputs()
    with monkeypatch.context() as patch:
        touched = []
        patch.setattr(torch.Tensor, "requires_grad_", lambda p, on=True: touched.append(on) or p)
        for role in (student, teacher, fake, average):
            role(x, t, cond)
        assert touched == []
    assert flags == {n: p.requires_grad for n, p in teacher.network.named_parameters()}


def test_state_is_restored_after_errors_and_early_exit():
    teacher = teacher_of("unet")
    student = add_adapter(teacher, "student", rank=2)
    fill(student, 1)
    x, t, cond = inputs()
    before = teacher(x, t, cond).raw
    with pytest.raises(ValueError, match="no block 'nowhere'"):
        student(x, t, cond, taps=["nowhere"])
    student.feature_maps(x, t, cond, ["mid_block"])
    with pytest.raises(RuntimeError):
        student(torch.randn(3, 7, 8, 8), t, cond)
    assert student.bank.active is None
    assert torch.equal(teacher(x, t, cond).raw, before)


def test_a_view_owns_its_adapter_and_nothing_else():
    teacher = teacher_of("plain")
    student = add_adapter(teacher, "student", rank=2)
    module = nn.ModuleDict({"student": student, "teacher": teacher})
    names = [n for n, _ in student.named_parameters()]
    assert names
    assert all(n.startswith("adapter.") and (".lora_A." in n or ".lora_B." in n) for n in names)
    assert sum(p.requires_grad for p in module.parameters()) == len(names) == len(trainable_parameters(student))
    kept = [k for k in module.state_dict() if k.startswith("student.")]
    assert sorted(kept) == sorted(f"student.{k}" for k in role_state(student))
    assert all(not k.startswith("student.network") for k in kept)
    assert trainable_parameters(teacher) == []
    # peft's own key format: what LoRA files hold
    from peft import get_peft_model_state_dict

    want = get_peft_model_state_dict(teacher.network, adapter_name="student")
    got = student.adapter_state_dict()
    assert set(got) == set(want)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_copies_of_adapters_for_averages():
    teacher = teacher_of("unet")
    student = add_adapter(teacher, "student", rank=2, alpha=5)
    fill(student, 1)
    average = add_adapter_copy(student, "student_ema.power_0_1")
    assert average.adapter_name == "student_ema_power_0_1"
    x, t, cond = inputs()
    for (name, a), (other, b) in zip(average.adapter_parameters(), student.adapter_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert a is not b
    # torch folds a frozen weight into another matrix product than a trained one: equal up to rounding
    assert torch.allclose(average(x, t, cond).raw, student(x, t, cond).raw, atol=1e-5)
    assert trainable_parameters(average) == []
    frozen = average(x, t, cond).raw.clone()
    fill(student, 2)
    assert torch.equal(average(x, t, cond).raw, frozen)
    assert not torch.equal(student(x, t, cond).raw, frozen)
    with pytest.raises(ValueError, match="already has an adapter"):
        add_adapter_copy(student, "student_ema.power_0_1")


@pytest.mark.parametrize("kind", NETWORKS)
def test_merged_network_is_plain_and_equal(kind, tmp_path):
    teacher = teacher_of(kind)
    original = list(teacher.network.state_dict())
    student = add_adapter(teacher, "student", rank=3, alpha=6)
    add_adapter(teacher, "fake", rank=2)
    fill(student, 1)
    if kind == "unet":
        enable_activation_checkpointing(student)
    x, t, cond = inputs()
    merged = merged_network(student)
    assert list(merged.state_dict()) == original
    got = Denoiser(merged, FlowMatching(), "flow_prediction", null_class=5)(x, t, cond).raw
    want = student(x, t, cond).raw
    assert (want - teacher(x, t, cond).raw).abs().max() > 1e-2
    assert torch.allclose(got, want, atol=1e-5, rtol=1e-5)
    if kind != "plain":
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path)
        assert torch.equal(Denoiser(again, FlowMatching(), "flow_prediction")(x, t, cond).raw, got)
    stripped = Denoiser(without_adapters(teacher.network), FlowMatching(), "flow_prediction")
    assert torch.equal(stripped(x, t, cond).raw, teacher(x, t, cond).raw)


def test_bfloat16_backbone_has_float32_adapters():
    teacher = teacher_of("plain", torch.bfloat16)
    x, t, cond = inputs()
    before = teacher(x, t, cond).raw
    student = add_adapter(teacher, "student", rank=2)
    assert {p.dtype for _, p in student.adapter_parameters()} == {torch.float32}
    assert next(teacher.network.parameters()).dtype == torch.bfloat16
    assert torch.equal(student(x, t, cond).raw, before)
    assert {p.dtype for _, p in add_adapter_copy(student, "ema").adapter_parameters()} == {torch.float32}


def test_equal_seeds_give_equal_adapters_and_leave_the_generator_alone():
    values = []
    for seed in (0, 0, 1):
        teacher = teacher_of("plain")
        torch.manual_seed(7 + seed)
        state = torch.get_rng_state()
        role = add_adapter(teacher, "student", rank=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        values.append(torch.cat([p.flatten() for _, p in role.adapter_parameters()]))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_dropout_follows_the_role_not_the_teacher():
    teacher = teacher_of("plain")
    student = add_adapter(teacher, "student", rank=4, dropout=0.5)
    fill(student, 1)
    x, t, _ = inputs()
    student.train()
    teacher.eval()  # what a module does after train(): the dropout lives in the teacher's module tree
    assert not torch.equal(student(x, t).raw, student(x, t).raw)
    student.eval()
    assert torch.equal(student(x, t).raw, student(x, t).raw)


def test_a_student_trains_with_dropout_and_is_sampled_without():
    module = DMD2(ZooDenoiser("digits"), student=Lora(rank=4, dropout=0.5), fake_score=Lora(rank=4), ema=[])
    module.configure_model()
    fill(module.student, 1)
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5, dtype=torch.float64)
    for _ in range(2):  # before and after a look at samples
        assert not torch.equal(module.student(x, t).raw, module.student(x, t).raw)
        assert torch.equal(module.fake_score(x, t).raw, module.fake_score(x, t).raw)
        assert torch.equal(module.sample(3, noise=x), module.sample(3, noise=x))


def test_the_student_meets_a_fake_score_without_dropout():
    module = DMD2(ZooDenoiser("digits"), fake_score=Lora(rank=4, dropout=0.5), ema=[])
    module.configure_model()
    fill(module.fake_score, 1)
    found = {}
    for phase in ("student", "fake_score"):
        module.draws = Draws(module.streams, 0, 0, f"{phase}0")
        losses = (module.losses_of(phase)(Batch(size=3)).losses for _ in range(2))
        found[phase] = [float(next(iter(terms.values())).detach()) for terms in losses]
        assert module.fake_score.training
    assert found["student"][0] == found["student"][1]
    assert found["fake_score"][0] != found["fake_score"][1]


def test_role_state_round_trip_and_refusals():
    student = add_adapter(teacher_of("unet"), "student", rank=2, alpha=4)
    fill(student, 1)
    state = {k: v.clone() for k, v in role_state(student).items()}
    assert sum(v.numel() for v in state.values()) < 0.5 * sum(p.numel() for p in student.network.parameters())
    again = add_adapter(teacher_of("unet"), "student", rank=2, alpha=4)
    load_role_state(again, state)
    x, t, cond = inputs()
    assert torch.equal(again(x, t, cond).raw, student(x, t, cond).raw)
    with pytest.raises(ValueError, match="LoRA alpha is 4 and the role's is 2"):
        load_role_state(add_adapter(teacher_of("unet"), rank=2), state, "run.ckpt")
    with pytest.raises(ValueError, match=r"run.ckpt does not fit UNet2DModel: .* has shape"):
        load_role_state(add_adapter(teacher_of("unet"), rank=3, alpha=4), state, "run.ckpt")
    with pytest.raises(ValueError, match="is missing"):
        load_role_state(again, {})


def test_targets():
    teacher = teacher_of("unet")
    role = add_adapter(teacher, rank=1)
    endings = {p.rsplit(".", 1)[-1] for p in role.config.target_modules}
    assert endings == {"to_q", "to_k", "to_v", "0", "conv1", "conv2", "time_emb_proj"}
    assert role.adapter_name == "adapter"
    assert add_adapter(teacher, rank=1).adapter_name == "adapter_2"
    plain = add_adapter(teacher_of("plain"), rank=1)
    assert set(plain.config.target_modules) == {"first", "middle.1", "time", "last"}
    one = add_adapter(teacher, "one", rank=1, target_modules=["mid_block.resnets.0.conv1"])
    assert next(n for n, _ in one.adapter_parameters()).startswith("mid_block.resnets.0.conv1.lora_A")
    assert len(one.adapter_parameters()) == 2
    with pytest.raises(ValueError, match=r"\['nothing'\] match no layer of UNet2DModel; endings .*conv1"):
        add_adapter(teacher, "x", target_modules=["nothing"])
    with pytest.raises(ValueError, match="a GroupNorm; adapters attach to linear and convolution"):
        add_adapter(teacher, "x", target_modules=["norm1"])
    with pytest.raises(ValueError, match="already has an adapter 'one'"):
        add_adapter(teacher, "one")
    with pytest.raises(ValueError, match="starts from the frozen backbone"):
        add_adapter(one, "x")
    with pytest.raises(ValueError, match="rank must be >= 1"):
        add_adapter(teacher, "x", rank=0)


def test_a_full_name_is_not_an_ending():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(2, 2))
            self.b = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2))})

        def forward(self, x, t):
            return self.a(x) + self.b["a"](x)

    for exact, want in ((True, {"a.0"}), (False, {"a.0", "b.a.0"})):
        teacher = Denoiser(Nested(), FlowMatching(), "sample")
        role = add_adapter(teacher, rank=1, target_modules=["a.0"], exact_names=exact)
        assert {n.split(".lora")[0] for n, _ in role.adapter_parameters()} == want


def test_deep_copies_keep_views_and_backbone_together():
    teacher = teacher_of("unet")
    student = add_adapter(teacher, "student", rank=2)
    enable_activation_checkpointing(student)
    pair = nn.ModuleDict({"teacher": teacher, "student": student})
    other = copy.deepcopy(pair)
    fill(student, 1)
    x, t, cond = inputs()
    assert isinstance(other["student"], AdapterDenoiser)
    assert other["student"].network is other["teacher"].network is not teacher.network
    assert torch.equal(other["student"](x, t, cond).raw, teacher(x, t, cond).raw)
    fill(other["student"], 1)
    loss = other["student"](x, t, cond).raw.square().mean()
    student(x, t, cond).raw.square().mean().backward()
    loss.backward()
    for (_, a), (_, b) in zip(student.adapter_parameters(), other["student"].adapter_parameters()):
        assert torch.equal(a.grad, b.grad)


def test_checkpointing_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="Plain has no activation checkpointing"):
        enable_activation_checkpointing(teacher_of("plain"))


def test_a_small_adapter_survives_merging_into_a_half_precision_backbone():
    source = Denoiser(ResidualMLP((2,), 16, 1).to(torch.bfloat16), FlowMatching(), "flow_prediction")
    adapter = add_adapter(source, rank=2)
    with torch.no_grad():
        for _, parameter in adapter.adapter_parameters():
            parameter.normal_(std=0.005)
    layer = adapter.bank.layers["blocks.0.inner"]
    change = layer.get_delta_weight(adapter.adapter_name).float()
    before = layer.get_base_layer().weight.detach().float()
    merged = merged_network(adapter, widened=True).blocks[0].inner.weight
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged - before, change, rtol=1e-2, atol=1e-7)
    with pytest.warns(UserWarning, match="rounds 9.% of its change away"):
        rounded = merged_network(adapter).blocks[0].inner.weight.float()
    assert (rounded - before - change).norm() > 0.5 * change.norm()
    assert layer.get_base_layer().weight.dtype == torch.bfloat16, "the backbone is as it was"
