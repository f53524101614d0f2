import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from lightning_distill.losses.adversarial import discriminator_loss
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.discriminators import DiscriminatorHeads, tap_shapes, tapped_features
from lightning_distill.processes import FlowMatching


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=3,
    ).eval()
    return Denoiser(net, FlowMatching(), "flow_prediction", null_class=2)


SHAPES = [
    (16, 4, 4),
    (8, 8, 8),
    (12, 7, 7),
    (6, 16, 4),
    (3, 28, 28),
    (64, 1, 1),
    (96, 2, 3),
    (10, 24),
    (2,),
    (48,),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_logits", [1, 3])
def test_heads_read_every_shape_and_see_every_value(shape, num_logits):
    heads = DiscriminatorHeads({"a.b": shape}, num_logits=num_logits)
    feature = torch.randn(4, *shape, requires_grad=True)
    logits = heads({"a.b": feature})
    assert logits.shape == (4, num_logits)
    # a normalisation over single numbers would leave constant logits and no gradient
    assert logits.std(0).min() > 1e-3
    (gradient,) = torch.autograd.grad(logits[0].sum(), feature)
    assert (gradient[1:] == 0).all()
    assert (gradient[0] != 0).float().mean() > 0.95


def test_the_head_of_dmd2():
    """8x8x768 -> conv 4x4 stride 2, GroupNorm(32), SiLU, conv 4x4, GroupNorm(32), SiLU, logit."""
    head = DiscriminatorHeads({"mid": (768, 8, 8)}).heads["mid"]
    kinds = [type(m).__name__ for m in head]
    assert kinds == ["Conv2d", "GroupNorm", "SiLU", "Conv2d", "GroupNorm", "SiLU", "Flatten", "Linear"]
    assert head[0].kernel_size == head[3].kernel_size == (4, 4)
    assert head[0].stride == (2, 2)
    assert head[1].num_groups == head[4].num_groups == 32
    assert head[0].out_channels == head[3].out_channels == 768
    sdxl = DiscriminatorHeads({"mid": (1280, 32, 32)}, width=64).heads["mid"]
    assert sum(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in sdxl) == 3


def test_logits_of_several_heads_are_side_by_side():
    shapes = {"x": (2,), "y": (4, 5)}
    heads = DiscriminatorHeads(shapes, num_logits=2)
    features = {"y": torch.randn(3, 4, 5), "x": torch.randn(3, 2)}
    both = heads(features)
    assert both.shape == (3, 4)
    assert heads.taps == ("x", "y")
    features["y"] = features["y"] + 1
    assert torch.equal(heads(features)[:, :2], both[:, :2])
    assert not torch.equal(heads(features)[:, 2:], both[:, 2:])
    # the number of tokens may change
    assert heads({"x": features["x"], "y": torch.randn(3, 9, 5)}).shape == (3, 4)


def test_tap_shapes_and_features(unet):
    taps = ["down_blocks.1", "input", "mid_block"]
    cond = {"class_labels": torch.tensor([1])}
    state = torch.get_rng_state()
    shapes = tap_shapes(unet, (1, 16, 16), taps, cond)
    assert torch.equal(torch.get_rng_state(), state)
    assert shapes == {"down_blocks.1": (16, 8, 8), "input": (1, 16, 16), "mid_block": (16, 8, 8)}
    assert list(shapes) == taps
    ran = []
    handle = unet.network.up_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    x = torch.randn(2, 1, 16, 16, requires_grad=True)
    features = tapped_features(unet, x, torch.tensor([0.2, 0.7]), {"class_labels": torch.tensor([0, 1])}, taps)
    assert features["input"] is x
    logits = DiscriminatorHeads(shapes)(features)
    assert logits.shape == (2, 3)
    assert torch.autograd.grad(logits.sum(), x)[0].abs().min() > 0
    full = unet(x, torch.tensor([0.2, 0.7]), {"class_labels": torch.tensor([0, 1])}, taps=["mid_block"])
    assert ran == [1]  # only the full forward ran the decoder
    assert torch.equal(full.features["mid_block"], features["mid_block"])
    handle.remove()


def test_pixels_alone_need_no_network_call(unet, monkeypatch):
    monkeypatch.setattr(unet.network, "forward", None)
    x = torch.randn(2, 1, 16, 16)
    assert tap_shapes(unet, (1, 16, 16), ["input"]) == {"input": (1, 16, 16)}
    assert tapped_features(unet, x, torch.tensor(0.5), None, ["input"])["input"] is x


def test_token_features_of_a_transformer():
    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_num_groups=2,
    )
    teacher = Denoiser(net.eval(), FlowMatching(), "flow_prediction")
    cond = {"class_labels": torch.tensor([0])}
    shapes = tap_shapes(teacher, (2, 8, 8), ["transformer_blocks.0"], cond)
    assert shapes == {"transformer_blocks.0": (16, 8)}
    assert DiscriminatorHeads(shapes)({"transformer_blocks.0": torch.randn(2, 16, 8)}).shape == (2, 1)


def test_narrow_features_and_equal_seeds():
    state = torch.get_rng_state()
    a, b, c = (DiscriminatorHeads({"m": (8, 4, 4)}, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    feature = torch.randn(2, 8, 4, 4)
    assert torch.equal(a({"m": feature}), b({"m": feature}))
    assert not torch.equal(a({"m": feature}), c({"m": feature}))
    assert a({"m": feature.bfloat16()}).dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 5, 5), (2,)], ids=str)
def test_heads_learn_to_tell_two_distributions(shape):
    """Real and fake differ by a shift of .8 in one channel, well above chance for a trained head."""
    torch.manual_seed(0)
    heads = DiscriminatorHeads({"input": shape}, width=32)
    optimizer = torch.optim.Adam(heads.parameters(), lr=2e-3)
    shift = torch.zeros(shape)
    shift[0] = 2.0 if len(shape) == 1 else 0.8

    def draw(n):
        return torch.randn(n, *shape) + shift, torch.randn(n, *shape)

    for _ in range(60):
        real, fake = draw(64)
        optimizer.zero_grad()
        discriminator_loss(heads({"input": real}), heads({"input": fake})).backward()
        optimizer.step()
    real, fake = draw(500)
    correct = (heads({"input": real}) > 0).float().mean() + (heads({"input": fake}) < 0).float().mean()
    assert correct.item() / 2 > 0.78


@pytest.mark.parametrize("shape", [(8, 4, 4), (5, 6), (3,)], ids=str)
def test_heads_that_are_told_the_class_project_on_its_vector(shape):
    heads = DiscriminatorHeads({"a.b": shape}, width=16, num_logits=2, num_classes=3)
    feature, labels = torch.randn(4, *shape), torch.tensor([2, 0, 3, 0])
    made = heads.heads["a/b"](feature)
    made = made.mean(1) if len(shape) == 2 else made
    vectors = heads.classes["a/b"].weight[labels]
    want = torch.stack([(made[:, :64] * vectors).sum(1), (made[:, 64:] * vectors).sum(1)], 1) / 8.0
    torch.testing.assert_close(heads({"a.b": feature}, labels), want)
    same = heads({"a.b": feature[:1].expand_as(feature)}, labels)
    assert torch.equal(same[1], same[3])
    assert not torch.equal(same[0], same[1])
    with pytest.raises(ValueError, match="is told the class; give class_labels"):
        heads({"a.b": feature})


def test_bad_input():
    heads = DiscriminatorHeads({"mid_block": (8, 4, 4)})
    with pytest.raises(ValueError, match=r"reads 'mid_block', but the features are \['up'\]"):
        heads({"up": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"built for features of shape \(8, 4, 4\) and got \(8, 8, 8\)"):
        heads({"mid_block": torch.zeros(2, 8, 8, 8)})
    with pytest.raises(ValueError, match="needs at least one tap"):
        DiscriminatorHeads({})
    with pytest.raises(ValueError, match=r"'v' has shape \(1, 2, 3, 4\)"):
        DiscriminatorHeads({"v": (1, 2, 3, 4)})
