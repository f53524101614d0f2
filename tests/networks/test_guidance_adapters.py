"""Guidance adapters: nothing at the start, the scale afterwards, and never a change of the shared network."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from frozen import frozen
from sampling_of_cases import long
from tiny_pipelines import pixart_sigma, sd3, sd15, wan
from torch import nn
from torch.nn import functional as F

from lightning_distill.guidance import is_told
from lightning_distill.networks.beside import Beside
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import Experts
from lightning_distill.networks.guidance_adapter import Told
from lightning_distill.networks.guidance_adapters import GuidanceAdapters, GuidedDenoiser
from lightning_distill.networks.lora import add_adapter, enable_activation_checkpointing
from lightning_distill.networks.merging import base_state_dict, merged_network
from lightning_distill.networks.roles import (
    Copy,
    Lora,
    averaged_copy,
    load_role_state,
    role_state,
    trainable_parameters,
    with_network,
)
from lightning_distill.networks.second_time import add_guidance
from lightning_distill.networks.shared_encoder import SharedEncoder
from lightning_distill.networks.small import ResidualMLP, small_dit, small_unet
from lightning_distill.processes import FlowMatching, VariancePreserving

KINDS = ["attention", "additive"]


def randomised(module, seed=0, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module


def classes(network, shape, kind="flow_prediction", process=None, count=3):
    teacher = Denoiser(randomised(network), process or FlowMatching(), kind, null_class=count).eval()
    return teacher, shape, {"class_labels": torch.tensor([0, 2])}


def pipeline(make):
    tiny = make()
    return tiny.denoiser(), tiny.shape, tiny.cond(2)


def unet():
    network = small_unet(8, 1, 3, (8, 16), norm_num_groups=4, attention_head_dim=8)
    return classes(network, (1, 8, 8), "epsilon", VariancePreserving())


TEACHERS = {
    "mlp": lambda: classes(ResidualMLP((2,), 8, 2, num_classes=3), (2,)),
    "unet": unet,
    "dit": lambda: classes(small_dit(8, 1, 3, 4, 1, 1, 8, learned_variance=True), (1, 8, 8)),
    "sd15": lambda: pipeline(sd15),
    "sd3": lambda: pipeline(sd3),
    "pixart": lambda: pipeline(pixart_sigma),
    "wan": lambda: pipeline(wan),
}


def made(name, **settings):
    teacher, shape, cond = TEACHERS[name]()
    teacher.requires_grad_(False)
    student = GuidanceAdapters(**{"width": 8, **settings}).build(teacher, "student")
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(4))
    return teacher, student, (x, torch.tensor([0.3, 0.8], dtype=torch.float64), cond)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEACHERS)
def test_a_new_student_is_the_conditional_teacher_and_a_trained_one_is_told_the_scale(name, kind):
    teacher, student, at = made(name, kind=kind)
    before = {k: v.clone() for k, v in base_state_dict(teacher.network).items()}
    plain = teacher(*at).raw
    for w in (1.0, 7.5):
        assert torch.equal(student(*at, guidance=torch.tensor(w)).raw, plain)
    for adapter in student.adapters:
        nn.init.normal_(adapter.out.weight, std=0.5)
    one, two = (student(*at, guidance=torch.tensor(w)).raw for w in (1.0, 4.0))
    assert (one - plain).abs().max() > 1e-3
    assert (one - two).abs().max() > 1e-4
    # a scale per sample; and the teacher, with which the network is shared, is what it was
    each = student(*at, guidance=torch.tensor([1.0, 4.0])).raw
    torch.testing.assert_close(each, torch.stack([one[0], two[1]]), rtol=1e-4, atol=1e-5)
    assert torch.equal(teacher(*at).raw, plain)
    assert student.network is teacher.network
    each.square().mean().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for a in student.adapters for p in a.out.parameters())
    after = base_state_dict(teacher.network)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("name", "count", "ending"), [("sd15", 3, "attn2"), ("dit", 1, "attn1"), ("unet", 1, "0"), ("mlp", 2, "")]
)
def test_they_sit_beside_cross_attention_else_attention_else_blocks(name, count, ending):
    _, student, _ = made(name)
    assert len(student.paths) >= count
    assert all(path.endswith(ending) for path in student.paths)
    if name == "mlp":
        assert student.paths == ["blocks.0", "blocks.1"]
    if name == "unet":
        assert student.paths == ["mid_block.attentions.0"]


def test_a_role_holds_its_adapters_alone():
    teacher, student, _ = made("sd15")
    assert all(key.startswith("adapters.") for key in role_state(student))
    assert {id(p) for p in student.parameters()}.isdisjoint({id(p) for p in teacher.parameters()})
    assert all(p.requires_grad for p in student.parameters())
    assert not any("adapters" in key for key in teacher.state_dict())


def told(n=2, text=None, mask=None):
    cond = {"class_labels": torch.tensor([0, 2])[:n]}
    if text is not None:
        cond = {"encoder_hidden_states": text}
    if mask is not None:
        cond["encoder_attention_mask"] = mask
    return Told(torch.tensor([2.0, 5.0])[:n], torch.tensor([0.3, 0.8])[:n], cond)


def test_the_attention_form_is_attention_to_scale_time_and_condition():
    _, student, _ = made("dit", heads=1)
    adapter = randomised(student.adapters[0])
    x, call = torch.randn(2, 4, 8), told()
    w, t, c = adapter.scale(call.scale / 10), adapter.time(call.time), adapter.label.weight[call.cond["class_labels"]]
    tokens = torch.stack([w, t, c], dim=1)
    weight_k, weight_v = adapter.key_value.weight.chunk(2)
    scores = torch.einsum("bnd,bsd->bns", x @ adapter.query.weight.T, tokens @ weight_k.T) / math.sqrt(8)
    expected = scores.softmax(-1) @ (tokens @ weight_v.T) @ adapter.out.weight.T + adapter.out.bias
    torch.testing.assert_close(adapter(x, call), expected, rtol=1e-4, atol=1e-5)


def test_the_additive_form_is_one_vector_for_all_positions():
    _, student, _ = made("dit", kind="additive")
    adapter = randomised(student.adapters[0])
    call = told()
    whole = adapter.scale(call.scale / 10) + adapter.time(call.time) + adapter.label.weight[call.cond["class_labels"]]
    linear, _, norm = adapter.hidden
    expected = F.linear(norm(F.silu(linear(whole))), adapter.out.weight, adapter.out.bias)
    torch.testing.assert_close(adapter(torch.randn(2, 4, 8), call), expected[:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_words_and_left_out_inputs_have_no_influence(kind):
    _, student, _ = made("sd15", kind=kind)
    adapter = randomised(student.adapters[0])
    x, text = torch.randn(2, 6, adapter.query.in_features if kind == "attention" else 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    out = adapter(x, told(text=text, mask=mask))
    changed = text.clone()
    changed[0, 2:] += 3.0
    assert torch.allclose(adapter(x, told(text=changed, mask=mask)), out, atol=1e-6)
    changed[0, 1] += 3.0
    assert not torch.allclose(adapter(x, told(text=changed, mask=mask)), out, atol=1e-4)
    deaf = randomised(made("sd15", kind=kind, time=False, condition=False)[1].adapters[0])
    call = told(text=text)
    other = Told(call.scale, 0.5 * call.time, {"encoder_hidden_states": 2 * text})
    assert torch.equal(deaf(x, call), deaf(x, other))
    assert not torch.allclose(deaf(x, call), deaf(x, Told(2 * call.scale, call.time, call.cond)), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputed_block_has_the_adapters_of_its_forward(kind):
    grads = []
    for checkpointing in (False, True):
        teacher, student, at = made("sd15", kind=kind)
        randomised(student)
        if checkpointing:
            enable_activation_checkpointing(student)
        student.network.train()
        student(*at, guidance=torch.tensor(3.0)).raw.square().mean().backward()
        grads.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
        assert student.guidance_bank.running == []
        assert torch.isfinite(teacher(*at).raw).all()
    assert len(grads[0]) == len(grads[1]) > 0
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_roles_and_guidance_adapters_share_one_network(lora_first):
    teacher, _, cond = TEACHERS["sd15"]()
    if lora_first:
        lora = add_adapter(teacher, rank=2)
    student = GuidanceAdapters(width=8).build(teacher)
    if not lora_first:
        lora = add_adapter(teacher, rank=2)
    at = (torch.randn(2, 4, 8, 8), torch.tensor(0.4), cond)
    plain = teacher(*at).raw
    randomised(student)
    randomised(lora.adapter)
    alone, low_rank = student(*at, guidance=torch.tensor(2.0)).raw, lora(*at).raw
    assert not torch.equal(alone, plain)
    assert not torch.equal(low_rank, plain)
    assert torch.equal(teacher(*at).raw, plain)
    assert all(p.requires_grad for role in (student, lora) for p in role.parameters())


def test_an_average_is_a_second_set_on_the_same_network():
    teacher, student, at = made("mlp")
    randomised(student)
    average = averaged_copy(student, "power")
    assert isinstance(average, GuidedDenoiser)
    assert average.network is teacher.network
    assert not any(p.requires_grad for p in average.parameters())
    w = torch.tensor(2.5)
    assert torch.equal(average(*at, guidance=w).raw, student(*at, guidance=w).raw)
    randomised(student, seed=1)
    assert not torch.equal(average(*at, guidance=w).raw, student(*at, guidance=w).raw)
    load_role_state(average, role_state(student))
    assert torch.equal(average(*at, guidance=w).raw, student(*at, guidance=w).raw)


# ------------------------------------------------------------------------------------------------ a second stage
def taught(name="sd15", **settings):
    """A trained guided teacher with a network of its own, as of an earlier run."""
    _, student, at = made(name, **settings)
    randomised(student)
    student.family = replace(student.family, guidance_scale=4.0)
    teacher = with_network(student, merged_network(student)).requires_grad_(False).eval()
    assert teacher.owns_network
    with frozen(student):
        assert torch.equal(teacher(*at).raw, student(*at).raw)
    return teacher, at


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", [Copy(), Lora(rank=2), long(Lora(rank=2, dora=True))], ids=["copy", "lora", "dora"])
@pytest.mark.parametrize("name", ["mlp", "unet", "sd15", "sd3"])
def test_a_student_of_a_guided_teacher_is_that_teacher_at_first(name, role, kind):
    teacher, at = taught(name, kind=kind)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = role.build(teacher, "student")
    assert isinstance(student, GuidedDenoiser)
    assert is_told(student)
    assert student.owns_network == isinstance(role, Copy)
    full = {id(p) for p in student.parameters()}
    assert full.isdisjoint({id(p) for p in teacher.parameters()} if isinstance(role, Copy) else set())
    assert {id(p) for _, p in trainable_parameters(student)} == {id(p) for p in student.parameters()}
    with torch.no_grad(), frozen(student):
        for w in (None, torch.tensor(1.0), torch.tensor([2.0, 6.0])):
            assert torch.equal(student(*at, guidance=w).raw, teacher(*at, guidance=w).raw)
    student(*at).raw.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in student.adapters[0].out.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        assert not torch.allclose(student(*at).raw, teacher(*at).raw, atol=1e-5)
    own = {key.replace(".base_layer", ""): value for key, value in teacher.state_dict().items() if ".lora_" not in key}
    assert before.keys() == own.keys()
    assert all(torch.equal(before[key], own[key]) for key in before)


@pytest.mark.parametrize("role", [Copy(), Lora(rank=2)], ids=["copy", "lora"])
def test_averages_and_states_of_a_second_stage(role):
    teacher, at = taught()
    student = role.build(teacher, "student")
    randomised(student, seed=3, std=0.1)
    average = averaged_copy(student, "power")
    assert role_state(average).keys() == role_state(student).keys()
    assert not any(p.requires_grad for p in average.parameters())
    with torch.no_grad():
        assert torch.equal(average(*at).raw, student(*at).raw)
        randomised(student, seed=5, std=0.1)
        assert not torch.equal(average(*at).raw, student(*at).raw)
        load_role_state(average, role_state(student))
        assert torch.equal(average(*at).raw, student(*at).raw)
        # a third stage begins where this one ended
        third = with_network(student, merged_network(student))
        torch.testing.assert_close(third(*at).raw, student(*at).raw, rtol=1e-4, atol=1e-4)
        assert torch.equal(Copy().build(third).requires_grad_(False)(*at).raw, third(*at).raw)


def test_equal_seeds_are_equal_adapters():
    one, two, other = (made("mlp", seed=seed)[1] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_what_does_not_fit_is_refused():
    teacher, student, at = made("mlp")
    with pytest.raises(ValueError, match="this call gives none"):
        student(*at)
    with pytest.raises(ValueError, match="choose attention or additive"):
        GuidanceAdapters(kind="gated").check()
    with pytest.raises(ValueError, match="number of heads divides"):
        GuidanceAdapters(width=8, heads=3).check()
    with pytest.raises(ValueError, match="match no module"):
        GuidanceAdapters(target_modules=["attn"]).build(teacher)
    with pytest.raises(ValueError, match="has no linear or convolution layer"):
        GuidanceAdapters(target_modules=["time_proj"]).build(teacher)
    with pytest.raises(ValueError, match="itself an adapter"):
        GuidanceAdapters().build(student)
    for role in (Experts(classes=[[0, 1], [2]]), SharedEncoder(decoders=2), Beside()):
        with pytest.raises(ValueError, match=r"the guidance adapters beside it would be lost; begin at the network"):
            role.build(student, "student")
    embeds = Denoiser(ResidualMLP((2,), 8, 1, num_classes=3), FlowMatching(), "flow_prediction")
    add_guidance(embeds.network)
    with pytest.raises(ValueError, match="is told a guidance scale already"):
        GuidanceAdapters().build(embeds)
