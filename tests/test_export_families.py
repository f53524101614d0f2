"""Students of every diffusers family, trained for an update, in stock pipelines: the same latents as ``sample()``."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import diffusers
import pytest
import torch
from family_runs import build, train_once
from family_settings import settings_of
from frozen import frozen
from safetensors.torch import load_file
from sampling_of_cases import long, slow
from tiny_pipelines import MAKERS, Tiny, random_network

from lightning_distill.cli import import_everything
from lightning_distill.commands import export
from lightning_distill.commands.export import export_module
from lightning_distill.commands.methods import method_classes
from lightning_distill.export import adapters, export_denoiser, export_lora, export_pipeline, probe_cond, verify_export
from lightning_distill.export.entries import ENTRIES
from lightning_distill.export.schedules import flow_scheduler, scm_scheduler, vp_scheduler
from lightning_distill.generation import default_cond, draw_noise, generate
from lightning_distill.memory_format import lay_out_convolutions, suits_channels_last
from lightning_distill.methods import CTM, DMD2, TeacherTraining
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import FAMILIES
from lightning_distill.networks.lora import add_adapter
from lightning_distill.networks.merging import base_state_dict
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.second_time import add_second_time
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import FlowMatching, TrigFlow, VariancePreserving
from lightning_distill.samplers import SAMPLERS
from lightning_distill.times import few_step_times

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*eval mode", "ignore:Trying to infer", "ignore:Found .* module"
)

#: pipelines of diffusers that read LoRA files, and those that read flattened names
LORA = [name for name in MAKERS if not name.startswith("pixart")]
KOHYA = ("sd15", "sd21", "lcm", "sdxl", "qwen_image", "z_image")
#: kinds of pipeline that every test sees, by itself and in CI; the others join in ``make matrix``
FAST, LONG = ("sd15", "pixart_alpha", "flux", "wan"), ("sdxl", "sd3", "anyflow")
SOME = [name if name in FAST else long(name) if name in LONG else slow(name) for name in MAKERS]


def trained(method: type, name: str, folder: Path, lora: bool, **settings: object) -> tuple[Tiny, object]:
    tiny = MAKERS[name]()
    module = build(method, tiny, folder / "base", lora, **settings)
    train_once(module, tiny)
    return tiny, module


# ------------------------------------------------------------------------------------------------ every family
@pytest.mark.parametrize("name", SOME)
def test_lora_student_of_dmd2(name, tmp_path):
    """Only adapters get a gradient; without them the backbone is the file's; pipeline and LoRA file make sample()."""
    tiny, module = trained(DMD2, name, tmp_path, lora=True)
    saved = load_file(next((tmp_path / "base" / tiny.component).glob("*.safetensors")))
    assert all(torch.equal(v, saved[k]) for k, v in base_state_dict(module.teacher.network).items())
    own = {id(p) for p in module.role_parameters("student")}
    own |= {id(p) for p in module.role_parameters("fake_score")}
    assert own
    assert {id(p) for p in module.parameters() if p.requires_grad} == own
    assert all(p.grad is None for p in module.parameters() if id(p) not in own)
    x, t, cond = torch.randn(2, *tiny.shape), torch.tensor(0.6), tiny.cond(2)
    # the network as it was read
    plain = PretrainedDenoiser(str(tmp_path / "base"), guidance=tiny.guidance, shape=list(tiny.shape)).build()
    plain.eval()
    if suits_channels_last(plain):
        lay_out_convolutions(plain)
    with torch.no_grad(), frozen(plain):
        assert torch.equal(module.teacher(x, t, cond).raw, plain(x, t, cond).raw)
        assert not torch.allclose(module.student(x, t, cond).raw, plain(x, t, cond).raw, atol=1e-4)
    _, difference = export_module(module, tmp_path / "pipeline", fresh=False)
    assert difference <= 1e-5
    for style in ("diffusers", "kohya"):
        if name in LORA and (style == "diffusers" or name in KOHYA):
            _, difference = export_module(module, tmp_path / style, lora=style, fresh=False)
            assert difference <= 1e-5
        else:
            with pytest.raises(ValueError, match=r"reads no LoRA files|does not read layer names"):
                export_module(module, tmp_path / style, lora=style, fresh=False)


def test_the_check_sees_an_adapter_of_a_half_precision_backbone(tmp_path, monkeypatch):
    """Rounding of bfloat16 (.005 here) is of the size of what a small adapter does (.03)."""
    teacher = MAKERS["sd15"]().denoiser(null_cond={"encoder_hidden_states": torch.zeros(1, 12, 8)})
    teacher.network.to(torch.bfloat16)
    module = DMD2(teacher, student=Lora(rank=2), num_steps=2, check_data=False)
    module.configure_model()
    module.eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    before = {name: (value.dtype, value.clone()) for name, value in module.state_dict().items()}
    _, difference = export_module(module, tmp_path / "right", lora="diffusers", fresh=False)
    assert difference <= 1e-5
    for name, value in module.state_dict().items():
        assert value.dtype == before[name][0]
        assert torch.equal(value, before[name][1])
    right = adapters.lora_tensors
    monkeypatch.setattr(
        adapters, "lora_tensors", lambda *a, **k: {n: torch.zeros_like(v) for n, v in right(*a, **k).items()}
    )
    with pytest.raises(RuntimeError, match="makes other images than the student"):
        export_module(module, tmp_path / "zeros", lora="diffusers", fresh=False)


@pytest.mark.parametrize("steps", [1, long(2)])
def test_lora_files_of_flow_maps_whose_teacher_came_from_no_folder(steps, tmp_path):
    teacher = MAKERS["sd15"]().denoiser(null_cond={"encoder_hidden_states": torch.zeros(1, 12, 8)})
    module = CTM(teacher, student=TwoTime(Lora(rank=2)), num_steps=steps, sampler="flow_map", check_data=False)
    module.configure_model()
    module.eval()
    with torch.no_grad():
        for parameter in module.role_parameters("student"):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    _, difference = export_module(module, tmp_path / "lora", lora="diffusers", fresh=False)
    assert difference <= 1e-5


def test_the_check_rounds_the_base_as_training_did(tmp_path, monkeypatch):
    """The folder has float32, the run bfloat16 of it, and the adapter is added to the folder's weights."""
    tiny = MAKERS["sd15"]()
    base = tiny.save(tmp_path / "base")
    module = DMD2(PretrainedDenoiser(str(base), dtype="bfloat16"), student=Lora(rank=2), num_steps=2, check_data=False)
    module.configure_model()
    module.eval()
    _, difference = export_module(module, tmp_path / "lora", lora="diffusers", fresh=False)
    assert difference <= 1e-5
    monkeypatch.setattr(export, "verify_export", lambda *args, rounded, **named: verify_export(*args, **named))
    with pytest.raises(RuntimeError, match="makes other images than the student"):
        export_module(module, tmp_path / "as_it_is", lora="diffusers", fresh=False)


@pytest.mark.parametrize("name", SOME)
def test_full_student_of_teacher_training(name, tmp_path):
    _, module = trained(TeacherTraining, name, tmp_path, lora=False, num_steps=4)
    _, difference = export_module(module, tmp_path / "pipeline", fresh=False)
    assert difference <= 1e-5
    with pytest.raises(ValueError, match="is a full network, not an adapter"):
        export_module(module, tmp_path / "lora", lora="diffusers", fresh=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sana_sprint", "flux", "wan"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_method(name, lora, tmp_path):
    """All registered methods or their refusals, in a sentence; benchmarks/support.py has all families."""
    import_everything()
    outcomes: dict[str, str] = {}
    for method in method_classes():
        if method.__module__.startswith("lightning_distill."):  # other tests have their own
            outcomes[method.__name__] = outcome(method, name, tmp_path / method.__name__, lora)
    assert outcomes["DMD2"] == "same"
    # everything else is the same too, or says in a sentence why it is not
    assert all(text == "same" or re.search(r"\w{4,}.*[.)]$", text) for text in outcomes.values()), outcomes
    assert sum(text == "same" for text in outcomes.values()) >= 2, outcomes


def outcome(method: type, name: str, folder: Path, lora: bool) -> str:
    """``same``, or the sentence that refuses this method, family or export."""
    try:
        settings = {"num_steps": 1} | settings_of(method, MAKERS[name](), lora)
        _, module = trained(method, name, folder, lora=lora, **settings)
        _, difference = export_module(module, folder / "pipeline", fresh=False)
    except ValueError as error:
        return str(error)
    return "same" if difference <= 1e-5 else f"differs by {difference:g}"


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_fresh_process(name, tmp_path):
    """The comparison in a process that has never seen this package."""
    _, module = trained(DMD2, name, tmp_path, lora=True)
    assert export_module(module, tmp_path / "pipeline")[1] <= 1e-5
    if name in LORA:
        assert export_module(module, tmp_path / "lora", lora="diffusers")[1] <= 1e-5


@pytest.mark.parametrize("sampler", ["renoise", long("ode")])
@pytest.mark.parametrize(
    "name", ["sd15", "pixart_alpha", "sd3", "sana_sprint", "z_image", "qwen_image", "cogvideox", "ltx"]
)
def test_both_samplers_and_one_step(name, sampler, tmp_path):
    tiny = MAKERS[name]()
    folder = tiny.save(tmp_path / "base")
    student = PretrainedDenoiser(str(folder), guidance=tiny.guidance, shape=list(tiny.shape)).build()
    for steps in (1, 4):
        times, out = few_step_times(student.process, steps), tmp_path / str(steps)
        if (name, sampler, steps) == ("sana_sprint", "ode", 4):
            with pytest.raises(ValueError, match=r"fresh noise in every step.*use sampler='renoise'"):
                export_denoiser(student, times, sampler, out, shape=tiny.shape)
            continue
        export_denoiser(student, times, sampler, out, shape=tiny.shape)
        config = json.loads((out / "distill_config.json").read_text())
        cond = probe_cond(student, 2, config["size"])
        generator = torch.Generator().manual_seed(3)
        noise = draw_noise((2, *tiny.shape), generator)
        x0 = generate(student, noise, cond, times, sampler, generator=generator)
        assert verify_export(out, x0, seed=3, cond=cond) <= 1e-5
        for wrong in ({"seed": 4, "cond": cond}, {"seed": 3, "cond": probe_cond(student, 2, config["size"], seed=1)}):
            with pytest.raises(ValueError, match="makes other images than the student"):
                verify_export(out, x0, **wrong)


def test_every_entry_is_a_pipeline_and_a_family():
    assert {entry.model_class for entry in ENTRIES} == set(FAMILIES) - {"UNet2DModel", "DiTTransformer2DModel"} - {
        name for name in FAMILIES if not hasattr(diffusers, name)
    }
    for entry in ENTRIES:
        family = FAMILIES[entry.model_class]
        assert set(entry.inputs) <= set(family.cond_keys)
        named = {*entry.inputs, "time_ids"} | ({"encoder_attention_mask"} if entry.lists else set())
        assert set(family.required) <= named
        assert hasattr(getattr(diffusers, entry.name), "load_lora_weights") != entry.name.startswith("PixArt")


# ------------------------------------------------------------------------------------------------ grids
def test_even_grids_need_no_call_argument():
    for shift in (1.0, 2.5, 7.0):
        for steps in (1, 2, 3, 4, 8):
            times = few_step_times(FlowMatching(shift), steps)
            for even in (False, True):
                scheduler, call = flow_scheduler(times, fresh_noise=True, even=even)
                assert call == {}
                given = {"sigmas": [1 - i / steps for i in range(steps)]} if even else {"num_inference_steps": steps}
                scheduler.set_timesteps(**given)
                assert scheduler.sigmas[:-1].tolist() == pytest.approx(times, abs=1e-6)


def test_any_list_of_times_goes_through_the_call():
    times = [1.0, 0.9, 0.2, 0.1]
    scheduler, call = flow_scheduler(times, fresh_noise=False, grid_argument=True)
    assert call == {"sigmas": times}
    scheduler.set_timesteps(**call)
    assert scheduler.sigmas.tolist() == pytest.approx([*times, 0.0])
    with pytest.raises(ValueError, match="shifted trailing grid"):
        flow_scheduler(times, fresh_noise=False, even=True)
    process = VariancePreserving()
    times = process.t_from_index(torch.tensor([999, 801, 13])).tolist()
    scheduler, call = vp_scheduler(process, "epsilon", times, True, 1.0, grid_argument=True)
    assert call == {"timesteps": [999, 801, 13]}
    scheduler.set_timesteps(**call)
    assert scheduler.timesteps.tolist() == [999, 801, 13]


def test_angles_of_sana_sprint():
    flow = [math_t / (1 + math_t) for math_t in (torch.tan(torch.tensor(0.7)).item(),)]
    assert scm_scheduler([1.0], False)[1] == {"intermediate_timesteps": None}
    assert scm_scheduler([1.0, flow[0]], True)[1]["intermediate_timesteps"] == pytest.approx(0.7)
    default = torch.tan(torch.tensor(1.3, dtype=torch.float64)).item()
    assert scm_scheduler([1.0, default / (1 + default)], True)[1] == {}
    with pytest.raises(ValueError, match=r"samples at the angles \[1.5708, 1.0472, 0.5236\]"):
        scm_scheduler([1.0, 0.9, 0.2], True)
    angles = few_step_times(TrigFlow(), 4)
    assert angles == pytest.approx([1.5708, 1.1781, 0.7854, 0.3927], abs=1e-4)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_times_of_the_users_own(name, tmp_path):
    tiny = MAKERS[name]()
    student = PretrainedDenoiser(str(tiny.save(tmp_path / "base"))).build()
    times = [0.4] if name == "sdxl" else [1.0, 0.95, 0.3, 0.2]
    sampler = "renoise" if name == "sdxl" else "ode"
    out = export_denoiser(student, times, sampler, tmp_path / "out", shape=tiny.shape)
    config = json.loads((out / "distill_config.json").read_text())
    if name == "sd3":
        assert "sigmas=[1.0, 0.95, 0.3, 0.2]" in (out / "README.md").read_text()
    cond = probe_cond(student, 2, config["size"])
    x0 = generate(student, draw_noise((2, *tiny.shape), torch.Generator().manual_seed(0)), cond, times, sampler)
    assert verify_export(out, x0, cond=cond) <= 1e-5


# ------------------------------------------------------------------------------------------------ two experts
def test_two_experts(tmp_path):
    tiny = MAKERS["wan"]()
    low = random_network("WanTransformer3DModel", **tiny.network.config)
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(0.8)
    experts = [Denoiser(network, FlowMatching(3.0), "flow_prediction") for network in (tiny.network, low)]
    times, boundary = few_step_times(FlowMatching(3.0), 4), 0.8
    assert min(times) < boundary < times[1]
    out = export_denoiser(
        experts[0], times, "ode", tmp_path / "out", second=experts[1], boundary_ratio=boundary, shape=tiny.shape
    )
    size = json.loads((out / "distill_config.json").read_text())["size"]
    cond = probe_cond(experts[0], 2, size)
    noise = draw_noise((2, *tiny.shape), torch.Generator().manual_seed(0))

    @torch.no_grad()
    def both(x, t):
        return experts[0 if float(t) >= boundary else 1](x, t, cond)

    expected = SAMPLERS["ode"](both, noise, times, experts[0].process)
    assert verify_export(out, expected, cond=cond) <= 1e-5
    one = generate(experts[0], noise, cond, times, "ode")
    with pytest.raises(ValueError, match="makes other images"):
        verify_export(out, one, cond=cond)
    with pytest.raises(ValueError, match=r"needs second=... and boundary_ratio=... in \(0, 1\)"):
        export_denoiser(experts[0], times, "ode", tmp_path / "bad", second=experts[1])
    sd3 = MAKERS["sd3"]()
    with pytest.raises(ValueError, match="only WanPipeline switches between two experts"):
        export_pipeline(
            sd3.network, FlowMatching(), "flow_prediction", [1.0], "ode", tmp_path / "bad", second=sd3.network,
            boundary_ratio=0.5,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ refusals
def test_what_is_refused(tmp_path):
    sd3 = MAKERS["sd3"]()
    start = Denoiser(sd3.network, FlowMatching(), "flow_prediction")
    with pytest.raises(ValueError, match=r"starts from 0.9 x noise, but stock flow-matching schedulers from unit"):
        export_denoiser(start, [0.9], "ode", tmp_path / "out")
    with pytest.raises(ValueError, match="sampler='heun' cannot be exported"):
        export_denoiser(start, [1.0], "heun", tmp_path / "out")
    wan = MAKERS["wan"]()
    with pytest.raises(ValueError, match="shifted trailing grid"):
        export_denoiser(wan.denoiser(), [1.0, 0.9, 0.2, 0.1], "ode", tmp_path / "out")
    student = add_adapter(start, "student", rank=2)
    with pytest.raises(ValueError, match="style='comfy' is unknown; choose one of diffusers, kohya"):
        export_lora(student, [1.0], "ode", tmp_path / "out", style="comfy")
    student.config.use_dora = True
    with pytest.raises(ValueError, match=r"magnitudes \(DoRA\), which diffusers drops from files with kohya's names"):
        export_lora(student, [1.0], "ode", tmp_path / "out", style="kohya")
    two_times = Denoiser(MAKERS["sd3"]().network, FlowMatching(), "flow_prediction")
    add_second_time(two_times.network)
    with pytest.raises(ValueError, match=r"was given a further input .* export_denoiser and export_lora write it into"):
        export_pipeline(two_times.network, FlowMatching(), "flow_prediction", [1.0], "ode", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_conditions_that_the_pipeline_computes(tmp_path):
    tiny = MAKERS["pixart_alpha"]()
    student = tiny.denoiser()
    out = export_denoiser(student, [1.0], "renoise", tmp_path / "out", shape=tiny.shape)
    size = json.loads((out / "distill_config.json").read_text())["size"]
    cond, x0 = probe_cond(student, 2, size), torch.zeros(2, *tiny.shape)
    with pytest.raises(
        ValueError, match=r"PixArtAlphaPipeline computes resolution=\[1024, 1024\]|computes resolution="
    ):
        verify_export(out, x0, cond={**cond, "resolution": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"needs embeddings for \['encoder_hidden_states'\]"):
        verify_export(out, x0, cond={})


# ------------------------------------------------------------------------------------------------ conditions
def test_default_conditions_fall_back_to_zeros():
    student = MAKERS["sd3"]().denoiser()
    cond = default_cond(student, 3)
    assert {k: v.shape[0] for k, v in cond.items()} == {"encoder_hidden_states": 3, "pooled_projections": 3}
    assert all(v.abs().sum() == 0 for v in cond.values())
    heads = Adversary(taps=("transformer_blocks.0",)).build(student, (4, 8, 8))
    assert sum(p.numel() for p in heads.parameters()) > 0
