"""Students of two times in stock pipelines of one: target times folded into the time embedding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sampling_of_cases import long
from tiny_pipelines import MAKERS
from torch import nn

from lightning_distill.export import export_denoiser, export_lora, probe_cond, target_times, verify_export
from lightning_distill.export.target_times import Steps, fold_into, low_rank, record_steps
from lightning_distill.generation import draw_noise, generate
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import add_adapter
from lightning_distill.networks.merging import merged_network, widest
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.second_time import add_guidance, add_second_time, remove_second_time, second_time_of
from lightning_distill.networks.small import small_unet
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import FlowMatching, VariancePreserving
from lightning_distill.times import few_step_times

FAST = ("sd15", "flux", "wan")
SOME = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
    for name in MAKERS
    if name not in ("anyflow", "sana_sprint")  # a target time of its own; no jumps in its pipeline
]


def randomised(network: nn.Module, spread: float = 0.2) -> None:
    """Weights of the branch as training could leave them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in second_time_of(network).parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))


def read(name: str, folder: Path) -> tuple[Denoiser, tuple[int, ...]]:
    tiny = MAKERS[name]()
    student = PretrainedDenoiser(str(tiny.save(folder)), guidance=tiny.guidance, shape=list(tiny.shape)).build()
    return student, tiny.shape


def samples(
    student: Denoiser, shape: tuple[int, ...], times: list[float], sampler: str, out: Path
) -> tuple[torch.Tensor, dict]:
    cond = probe_cond(student, 2, json.loads((out / "distill_config.json").read_text())["size"])
    generator = torch.Generator().manual_seed(3)
    noise = draw_noise((2, *shape), generator)
    return generate(student, noise, cond, times, sampler, generator=generator), cond


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    ("kind", "input", "steps"),
    [
        ("zero_init", "r", 4),
        long("zero_init", "difference", 1),
        long("scaled_difference", "r", 2),
        ("gated_copy", "r", 4),
    ],
)
def test_flow_maps_of_every_family(name, kind, input, steps, tmp_path):
    student, shape = read(name, tmp_path / "base")
    add_second_time(student.network, kind, input=input)
    randomised(student.network)
    times = few_step_times(student.process, steps)
    if (name, kind, steps) == ("lumina2", "zero_init", 4):  # is told times in [0, 1], as they are
        with pytest.raises(ValueError, match=r"embeds the times of these 4 steps so much alike .* grow \d+ times"):
            export_denoiser(student, times, "flow_map", tmp_path / "out", shape=shape)
        return
    out = export_denoiser(student, times, "flow_map", tmp_path / "out", shape=shape)
    x0, cond = samples(student, shape, times, "flow_map", out)
    assert verify_export(out, x0, seed=3, cond=cond) <= 1e-5
    assert "The target time of each step is part of the weights" in (out / "README.md").read_text()
    plain = generate(student, draw_noise(x0.shape, torch.Generator().manual_seed(3)), cond, times, "ode")
    assert (plain - x0).abs().max() > 1e-3  # the branch matters
    assert second_time_of(student.network) is not None  # and stays in the student


@pytest.mark.parametrize(("kind", "steps"), [("zero_init", 4), long("gated_copy", 2), long("scaled_difference", 1)])
def test_adapters_on_weights_of_half_precision(kind, steps, tmp_path):
    """The steps are noted as the float32 network of the export computes them."""
    network = small_unet(8, 3, 0, (8, 16), norm_num_groups=4, attention_head_dim=8).to(torch.bfloat16)
    source = Denoiser(network, FlowMatching(), "flow_prediction").eval()
    add_second_time(network, kind)
    randomised(network)
    student = add_adapter(source, "student", rank=2, target_modules=["to_q", "second_time.time.outer", "linear_2"])
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    times = few_step_times(student.process, steps)
    out = export_denoiser(student, times, "flow_map", tmp_path / "out")
    assert network.conv_in.weight.dtype == torch.bfloat16  # afterwards
    with widest(network):
        x0 = generate(student, draw_noise((2, 3, 8, 8), torch.Generator().manual_seed(3)), {}, times, "flow_map")
    assert verify_export(out, x0, seed=3, fresh=False) <= 1e-5


@pytest.mark.parametrize("style", ["diffusers", long("kohya")])
@pytest.mark.parametrize(("steps", "rank"), [(1, 2), (4, 2), (2, 4)])
def test_lora_files_hold_the_target_times(style, steps, rank, tmp_path):
    """Also where they need more ranks than the adapter has."""
    base = tmp_path / "base"
    source, shape = read("sd15", base)
    add_second_time(source.network)
    student = add_adapter(source, "student", rank=rank, target_modules=["attn1.to_q", "second_time.time.outer"])
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    assert any("second_time" in key for key in student.adapter_state_dict())
    times = few_step_times(student.process, steps)
    out = export_lora(student, times, "flow_map", tmp_path / "out", style=style, shape=shape)
    tensors = load_file(next(out.glob("*.safetensors")))
    assert not any("second_time" in key for key in tensors)
    assert {len(v) for k, v in tensors.items() if "lora_A" in k or "lora_down" in k} == {max(rank, steps)}
    x0, cond = samples(student, shape, times, "flow_map", out)
    assert verify_export(out, x0, seed=3, cond=cond, base=base) <= 1e-5


def test_other_samplers_and_a_layer_that_has_an_adapter_already(tmp_path):
    base = tmp_path / "base"
    source, shape = read("sd15", base)
    add_second_time(source.network)
    randomised(source.network)
    for sampler in ("renoise", "ode"):
        out = export_denoiser(source, few_step_times(source.process, 2), sampler, tmp_path / sampler, shape=shape)
        x0, cond = samples(source, shape, few_step_times(source.process, 2), sampler, out)
        assert verify_export(out, x0, seed=3, cond=cond) <= 1e-5
    student = add_adapter(source, "student", rank=2, alpha=6.0, target_modules=["time_embedding.linear_2"])
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    out = export_lora(student, [1.0], "flow_map", tmp_path / "lora", shape=shape)
    x0, cond = samples(student, shape, [1.0], "flow_map", out)
    assert verify_export(out, x0, seed=3, cond=cond, base=base) <= 1e-5


@pytest.mark.parametrize(("steps", "lora"), [(1, False), (4, True)])
def test_networks_that_are_told_two_times_jump_in_their_own_pipeline(steps, lora, tmp_path):
    student, shape = read("anyflow", tmp_path / "base")
    if lora:
        student = add_adapter(student, "student", rank=2, target_modules=["attn1.to_q"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    times = few_step_times(student.process, steps)
    folders = [export_denoiser(student, times, "flow_map", tmp_path / "pipeline", shape=shape)]
    if lora:
        folders += [export_lora(student, times, "flow_map", tmp_path / "lora", shape=shape)]
    x0, cond = samples(student, shape, times, "flow_map", folders[0])
    for folder, base in zip(folders, (None, tmp_path / "base")):
        assert json.loads((folder / "distill_config.json").read_text())["call"]["use_mean_velocity"] is True
        assert verify_export(folder, x0, seed=3, cond=cond, base=base) <= 1e-5
    assert not torch.allclose(x0, samples(student, shape, times, "ode", folders[0])[0], atol=1e-3)


def test_one_jump_to_clean_data_is_one_of_their_pipeline_and_several_are_not(tmp_path):
    """A flow-map method may sample them by renoise: jumps to clean data, and fresh noise between."""
    student, shape = read("anyflow", tmp_path / "base")
    student.jumps = True
    out = export_denoiser(student, [1.0], "renoise", tmp_path / "one", shape=shape)
    x0, cond = samples(student, shape, [1.0], "renoise", out)
    assert verify_export(out, x0, seed=3, cond=cond) <= 1e-5
    with pytest.raises(ValueError, match="jumps to clean data in each of 2 steps"):
        export_denoiser(student, [1.0, 0.5], "renoise", tmp_path / "two", shape=shape)


@pytest.mark.parametrize("read_from_file", [False, True])
def test_adapters_of_layers_that_the_original_lacks_are_refused(read_from_file, tmp_path):
    student, shape = read("sd15", tmp_path / "base") if read_from_file else (MAKERS["sd15"]().denoiser(), None)
    shape = shape or MAKERS["sd15"]().shape
    role = TwoTime(role=Lora(rank=2), kind=None, guidance=True).build(student, "student")
    assert any("cond_proj" in key for key in role.adapter_state_dict())
    for style in ("diffusers", "kohya"):
        with pytest.raises(ValueError, match=r"time_embedding.cond_proj, which was installed.*export the pipeline"):
            export_lora(role, few_step_times(role.process, 2), "renoise", tmp_path / "out", style=style, shape=shape)
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_read_back_are_refused(tmp_path):
    source, shape = read("lcm", tmp_path / "base")
    student = add_adapter(source, "student", rank=2, target_modules=["attn1.to_q", "time_embedding.cond_proj"])
    with pytest.raises(ValueError, match=r"no name with underscores for time_embedding.cond_proj.* diffusers' names"):
        export_lora(student, [1.0], "renoise", tmp_path / "out", style="kohya", shape=shape)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving(zero_terminal_snr=True)])
def test_networks_without_text(process, tmp_path):
    network = small_unet(8, 3, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    kind = "flow_prediction" if isinstance(process, FlowMatching) else "v_prediction"
    student = Denoiser(network, process, kind).eval()
    add_second_time(network, "gated_copy")
    randomised(network)
    times = few_step_times(process, 2)
    out = export_denoiser(student, times, "flow_map", tmp_path / "out")
    noise = draw_noise((2, 3, 8, 8), torch.Generator().manual_seed(0))
    assert verify_export(out, generate(student, noise, {}, times, "flow_map")) <= 1e-5


def test_a_scale_that_a_branch_is_told_is_part_of_the_weights_as_well(tmp_path):
    student, shape = read("sd3", tmp_path / "base")
    add_guidance(student.network)
    randomised(student.network)
    student.family = replace(student.family, guidance_scale=3.0)
    times = few_step_times(student.process, 2)
    out = export_denoiser(student, times, "ode", tmp_path / "out", shape=shape)
    x0, cond = samples(student, shape, times, "ode", out)
    assert verify_export(out, x0, seed=3, cond=cond) <= 1e-5


def test_an_embedded_scale_of_the_users_own_is_the_one_that_is_folded(tmp_path):
    student, shape = read("lcm", tmp_path / "base")
    add_second_time(student.network)
    randomised(student.network)
    times, own = few_step_times(student.process, 2), student.family
    assert own.guidance_scale != 3.0
    out = export_denoiser(student, times, "flow_map", tmp_path / "out", shape=shape, guidance=3.0)
    assert student.family is own
    student.family = replace(own, guidance_scale=3.0)
    x0, cond = samples(student, shape, times, "flow_map", out)
    assert verify_export(out, x0, seed=3, cond=cond) <= 1e-5
    student.family = own
    other, _ = samples(student, shape, times, "flow_map", out)
    assert (other - x0).abs().max() > 1e-4


@pytest.mark.parametrize("lora", [False, True])
def test_what_cannot_be_exported_is_refused_before_it_is_sampled(lora, tmp_path, monkeypatch):
    monkeypatch.setattr(target_times, "generate", lambda *_: pytest.fail("the student was sampled"))
    student, shape = read("sd15", tmp_path / "base")
    add_second_time(student.network)
    export = export_denoiser
    if lora:
        student, export = add_adapter(student, "student", rank=2, target_modules=["to_q"]), export_lora
    with pytest.raises(ValueError, match="sampler='heun' cannot be exported"):
        export(student, [1.0, 0.5], "heun", tmp_path / "out", shape=shape)


def test_the_branch_leaves_no_trace():
    network = small_unet(8, 3, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    add_second_time(network)
    randomised(network)
    remove_second_time(network)
    assert network.state_dict().keys() == before.keys()
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs
        assert not module._forward_hooks_always_called
        assert not module._forward_pre_hooks_with_kwargs
    remove_second_time(network)


def test_both_forms_solve_the_equations():
    generator = torch.Generator().manual_seed(0)
    h, a = (torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (8, 5))
    down, up = low_rank(Steps(h, a))
    assert down.shape == (3, 8)
    torch.testing.assert_close((h.float() @ down.T) @ up.T, a.float(), atol=1e-5, rtol=1e-5)
    network = small_unet(8, 3, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    student = Denoiser(network, FlowMatching(), "flow_prediction").eval()
    add_second_time(network)
    randomised(network)
    times = [1.0, 0.7, 0.2]
    steps = record_steps(student, times, "flow_map", None)
    assert list(steps) == ["time_embedding.linear_2"]
    folded = merged_network(student)
    fold_into(folded, steps)
    x = torch.randn(2, 3, 8, 8)
    plain = Denoiser(folded, FlowMatching(), "flow_prediction").eval()
    for t, r in zip(times, [*times[1:], 0.0]):
        want = student(x, torch.tensor(t), {}, r=torch.tensor(r)).raw
        torch.testing.assert_close(plain(x, torch.tensor(t), {}).raw, want, atol=1e-5, rtol=1e-5)
    t = torch.tensor(0.45)  # between the steps nothing is promised
    assert not torch.allclose(plain(x, t, {}).raw, student(x, t, {}, r=torch.tensor(0.1)).raw, atol=1e-4)


def test_embeddings_that_end_otherwise_are_refused(tmp_path):
    network = small_unet(8, 3, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    student = Denoiser(network, FlowMatching(), "flow_prediction").eval()
    add_second_time(network)
    network.time_embedding.post_act = nn.SiLU()
    with pytest.raises(ValueError, match="the time embedding time_embedding does not end in a linear layer"):
        export_denoiser(student, [1.0], "flow_map", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert not any(hook for module in network.time_embedding.modules() for hook in module._forward_hooks.values()
                   if "_Layer" in repr(hook))  # fmt: skip
