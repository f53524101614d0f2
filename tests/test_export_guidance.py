"""Students that are guided in two passes, as learned solvers are, in stock pipelines: the same samples."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from family_runs import build, train_once
from family_settings import LEFT_OUT
from safetensors.torch import load_file
from tiny_pipelines import MAKERS, Tiny, random_network

from lightning_distill.commands.export import export_module
from lightning_distill.export import export_denoiser, export_lora, probe_cond, verify_export
from lightning_distill.export.sampling import sample_export
from lightning_distill.export.schedules import vp_scheduler
from lightning_distill.export.two_passes import constant_scale
from lightning_distill.generation import draw_noise, generate
from lightning_distill.guidance import Guidance, IntervalGuidance, RandomGuidance, is_told
from lightning_distill.methods import LearnedSolver
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import add_adapter
from lightning_distill.networks.small import small_dit, small_unet
from lightning_distill.processes import FlowMatching, NoiseProcess, VariancePreserving
from lightning_distill.times import few_step_times

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*eval mode", "ignore:Trying to infer", "ignore:Found .* module"
)

#: kinds of guided call that every test sees; the others join in ``make matrix``
FAST = ("sd15", "sdxl", "lumina2", "z_image", "hunyuan_video")
#: pipelines with two passes of our formula; the others are told a scale, or rescale
PASSES = [name for name in MAKERS if name not in ("sana_sprint", "flux2", "qwen_image")]
SOME = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in PASSES]


def guided(tiny: Tiny, policy: Guidance) -> Denoiser:
    """The family's network with guidance without which it is not sampled; one told no scale."""
    config = dict(tiny.network.config)
    if "guidance_embeds" in config:
        config["guidance_embeds"] = False
        tiny.network = random_network(type(tiny.network).__name__, **config)
    elif config.get("time_cond_proj_dim"):
        tiny.network = random_network(type(tiny.network).__name__, **{**config, "time_cond_proj_dim": None})
    student = tiny.denoiser()
    student.sampling_guidance = policy
    assert not is_told(student)
    return student


def samples(student: Denoiser, shape: tuple[int, ...], cond: dict, times: list[float]) -> torch.Tensor:
    noise = draw_noise((2, *shape), torch.Generator().manual_seed(0))
    return generate(student, noise, cond, times, "ode")


# ------------------------------------------------------------------------------------------------ pipelines
@pytest.mark.parametrize("name", SOME)
def test_every_pipeline_of_two_passes_makes_the_same_latents(name, tmp_path):
    tiny = MAKERS[name]()
    student = guided(tiny, Guidance(3.0))
    times = few_step_times(student.process, 2)
    out = export_denoiser(student, times, "ode", tmp_path / "out", shape=tiny.shape)
    config = json.loads((out / "distill_config.json").read_text())
    cond = probe_cond(student, 2, config["size"])
    x0 = samples(student, tiny.shape, cond, times)
    assert verify_export(out, x0, cond=cond) <= 5e-5
    student.sampling_guidance = None
    with pytest.raises(ValueError, match="makes other images"):
        verify_export(out, samples(student, tiny.shape, cond, times), cond=cond)
    scale = {"z_image": {"guidance_scale": 2.0}, **{key: {"true_cfg_scale": 3.0} for key in ("flux", "hunyuan_video")}}
    assert config["call"].items() >= scale.get(name, {"guidance_scale": 3.0}).items()
    if name.startswith("cogvideox"):  # whose noise has the frames before the channels
        return
    found, _ = sample_export(out, 2, cond=cond)
    torch.testing.assert_close(found, x0.transpose(1, 2) if x0.ndim == 5 else x0, rtol=1e-4, atol=1e-4)


def test_the_card_says_how_both_passes_are_made(tmp_path):
    tiny = MAKERS["hunyuan_video"]()
    student = guided(tiny, Guidance(3.0))
    out = export_denoiser(student, [1.0, 0.5], "ode", tmp_path / "out", shape=tiny.shape)
    card = (out / "README.md").read_text()
    # without a negative prompt this pipeline has one pass
    assert "true_cfg_scale=3.0" in card
    assert "negative_prompt=''" in card
    assert "keep true_cfg_scale=3.0. The other pass has the empty prompt" in card
    saved = load_file(out / "null_cond.safetensors")
    assert set(saved) == set(tiny.null())
    assert all(torch.equal(value, saved[key]) for key, value in tiny.null().items())
    sd = guided(MAKERS["sdxl"](), Guidance(3.0))
    folder = export_denoiser(sd, [1.0], "ode", tmp_path / "sdxl", shape=MAKERS["sdxl"]().shape)
    assert "negative_prompt" not in (folder / "README.md").read_text()
    zeros = json.loads((folder / "distill_config.json").read_text())["null_cond"]
    assert zeros == {"encoder_hidden_states": 0.0, "text_embeds": 0.0}
    assert not (folder / "null_cond.safetensors").exists()


def test_pipelines_that_guide_otherwise_are_refused(tmp_path):
    qwen = MAKERS["qwen_image"]()
    with pytest.raises(ValueError, match=r"QwenImagePipeline of diffusers does not guide .* by a scale of 3; distil"):
        export_denoiser(guided(qwen, Guidance(3.0)), [1.0], "ode", tmp_path / "out", shape=qwen.shape)
    sd3 = MAKERS["sd3"]()
    with pytest.raises(ValueError, match=r"scale of 0\.5, but stock pipelines guide above 1 only"):
        export_denoiser(guided(sd3, Guidance(0.5)), [1.0], "ode", tmp_path / "out", shape=sd3.shape)
    policy = IntervalGuidance(3.0, 0.2, 0.7)
    with pytest.raises(ValueError, match=r"steps is \[1\.0, 3\.0\], and stock pipelines guide every step by one"):
        export_denoiser(guided(sd3, policy), [1.0, 0.5], "ode", tmp_path / "out", shape=sd3.shape)
    adapter = add_adapter(sd3.denoiser(), "student", rank=2)
    adapter.sampling_guidance = Guidance(3.0)
    with pytest.raises(ValueError, match="in two passes; export the pipeline"):
        export_lora(adapter, [1.0], "ode", tmp_path / "out")
    network = small_unet(8, 1, 3, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8).eval()
    unet = Denoiser(network, VariancePreserving(), "epsilon", null_class=3)
    unet.sampling_guidance = Guidance(2.0)
    with pytest.raises(ValueError, match="ConsistencyModelPipeline of diffusers does not guide as this student"):
        export_denoiser(unet, [1.0], "ode", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_scale_for_all_steps():
    times = [1.0, 0.6, 0.3]
    assert constant_scale(None, times) == 1.0
    assert constant_scale(IntervalGuidance(4.0, 0.2, 1.0), times) == 4.0
    assert constant_scale(IntervalGuidance(4.0, 0.7, 0.9), times) == 1.0
    assert constant_scale(RandomGuidance(2.0, 6.0), times) == 4.0  # that of the middle, with which samples are made
    with pytest.raises(ValueError, match=r"\[1\.0, 4\.0, 4\.0\]"):
        constant_scale(RandomGuidance(2.0, 6.0, (0.2, 0.7)), times)


@pytest.mark.parametrize("classes", [1000, 10])
def test_a_transformer_of_classes_has_the_pipelines_own_null_label(classes, tmp_path):
    torch.manual_seed(0)
    network = small_dit(8, 4, classes, 2, num_layers=2, num_attention_heads=2, attention_head_dim=8).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8).eval()
    student = Denoiser(network, VariancePreserving(), "v_prediction", null_class=classes)
    student.sampling_guidance = Guidance(2.5)
    times, out = few_step_times(student.process, 2), tmp_path / "out"
    if classes == 10:
        with pytest.raises(ValueError, match="label 1000 for no class, but the null class of this network is 10"):
            export_denoiser(student, times, "ode", out, vae=vae)
        return
    export_denoiser(student, times, "ode", out, vae=vae)
    cond = {"class_labels": torch.tensor([3, 7])}
    assert verify_export(out, samples(student, (4, 8, 8), cond, times), class_labels=[3, 7]) <= 1e-5
    assert "keep guidance_scale=2.5" in (out / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ timesteps
class SigmaStart(VariancePreserving):
    """Starting from the noise part of x_t."""

    def prior_std(self, t_init: float) -> float:
        return float(self.sigma(torch.tensor(t_init, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("process", "kind"),
    [
        pytest.param(VariancePreserving(), "epsilon", marks=pytest.mark.long, id="epsilon-unit"),  # a fresh process
        pytest.param(SigmaStart(), "epsilon", id="epsilon-sigma"),
        pytest.param(VariancePreserving(), "v_prediction", id="v_prediction-unit"),
        pytest.param(SigmaStart(), "v_prediction", id="v_prediction-sigma"),
        pytest.param(VariancePreserving(), "sample", id="sample-unit"),
        pytest.param(SigmaStart(), "sample", id="sample-sigma"),
    ],
)
def test_any_timesteps_go_through_the_call(process, kind, tmp_path):
    torch.manual_seed(0)
    network: UNet2DModel = small_unet(
        8, 1, 3, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8
    ).eval()
    student = Denoiser(network, process, kind)
    times = process.t_from_index(torch.tensor([999, 700, 321])).tolist()
    out = export_denoiser(student, times, "ode", tmp_path / "out")
    config = json.loads((out / "distill_config.json").read_text())
    assert config["call"] == {"timesteps": [999, 700, 321]}
    unit = type(process) is VariancePreserving
    assert config["scheduler"] == ("DPMSolverMultistepScheduler" if unit else "EulerDiscreteScheduler")
    noise = draw_noise((2, 1, 8, 8), torch.Generator().manual_seed(0))
    cond = {"class_labels": torch.tensor([0, 2])}
    x0 = generate(student, noise, cond, times, "ode")
    assert x0.clamp(-1, 1).std() > 0.01
    assert verify_export(out, x0, class_labels=[0, 2], fresh=unit and kind == "epsilon") <= 1e-5


def test_a_terminal_alpha_of_zero_has_the_trailing_grid_alone():
    process = VariancePreserving(zero_terminal_snr=True)
    times = process.t_from_index(torch.tensor([999, 700, 321])).tolist()
    with pytest.raises(ValueError, match="the stock DDIMScheduler can give with 3 steps is none"):
        vp_scheduler(process, "v_prediction", times, False, 1.0, grid_argument=True)


# ------------------------------------------------------------------------------------------------ learned solvers
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_learned_solver_leaves_with_its_times_and_scale(name, tmp_path):
    torch.manual_seed(0)
    tiny = MAKERS[name]()
    left = {"student": LEFT_OUT, "ema": LEFT_OUT}
    module = build(
        LearnedSolver, tiny, tmp_path / "base", False, num_steps=3, solver_steps=4, guidance=Guidance(3.0), **left
    )
    train_once(module, tiny)
    out, difference = export_module(module, tmp_path / "out", fresh=False)
    assert difference <= 5e-5
    config = json.loads((out / "distill_config.json").read_text())
    assert config["times"] == pytest.approx(module.student_times)
    assert config["call"]["guidance_scale"] == 3.0
    if name == "sd15":
        assert config["call"]["timesteps"] == [round(1000 * t) - 1 for t in module.student_times]
        assert f"timesteps={config['call']['timesteps']}" in (out / "README.md").read_text()
    # the weights are the teacher's
    original = load_file(next((tmp_path / "base" / tiny.component).glob("*.safetensors")))
    exported = load_file(next((out / tiny.component).glob("*.safetensors")))
    assert all(torch.equal(exported[key], value) for key, value in original.items())


@pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving()], ids=["flow", "vp"])
def test_coefficients_name_the_way_out(process: NoiseProcess, tmp_path):
    network = small_unet(8, 1, 0, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=8)
    kind = "flow_prediction" if isinstance(process, FlowMatching) else "epsilon"
    with pytest.raises(ValueError, match=r"sampler='adams' .* train with coefficients='none', .* keep the run and"):
        export_denoiser(Denoiser(network, process, kind), [1.0, 0.5], "adams", tmp_path / "out")
