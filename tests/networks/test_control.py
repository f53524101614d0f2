"""ControlNets: the steered model at the start is the model; the picture matters afterwards, to every derivative too."""

from __future__ import annotations

import diffusers
import pytest
import torch
from frozen import frozen
from tiny_pipelines import sana, sana_sprint, sd15, sd21, sdxl
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.guidance import guided
from lightning_distill.methods import LCM, ConsistencyDistillation, SANASprint
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.control import Controlled, ControlledDenoiser, controlled
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import example_cond
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.randomness import Draws
from lightning_distill.tangents import value_and_tangent

pytestmark = pytest.mark.filterwarnings("ignore:.*eval mode")
UNETS, SANAS = {"sd15": sd15, "sd21": sd21, "sdxl": sdxl}, {"sana": sana, "sana_sprint": sana_sprint}
TINY = {**UNETS, **SANAS}


def controlnet(network, seed=0):
    torch.manual_seed(seed)
    if type(network).__name__ == "UNet2DConditionModel":
        made = diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(8, 8, 8, 8))
    else:
        config = dict(network.config)
        names = ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "sample_size",
                 "num_cross_attention_heads", "cross_attention_head_dim", "cross_attention_dim", "caption_channels",
                 "patch_size", "mlp_ratio")  # fmt: skip
        made = diffusers.SanaControlNetModel(**{k: config[k] for k in names})
        for block in [*made.controlnet_blocks, made.input_block]:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
    return made.eval()


def steered(name, moved=True):
    """A tiny model and the same model with a ControlNet, whose last layers are zero unless moved."""
    tiny = TINY[name]()
    plain = tiny.denoiser()
    steering = controlnet(plain.network)
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in steering.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    network = controlled(plain.network, steering)
    settings = {"network_process": plain.network_process, "data_scale": plain.data_scale, "null_cond": tiny.null()}
    both = Denoiser(network, plain.process, plain.prediction_type, **settings)
    return tiny, plain, both.eval()


def inputs(tiny, both, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *tiny.shape, generator=generator)
    picture = torch.rand(example_cond(both.network, n)["control"].shape, generator=generator)
    return x, torch.full((n,), 0.4, dtype=torch.float64), {**tiny.cond(n), "control": picture}


def without(cond):
    return {k: v for k, v in cond.items() if k != "control"}


@pytest.mark.parametrize("name", TINY)
def test_a_new_controlnet_changes_nothing(name):
    tiny, plain, both = steered(name, moved=False)
    x, t, cond = inputs(tiny, both)
    assert torch.equal(both(x, t, cond).raw, plain(x, t, without(cond)).raw)


@pytest.mark.parametrize("name", TINY)
def test_a_trained_one_listens_to_the_picture(name):
    tiny, plain, both = steered(name)
    x, t, cond = inputs(tiny, both)
    other = {**cond, "control": 1.0 - cond["control"]}
    assert not torch.allclose(both(x, t, cond).raw, plain(x, t, without(cond)).raw, atol=1e-4)
    assert not torch.allclose(both(x, t, cond).raw, both(x, t, other).raw, atol=1e-6)
    both.network.strength = 0.0
    assert torch.allclose(both(x, t, cond).raw, plain(x, t, without(cond)).raw, atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sana"])
def test_both_branches_of_guidance_see_the_picture(name):
    tiny, _, both = steered(name)
    x, t, cond = inputs(tiny, both)
    null = both.null_cond(cond)
    assert torch.equal(null["control"], cond["control"])
    w = 3.0
    expected = both(x, t, null).x0 + w * (both(x, t, cond).x0 - both(x, t, null).x0)
    assert torch.allclose(guided(both, x, t, cond, w).x0, expected, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_the_tangent_goes_through_both_networks(name):
    tiny, plain, both = steered(name)
    x, t, cond = inputs(tiny, both)
    # along x alone: single precision cannot take differences in the time of a network that counts to 1000
    dx, dt = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)), torch.zeros_like(t)

    def f(x, t):
        return both(x, t, cond).raw

    _, exact = value_and_tangent(f, (x, t), (dx, dt), "jvp")
    _, difference = value_and_tangent(f, (x, t), (dx, dt), "central", step=2e-4)
    scale = exact.abs().max()
    assert (exact - difference).abs().max() < 2e-2 * scale
    _, alone = value_and_tangent(lambda x, t: plain(x, t, without(cond)).raw, (x, t), (dx, dt), "jvp")
    assert (exact - alone).abs().max() > 1e-3 * scale


def updated(module, batch):
    module.configure_model()
    module.draws = Draws(module.streams, 0, 0, "student0", 0)
    loss = sum(module.student_loss(batch).losses.values())
    loss.backward()
    return {name for name, p in module.student.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("role", [Copy, lambda: Lora(rank=2)], ids=["copy", "lora"])
def test_students_train_with_their_control(role):
    tiny, _, both = steered("sd15")
    x, _, cond = inputs(tiny, both)
    reached = updated(ConsistencyDistillation(both, student=role(), intervals=4, ema=[]), Batch(x0=x, cond=cond))
    assert any("controlnet" in name for name in reached)
    assert any(".network." in name and "controlnet" not in name for name in reached)


def test_consistency_with_a_told_scale_and_a_control():
    tiny, _, both = steered("sd15")
    x, _, cond = inputs(tiny, both)
    module = LCM(both, student=TwoTime(Copy(), kind=None, guidance=True), intervals=4, ema=[])
    assert updated(module, Batch(x0=x, cond=cond))


@pytest.mark.parametrize("name", ["sana", "sana_sprint"])
def test_continuous_methods_train_with_a_control(name):
    """SANA-Sprint's own setting: the tangent goes through the ControlNet, and the student is told a scale."""
    tiny, _, both = steered(name)
    x, t, cond = inputs(tiny, both)
    told = TwoTime(Copy(), kind=None, guidance=True) if name == "sana" else Copy()
    gan = Adversary(taps=both.block_names()[:1], features="teacher")
    module = SANASprint(both, student=told, gan=gan, warmup_updates=1, ema=[])
    module.configure_model()
    with frozen(module.student, both):
        assert torch.equal(module.student(x, t, cond).x0, both(x, t, cond).x0)
    module.draws = Draws(module.streams, 5, 0, "student0", 0)
    sum(module.student_loss(Batch(x0=x, cond=cond)).losses.values()).backward()
    reached = {name for name, p in module.student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("controlnet" in parameter for parameter in reached)
    assert any(".network." in parameter for parameter in reached)


def test_it_is_read_from_two_folders(tmp_path):
    tiny, _, both = steered("sd15")
    tiny.save(tmp_path / "model")
    both.network.controlnet.save_pretrained(tmp_path / "control")
    spec = ControlledDenoiser(PretrainedDenoiser(str(tmp_path / "model")), str(tmp_path / "control"))
    spec.check()
    read = spec.build()
    x, t, cond = inputs(tiny, both)
    assert isinstance(read.network, Controlled)
    assert torch.allclose(read(x, t, cond).raw, both(x, t, cond).raw, atol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    tiny, plain, both = steered("sd15")
    tiny.save(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="is no folder of a ControlNet"):
        ControlledDenoiser(PretrainedDenoiser(str(tmp_path / "model")), str(tmp_path / "none")).check()
    with pytest.raises(ValueError, match="is steered by a SanaControlNetModel"):
        controlled(sana().network, both.network.controlnet)
    with pytest.raises(ValueError, match="with a ControlNet is not supported"):
        controlled(nn.Linear(2, 2), both.network.controlnet)
    x, t, cond = inputs(tiny, both)
    with pytest.raises(ValueError, match="control"):
        both(x, t, without(cond))
    assert plain is not both
