"""Exported folders, loaded by stock diffusers in a fresh process, make the student's images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_distill.commands.export import export_module
from lightning_distill.export import export_denoiser, export_pipeline, export_weights, verify_export
from lightning_distill.export import pipeline as export
from lightning_distill.export.stock import stock_parts
from lightning_distill.generation import draw_noise, generate
from lightning_distill.methods import PiFlow
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import add_adapter
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.small import small_dit, small_unet
from lightning_distill.processes import EDM, FlowMatching, NoiseProcess, TrigFlow, VariancePreserving
from lightning_distill.times import few_step_times


class SigmaStart(VariancePreserving):
    """Without zero terminal SNR, starting from the noise part of x_t."""

    def prior_std(self, t_init: float) -> float:
        return float(self.sigma(torch.tensor(t_init, dtype=torch.float64)))


def unet(num_classes: int = 0, channels: int = 1, seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    network = small_unet(16, channels, num_classes, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
    return network.eval()


def dit() -> nn.Module:
    torch.manual_seed(0)
    return small_dit(8, 4, 10, 2, num_layers=2, num_attention_heads=2, attention_head_dim=8).eval()


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8).eval()


def zero_snr(schedule: str = "squaredcos_cap_v2") -> VariancePreserving:
    return VariancePreserving(schedule, zero_terminal_snr=True)


@dataclass
class Case:
    process: NoiseProcess
    kind: str
    steps: int
    sampler: str
    network: nn.Module
    pipeline: str
    scheduler: str
    labels: bool = False
    vae: nn.Module | None = None

    given: list[float] | None = None

    @property
    def times(self) -> list[float]:
        return few_step_times(self.process, self.steps) if self.given is None else self.given

    def cond(self) -> dict[str, Any]:
        return {"class_labels": torch.tensor([3, 0, 7])} if self.labels else {}

    def samples(self, seed: int = 5) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        denoiser = Denoiser(self.network, self.process, self.kind)
        noise = draw_noise((3, *denoiser.sample_shape), generator)
        return generate(denoiser, noise, self.cond(), self.times, self.sampler, generator=generator)

    def images(self, seed: int = 5) -> Tensor:
        x0 = self.samples(seed)
        if self.vae is not None:
            with torch.no_grad():
                x0 = self.vae.decode(x0 / self.vae.config.scaling_factor).sample
        return (x0 / 2 + 0.5).clamp(0, 1)


def _cases() -> dict[str, Case]:
    cm, lcm = "ConsistencyModelPipeline", "LCMScheduler"
    flow, flow_map = FlowMatching(3.0), "FlowMapEulerDiscreteScheduler"
    cases = {
        f"{schedule}-{n}": Case(zero_snr(schedule), "v_prediction", n, "renoise", unet(10), cm, lcm, labels=True)
        for schedule in ("squaredcos_cap_v2", "scaled_linear")
        for n in (1, 2, 4)
    }
    given = VariancePreserving.from_alphas_cumprod(DDPMScheduler(beta_schedule="linear").alphas_cumprod)
    vae = autoencoder()
    cases |= {
        "sample-8": Case(zero_snr(), "sample", 8, "renoise", unet(), cm, lcm),
        "epsilon-4": Case(VariancePreserving(), "epsilon", 4, "renoise", unet(10), cm, lcm, labels=True),
        "given-betas-2": Case(given, "v_prediction", 2, "renoise", unet(), cm, lcm),
        "ddim-4": Case(zero_snr(), "v_prediction", 4, "ode", unet(10), cm, "DDIMScheduler", labels=True),
        "ddim-epsilon-2": Case(VariancePreserving(), "epsilon", 2, "ode", unet(), cm, "DDIMScheduler"),
        "euler-4": Case(SigmaStart(), "v_prediction", 4, "ode", unet(10), cm, "EulerDiscreteScheduler", labels=True),
        "euler-3": Case(SigmaStart(), "epsilon", 3, "ode", unet(), cm, "EulerDiscreteScheduler"),
        "euler-1": Case(SigmaStart(), "epsilon", 1, "renoise", unet(), cm, "EulerDiscreteScheduler"),
        "dit-lcm-4": Case(zero_snr(), "v_prediction", 4, "renoise", dit(), "DiTPipeline", lcm, True, vae),
        "dit-ddim-2": Case(zero_snr(), "v_prediction", 2, "ode", dit(), "DiTPipeline", "DDIMScheduler", True, vae),
        "dit-flow-4": Case(flow, "flow_prediction", 4, "ode", dit(), "DiTPipeline", flow_map, True, vae),
    }
    # times of the user's own, which the call states
    cases["lcm-given"] = Case(zero_snr(), "v_prediction", 3, "renoise", unet(10), cm, lcm, True, None, [1.0, 0.8, 0.3])
    cases["lcm-late"] = Case(zero_snr(), "v_prediction", 1, "renoise", unet(), cm, lcm, given=[0.5])
    cases["euler-given"] = Case(
        SigmaStart(), "epsilon", 2, "ode", unet(), cm, "EulerDiscreteScheduler", given=[1.0, 0.3]
    )
    ddpm, euler, fresh = "DDPMPipeline", "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"
    for sampler, n, shift in [
        *(("renoise", 1, 1.0), ("renoise", 2, 3.0), ("renoise", 4, 5.0), ("renoise", 8, 1.0)),
        *(("ode", 2, 1.0), ("ode", 4, 3.0)),
    ]:
        scheduler = fresh if sampler == "renoise" and n > 1 else euler
        cases[f"flow-{sampler}-{n}-{shift:g}"] = Case(
            FlowMatching(shift), "flow_prediction", n, sampler, unet(channels=3), ddpm, scheduler
        )
    return cases


CASES = _cases()

# runs without this package: every folder by DiffusionPipeline, then the code block of its card as written
FRESH = """
import json, os, re, sys, warnings
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
root = sys.argv[1]
images, cards = {}, {}
for name, job in json.load(open(f"{root}/jobs.json")).items():
    folder = f"{root}/{name}"
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = dict(job["call"], output_type="pt")
    torch.manual_seed(5)
    if job["generator"]:
        call["generator"] = torch.Generator().manual_seed(5)
    images[name] = torch.as_tensor(pipe(**call).images)
    os.chdir(folder)
    scope = {}
    exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.S)[1], scope)
    cards[name] = len(scope["images"])
assert not any(module.startswith("lightning") for module in sys.modules)
torch.save({"images": images, "cards": cards}, f"{root}/images.pt")
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Images of every case, from one fresh process that knows nothing of this package."""
    root, jobs = tmp_path_factory.mktemp("exports"), {}
    for name, case in CASES.items():
        export_pipeline(case.network, case.process, case.kind, case.times, case.sampler, root / name, vae=case.vae)
        call: dict[str, Any] = {"num_inference_steps": case.steps}
        if case.labels:
            call["class_labels"] = case.cond()["class_labels"].tolist()
        if case.given is not None:
            call = {"timesteps": [round(1000 * t) - 1 for t in case.given], **call}
        if case.vae is None:
            call["batch_size"] = 3
        else:
            call["guidance_scale"] = 1.0
        jobs[name] = {"call": call, "generator": case.vae is None}
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, "-c", FRESH, str(root)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"root": root, **torch.load(root / "images.pt")}


@pytest.mark.parametrize("name", CASES)
def test_fresh_process_makes_the_same_images(name, fresh):
    case = CASES[name]
    expected = case.images()
    assert expected.std() > 0.01  # not clamped to one colour
    torch.testing.assert_close(fresh["images"][name], expected, atol=1e-5, rtol=0)
    index = json.loads((fresh["root"] / name / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"][1]) == (case.pipeline, case.scheduler)
    assert fresh["cards"][name] == 2  # the card's own example ran


def test_wrong_steps_or_seed_make_other_images(fresh):
    # the comparison above can fail
    case = CASES["squaredcos_cap_v2-4"]
    assert (fresh["images"]["squaredcos_cap_v2-2"] - case.images()).abs().max() > 1e-3
    assert (case.images(seed=6) - case.images()).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["scaled_linear-4", "flow-renoise-4-5", "dit-lcm-4"])
def test_verify_export(name, fresh):
    case, folder = CASES[name], fresh["root"] / name
    labels = case.cond().get("class_labels")
    before = torch.get_rng_state()
    assert verify_export(folder, case.samples(), seed=5, class_labels=labels) <= 1e-5
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="makes other images than the student"):
        verify_export(folder, case.samples(), seed=6, class_labels=labels)


def test_folder_and_card(tmp_path):
    card = {"title": "Tiny", "teacher": "made up", "teacher_sha256": "ab" * 32}
    process, network = zero_snr(), unet(10)
    network.register_to_config(_name_or_path=str(tmp_path))
    folder = export_pipeline(
        network, process, "v_prediction", few_step_times(process, 4), "renoise", tmp_path / "a" / "out",
        card=card, license="mit", null_class=10, dtype=torch.bfloat16,
    )  # fmt: skip
    config = json.loads((folder / "distill_config.json").read_text())
    assert config["times"] == [1.0, 0.75, 0.5, 0.25]
    assert config["num_steps"] == 4
    assert config["sampler"] == "renoise"
    assert config["prediction_type"] == "v_prediction"
    assert config["process"]["beta_schedule"] == "squaredcos_cap_v2"
    assert config["process"]["zero_terminal_snr"] is True
    assert config["teacher_sha256"] == "ab" * 32
    assert config["card"] == {"title": "Tiny", "teacher": "made up"}
    assert len(config["weights_sha256"]["unet/diffusion_pytorch_model.safetensors"]) == 64
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\nlibrary_name: diffusers\n")
    for part in (
        "# Tiny",
        "num_inference_steps=4",
        "class_labels=[0, 1]",
        "labels are 0 to 9",
        "| teacher | made up |",
    ):
        assert part in text
    assert "torch_dtype=torch.bfloat16" in text
    saved = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert network.dtype == torch.float32  # the student itself is untouched
    for path in folder.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["out"]


def test_existing_folders_are_not_overwritten(tmp_path):
    process = zero_snr()

    def run(seed: int, **options: Any) -> Path:
        network = unet(seed=seed)
        return export_pipeline(network, process, "v_prediction", [1.0], "renoise", tmp_path / "out", **options)

    def weight() -> Tensor:
        return UNet2DModel.from_pretrained(tmp_path / "out" / "unet").conv_in.weight

    run(0)
    with pytest.raises(FileExistsError, match="exists already"):
        run(1)
    torch.testing.assert_close(weight(), unet(seed=0).conv_in.weight, rtol=0, atol=0)
    run(1, overwrite=True)
    torch.testing.assert_close(weight(), unet(seed=1).conv_in.weight, rtol=0, atol=0)
    (tmp_path / "out" / "distill_config.json").unlink()
    with pytest.raises(FileExistsError, match="not the folder of an earlier export"):
        run(2, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch, existing):
    process, arguments = zero_snr(), ("v_prediction", [1.0], "renoise", tmp_path / "out")
    if existing:
        export_pipeline(unet(), process, *arguments)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    written = []

    def interrupt(folder: Path, *_: Any) -> None:
        written.extend(folder.rglob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_pipeline(unet(seed=1), process, *arguments, overwrite=True)
    assert written  # the weights were there when it stopped
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert len(list(tmp_path.iterdir())) == existing


def test_failed_replacement_restores_the_old_folder(tmp_path, monkeypatch):
    process, arguments = zero_snr(), ("v_prediction", [1.0], "renoise", tmp_path / "out")
    export_pipeline(unet(), process, *arguments)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk gone"):
        export_pipeline(unet(seed=1), process, *arguments, overwrite=True)
    weight = UNet2DModel.from_pretrained(tmp_path / "out" / "unet").conv_in.weight
    torch.testing.assert_close(weight, unet().conv_in.weight, rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


FLOW, VP = FlowMatching(), zero_snr()


@pytest.mark.parametrize(
    ("network", "process", "kind", "times", "sampler", "message"),
    [
        (nn.Linear(2, 2), FLOW, "flow_prediction", [1.0], "ode", "Linear has no stock .*export_weights"),
        (unet(), VP, "v_prediction", [1.0, 0.8, 0.5, 0.25], "ode", r"steps is \[999, 749, 499, 249\]"),
        (unet(), VP, "v_prediction", [1.0, 0.7505], "renoise", "749.5"),
        (unet(), VP, "v_prediction", [1.0, 0.001], "renoise", "timestep 0, where the stock LCMSch"),
        (unet(), VP, "v_prediction", few_step_times(VP, 3), "ode", "DDIMScheduler.*divisor of 1000"),
        (unet(), SigmaStart(), "epsilon", [1.0, 0.5], "renoise", "x noise, but stock LCM schedulers from unit noise"),
        (unet(), SigmaStart(), "epsilon", [1.0, 0.5], "renoise", r"0\.99\d+ x noise"),
        (unet(), SigmaStart(), "epsilon", [0.5], "ode", r"0\.\d+ x noise"),
        (unet(), VP, "flow_prediction", [1.0], "renoise", "not flow_prediction"),
        (unet(), FLOW, "v_prediction", [1.0], "ode", "read flow_prediction, not v_prediction"),
        (unet(10), FLOW, "flow_prediction", [1.0], "ode", "class labels to a flow-matching UNet2DModel"),
        (unet(), FLOW, "flow_prediction", [1.0, 0.9, 0.2, 0.1], "ode", "shifted trailing grid"),
        (unet(), FLOW, "flow_prediction", [0.9], "ode", "0.9 x noise"),
        (unet(), EDM(), "v_prediction", [80.0], "renoise", "no stock pipeline samples a UNet2DModel in EDM"),
        (unet(), TrigFlow(), "v_prediction", [1.5], "renoise", "in TrigFlow"),
        (unet(), VP, "v_prediction", [1.0], "heun", "sampler='heun' cannot be exported"),
        (unet(), VP, "v_prediction", [0.5, 1.0], "ode", "fall strictly"),
        (dit(), VP, "v_prediction", [1.0], "ode", "pass vae=AutoencoderKL"),
    ],
)  # fmt: skip
def test_what_no_stock_pipeline_does_is_refused(tmp_path, network, process, kind, times, sampler, message):
    with pytest.raises(ValueError, match=message):
        export_pipeline(network, process, kind, times, sampler, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("role", [None, Lora(rank=2)], ids=["full", "lora"])
def test_students_with_a_policy_are_refused_as_such(tmp_path, role):
    """For any sampler, and not for the sampler: another one would not help."""
    teacher = Denoiser(unet(), FlowMatching(), "flow_prediction")
    module = PiFlow(teacher, student=role, shape=[1, 16, 16], num_steps=2, policy="grid", components=3)
    module.configure_model()
    assert module.sampler == "flow_map"
    for style in (None,) if role is None else (None, "diffusers"):
        with pytest.raises(ValueError, match=r"puts out a policy for each of its steps.*no stock pipeline"):
            export_module(module, tmp_path / "out", lora=style, fresh=False)


def test_refusals_of_latent_transformers_and_shapes():
    vae = autoencoder()
    with pytest.raises(ValueError, match="with fresh noise runs in DiTPipeline"):
        stock_parts(dit(), FLOW, "flow_prediction", [1.0, 0.5], "renoise", vae, None)
    with pytest.raises(ValueError, match=r"integer timesteps.*0\.83333"):
        stock_parts(dit(), FLOW, "flow_prediction", few_step_times(FlowMatching(5.0), 4), "ode", vae, None)
    with pytest.raises(ValueError, match="have no autoencoder"):
        stock_parts(unet(), VP, "v_prediction", [1.0], "ode", vae, None)
    with pytest.raises(ValueError, match=r"4 latent channels.* 3"):
        stock_parts(small_dit(8, 3, 10, 2, 1, 2, 8), VP, "v_prediction", [1.0], "ode", vae, None)
    wide = unet()
    wide.register_to_config(sample_size=(16, 32))
    with pytest.raises(ValueError, match="sample squares"):
        stock_parts(wide, VP, "v_prediction", [1.0], "ode", None, None)


def test_denoiser_with_an_adapter_and_another_process(tmp_path):
    # a method in TrigFlow on a network that works in VP: same times up to the change of process
    base = Denoiser(unet(10), TrigFlow(), "v_prediction", network_process=zero_snr(), null_class=10)
    student = add_adapter(base, "student", rank=2)
    for name, parameter in student.adapter_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    vp = zero_snr()
    times = [float(TrigFlow().t_from_log_snr(vp.log_snr(torch.tensor(t)))) for t in (1.0, 0.5)]
    generator = torch.Generator().manual_seed(0)
    cond = {"class_labels": torch.tensor([1, 2])}
    noise = draw_noise((2, 1, 16, 16), generator)
    samples = generate(student, noise, cond, times, "renoise", generator=generator)
    folder = export_denoiser(student, times, "renoise", tmp_path / "out")
    assert verify_export(folder, samples, seed=0, class_labels=[1, 2]) <= 1e-5
    assert "The label 10 means no class." in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="still carries adapters"):
        export_pipeline(student.network, vp, "v_prediction", [1.0], "renoise", tmp_path / "raw")
    scaled = Denoiser(unet(), EDM(), "v_prediction", network_process=TrigFlow(), sigma_data=0.5)
    with pytest.raises(ValueError, match=r"divided by 0\.5"):
        export_denoiser(scaled, [80.0], "renoise", tmp_path / "scaled")


def test_export_weights(tmp_path):
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    network[1].weight = nn.Parameter(network[0].weight.data.T.contiguous())
    folder = export_weights(network, EDM(), "sample", [80.0, 1.0], "renoise", tmp_path / "out", card={"method": "SiD"})
    for key, value in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(value, network.state_dict()[key], rtol=0, atol=0)
    config = json.loads((folder / "distill_config.json").read_text())
    assert config["times"] == [80.0, 1.0]
    assert config["process"] == {"class": "EDM", "sigma_min": 0.002, "sigma_max": 80.0, "t_max": 80.0}
    text = (folder / "README.md").read_text()
    assert "| method | SiD |" in text
    assert re.search(r'load_model\(network, "model.safetensors"\)', text)
    with pytest.raises(FileExistsError, match="exists already"):
        export_weights(network, EDM(), "sample", [80.0], "renoise", tmp_path / "out")
