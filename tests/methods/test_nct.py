"""NCT: its noises, its adapter, what it learns of signs with the boundary and without, messages."""

from __future__ import annotations

import pytest
import torch
from conftest import fit
from small_problems import mlp, ready, shift
from tiny_pipelines import sd15
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.data.super_resolution import Degradation
from lightning_distill.ema import PowerEMA
from lightning_distill.guidance import guided
from lightning_distill.losses.noise_consistency import noise_levels, partly_fresh
from lightning_distill.methods import NCT
from lightning_distill.networks.beside import Beside
from lightning_distill.networks.concatenated import concatenated
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy
from lightning_distill.networks.small import ResidualMLP, small_unet
from lightning_distill.processes import FlowMatching
from lightning_distill.schedules import WarmupDecay

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*eval mode")


class Same(nn.Module):
    """The generator f(z) = z."""

    shape = (1,)

    def forward(self, x, t):
        return x


def generator():
    return Denoiser(Same(), FlowMatching(), "sample")


def adapter(width=8, points=1, seed=0):
    torch.manual_seed(seed)
    return Denoiser(concatenated(ResidualMLP((2 * points,), width, 2), points), FlowMatching(), "sample")


def nct(teacher=None, **settings):
    made = {"control": torch.sign, "condition": "low", "student": Beside(adapter(), "low"), "ema": []}
    return NCT(teacher or generator(), **{**made, **settings})


# ------------------------------------------------------------------------------------------------ noises
def test_noises_of_all_levels_are_unit_noise_and_forget_by_equal_angles():
    draws = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 200_000, 1, generator=draws).unbind()
    levels = noise_levels(4)
    assert torch.equal(levels[[0, 4]], torch.tensor([0.0, 1.0], dtype=F64))
    angles = []
    for level in levels:
        made = partly_fresh(z, eps, level.expand(len(z)))
        assert float(made.std()) == pytest.approx(1.0, abs=0.01)
        angles.append(float((made * z).mean().clamp(-1, 1).arccos()) / (torch.pi / 2))
    assert angles == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0], abs=0.05)
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    assert torch.equal(partly_fresh(z[:2], eps[:2], ends), torch.stack([z[0], eps[1]]))


# ------------------------------------------------------------------------------------------------ adapter
def test_the_adapter_starts_as_the_generator_and_owns_nothing_of_it():
    teacher = mlp()
    module = ready(nct(teacher, student=Beside(adapter(points=2), "low"), ema=[PowerEMA(0.1)]))
    x, t, cond = torch.randn(6, 2), torch.ones(6, dtype=F64), {"low": torch.randn(6, 2)}
    assert torch.equal(module.student(x, t, cond).raw, teacher(x, t).raw)
    own = {name.split(".")[1] for name, _ in module.student.named_parameters()}
    assert own == {"adapter", "gain"}
    average = module.sampling_network()
    assert average.network.network is module.student.network.network is teacher.network
    assert average.network.adapter is not module.student.network.adapter
    assert not any(key.startswith("teacher.") or ".network.network.output" in key for key in module.state_dict()
                   if "adapter" not in key)  # fmt: skip
    assert module.sample(6, cond).shape == (6, 2)
    with pytest.raises(ValueError, match="WithAdapter needs low for every sample"):
        module.sample(3)
    before = [p.clone() for p in teacher.parameters()]
    shift(module.student)
    assert not torch.allclose(module.student(x, t, cond).raw, teacher(x, t).raw, atol=1e-3)
    assert torch.equal(average(x, t, cond).raw, teacher(x, t).raw)
    sum(module.student_loss(Batch(size=6)).losses.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))
    assert module.student.network.gain.grad.abs() > 0


def test_a_condition_of_the_generator_is_guided_and_the_control_is_not():
    teacher = mlp(classes=3)
    module = ready(nct(teacher, student=Beside(adapter(points=2), "low")))
    shift(module.student)
    x, t = torch.randn(6, 2), torch.ones(6, dtype=F64) * 0.7
    cond = {"low": torch.randn(6, 2), "class_labels": torch.arange(6) % 3}
    null = module.student.null_cond(cond)
    assert torch.equal(null["low"], cond["low"])
    assert bool((null["class_labels"] == 3).all())
    expected = module.student(x, t, null).x0 * -1.0 + 2.0 * module.student(x, t, cond).x0
    torch.testing.assert_close(guided(module.student, x, t, cond, 2.0).x0, expected)


def test_a_unet_gets_a_controlnet():
    tiny = sd15()
    teacher = tiny.denoiser()
    settings = {
        "condition": "control",
        "control": lambda x: x[:, :3].sigmoid().repeat_interleave(8, 2).repeat_interleave(8, 3),
    }
    module = ready(nct(teacher, student=Beside(), student_times=[0.4], ema=[PowerEMA(0.1)], **settings))
    batch = Batch(cond=tiny.cond(2))
    _, picture, cond = module.example(batch)
    x, t = torch.randn(2, *tiny.shape), torch.full((2,), 0.4, dtype=F64)
    assert torch.equal(module.student(x, t, cond).raw, teacher(x, t, batch.cond).raw)
    assert {name.split(".")[1] for name, _ in module.student.named_parameters()} == {"controlnet"}
    shift(module.student)
    terms = module.student_loss(batch)
    sum(terms.losses.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in module.student.parameters())
    assert module.sample(2, cond).shape == picture.shape
    assert module.sampling_network().network.network is teacher.network


# ------------------------------------------------------------------------------------------------ loss
def test_a_control_that_is_the_picture_has_a_student_without_loss():
    """f_phi(z, c) = c."""

    class Obedient(nn.Module):
        shape = (1,)

        def __init__(self):
            super().__init__()
            self.share = nn.Parameter(torch.ones(()))

        def forward(self, x, t, low):
            return self.share * low + (1 - self.share) * x

    class Given(Beside):
        def build(self, source, name=None):
            return Denoiser(Obedient(), source.process, "sample")

    module = ready(nct(control=lambda x: x.clone(), student=Given()))
    assert all(value.item() == 0.0 for value in module.student_loss(Batch(size=64)).losses.values())
    with torch.no_grad():
        module.student.network.share.fill_(0.0)  # the generator as it was
    losses = module.student_loss(Batch(size=4000)).losses
    assert losses["boundary"].item() == 0.0
    # neighbouring levels lie an angle of pi / 16 apart
    assert losses["consistency"].item() == pytest.approx(2 - 2 * torch.tensor(torch.pi / 16).cos().item(), rel=0.1)


def test_what_nct_cannot_use_is_refused():
    with pytest.raises(ValueError, match="NCT needs control"):
        NCT(generator(), student=Beside(adapter(), "low"))
    with pytest.raises(ValueError, match="NCT needs control"):
        NCT(generator(), control=torch.sign)
    with pytest.raises(ValueError, match="intervals=0"):
        nct(intervals=0)
    with pytest.raises(ValueError, match="adds a control to a one-step generator, and student_times has 2 times"):
        ready(nct(num_steps=2))
    with pytest.raises(ValueError, match="return one row for each"):
        ready(nct(control=torch.sum)).student_loss(Batch(size=4))
    with pytest.raises(ValueError, match="a new ControlNet is made for a UNet2DConditionModel"):
        ready(nct(student=Beside()))
    unet = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    pictures = Denoiser(unet, FlowMatching(), "flow_prediction")
    with pytest.raises(ValueError, match="both are called with the same samples and times"):
        Beside(adapter(), "low").build(pictures)
    half = mlp()
    half.to(torch.bfloat16)
    with pytest.raises(ValueError, match="has to be float32"):
        ready(nct(half))
    with pytest.raises(ValueError, match="lacks"):
        ready(nct(student=Beside(adapter(), "low"))).student(torch.randn(2, 1), torch.ones(2))
    assert Copy().shares_weights is False
    assert Beside.shares_weights is True


def test_a_degraded_picture_is_a_control():
    torch.manual_seed(0)
    teacher = Denoiser(ResidualMLP((1, 8, 8), 8, 1), FlowMatching(), "sample")
    beside = Denoiser(concatenated(ResidualMLP((2, 8, 8), 8, 1), 1), FlowMatching(), "sample")
    module = ready(nct(teacher, control=Degradation(4), student=Beside(beside, "low")))
    _, picture, cond = module.example(Batch(size=5))
    assert torch.equal(cond["low"], Degradation(4)(picture))
    assert not module.train().control.training


# ------------------------------------------------------------------------------------------------ learning
def learned(boundary, updates):
    """Signs obeyed, mean along the sign, and error at the picture's own noise, of noise independent of the control."""
    module = nct(
        student=Beside(adapter(64), "low"),
        loss_weights={"student/boundary": boundary},
        student_optimizer=lambda p: torch.optim.Adam(p, lr=3e-3, betas=(0.9, 0.99), fused=True),
        student_scheduler=lambda o: WarmupDecay(o, 10, updates, "linear", final=0.02),
        gradient_clip_val=None,
    )
    fit(module, updates, Batch(size=51_200), batch_size=256)
    draws = torch.Generator().manual_seed(5)
    noise, sign = torch.randn(4000, 1, generator=draws), torch.randn(4000, 1, generator=draws).sign()
    made = module.sample(4000, {"low": sign}, noise=noise)
    own = module.sample(4000, {"low": noise.sign()}, noise=noise)
    along, error = (made * sign).mean().item(), (own - noise).square().mean().item()
    return (made.sign() == sign).float().mean().item(), along, error


@pytest.mark.long
@pytest.mark.learn
def test_signs_are_obeyed():
    """E |N(0, 1)| is .80; the generator itself obeys half of the signs, with an error of 0."""
    obeyed, along, error = learned(1.0, 450)
    print(f"nct: {obeyed:.3f} obeyed, {along:.2f} along, error {error:.2f}")
    assert obeyed > 0.95
    assert 0.3 < along < 0.9
    assert error < 0.5


@pytest.mark.slow
@pytest.mark.learn
def test_the_output_diverges_without_the_boundary():
    _, far, lost = learned(0.0, 250)
    print(f"nct without the boundary: {far:.1f} along, error {lost:.1f}")
    assert abs(far) > 2.5
    assert lost > 5.0
