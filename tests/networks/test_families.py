"""Every diffusers family against its own pipeline: call, scheduler, taps, guidance, roles and a short training run."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from tiny_pipelines import MAKERS, Tiny, random_network, sana, sd15

from lightning_distill.batch import Batch
from lightning_distill.guidance import guided, is_told
from lightning_distill.methods import DMD2
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import FAMILIES, example_cond
from lightning_distill.networks.families.packed import flux2_mu
from lightning_distill.networks.latents import LatentScale, latent_scale
from lightning_distill.networks.merging import base_state_dict, merged_network
from lightning_distill.networks.roles import Copy, FromCheckpoint, Lora
from lightning_distill.networks.specs import DiffusersDenoiser, PretrainedDenoiser, as_denoiser
from lightning_distill.processes import FlowMatching, TrigFlow, VariancePreserving

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

CONDITIONAL = [name for name in MAKERS if name not in ("cogvideox_wide", "cogvideox_patches", "sd21")]


@pytest.fixture(params=MAKERS)
def tiny(request) -> Tiny:
    return MAKERS[request.param]()


@pytest.fixture(params=CONDITIONAL)
def family(request) -> Tiny:
    """One tiny network per model class and layout; variants that differ in the scheduler only are left out."""
    return MAKERS[request.param]()


def native_time(denoiser: Denoiser, timestep: float) -> torch.Tensor:
    """Our time of a pipeline's timestep."""
    if isinstance(denoiser.process, VariancePreserving):
        return denoiser.process.t_from_index(timestep)
    if isinstance(denoiser.process, TrigFlow):
        # the scheduler's largest, 1.57080, lies beyond pi / 2
        return torch.tensor(min(timestep, math.pi / 2), dtype=torch.float64)
    return torch.tensor(timestep / 1000.0, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the stock call
def watched(tiny: Tiny, cond: dict) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Model output, latent and timestep of every step of the stock pipeline, as its scheduler gets them."""
    pipe, seen = tiny.stock(), []
    step = pipe.scheduler.step

    def spy(output, t, latents, *args, **kwargs):
        # Euler's latents have the scale of its sigmas, and the model sees them scaled down
        euler = isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)
        scale = (pipe.scheduler.sigmas[pipe.scheduler.step_index] ** 2 + 1) ** 0.5 if euler else 1.0
        seen.append((output.clone(), latents / scale, float(torch.as_tensor(t).flatten()[0])))
        return step(output, t, latents, *args, **kwargs)

    pipe.scheduler.step = spy
    torch.manual_seed(0)
    pipe(**tiny.call(cond), num_inference_steps=2, output_type="latent")
    return [(tiny.to_sample(output), tiny.to_sample(x), t) for output, x, t in seen]


def x0_by_hand(tiny: Tiny, output: torch.Tensor, x: torch.Tensor, timestep: float) -> torch.Tensor:
    if tiny.kind == "flow_prediction":
        return x - timestep / 1000.0 * output
    alpha = float(tiny.scheduler.alphas_cumprod[int(timestep)]) ** 0.5
    sigma = (1.0 - alpha**2) ** 0.5
    return (x - sigma * output) / alpha if tiny.kind == "epsilon" else alpha * x - sigma * output


@torch.no_grad()
def test_the_stock_pipeline_makes_the_same_prediction(tiny, tmp_path):
    """The recorded steps of a real run; the denoiser is read from the saved pipeline."""
    cond = tiny.cond(2)
    steps = watched(tiny, cond)
    assert len(steps) == 2
    denoiser = as_denoiser(PretrainedDenoiser(str(tiny.save(tmp_path)), guidance=tiny.guidance))
    for index, (output, x, timestep) in enumerate(steps):
        t = native_time(denoiser, timestep)
        if tiny.name == "anyflow":  # the mean velocity to the next time of the grid
            got, expected = denoiser(x, t, cond, r=torch.as_tensor(tiny.scheduler.sigmas[index + 1])).raw, output
        elif tiny.name == "sana_sprint":  # sigma_data = 0.5 multiplies latents and output throughout
            got = denoiser(x / 0.5, t, cond).x0
            expected = (math.cos(timestep) * x - math.sin(timestep) * output) / 0.5
        else:
            got, expected = denoiser(x, t, cond).x0, x0_by_hand(tiny, output, x, timestep)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)
    assert steps[0][0].std() > 0.1


@torch.no_grad()
def test_eulers_continuous_times_are_read_as_the_stock_pipeline_tells_them(tmp_path):
    """Stable Diffusion XL of EDM's noise levels, as CosXL."""
    tiny = MAKERS["sdxl"]()
    tiny.scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=120.0,
        use_karras_sigmas=True,
    )  # fmt: skip
    cond = tiny.cond(2)
    denoiser = as_denoiser(PretrainedDenoiser(str(tiny.save(tmp_path))))
    for output, x, timestep in watched(tiny, cond):
        sigma = torch.tensor(math.exp(4.0 * timestep), dtype=torch.float64)
        length = (sigma**2 + 1.0).sqrt()
        torch.testing.assert_close(float(denoiser._time(sigma)), timestep)
        expected = (x - sigma * output) / length
        torch.testing.assert_close(denoiser(x * length, sigma, cond).x0, expected.float(), rtol=1e-4, atol=1e-4)
    assert float(denoiser.process.sigma_max) == 120.0


@torch.no_grad()
def test_the_comparison_can_fail(family):
    """Other times, conditions and guidance give other predictions; every condition reaches the network."""
    denoiser = family.denoiser()
    x, t, cond = torch.randn(2, *family.shape), torch.tensor([0.3, 0.7]), family.cond(2)
    first = denoiser(x, t, cond).raw
    assert not torch.allclose(denoiser(x, t + 0.1, cond).raw, first, atol=1e-4)
    for key, value in cond.items():
        changed = 1 - value if key == "encoder_attention_mask" else value + 1.0
        assert not torch.allclose(denoiser(x, t, {**cond, key: changed}).raw, first, atol=1e-5), key
    if family.guidance is not None:
        assert not torch.allclose(denoiser(x, t, cond, guidance=torch.tensor(9.0)).raw, first, atol=1e-6)
        told = family.denoiser(guidance=9.0)
        torch.testing.assert_close(told(x, t, cond).raw, denoiser(x, t, cond, guidance=torch.tensor(9.0)).raw)
    # the conditions that the entry itself declares fit too
    example = example_cond(denoiser.network, 2)
    assert set(example) == set(cond)
    assert denoiser(x, t, example).raw.isfinite().all()
    # rows do not mix
    torch.testing.assert_close(
        denoiser(x[1:], t[1:], {k: v[1:] for k, v in cond.items()}).raw, first[1:], rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_anyflow_is_told_both_times():
    tiny = MAKERS["anyflow"]()
    denoiser, x, cond = tiny.denoiser(), torch.randn(2, *tiny.shape), tiny.cond(2)
    t, r = torch.tensor([0.9, 0.6]), torch.tensor([0.4, 0.0])
    per_frame = [(1000 * time)[:, None].expand(2, tiny.shape[1]) for time in (t, r)]
    expected = tiny.network(x.transpose(1, 2), *per_frame, **cond).sample.transpose(1, 2)
    torch.testing.assert_close(denoiser(x, t, cond, r=r).raw, expected)
    assert not torch.allclose(denoiser(x, t, cond).raw, expected, atol=1e-4)
    torch.testing.assert_close(denoiser(x, t, cond).raw, denoiser(x, t, cond, r=t).raw)


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", "sdxl", "lcm", "flux", "z_image", "pixart_alpha", "cogvideox"])
def test_half_precision(name):
    """Small layers that diffusers keeps in float32 do not decide the input's dtype; sizes are not rounded."""
    tiny = MAKERS[name]()
    x, t, cond = torch.randn(2, *tiny.shape), torch.tensor([0.3, 0.7]), tiny.cond(2)
    exact = tiny.denoiser()(x, t, cond).raw
    tiny.network = copy.deepcopy(tiny.network).to(torch.bfloat16)
    if name == "wan":
        tiny.network.scale_shift_table.data = tiny.network.scale_shift_table.data.float()
    raw = tiny.denoiser()(x, t, cond).raw
    assert raw.dtype == torch.float32
    assert (raw - exact).norm() < 0.2 * exact.norm()


# ------------------------------------------------------------------------------------------------ the saved pipeline
def test_process_and_prediction_type_come_from_the_scheduler(tiny, tmp_path):
    denoiser = as_denoiser(PretrainedDenoiser(str(tiny.save(tmp_path))))
    process = denoiser.process
    assert denoiser.prediction_type == tiny.kind
    if tiny.name == "sana_sprint":
        assert isinstance(process, TrigFlow)
        assert isinstance(denoiser.network_process, FlowMatching)
        assert denoiser.data_scale == 1.0
    elif tiny.kind == "flow_prediction":
        assert isinstance(process, FlowMatching)
        assert denoiser.network_process is None
    else:
        assert isinstance(process, VariancePreserving)
        alpha = process.alpha(process.t_from_index(torch.arange(1000)))
        torch.testing.assert_close(alpha.square(), tiny.scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6)
    for a, b in zip(denoiser.network.parameters(), tiny.network.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sd3", "sana", "lumina2", "wan", "anyflow", "hunyuan_video"])
def test_fixed_shifts(name, tmp_path):
    tiny = MAKERS[name]()
    shift = tiny.scheduler.config.get("flow_shift") or tiny.scheduler.config.shift
    assert shift > 1
    assert as_denoiser(PretrainedDenoiser(str(tiny.save(tmp_path)))).process.shift == shift


@pytest.mark.parametrize("name", ["flux", "qwen_image", "ltx"])
def test_shifts_that_depend_on_the_resolution(name, tmp_path):
    """The shift at our shape maps the pipeline's even grid on the times it really used."""
    tiny = MAKERS[name]()
    (_, _, _), (_, _, timestep) = watched(tiny, tiny.cond(1))
    spec = PretrainedDenoiser(str(tiny.save(tmp_path)), shape=list(tiny.shape))
    process = spec.build().process
    assert float(process.warp(torch.tensor(0.5))) * 1000 == pytest.approx(timestep, rel=1e-5)
    largest = PretrainedDenoiser(str(tmp_path)).build().process  # no shape: the largest the scheduler names
    assert largest.shift == pytest.approx(math.exp(tiny.scheduler.config.max_shift))


def test_flux2_shift_depends_on_steps():
    module = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2")
    for tokens in (16, 1024, 4096, 4300, 5000):
        for steps in (4, 28, 50):
            expected = module.compute_empirical_mu(tokens, steps)
            assert flux2_mu({}, tokens, steps) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (UniPCMultistepScheduler(use_flow_sigmas=True), r"use_flow_sigmas=True and prediction_type='epsilon'"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), r"use_flow_sigmas=False and prediction_type"),
        (
            DDIMScheduler(),
            r"VariancePreserving.*scheduler_config.json but FlowMatching.* by its class SD3Transformer2D",
        ),
    ],
)
def test_contradicting_schedulers(scheduler, message, tmp_path):
    tiny = MAKERS["sd3"]()
    tiny.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        PretrainedDenoiser(str(tiny.save(tmp_path))).check()


def test_contradicting_arguments(tmp_path):
    tiny = MAKERS["sd3"]()
    tiny.save(tmp_path)
    with pytest.raises(ValueError, match=r"'epsilon' by argument prediction_type but 'flow_prediction' by .*config"):
        PretrainedDenoiser(str(tmp_path), prediction_type="epsilon").check()
    with pytest.raises(ValueError, match=r"VariancePreserving.* by argument process but FlowMatching\(shift=3.0\) by"):
        PretrainedDenoiser(str(tmp_path), process=VariancePreserving()).check()


def test_flow_classes_need_no_scheduler_and_others_do(tmp_path):
    flow, other = MAKERS["sd3"](), sd15()
    flow.network.save_pretrained(tmp_path / "sd3")
    denoiser = as_denoiser(PretrainedDenoiser(str(tmp_path / "sd3")))
    assert (type(denoiser.process), denoiser.prediction_type) == (FlowMatching, "flow_prediction")
    other.network.save_pretrained(tmp_path / "sd15")
    with pytest.raises(ValueError, match=r"neither a scheduler nor a card.json says the process"):
        PretrainedDenoiser(str(tmp_path / "sd15")).check()


def test_trained_networks_of_two_experts(tmp_path):
    """Wan 2.2: the second expert is a component of its own."""
    tiny = MAKERS["wan"]()
    tiny.save(tmp_path)
    second = random_network("WanTransformer3DModel", **{**tiny.network.config, "num_layers": 1})
    second.save_pretrained(tmp_path / "transformer_2")
    assert len(PretrainedDenoiser(str(tmp_path)).build().network.blocks) == 2
    assert len(PretrainedDenoiser(str(tmp_path), "transformer_2").build().network.blocks) == 1


def test_variants(tmp_path):
    tiny = MAKERS["sd3"]()
    tiny.save(tmp_path)
    half = copy.deepcopy(tiny.network).half()
    half.save_pretrained(tmp_path / "transformer", variant="fp16")
    plain = PretrainedDenoiser(str(tmp_path)).build().network.pos_embed.proj.weight
    torch.testing.assert_close(plain, tiny.network.pos_embed.proj.weight, rtol=0, atol=0)
    read = PretrainedDenoiser(str(tmp_path), variant="fp16").build().network.pos_embed.proj.weight
    torch.testing.assert_close(read, half.pos_embed.proj.weight.float(), rtol=0, atol=0)
    assert not torch.equal(read, plain)
    with pytest.raises(FileNotFoundError, match=r"no weights of variant 'bf16'; set variant to one of .*plain.*fp16"):
        PretrainedDenoiser(str(tmp_path), variant="bf16").check()


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart_sigma"])
def test_single_files(name, tmp_path):
    """Weights in one file, everything else from a folder without weights."""
    tiny = MAKERS[name]()
    folder = tiny.save(tmp_path / "pipeline")
    file = shutil.move(folder / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "model.safetensors")
    pickled = tmp_path / "weights.bin"
    pickled.write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"weights.bin is not a safetensors file; other formats can run code"):
        PretrainedDenoiser(str(pickled)).build()
    with pytest.raises(ValueError, match=r"is a single file, .* give config_path="):
        DiffusersDenoiser(str(file)).check()
    spec = DiffusersDenoiser(str(file), config_path=str(folder))
    spec.check()
    denoiser = spec.build()
    assert denoiser.prediction_type == tiny.kind
    own = tiny.network.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in denoiser.network.state_dict().items())
    with pytest.raises(FileNotFoundError, match="config_path='nowhere' is no folder"):
        DiffusersDenoiser(str(file), config_path="nowhere").check()
    torch.save({}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt is not a safetensors file; other formats can run code"):
        DiffusersDenoiser(str(tmp_path / "model.ckpt"), config_path=str(folder)).check()
    save_file({"one": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors does not fit \w+ as described in .*config.json"):
        spec.build()


def test_the_hubs_cache_is_read_without_network(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    commit = "c0ffee" * 6 + "c0ff"
    repository = tmp_path / "models--maker--model"
    MAKERS["sd3"]().save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert PretrainedDenoiser("maker/model").build().prediction_type == "flow_prediction"
    PretrainedDenoiser("maker/model", revision=commit).check()
    for spec in (PretrainedDenoiser("maker/other"), PretrainedDenoiser("maker/model", revision="next")):
        with pytest.raises(FileNotFoundError, match="allow_download=True"):
            spec.check()


# ------------------------------------------------------------------------------------------------ taps
@torch.no_grad()
def test_taps_and_early_exit(family):
    denoiser = family.denoiser()
    x, t, cond = torch.randn(2, *family.shape), torch.tensor([0.3, 0.7]), family.cond(2)
    names = denoiser.block_names()
    assert family.block in names
    assert family.late in names
    assert names.index(family.block) < names.index(family.late)
    assert all(denoiser.family.model_class == type(family.network).__name__ for _ in names)
    ran: list[str] = []
    for name in names:
        family.network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    early = denoiser.feature_maps(x, t, cond, (family.block,))[family.block]
    assert early.shape[0] == 2
    assert early.ndim in (3, 4)
    assert family.late not in ran
    prediction = denoiser(x, t, cond, taps=(family.block, family.late))
    assert sorted(set(ran)) == sorted(names)  # every declared block is run
    torch.testing.assert_close(prediction.features[family.block], early, rtol=0, atol=0)
    assert not torch.equal(prediction.features[family.late].flatten()[:8], early.flatten()[:8])
    torch.testing.assert_close(prediction.raw, denoiser(x, t, cond).raw, rtol=0, atol=0)
    # the features are those of the image, whatever order a block returns its streams in
    moved = denoiser.feature_maps(x + 1.0, t, cond, (family.block,))[family.block]
    assert not torch.allclose(moved, early, atol=1e-3)


# ------------------------------------------------------------------------------------------------ guidance
@torch.no_grad()
def test_guidance(family):
    denoiser = family.denoiser()
    x, t, cond = torch.randn(2, *family.shape), torch.tensor([0.3, 0.7]), family.cond(2)
    assert denoiser.missing_null(cond) == []
    null = denoiser.null_cond(cond)
    for key, value in null.items():
        assert value.shape == cond[key].shape
        assert value.dtype == cond[key].dtype
    torch.testing.assert_close(guided(denoiser, x, t, cond, 1.0).x0, denoiser(x, t, cond).x0, rtol=0, atol=0)
    with_cond, without = denoiser(x, t, cond).x0, denoiser(x, t, null).x0
    assert not torch.allclose(with_cond, without, atol=1e-3)
    expected = without + 3.0 * (with_cond - without)
    if is_told(denoiser):
        expected = denoiser(x, t, cond, guidance=torch.tensor(3.0)).x0
    torch.testing.assert_close(guided(denoiser, x, t, cond, 3.0).x0, expected, rtol=1e-3, atol=1e-3)


def test_sdxl_drops_to_zeros_and_keeps_its_sizes():
    tiny = MAKERS["sdxl"]()
    cond = tiny.cond(2)
    null = tiny.denoiser().null_cond(cond)
    assert null["encoder_hidden_states"].abs().sum() == 0
    assert null["text_embeds"].abs().sum() == 0
    assert torch.equal(null["time_ids"], cond["time_ids"])
    given = {"encoder_hidden_states": torch.ones(1, *cond["encoder_hidden_states"].shape[1:]), "text_embeds": 0.0}
    mine = tiny.denoiser(null_cond=given).null_cond(cond)
    assert mine["encoder_hidden_states"].min() == 1.0
    assert mine["text_embeds"].abs().sum() == 0


def test_zeros_are_no_null_where_the_pipeline_does_not_take_them(tmp_path):
    tiny = MAKERS["sdxl"]()
    cond, file = tiny.cond(2), tiny.save(tmp_path) / "model_index.json"
    index = json.loads(file.read_text())
    for forced in (True, False):
        file.write_text(json.dumps(index | {"force_zeros_for_empty_prompt": forced}))
        for path in (tmp_path, tmp_path / "unet"):
            teacher = PretrainedDenoiser(str(path)).build()
            assert teacher.missing_null() == ([] if forced else ["encoder_hidden_states"])
    with pytest.raises(ValueError, match="UNet2DConditionModel has none; give null_cond="):
        teacher.null_cond(cond)
    rows = {k: v for k, v in tiny.null().items() if k in ("encoder_hidden_states", "text_embeds")}
    save_file(rows, tmp_path / "null_cond.safetensors")
    null = PretrainedDenoiser(str(tmp_path)).build().null_cond(cond)
    for key, value in rows.items():
        assert torch.equal(null[key], value.expand_as(cond[key]))
    assert torch.equal(null["time_ids"], cond["time_ids"])


def test_missing_and_unfitting_null_conditions():
    tiny, process = MAKERS["sana"](), FlowMatching()
    cond = tiny.cond(2)
    bare = Denoiser(tiny.network, process, tiny.kind)
    assert bare.missing_null() == ["encoder_hidden_states"]
    with pytest.raises(ValueError, match=r"'encoder_hidden_states', and SanaTransf.* has none; give null_cond="):
        bare.null_cond(cond)
    short = {k: v[:, :2] for k, v in tiny.null().items()}
    padded = Denoiser(tiny.network, process, tiny.kind, null_cond=short).null_cond(cond)
    assert padded["encoder_attention_mask"].tolist() == [[1, 0, 0, 0, 0]] * 2
    assert padded["encoder_hidden_states"][:, 2:].abs().sum() == 0
    long = {k: torch.cat([v, v], dim=1) for k, v in tiny.null().items()}
    with pytest.raises(ValueError, match=r"has shape \(10, 6\) per sample and the batch's \(5, 6\)"):
        Denoiser(tiny.network, process, tiny.kind, null_cond=long).null_cond(cond)
    with pytest.raises(ValueError, match=r"null_cond has 'tokens', but SanaTransformer2DModel takes"):
        Denoiser(tiny.network, process, tiny.kind, null_cond={"tokens": 0.0})
    with pytest.raises(ValueError, match=r"has shape \(5, 6\); give one row, \(1, ...\)"):
        Denoiser(tiny.network, process, tiny.kind, null_cond={"encoder_hidden_states": torch.zeros(5, 6)})


def test_null_conditions_travel_with_the_pipeline_and_its_roles(tmp_path):
    tiny = MAKERS["sd3"]()
    save_file(tiny.null(), tiny.save(tmp_path) / "null_cond.safetensors")
    teacher = PretrainedDenoiser(str(tmp_path)).build()
    cond = tiny.cond(2)
    expected = tiny.null()["encoder_hidden_states"].expand(2, -1, -1)
    for role in (teacher, Copy().build(teacher, "student"), Lora(rank=2).build(teacher, "fake_score")):
        torch.testing.assert_close(role.null_cond(cond)["encoder_hidden_states"], expected)
        assert not any("null" in key for key in role.state_dict())
    (tmp_path / "null_cond.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert PretrainedDenoiser(str(tmp_path)).build().missing_null() != []
    given = PretrainedDenoiser(str(tmp_path), null_cond=str(tmp_path / "elsewhere.safetensors"))
    assert given.build().missing_null() == []
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors does not exist"):
        PretrainedDenoiser(str(tmp_path), null_cond=str(tmp_path / "nothing.safetensors")).check()


# ------------------------------------------------------------------------------------------------ roles
@pytest.mark.sparse(3)
def test_lora_and_copy_start_as_the_teacher(family):
    teacher = family.denoiser().requires_grad_(False)
    x, t, cond = torch.randn(2, *family.shape), torch.tensor([0.3, 0.7]), family.cond(2)
    with torch.no_grad():
        before = teacher(x, t, cond).raw
        copied = Copy().build(teacher, "fake_score")
        own = copied.network.state_dict()
        assert all(torch.equal(v, own[k]) for k, v in teacher.network.state_dict().items())
        torch.testing.assert_close(copied.requires_grad_(False)(x, t, cond).raw, before, rtol=0, atol=0)
        student = Lora(rank=2).build(teacher, "student")
        torch.testing.assert_close(student(x, t, cond).raw, before, rtol=0, atol=0)
        torch.testing.assert_close(teacher(x, t, cond).raw, before, rtol=0, atol=0)
    adapters = dict(student.adapter_parameters())
    for name, parameter in adapters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    moved = student(x, t, cond).raw
    assert not torch.allclose(moved, before, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x, t, cond).raw, before, rtol=0, atol=0)
    moved.square().mean().backward()
    own = {id(p) for p in adapters.values()}
    assert {id(p) for p in teacher.network.parameters() if p.grad is not None} <= own
    reached = [p for p in adapters.values() if p.grad is not None and p.grad.abs().sum() > 0]
    # the last block of some models updates its text stream for nobody
    assert len(reached) >= 0.7 * len(adapters)
    with torch.no_grad():
        merged = Denoiser(merged_network(student), teacher.process, teacher.prediction_type, family=teacher.family)
        torch.testing.assert_close(merged.eval()(x, t, cond).raw, moved, rtol=1e-3, atol=1e-4)


@pytest.mark.sparse(3)
def test_every_block_can_be_checkpointed(family):
    """Recomputed blocks give the same gradient, so their lists are what diffusers walks through."""
    from lightning_distill.networks.lora import enable_activation_checkpointing

    x, t, cond = torch.randn(1, *family.shape), torch.tensor([0.4]), family.cond(1)
    grads = []
    for recompute in (False, True):
        denoiser = family.denoiser()
        if recompute:
            enable_activation_checkpointing(denoiser)
        denoiser.zero_grad()
        denoiser(x, t, cond).raw.square().mean().backward()
        grads.append([p.grad.clone() for p in denoiser.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_warm_start_from_an_exported_folder(tmp_path):
    tiny = sana()
    teacher = tiny.denoiser()
    tiny.network.transformer_blocks[0].attn1.to_q.weight.data.mul_(1.5)
    tiny.save(tmp_path)
    expected = tiny.network.state_dict()
    student = FromCheckpoint(str(tmp_path)).build(teacher)
    assert all(torch.equal(v, expected[k]) for k, v in student.network.state_dict().items())


# ------------------------------------------------------------------------------------------------ training
class OneBatch:
    """A loader of equal batches."""

    def __init__(self, batch: Batch, n: int) -> None:
        self.batch, self.n = batch, n

    def __iter__(self):
        return iter([self.batch] * self.n)

    def __len__(self) -> int:
        return self.n


@pytest.mark.sparse(3)
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*eval mode", "ignore:Trying to infer")
def test_dmd2_moves_the_student(family):
    """Two cycles from conditions alone; the teacher, its backbone and its null conditions stay."""
    teacher = family.denoiser(sigma_data=1.0)
    lora = family.name in ("flux", "wan")
    roles = {"student": Lora(rank=2), "fake_score": Lora(rank=2)} if lora else {}
    module = DMD2(
        teacher,
        fake_score_steps=1,
        shape=list(family.shape),
        ema=[],
        student_optimizer=lambda p: torch.optim.SGD(p, lr=1e-2),
        fake_score_optimizer=lambda p: torch.optim.SGD(p, lr=1e-2),
        student_times=[0.9],
        **roles,
    )
    module.configure_model()
    before = {k: v.clone() for k, v in base_state_dict(teacher.network).items()}
    started = [p.detach().clone() for p in module.role_parameters("student")]
    with torch.no_grad():
        for parameter in module.role_parameters("fake_score"):
            parameter.add_(0.1 * torch.randn_like(parameter))  # else both scores agree
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, OneBatch(Batch(cond=family.cond(2), size=2), 2))
    assert trainer.global_step == 2
    assert float(module.skipped_steps.sum()) == 0
    moved = [not torch.equal(a, b) for a, b in zip(started, module.role_parameters("student"))]
    assert sum(moved) >= (len(moved) // 2 if lora else 0.7 * len(moved))
    assert all(torch.equal(v, before[k]) for k, v in base_state_dict(teacher.network).items())
    images = module.sample(2, family.cond(2), generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, *family.shape)
    assert bool(images.isfinite().all())


# ------------------------------------------------------------------------------------------------ what cannot be done
def test_every_entry_is_complete_and_tested():
    tested = {type(make().network).__name__ for make in MAKERS.values()}
    missing = {name for name in FAMILIES if name.endswith(("Model", "Transformer2DModel", "3DModel"))} - tested
    assert missing == {"UNet2DModel", "DiTTransformer2DModel"}  # tests/networks/test_denoiser.py
    for entry in FAMILIES.values():
        assert set(entry.required) <= set(entry.cond_keys)
        if entry.cond_keys:  # without them any condition is taken
            assert set(entry.null) <= set(entry.cond_keys)
        if entry.time_keyword is not None:
            assert "encoder_hidden_states" in entry.required


def test_clear_errors():
    sd3, flux, x, t = MAKERS["sd3"](), MAKERS["flux"](), torch.randn(2, 4, 8, 8), torch.tensor(0.5)
    denoiser, cond = sd3.denoiser(), sd3.cond(2)
    with pytest.raises(ValueError, match=r"needs the conditions .*, but the batch lacks \['pooled_projections'\]"):
        denoiser(x, t, {"encoder_hidden_states": cond["encoder_hidden_states"]})
    with pytest.raises(ValueError, match=r"takes the conditions .*, but the batch also has \['class_labels'\]"):
        denoiser(x, t, {**cond, "class_labels": torch.zeros(2).long()})
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel takes one time, so r=... has no place"):
        denoiser(x, t, cond, r=torch.tensor(0.1))
    for tiny in (sd3, sd15()):
        with pytest.raises(ValueError, match=r"this \w+ does not embed a guidance scale; leave out guidance"):
            tiny.denoiser()(x, t, tiny.cond(2), guidance=torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"the latent is 7 x 8; give a shape with even height"):
        flux.denoiser()(torch.randn(2, 4, 7, 8), t, flux.cond(2))


def test_schnell_embeds_no_guidance():
    """FLUX.1-schnell has the class of FLUX.1-dev without the embedding, and no default is forced on it."""
    tiny = MAKERS["flux"]()
    tiny.network = random_network("FluxTransformer2DModel", **{**tiny.network.config, "guidance_embeds": False})
    x = torch.randn(2, *tiny.shape)
    assert tiny.denoiser()(x, torch.tensor(0.5), tiny.cond(2)).raw.shape == x.shape


# ------------------------------------------------------------------------------------------------ latents
def small_vae(**config):
    return diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, **config)


def test_latents_of_image_autoencoders():
    z = torch.randn(2, 4, 4, 4)
    plain, shifted = small_vae(scaling_factor=0.13), small_vae(scaling_factor=0.36, shift_factor=0.11)
    torch.testing.assert_close(latent_scale(plain).to_sample(z), 0.13 * z)
    torch.testing.assert_close(latent_scale(shifted).to_sample(z), (z - 0.11) * 0.36)
    torch.testing.assert_close(latent_scale(dict(shifted.config)).to_latent(z), z / 0.36 + 0.11)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    listed = latent_scale(small_vae(scaling_factor=0.5, latents_mean=mean, latents_std=std))
    m, s = (torch.tensor(v).view(1, 4, 1, 1) for v in (mean, std))
    torch.testing.assert_close(listed.to_latent(z), z * s / 0.5 + m)  # the formula of the SDXL pipeline
    torch.testing.assert_close(listed.to_sample(listed.to_latent(z)), z)


def test_latents_of_video_autoencoders():
    config = {"_class_name": "AutoencoderKLWan", "latents_mean": [0.5, -0.5], "latents_std": [2.0, 4.0]}
    z = torch.randn(1, 2, 3, 4, 4)
    expected = torch.stack([(z[:, 0] - 0.5) / 2, (z[:, 1] + 0.5) / 4], dim=1)
    torch.testing.assert_close(latent_scale(config).to_sample(z), expected)
    with pytest.raises(ValueError, match="have 2 channels and the given ones 4"):
        latent_scale(config).to_sample(torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match="AutoencoderKLLTXVideo keeps the statistics of its latents among its weights"):
        latent_scale({"_class_name": "AutoencoderKLLTXVideo", "scaling_factor": 1.0})
    with pytest.raises(ValueError, match="VQModel states no scaling_factor"):
        latent_scale({"_class_name": "VQModel"})


def test_latents_of_ltx():
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False), decoder_inject_noise=(False, False, False),
        upsample_residual=(False, False), upsample_factor=(1, 1), scaling_factor=0.7, down_block_types=(
            "LTXVideoDownBlock3D", "LTXVideoDownBlock3D"
        ),
    )  # fmt: skip
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(1, 2)
    z = torch.randn(1, 4, 2, 3, 3)
    expected = diffusers.LTXPipeline._normalize_latents(z, vae.latents_mean, vae.latents_std, 0.7)
    torch.testing.assert_close(latent_scale(vae).to_sample(z), expected)


def test_latents_of_flux2():
    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, down_block_types=(
        "DownEncoderBlock2D",
    ), up_block_types=("UpDecoderBlock2D",), layers_per_block=1)  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    scale = latent_scale(vae)
    assert isinstance(scale, LatentScale)
    z = torch.randn(2, 2, 4, 4)
    x = scale.to_sample(z)
    assert x.shape == (2, 8, 2, 2)
    # as the pipeline undoes it
    folded = x * (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    folded = folded + vae.bn.running_mean.view(1, -1, 1, 1)
    torch.testing.assert_close(diffusers.Flux2Pipeline._unpatchify_latents(folded), z)
    torch.testing.assert_close(scale.to_latent(x), z)
