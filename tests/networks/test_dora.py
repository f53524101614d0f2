"""Adapters with magnitudes (DoRA) on the shared backbone."""

import copy
import json

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_lora import NETWORKS, checkpoint_all, inputs, teacher_of
from tiny_pipelines import MAKERS
from torch import nn
from torch.func import functional_call

from lightning_distill.export import export_lora, probe_cond, verify_export
from lightning_distill.generation import draw_noise, generate
from lightning_distill.networks.adapter_transfer import adapter_changes
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import add_adapter, add_adapter_copy, load_role_state, role_state
from lightning_distill.networks.merging import base_state_dict, merged_network, without_adapters
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.second_time import add_second_time
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.processes import FlowMatching
from lightning_distill.times import few_step_times


def shake(role, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in role.adapter_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))


def reference_weights(role, leaves, base):
    """W' = m (W + s B A) / |W + s B A| by row, the norm without gradient (arXiv:2402.09353, Eq. 5 and Section 4.3)."""
    weights = {}
    for path in {name.split(".lora_")[0] for name in leaves}:
        down, up, m = (leaves[f"{path}.lora_{part}.weight"] for part in ("A", "B", "magnitude_vector"))
        full = base[f"{path}.weight"]
        scale = role.config.lora_alpha / role.config.r
        full = full + scale * (up.flatten(1) @ down.flatten(1)).view_as(full)
        norm = full.detach().flatten(1).norm(dim=1)
        weights[f"{path}.weight"] = full * (m.flatten() / norm).view(-1, *[1] * (full.ndim - 1))
    return weights


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_outputs_and_gradients_equal_those_of_the_formula(kind, checkpointing):
    """Two adapters in turn, one of them plain; convolutions and linear layers."""
    teacher = teacher_of(kind, torch.float64)
    student = add_adapter(teacher, "student", rank=2, alpha=3.0, dora=True)
    fake = add_adapter(teacher, "fake", rank=2)
    shake(student, 1)
    shake(fake, 2)
    plain = without_adapters(teacher.network)
    if checkpointing:
        checkpoint_all(student)
    x, t, cond = inputs(torch.float64)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in student.adapter_parameters()}
    weights = reference_weights(student, leaves, base_state_dict(teacher.network))

    class Functional(nn.Module):
        dtype = torch.float64

        def forward(self, *args, **kwargs):
            return functional_call(plain, weights, args, kwargs)

    formula = Denoiser(Functional(), FlowMatching(), "flow_prediction", null_class=5, family=teacher.family)
    got, want = student(x, t, cond).raw, formula(x, t, cond).raw
    other = fake(x, t, cond).raw  # another adapter runs before the backward pass
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert (got - teacher(x, t, cond).raw).abs().max() > 1e-3
    assert (got - other).abs().max() > 1e-3
    got.square().mean().backward()
    wanted = torch.autograd.grad(want.square().mean(), list(leaves.values()))
    for (name, p), g in zip(student.adapter_parameters(), wanted, strict=True):
        assert g.abs().max() > 1e-12, name
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-12)
    assert all(p.grad is None for _, p in fake.adapter_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_the_teacher_bit_for_bit_and_merges(dtype):
    teacher = teacher_of("dit", dtype)
    x, t, cond = inputs()
    before = teacher(x, t, cond).raw
    student = add_adapter(teacher, "student", rank=3, dora=True)
    assert torch.equal(student(x, t, cond).raw, before)
    assert {p.dtype for _, p in student.adapter_parameters()} == {torch.float32}
    assert all(p.requires_grad for _, p in student.adapter_parameters())
    shake(student, 1)
    merged = Denoiser(merged_network(student, widened=True), FlowMatching(), "flow_prediction", null_class=5)
    wanted = student(x, t, cond).raw
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(merged(x, t, cond).raw, wanted, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert torch.equal(teacher(x, t, cond).raw, before)


def test_state_copies_and_files():
    teacher = teacher_of("unet")
    student = add_adapter(teacher, "student", rank=2, dora=True)
    shake(student, 1)
    state = {k: v.clone() for k, v in role_state(student).items()}
    assert sum(".lora_magnitude_vector." in k for k in state) == len(student.config.target_modules)
    x, t, cond = inputs()
    average = add_adapter_copy(student, "ema")
    torch.testing.assert_close(average(x, t, cond).raw, student(x, t, cond).raw, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in average.parameters())
    again = add_adapter(teacher_of("unet"), "student", rank=2, dora=True)
    load_role_state(again, state)
    assert torch.equal(again(x, t, cond).raw, student(x, t, cond).raw)
    with pytest.raises(ValueError, match=r"lora_magnitude_vector\.weight is unknown"):
        load_role_state(add_adapter(teacher_of("unet"), "student", rank=2), state)
    want = get_peft_model_state_dict(teacher.network, adapter_name="student")
    got = student.adapter_state_dict()
    assert set(got) == set(want)
    assert all(torch.equal(got[k], want[k]) for k in want)
    pair = copy.deepcopy(nn.ModuleDict({"teacher": teacher, "student": student}))
    assert torch.equal(pair["student"](x, t, cond).raw, student(x, t, cond).raw)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.split = nn.Conv2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x, t):
        return self.split(x)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"Lora\(dora=True, dropout=0.1\): a row is scaled as a whole"):
        Lora(dora=True, dropout=0.1).check()
    source = Denoiser(Grouped(), FlowMatching(), "flow_prediction")
    with pytest.raises(ValueError, match="cannot adapt 'split' of Grouped, a convolution in groups"):
        Lora(rank=2, dora=True).build(source, "student")
    Lora(rank=2).build(source, "student")
    with pytest.raises(ValueError, match="convolution in groups"):  # also where a plain adapter is already
        Lora(rank=2, dora=True).build(source, "fake")


def test_magnitudes_are_not_carried_to_another_model(tmp_path):
    """Their change is no sum of matrices: neither the role nor its file is transferred as if it were a plain LoRA."""
    teacher = teacher_of("plain")
    role = add_adapter(teacher, "style", rank=2, dora=True)
    with pytest.raises(ValueError, match=r"learned magnitudes \(DoRA\).*train a plain LoRA"):
        adapter_changes(role)
    save_file(role_state(role), tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"learned magnitudes \(DoRA\)"):
        adapter_changes(tmp_path / "style.safetensors")


# ------------------------------------------------------------------------------------------------ LoRA files
@pytest.mark.sparse(3)
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "sdxl", "sana_sprint", "z_image", "qwen_image", "wan", "cogvideox", "ltx",
))])  # fmt: skip
def test_stock_pipelines_read_magnitudes_with_diffusers_names(name, tmp_path):
    """The samples of the student; without the magnitudes, or from kohya's names, there would be others."""
    tiny = MAKERS[name]()
    base = tiny.save(tmp_path / "base")
    teacher = PretrainedDenoiser(str(base), guidance=tiny.guidance, shape=list(tiny.shape)).build()
    student = add_adapter(teacher, "student", rank=2, alpha=3.0, dora=True)
    shake(student, 1)
    times, out = few_step_times(student.process, 2), tmp_path / "lora"
    export_lora(student, times, "renoise", out, shape=tiny.shape)
    tensors = load_file(out / "pytorch_lora_weights.safetensors")
    magnitudes = {key for key in tensors if key.endswith(".lora_magnitude_vector.weight")}
    assert len(magnitudes) == len(student.config.target_modules)
    cond = probe_cond(student, 2, json.loads((out / "distill_config.json").read_text())["size"])
    generator = torch.Generator().manual_seed(3)
    noise = draw_noise((2, *tiny.shape), generator)
    x0 = generate(student, noise, cond, times, "renoise", generator=generator)
    assert verify_export(out, x0, seed=3, cond=cond, base=base) <= 1e-5
    plain = {key: value for key, value in tensors.items() if key not in magnitudes}
    save_file(plain, out / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="makes other images"):
        verify_export(out, x0, seed=3, cond=cond, base=base)
    with pytest.raises(ValueError, match=r"diffusers drops from files with kohya's names; export the LoRA file with"):
        export_lora(student, times, "renoise", tmp_path / "kohya", style="kohya", shape=tiny.shape)
    assert not (tmp_path / "kohya").exists()


def test_magnitudes_and_folded_target_times_have_no_common_file(tmp_path):
    tiny = MAKERS["sd3"]()
    denoiser = Denoiser(tiny.network, FlowMatching(), "flow_prediction")
    add_second_time(denoiser.network)
    student = add_adapter(denoiser, "student", rank=2, dora=True)
    shake(student, 1)
    with pytest.raises(ValueError, match=r"magnitudes \(DoRA\), which rescale .* export the pipeline, whose weights"):
        export_lora(student, [1.0, 0.5], "flow_map", tmp_path / "out", shape=tiny.shape)
    assert not list(tmp_path.iterdir())


def test_rows_of_zeros_are_refused():
    """They have no direction, and made samples of NaN."""
    teacher = teacher_of("unet")
    with torch.no_grad():
        teacher.network.conv_out.weight[0] = 0
    with pytest.raises(ValueError, match="cannot adapt 'conv_out' of UNet2DModel, of which rows are zero"):
        add_adapter(teacher, "student", rank=2, dora=True, target_modules=["conv_out"])
