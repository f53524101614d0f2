"""GDD: a discriminator on clean images, and students of which a part stays as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sampling_of_cases import long
from small_problems import ready
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.methods import GDD, GDDI
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.frozen_features import FrozenFeatures
from lightning_distill.networks.small import ResidualMLP, small_unet
from lightning_distill.processes import FlowMatching, TrigFlow
from lightning_distill.randomness import Draws
from lightning_distill.schedules import WarmupDecay

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def extractor():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 6, 3, 2, padding=1))


def features(**settings):
    return FrozenFeatures(extractor(), ["0", "2"], **settings)


def unet():
    torch.manual_seed(0)
    network = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    return Denoiser(network, FlowMatching(), "flow_prediction", sigma_data=0.5)


# ------------------------------------------------------------------------------------------------ features
def test_features_are_those_of_the_prepared_images():
    frozen, network = features(size=4, mean=[0.1, 0.2, 0.3], std=0.5), extractor()
    images = torch.randn(2, 1, 8, 8, requires_grad=True)
    found = frozen(images)
    small = F.interpolate(images.expand(-1, 3, -1, -1), (4, 4), mode="bilinear", antialias=True)
    prepared = (small - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    torch.testing.assert_close(found["0"], network[0](prepared))
    torch.testing.assert_close(found["2"], network(prepared))
    assert torch.autograd.grad(found["2"].sum(), images)[0].abs().sum() > 0
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.train().network.training


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_come_from_a_file(tmp_path, suffix):
    other = {k: v + 1 for k, v in extractor().state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    save_file(other, path) if suffix == "safetensors" else torch.save(other, path)
    frozen = features(weights=str(path))
    assert all(torch.equal(v, other[k]) for k, v in frozen.network.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        features(weights="nothing.pt")
    with pytest.raises(ValueError, match="Sequential has no submodule '9' to tap; some of its own: 0, 1, 2"):
        FrozenFeatures(extractor(), ["9"])


# ------------------------------------------------------------------------------------------------ the game
def test_both_sides_see_clean_images():
    module = ready(GDD(unet(), features=features(), width=4))
    batch = Batch(x0=0.5 * torch.randn(4, 1, 8, 8))
    heads = module.discriminator
    x = module.rollout(batch)
    student = module.student_loss(batch).losses
    assert set(student) == {"gan"}
    torch.testing.assert_close(student["gan"], F.softplus(-heads(module.features(x.x0))).mean(), atol=1e-3, rtol=1e-3)
    module.draws = Draws(module.streams, 0, 0, "discriminator0")
    losses = module.discriminator_loss(batch).losses
    assert set(losses) == {"gan", "r1"}
    real = batch.x0.clone().requires_grad_()
    on_real, on_fake = heads(module.features(real)), heads(module.features(x.x0.detach()))
    torch.testing.assert_close(
        losses["gan"], F.softplus(-on_real).mean() + F.softplus(on_fake).mean(), atol=1e-3, rtol=1e-3
    )
    (slope,) = torch.autograd.grad(on_real.mean(1).sum(), real)
    torch.testing.assert_close(losses["r1"], slope.square().sum((1, 2, 3)).mean(), atol=1e-3, rtol=1e-2)


def trained(module):
    return {n for n, p in module.student.network.named_parameters() if p.requires_grad}


def test_the_trained_part_is_the_one_asked_for():
    everything = trained(ready(GDD(unet(), features=features())))
    without = trained(ready(GDDI(unet(), features=features())))
    kept = everything - without
    parts = ("conv1", "conv2", "conv", "to_out")  # not conv_in, conv_out, conv_shortcut, time_emb_proj
    assert kept == {n for n in everything if any(part in n.split(".") for part in parts)}
    assert {name.split(".")[0] for name in without} >= {"conv_in", "conv_out", "time_embedding"}
    assert any("conv_shortcut" in n for n in without)
    assert any("time_emb_proj" in n for n in without)
    assert 0 < len(without) < len(everything)
    assert any("norm" in n for n in without)
    assert any("to_q" in n for n in without)
    chosen = trained(ready(GDD(unet(), features=features(), freeze=["^down_blocks"])))
    assert chosen == {n for n in everything if not n.startswith("down_blocks")}
    module = ready(GDDI(unet(), features=features()))
    assert {id(p) for p in module.role_parameters("student")} == {
        id(p) for n, p in module.student.network.named_parameters() if n in without
    }


# ------------------------------------------------------------------------------------------------ learning
POINTS = (2, 1, 1)


def play(problem, teacher, method, updates=100, **settings):
    """The four modes as images of one pixel in two colours; features are random functions of the colour."""
    network = ResidualMLP(POINTS, 128, 3)
    network.load_state_dict(teacher.network.state_dict())
    source = Denoiser(network, teacher.process, "v_prediction", network_process=TrigFlow(), sigma_data=1.12)
    torch.manual_seed(2)
    colours = nn.Sequential(nn.Conv2d(2, 64, 1), nn.Tanh(), nn.Conv2d(64, 64, 1), nn.Tanh())
    nn.init.normal_(colours[0].weight, std=1.5)

    def decay(optimizer):
        return WarmupDecay(optimizer, 0, updates, "linear", final=0.1)

    module = method(
        source,
        features=FrozenFeatures(colours, ["1"], channels=2),
        width=64,
        student_times=[2.5],
        student_optimizer=problem.adam,
        discriminator_optimizer=lambda ps: torch.optim.Adam(ps, lr=3e-3, betas=(0.0, 0.99), fused=True),
        student_scheduler=decay,
        discriminator_scheduler=decay,
        ema=[ConstantEMA(0.97)],
        loss_weights={"discriminator/r1": 0.1},
        **settings,
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    problem.fit(module, updates, Batch(x0=problem.data.x0.view(-1, *POINTS)))
    samples = module.sample(5000, generator=torch.Generator().manual_seed(1)).flatten(1)
    changed = {n for n, v in module.student.network.state_dict().items() if not torch.equal(v, before[n])}
    return problem.distance(samples), problem.shares(samples), changed


@pytest.mark.learn
@pytest.mark.parametrize(("method", "frozen"), [(GDD, []), long(GDDI, ["^blocks.0", "^input"])])
def test_it_learns_four_modes_from_data(method, frozen, ring4_problem, trained_teacher):
    distance, shares, changed = play(ring4_problem, trained_teacher.denoiser, method, freeze=frozen)
    print(f"{method.__name__}: {distance:.3f} {shares}")
    assert distance < 0.2
    assert all(0.12 < share < 0.4 for share in shares), shares
    assert changed
    assert not {name for name in changed if frozen and name.startswith(("blocks.0", "input"))}


class Shifted(nn.Module):
    """Samples around a number for each class, for any noise."""

    def __init__(self, means):
        super().__init__()
        self.means = nn.Parameter(torch.tensor(means))

    def forward(self, x_t, t, class_labels):
        return 0.3 * x_t + self.means[class_labels].view(-1, 1, 1, 1)


@pytest.mark.parametrize("classes", [None, False])
def test_only_heads_that_are_told_the_class_put_classes_where_they_belong(classes, ring4_problem):
    """Both classes together are right from the start, each in the other's place."""
    torch.manual_seed(0)
    teacher = Denoiser(Shifted([1.0, -1.0]), FlowMatching(), "sample", null_class=2)
    wide = nn.Sequential(nn.Conv2d(1, 32, 1), nn.Tanh())
    nn.init.normal_(wide[0].weight, std=1.5)
    module = GDD(
        teacher,
        shape=[1, 1, 1],
        features=FrozenFeatures(wide, ["1"], channels=1),
        classes=classes,
        student_optimizer=lambda ps: torch.optim.Adam(ps, lr=0.05, betas=(0.0, 0.9)),
        discriminator_optimizer=lambda ps: torch.optim.Adam(ps, lr=3e-3, betas=(0.0, 0.99)),
        ema=[],
        loss_weights={"discriminator/r1": 0.1},
    )
    labels = torch.arange(256) % 2
    x0 = (2.0 * labels - 1.0).view(-1, 1, 1, 1) + 0.3 * torch.randn(256, 1, 1, 1)
    ring4_problem.fit(module, 100, Batch(x0=x0, cond={"class_labels": labels}))
    first, second = module.student.network.means.tolist()
    print(f"{first:.2f} {second:.2f}")
    if classes is None:
        assert -1.5 < first < -0.5 < 0.5 < second < 1.5
    else:
        assert second < 0.0 < first


def test_bad_input():
    with pytest.raises(ValueError, match="UNet2DModel has no classes that heads could be told"):
        ready(GDD(unet(), features=features(), classes=True))
    with pytest.raises(ValueError, match="GDD needs features"):
        GDD(unet())
    with pytest.raises(ValueError, match="matches no parameter of UNet2DModel"):
        ready(GDD(unet(), features=features(), freeze=["nothing"]))
    with pytest.raises(ValueError, match="leaves nothing of the student"):
        ready(GDD(unet(), features=features(), freeze=["."]))
