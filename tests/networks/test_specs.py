import json

import huggingface_hub
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from huggingface_hub.utils import filter_repo_objects
from jsonargparse import ArgumentParser
from safetensors.torch import save_file
from torch import nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.folders import WEIGHTS_VARIABLE
from lightning_distill.networks.specs import (
    AnalyticTeacher,
    DenoiserSpec,
    NewDenoiser,
    PretrainedDenoiser,
    ZooDenoiser,
    as_denoiser,
    same_path,
    seeded,
)
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving, change_process

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
}


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.inner = nn.Linear(2, width)
        self.outer = nn.Linear(width, 2)

    def forward(self, x, t):
        return self.outer(self.inner(x).tanh()) * t[:, None].to(x)


def pipeline(folder, scheduler, card=None):
    with seeded(0):
        net = UNet2DModel(**UNET).eval()
    DDPMPipeline(net, scheduler).save_pretrained(folder)
    if card is not None:
        (folder / "card.json").write_text(json.dumps(card))
    return net


def outputs(denoiser, net):
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8])
    return denoiser(x, t).raw, net(x, denoiser.process.network_time(t).float()).sample


ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = [
    (DDPMScheduler(), "epsilon"),
    (DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"), "sample"),
    (DDIMScheduler(**ZERO), "v_prediction"),
    (LCMScheduler(**LATENT), "epsilon"),
    (EulerDiscreteScheduler(**LATENT, num_train_timesteps=500), "epsilon"),
    (DDPMScheduler(trained_betas=[0.01 * (i + 1) for i in range(20)]), "epsilon"),
]


@pytest.mark.parametrize(("scheduler", "kind"), SCHEDULERS, ids=lambda s: getattr(type(s), "__name__", s))
def test_variance_preserving_schedulers(tmp_path, scheduler, kind):
    net = pipeline(tmp_path, scheduler)
    denoiser = as_denoiser(PretrainedDenoiser(str(tmp_path)))
    process = denoiser.process
    assert isinstance(process, VariancePreserving)
    assert denoiser.prediction_type == kind
    assert process.num_train_timesteps == len(scheduler.alphas_cumprod)
    alpha = process.alpha(process.t_from_index(torch.arange(len(scheduler.alphas_cumprod))))
    assert torch.allclose(alpha.square(), scheduler.alphas_cumprod.double(), atol=1e-6)
    assert torch.equal(*outputs(denoiser, net))
    assert not denoiser.network.training


def test_flow_matching_scheduler_and_card(tmp_path):
    card = {"sigma_data": 0.35, "null_class": 7, "anything": "else"}
    net = pipeline(tmp_path, FlowMatchEulerDiscreteScheduler(shift=3.0), card)
    denoiser = as_denoiser(PretrainedDenoiser(str(tmp_path)))
    assert repr(denoiser.process) == "FlowMatching(shift=3.0)"
    assert denoiser.prediction_type == "flow_prediction"
    assert (denoiser.sigma_data, denoiser.null_class) == (0.35, 7)
    assert torch.equal(*outputs(denoiser, net))
    given = as_denoiser(PretrainedDenoiser(str(tmp_path), sigma_data=0.5, null_class=3, process=FlowMatching(5)))
    assert (given.sigma_data, given.null_class, given.process.shift) == (0.5, 3, 5)  # a shift moves no path
    # the network's own folder finds scheduler and card of its pipeline
    inner = as_denoiser(PretrainedDenoiser(str(tmp_path / "unet")))
    assert (inner.prediction_type, inner.null_class) == ("flow_prediction", 7)
    assert (
        as_denoiser(PretrainedDenoiser(str(tmp_path), "unet", dtype="bfloat16")).computes_in(torch.float32)
        == torch.bfloat16
    )


def test_contradictions_name_both_sides(tmp_path):
    pipeline(tmp_path, DDPMScheduler(), {"prediction_type": "epsilon"})
    with pytest.raises(ValueError, match=r"'sample' by argument prediction_type but 'epsilon' by .*card.json"):
        PretrainedDenoiser(str(tmp_path), prediction_type="sample").check()
    with pytest.raises(
        ValueError, match=r"FlowMatching\(shift=1.0\) by argument process but VariancePreserving.*config"
    ):
        PretrainedDenoiser(str(tmp_path), process=FlowMatching()).check()
    (tmp_path / "card.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match=r"'v_prediction' by .*card.json but 'epsilon' by .*scheduler_config.json"):
        PretrainedDenoiser(str(tmp_path)).check()


def test_model_folder_without_scheduler(tmp_path):
    net = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=4,
        in_channels=1,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    )
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"neither a scheduler nor a card.json says the process of .*give process="):
        PretrainedDenoiser(str(tmp_path)).check()
    spec = PretrainedDenoiser(str(tmp_path), process=FlowMatching(), prediction_type="flow_prediction")
    spec.check()
    denoiser = spec.build()
    assert type(denoiser.network) is DiTTransformer2DModel
    assert denoiser.sigma_data == 1.0
    (tmp_path / "card.json").write_text(json.dumps({"process": {"class_path": "lightning_distill.processes.TrigFlow"}}))
    spec = PretrainedDenoiser(str(tmp_path), prediction_type="v_prediction")
    assert isinstance(spec.build().process, TrigFlow)


def card_folder(folder, **changes):
    card = {
        "network": {"class_path": f"{__name__}.Net", "init_args": {"width": 6}},
        "weights": "net.safetensors",
        "process": {"class_path": "lightning_distill.processes.FlowMatching", "init_args": {"shift": 2.0}},
        "prediction_type": "flow_prediction",
        "sigma_data": 0.7,
        "null_class": 10,
    }
    net = Net(6)
    save_file(net.state_dict(), folder / "net.safetensors")
    (folder / "card.json").write_text(json.dumps({**card, **changes}))
    return net


def test_networks_described_by_a_card(tmp_path):
    net = card_folder(tmp_path)
    state = torch.get_rng_state()
    denoiser = as_denoiser(PretrainedDenoiser(str(tmp_path)))
    assert torch.equal(torch.get_rng_state(), state)
    assert (denoiser.sigma_data, denoiser.null_class, denoiser.process.shift) == (0.7, 10, 2.0)
    x, t = torch.randn(3, 2), torch.tensor([0.1, 0.4, 0.9])
    assert torch.equal(denoiser(x, t).raw, net(x, t))
    card_folder(tmp_path, network_process={"class_path": "lightning_distill.processes.TrigFlow"})
    assert isinstance(PretrainedDenoiser(str(tmp_path)).build().network_process, TrigFlow)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"class_path": "os.system"}}, r"names 'os.system', which is no importable Module class"),
        ({"network": {"class_path": "no.such.Net"}}, "names 'no.such.Net'"),
        ({"process": {"class_path": "torch.nn.Linear"}}, "no importable NoiseProcess class"),
        ({"weights": "gone.safetensors"}, "gone.safetensors does not exist; complete the download"),
        ({"weights": "card.json"}, "is not a safetensors file"),
        ({"prediction_type": "noise"}, "prediction_type='noise' is unknown"),
    ],
)
def test_bad_cards_are_found_by_check(tmp_path, changes, message):
    card_folder(tmp_path, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PretrainedDenoiser(str(tmp_path)).check()


def test_cards_that_do_not_fit_their_weights(tmp_path):
    card_folder(tmp_path, network={"class_path": f"{__name__}.Net", "init_args": {"width": 5}})
    with pytest.raises(ValueError, match=r"net.safetensors does not fit .*Net as described in .*size mismatch"):
        PretrainedDenoiser(str(tmp_path)).build()
    card_folder(tmp_path, network={"class_path": f"{__name__}.Net", "init_args": {"depth": 5}})
    with pytest.raises(ValueError, match=r"cannot construct .*Net: .*'depth'"):
        PretrainedDenoiser(str(tmp_path)).build()


def test_weight_files_are_checked_from_their_headers(tmp_path):
    pipeline(tmp_path, DDPMScheduler())
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    spec = PretrainedDenoiser(str(tmp_path))
    spec.check()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        spec.check()
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    file.with_name("diffusion_pytorch_model.fp16.safetensors").write_bytes(content)
    assert spec.build().network.config.sample_size == 8  # a folder with fp16 files only
    file.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"model.safetensors does not exist.*{WEIGHTS_VARIABLE}"):
        spec.check()
    torch.save({}, file.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"\.bin is a pickle, which can run code"):
        spec.check()
    with pytest.raises(ValueError, match=r"\.bin is a pickle"):
        spec.build()


def test_sharded_weights(tmp_path):
    with seeded(0):
        net = UNet2DModel(**UNET)
    net.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    spec = PretrainedDenoiser(str(tmp_path), process=FlowMatching(), prediction_type="flow_prediction")
    assert torch.equal(*outputs(spec.build(), net.eval()))
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[-1].name} does not exist"):
        spec.check()


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model: expected config.json"):
        PretrainedDenoiser(str(tmp_path)).check()
    pipeline(tmp_path, DDPMScheduler())
    with pytest.raises(FileNotFoundError, match=r"transformer/config.json does not exist; .* one of \['unet'\]"):
        PretrainedDenoiser(str(tmp_path), subfolder="transformer").check()
    config = tmp_path / "unet" / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "NetOfTomorrow"))
    with pytest.raises(ValueError, match=r"names the model class 'NetOfTomorrow', which diffusers .* does not have"):
        PretrainedDenoiser(str(tmp_path)).check()
    config.write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        PretrainedDenoiser(str(tmp_path)).check()
    with pytest.raises(ValueError, match="dtype='half' is unknown"):
        PretrainedDenoiser(str(tmp_path), dtype="half").check()


#: what the hub's folder of a pipeline has
HUB = [
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer_2/spiece.model",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "v1-5-pruned-emaonly.safetensors",
    "v1-5-pruned.safetensors",
]


def test_names_and_downloads(tmp_path, monkeypatch):
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    calls = []

    def download(name, revision, **patterns):
        calls.append((name, sorted(filter_repo_objects(HUB, **patterns))))
        return str(tmp_path / "maker" / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    spec = PretrainedDenoiser("maker/model")
    for call in (spec.check, spec.build):
        with pytest.raises(FileNotFoundError, match="download the model beforehand") as error:
            call()
        assert all(way in str(error.value) for way in ("path", WEIGHTS_VARIABLE, "allow_download=True"))
    assert calls == []
    pipeline(tmp_path / "maker" / "model", DDPMScheduler())
    willing = PretrainedDenoiser("maker/model", allow_download=True)
    willing.check()
    assert calls == []  # checking downloads nothing
    willing.build()
    wanted = {
        name for name in HUB if "pruned" not in name and "fp16" not in name and not name.endswith((".bin", ".md"))
    }
    assert calls == [("maker/model", sorted(wanted))]
    for base in (tmp_path, tmp_path / "maker"):
        monkeypatch.setenv(WEIGHTS_VARIABLE, str(base))
        spec.check()
        spec.build()
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=f"nor one below {WEIGHTS_VARIABLE}="):
        spec.check()
    assert len(calls) == 1

    def fail(*_args, **_kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="could not be fetched from the Hugging Face hub"):
        willing.build()


def test_new_networks_have_equal_weights_on_every_rank():
    made = []
    for seed, before in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        spec = NewDenoiser(Net, EDM(), "v_prediction", TrigFlow(), sigma_data=0.5, null_class=2, seed=seed)
        made.append(as_denoiser(spec))
        assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (torch.cat([p.flatten() for p in d.parameters()]) for d in made)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert (made[0].sigma_data, made[0].null_class) == (0.5, 2)
    assert isinstance(made[0].network_process, TrigFlow)
    with pytest.raises(ValueError, match="prediction_type='x' is unknown"):
        NewDenoiser(Net, EDM(), "x").check()


def test_analytic_teachers():
    teacher = as_denoiser(AnalyticTeacher("ring4", FlowMatching()))
    x = 1.5 * torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    # at low noise a sample on a mode is explained by that mode
    assert torch.allclose(teacher(x * 0.99, torch.tensor(0.01)).x0, x, atol=0.02)
    labelled = as_denoiser(AnalyticTeacher("ring", FlowMatching(), labelled=True))
    assert labelled.null_cond({"class_labels": torch.tensor([3])})["class_labels"].tolist() == [8]
    for wrong in ("square", "analytic_denoiser", "GaussianMixture", "gaussian_flow_map", "torch"):
        with pytest.raises(ValueError, match="is unknown; choose one of ring, ring4"):
            AnalyticTeacher(wrong, FlowMatching()).check()


def test_zoo(monkeypatch, tmp_path):
    import lightning_distill.zoo as zoo

    with pytest.raises(ValueError, match="no entry 'nothing'"):
        ZooDenoiser("nothing").check()
    card_folder(tmp_path)
    monkeypatch.setattr(zoo, "zoo_path", lambda name: tmp_path)
    assert as_denoiser(ZooDenoiser("toy")).sigma_data == 0.7


def test_as_denoiser():
    denoiser = Denoiser(Net(), FlowMatching(), "sample")
    assert as_denoiser(denoiser) is denoiser
    with pytest.raises(TypeError, match=r"expected a Denoiser or a spec .* got Net; wrap a network"):
        as_denoiser(Net())


def test_same_path():
    assert same_path(FlowMatching(), FlowMatching(shift=3))
    assert same_path(VariancePreserving(), VariancePreserving("scaled_linear", 0.00085, 0.012))
    assert not same_path(VariancePreserving(), VariancePreserving("squaredcos_cap_v2"))
    assert not same_path(VariancePreserving(), VariancePreserving(zero_terminal_snr=True))
    assert not same_path(FlowMatching(), TrigFlow())


def test_specs_come_from_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_subclass_arguments(DenoiserSpec, "teacher")
    text = """
teacher:
  class_path: NewDenoiser
  init_args:
    network:
      class_path: diffusers.UNet2DModel
      init_args: {unet}
    process:
      class_path: lightning_distill.processes.EDM
    network_process: TrigFlow
    prediction_type: v_prediction
    sigma_data: 0.5
""".replace("{unet}", json.dumps(UNET))
    config = parser.parse_string(text)
    spec = parser.instantiate_classes(config).teacher
    denoiser = as_denoiser(spec)
    assert type(denoiser.network) is UNet2DModel
    assert denoiser.sample_shape == (1, 8, 8)
    assert isinstance(denoiser.network_process, TrigFlow)
    assert parser.parse_string(parser.dump(config)) == config
    pipeline(tmp_path, FlowMatchEulerDiscreteScheduler())
    args = ["--teacher=PretrainedDenoiser", f"--teacher.path={tmp_path}", "--teacher.sigma_data=0.4"]
    assert as_denoiser(parser.instantiate_classes(parser.parse_args(args)).teacher).sigma_data == 0.4


def test_method_process_is_an_exact_change_of_process():
    """The shipped VP teacher as a flow-matching one: same x0 and noise, velocity eps - x0."""
    teacher = ZooDenoiser("fashion").build()
    twin = ZooDenoiser("fashion", method_process=FlowMatching()).build()
    t = torch.tensor([0.05, 0.5, 1.0], dtype=torch.float64)
    labels = {"class_labels": torch.tensor([0, 3, 10])}
    x0, eps = 0.6 * torch.randn(3, 1, 32, 32), torch.randn(3, 1, 32, 32)
    t_vp, _ = change_process(t, twin.process, teacher.process)
    with torch.no_grad():
        expected = teacher(teacher.process.add_noise(x0, eps, t_vp), t_vp, labels)
        got = twin(twin.process.add_noise(x0, eps, t), t, labels)
    torch.testing.assert_close(got.x0, expected.x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.velocity, expected.eps - expected.x0, rtol=1e-4, atol=2e-5)
    assert twin.sigma_data == teacher.sigma_data
    assert twin.data_scale == 1.0
