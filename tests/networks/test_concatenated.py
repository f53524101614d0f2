"""A picture beside the sample: where it enters, what guidance and roles do with it, its shift, messages."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.generation import default_cond
from lightning_distill.guidance import guided
from lightning_distill.methods import LCM, ConsistencyDistillation
from lightning_distill.networks.concatenated import Concatenated, ConcatenatedDenoiser, concatenated
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import example_cond
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.small import ResidualMLP, small_dit, small_unet
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import FlowMatching, ResidualShift, VariancePreserving
from lightning_distill.randomness import Draws
from lightning_distill.tangents import value_and_tangent

pytestmark = pytest.mark.filterwarnings("ignore:.*eval mode")


def unet(classes=0, low_channels=1):
    network = small_unet(8, 1, classes, (8, 16), norm_num_groups=4, attention_head_dim=8)
    first = network.conv_in
    network.register_to_config(in_channels=1 + low_channels)
    network.conv_in = nn.Conv2d(1 + low_channels, first.out_channels, 3, padding=1)
    return network


def text_unet():
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=2, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=4,
        attention_head_dim=2, norm_num_groups=2,
    )  # fmt: skip


def mlp(classes=0):
    return ResidualMLP((2, 4, 4), width=8, depth=1, num_classes=classes)


def moved(network):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


MADE = {
    "unet": lambda: Denoiser(concatenated(moved(unet())), FlowMatching(), "flow_prediction"),
    "text": lambda: Denoiser(concatenated(moved(text_unet())), VariancePreserving(zero_terminal_snr=True),
                             "v_prediction", null_cond={"encoder_hidden_states": torch.zeros(1, 3, 4)}),
    "mlp": lambda: Denoiser(concatenated(moved(mlp(3)), 1), FlowMatching(), "flow_prediction"),
}  # fmt: skip


def inputs(denoiser, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *denoiser.sample_shape, generator=generator)
    cond = {"low": torch.randn(n, *denoiser.network.low_shape, generator=generator)}
    if "encoder_hidden_states" in denoiser.family.cond_keys:
        cond["encoder_hidden_states"] = torch.randn(n, 3, 4, generator=generator)
    if denoiser.num_classes is not None:
        cond["class_labels"] = torch.arange(n) % denoiser.num_classes
    return x, torch.full((n,), 0.4, dtype=torch.float64), cond


@pytest.mark.parametrize("name", MADE)
def test_the_picture_is_the_last_channels_of_the_input(name):
    denoiser = MADE[name]()
    x, t, cond = inputs(denoiser)
    assert denoiser.sample_shape == tuple(x.shape[1:])
    seen = []
    first = denoiser.network.network.input if name == "mlp" else denoiser.network.network.conv_in
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made = denoiser(x, t, cond)
    handle.remove()
    assert torch.equal(seen[0].reshape(2, -1), torch.cat([x, cond["low"]], 1).reshape(2, -1))
    assert made.x0.shape == x.shape
    assert not torch.allclose(made.raw, denoiser(x, t, {**cond, "low": cond["low"] + 1.0}).raw, atol=1e-4)
    own = {k: v for k, v in cond.items() if k != "low"}
    if name == "mlp":
        both = torch.cat([x, cond["low"]], 1)
        assert torch.equal(made.raw, denoiser.network.network(both, t.float(), **own)[:, :1])


@pytest.mark.parametrize("name", ["text", "mlp"])
def test_both_branches_of_guidance_see_the_picture(name):
    denoiser = MADE[name]()
    x, t, cond = inputs(denoiser)
    null = denoiser.null_cond(cond)
    assert torch.equal(null["low"], cond["low"])
    assert any(not torch.equal(null[key], cond[key]) for key in cond)
    expected = denoiser(x, t, null).x0 + 3.0 * (denoiser(x, t, cond).x0 - denoiser(x, t, null).x0)
    torch.testing.assert_close(guided(denoiser, x, t, cond, 3.0).x0, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MADE)
def test_shapes_are_known_without_a_batch(name):
    denoiser = MADE[name]()
    if name != "text":
        assert example_cond(denoiser.network, 3)["low"].shape == (3, *denoiser.network.low_shape)
        assert name == "mlp" or default_cond(denoiser, 3)["low"].shape[0] == 3
    assert denoiser.family.required[-1] == "low"
    assert denoiser.block_names() == Denoiser(denoiser.network.network, denoiser.process, "sample").block_names()


def test_the_tangent_has_none_of_the_picture():
    denoiser = MADE["mlp"]()
    x, t, cond = (v.double() if isinstance(v, torch.Tensor) else v for v in inputs(denoiser))
    denoiser.double()
    cond = {**cond, "low": cond["low"].double()}
    dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    _, exact = value_and_tangent(lambda x, t: denoiser(x, t, cond).raw, (x, t), (dx, torch.ones_like(t)), "jvp")
    h = 1e-5
    difference = (denoiser(x + h * dx, t + h, cond).raw - denoiser(x - h * dx, t - h, cond).raw) / (2 * h)
    torch.testing.assert_close(exact, difference, atol=1e-7, rtol=1e-6)


def updated(module, batch):
    module.configure_model()
    module.draws = Draws(module.streams, 0, 0, "student0", 0)
    sum(module.student_loss(batch).losses.values()).backward()
    return {name for name, p in module.student.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("role", [Copy, lambda: Lora(rank=2)], ids=["copy", "lora"])
@pytest.mark.parametrize("name", ["unet", "mlp"])
def test_students_learn_with_it_and_start_as_the_teacher(name, role):
    teacher = MADE[name]()
    x, t, cond = inputs(teacher)
    module = ConsistencyDistillation(teacher, student=role(), intervals=4)
    assert updated(module, Batch(x0=x, cond=cond))
    torch.testing.assert_close(module.student(x, t, cond).raw, teacher(x, t, cond).raw, rtol=1e-5, atol=1e-5)
    shape = module.sample(2, {"low": cond["low"], **{k: v for k, v in cond.items() if k == "class_labels"}}).shape
    assert shape == x.shape


def test_a_guidance_scale_is_told_to_the_network():
    teacher = MADE["text"]()
    x, _, cond = inputs(teacher)
    module = LCM(teacher, student=TwoTime(Copy(), kind=None, guidance=True), intervals=4, ema=[])
    assert updated(module, Batch(x0=x, cond=cond))


# ------------------------------------------------------------------------------------------------ residual shift
@pytest.mark.parametrize("name", ["unet", "mlp"])
def test_with_the_shift_the_network_sees_the_path_towards_the_picture(name):
    network = concatenated(moved(unet() if name == "unet" else mlp()), 1, residual_shift=True)
    process = ResidualShift(kappa=0.7)
    denoiser = Denoiser(network, process, "flow_prediction")
    generator = torch.Generator().manual_seed(0)
    x0, low, n = (torch.randn(4, *denoiser.sample_shape, generator=generator) for _ in range(3))
    t = torch.tensor([0.0, 0.25, 0.6, 1.0], dtype=torch.float64)
    seen = []
    handle = network.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made = denoiser(process.add_noise(x0, n, t), t, {"low": low})
    handle.remove()
    eta = t.float().view(-1, 1, 1, 1)
    path = x0 + eta * (low - x0) + 0.7 * eta.sqrt() * n
    torch.testing.assert_close(seen[0], torch.cat([path, low], 1), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(made.x0[0], x0[0], atol=0, rtol=0)  # the identity at 0, whatever the network says


# ------------------------------------------------------------------------------------------------ specs and messages
def test_the_spec_wraps_any_other():
    base = NewDenoiser(lambda: ResidualMLP((3,), width=8, depth=1, num_classes=2), FlowMatching(), "sample", seed=4)
    spec = ConcatenatedDenoiser(base, channels=2)
    spec.check()
    made = spec.build()
    assert isinstance(made.network, Concatenated)
    assert (made.sample_shape, made.network.low_shape, made.num_classes) == ((2,), (1,), 2)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), spec.build().parameters(), strict=True))
    # its own setting wins over the family's
    null = Denoiser(mlp(), FlowMatching(), "sample", null_class=7)
    base.build = lambda: null
    assert ConcatenatedDenoiser(base, channels=1).build().num_classes == 7


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 channels, of which 2 are the samples'"):
        concatenated(mlp(), 2)
    with pytest.raises(ValueError, match="does not say how many"):
        concatenated(mlp())
    with pytest.raises(ValueError, match="give both as many"):
        concatenated(text_unet(), residual_shift=True)
    with pytest.raises(ValueError, match="with a concatenated picture is not supported"):
        concatenated(small_dit(8, 2, 3), 1)
    denoiser = MADE["mlp"]()
    x, t, cond = inputs(denoiser)
    with pytest.raises(ValueError, match=r"the batch lacks \['low'\]"):
        denoiser(x, t, {"class_labels": cond["class_labels"]})
    with pytest.raises(ValueError, match="enlarge them in the data module"):
        denoiser(x, t, {**cond, "low": cond["low"][..., ::2]})
    with pytest.raises(ValueError, match="takes pictures of 1 channels"):
        denoiser(x, t, {**cond, "low": cond["low"].repeat(1, 2, 1, 1)})
