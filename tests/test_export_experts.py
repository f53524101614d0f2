"""Students of several experts as stock pipelines: one that switches by time, or one pipeline per group of classes."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import MAKERS

from lightning_distill.commands.export import export_module
from lightning_distill.methods import DMD2
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import Experts
from lightning_distill.networks.prompt_groups import prompt_features, read_centres
from lightning_distill.networks.small import small_unet
from lightning_distill.processes import FlowMatching, VariancePreserving


def differ(module):
    """Weights of the experts apart from each other and from the teacher's."""
    module.configure_model()
    with torch.no_grad():
        for k, expert in enumerate(module.student.network.experts):
            for parameter in expert.parameters():
                parameter.mul_(1 - 0.1 * (k + 1))
    return module


def test_two_experts_by_time_become_one_wan_pipeline(tmp_path):
    tiny = MAKERS["wan"]()
    teacher = Denoiser(tiny.network, FlowMatching(3.0), "flow_prediction")
    module = DMD2(teacher, student=Experts(boundaries=[0.875]), num_steps=4, sampler="ode", shape=tiny.shape, ema=[])
    folder, difference = export_module(differ(module), tmp_path / "out", fresh=False)
    assert difference <= 1e-5
    assert json.loads((folder / "model_index.json").read_text())["boundary_ratio"] == pytest.approx(0.875)
    assert (folder / "transformer_2").is_dir()


def test_experts_for_classes_become_one_pipeline_each(tmp_path):
    network = small_unet(16, 1, 4, (8, 16), norm_num_groups=4, attention_head_dim=8).eval()
    teacher = Denoiser(
        network, VariancePreserving("squaredcos_cap_v2", zero_terminal_snr=True), "v_prediction", null_class=4
    )
    module = DMD2(teacher, student=Experts(classes=[[0, 3], [1, 2]]), num_steps=2, ema=[])
    folder, difference = export_module(differ(module), tmp_path / "out", fresh=False)
    assert difference <= 1e-5
    for k, classes in enumerate([[0, 3], [1, 2]]):
        config = json.loads((folder / f"expert_{k}" / "distill_config.json").read_text())
        assert config["card"]["classes"] == classes
    with pytest.raises(FileExistsError, match="expert_0"):
        export_module(module, tmp_path / "out", fresh=False)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart_sigma"])
def test_experts_for_prompts_become_one_pipeline_each(tmp_path, name):
    tiny = MAKERS[name]()
    teacher = tiny.denoiser()
    width = prompt_features(tiny.cond(2)).shape[1]
    centres = torch.nn.functional.normalize(torch.randn(2, width), dim=1)
    save_file({"centres": centres}, tmp_path / "centres.safetensors")
    role = Experts(prompts=str(tmp_path / "centres.safetensors"))
    module = DMD2(teacher, student=role, num_steps=2, shape=tiny.shape, ema=[])
    folder, difference = export_module(differ(module), tmp_path / "out", fresh=False)
    assert difference <= 1e-5
    assert (folder / "expert_0").is_dir()
    assert (folder / "expert_1").is_dir()
    assert torch.equal(read_centres(str(folder / "centres.safetensors")), centres)


def test_experts_that_no_stock_pipeline_switches_are_refused(tmp_path):
    tiny = MAKERS["wan"]()
    teacher = Denoiser(tiny.network, FlowMatching(3.0), "flow_prediction")
    module = DMD2(teacher, student=Experts(boundaries=[0.8, 0.4]), num_steps=4, shape=tiny.shape, ema=[])
    with pytest.raises(ValueError, match=r"switches between two experts by time, not between 3 in a TimeExperts"):
        export_module(differ(module), tmp_path / "three", fresh=False)
    sd3 = MAKERS["sd3"]()
    teacher = Denoiser(sd3.network, FlowMatching(), "flow_prediction")
    module = DMD2(teacher, student=Experts(boundaries=[0.8]), num_steps=4, sampler="ode", shape=sd3.shape, ema=[])
    with pytest.raises(ValueError, match="only WanPipeline switches between two experts"):
        export_module(differ(module), tmp_path / "sd3", fresh=False)
