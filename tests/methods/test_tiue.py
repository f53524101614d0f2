"""TiUE: SwiftBrush's direction on the end of the chain, and the moments of the noises on the way."""

from __future__ import annotations

import pytest
import torch
from conftest import fit
from small_problems import Given, ready
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, guided
from lightning_distill.methods import SwiftBrush, TiUE
from lightning_distill.methods.tiue import standard_normal_kl
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.shared_encoder import NOISES, SharedEncoder, SharedEncoderDenoiser
from lightning_distill.networks.small import small_unet
from lightning_distill.processes import FlowMatching, VariancePreserving

N = 4


def teacher(kind="epsilon", process=None):
    torch.manual_seed(0)
    network = small_unet(8, 1, 3, (8, 16), norm_num_groups=4, attention_head_dim=8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Denoiser(network, process or VariancePreserving(), kind, null_class=3, sigma_data=0.5).eval()


def tiue(**settings):
    small = {"student": SharedEncoder(decoders=3), "fake_score": Lora(rank=2), "ema": []}
    return ready(TiUE(settings.pop("teacher", None) or teacher(), **{**small, **settings}))


def labels(n=N):
    return Batch(cond={"class_labels": torch.arange(n) % 3})


# ------------------------------------------------------------------------------------------------ the loss
def test_the_divergence_is_that_of_two_gaussians():
    noises = 1.7 * torch.randn(5, 3, 2, 4, 4) + torch.randn(5, 3, 1, 1, 1)
    flat = noises.flatten(2)
    fitted = torch.distributions.Normal(flat.mean(2), flat.std(2, correction=0))
    expected = torch.distributions.kl_divergence(fitted, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(standard_normal_kl(noises), expected)


def test_the_divergence_is_zero_for_standardised_noises_alone():
    flat = torch.randn(5, 3, 64, dtype=torch.float64)
    standard = (flat - flat.mean(2, keepdim=True)) / flat.std(2, correction=0, keepdim=True)
    standard = standard.unflatten(2, (1, 8, 8))
    assert standard_normal_kl(standard).abs() < 1e-12
    for other in (1.1 * standard, 0.9 * standard, standard + 0.1, standard - 0.1):
        assert standard_normal_kl(other) > 1e-3
    # of all noises, not of their mean
    assert standard_normal_kl(torch.cat([1.5 * standard[:, :1], standard[:, 1:]], dim=1)) > 1e-2


def test_the_student_moves_against_the_difference_of_the_noises():
    """Target x - sigma^2 (eps_T - eps_F), both guided, as in the released code."""
    module, batch = tiue(guidance=Guidance(3.0)), labels()
    with torch.no_grad():
        for parameter in module.fake_score.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    rollout = module.rollout(batch)
    rollout.x0 = rollout.x0.detach().requires_grad_()
    module.rollout = lambda *_: rollout
    loss = module.student_loss(batch).losses["matching"]
    (gradient,) = torch.autograd.grad(loss, rollout.x0)
    x_t, t, _ = module.renoise(rollout.x0.detach(), module.matching_times, "matching")
    real, fake = (guided(net, x_t, t, batch.cond, 3.0).eps for net in (module.teacher, module.fake_score))
    sigma = module.process.sigma(t).float().view(-1, 1, 1, 1)
    expected = (sigma.square() * (real - fake) / rollout.x0.numel()).detach()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_moments_are_those_of_the_student_s_noises_and_have_the_weight_of_the_paper():
    module, batch = tiue(), labels()
    terms = module.student_loss(batch)
    noise = module.process.prior(module.draws.of_slice().normal("start", (N, 1, 8, 8)), 1.0)
    made = module.student(noise, torch.ones(N, dtype=torch.float64), batch.cond)
    torch.testing.assert_close(terms.losses["kl"], standard_normal_kl(made.features[NOISES]))
    total = module.weighted_sum("student", terms)
    torch.testing.assert_close(total, terms.losses["matching"] + 0.1 * terms.losses["kl"])
    total.backward()
    assert all(p.grad is not None for p in module.student.network.conv_in.parameters())
    assert all(p.grad is None for p in module.teacher.network.parameters() if not p.requires_grad)


def test_the_settings_are_the_paper_s():
    module = ready(TiUE(teacher(), ema=[]))
    assert module.guidance.scale == module.fake_guidance.scale == 4.5
    assert (module.fake_score.config.r, module.fake_score.config.lora_alpha) == (64, 108.0)
    assert module.student.decoder_times == [1.0, 0.75, 0.5, 0.25]
    assert module.critic_dropout == 0.1
    assert module.weight == "vsd"


def test_an_update_runs_the_encoder_once_and_the_critic_reuses_the_samples():
    module, batch, rows = tiue(), labels(), []
    module.student.network.down_blocks[0].resnets[0].register_forward_hook(lambda _m, _a, out: rows.append(len(out)))
    module.student_loss(batch)
    module.fake_score_loss(batch)
    assert rows == [N]


@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_samples_are_one_call_of_the_trained_student():
    module = tiue(teacher=teacher("flow_prediction", FlowMatching()), check_data=False)
    before = [p.clone() for p in module.student.parameters()]
    fit(module, 2, labels(16), 4)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.student.parameters()))
    z, cond = torch.randn(2, 1, 8, 8), {"class_labels": torch.tensor([0, 1])}
    with torch.no_grad():
        expected = module.student(z, torch.ones(2, dtype=torch.float64), cond).x0
    for sampler in ("renoise", "ode"):
        module.sampler = sampler
        assert torch.equal(module.sample(2, cond, noise=z), expected)
    with pytest.raises(ValueError, match="one_step_only"):
        module.sample(2, cond, noise=z, num_steps=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": Copy()}, "whose encoder is shared"),
        ({"num_steps": 2}, "a TiUE student is one call"),
        ({"student_times": [0.5]}, "a TiUE student is one call"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiue(**settings)


def test_one_decoder_without_the_divergence_is_swiftbrush():
    both = []
    for method, student in ((TiUE, SharedEncoder(decoders=1)), (SwiftBrush, Copy())):
        module = ready(method(teacher(), student=student, fake_score=Lora(rank=2), guidance=Guidance(2.0), ema=[]))
        assert isinstance(module.student, SharedEncoderDenoiser) == (method is TiUE)
        loss = module.student_loss(labels()).losses["matching"]
        both.append(torch.autograd.grad(loss, list(module.student.parameters()), allow_unused=True))
    for one, other in zip(*both, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-12)


# ------------------------------------------------------------------------------------------------ learning
class Picture(nn.Module):
    """The exact denoiser of pictures N(mean, std^2) in flow matching, with both as parameters."""

    shape = (1, 4, 4)

    def __init__(self, mean, std):
        super().__init__()
        self.mean = nn.Parameter(mean.clone())
        self.log_std = nn.Parameter(torch.tensor(std).log())

    def forward(self, x, t):
        t = t.to(x).view(-1, 1, 1, 1)
        variance = (2 * self.log_std).exp()
        gain = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)
        return self.mean + gain * (x - (1 - t) * self.mean)


def adam(lr):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.99), fused=True)


def learned(**settings):
    """Distance of the student's mean to the teacher's, and the student's spread, whose is .4."""
    torch.manual_seed(1)
    target = torch.linspace(-1.0, 1.0, 16).view(1, 4, 4)
    exact = Denoiser(Picture(target, 0.4), FlowMatching(), "sample", sigma_data=0.7).eval()
    student = Given(small_unet(4, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8))
    module = TiUE(
        exact,
        student=SharedEncoder(decoders=2, role=student),
        fake_score=Given(Picture(torch.zeros(1, 4, 4), 1.0)),
        guidance=Guidance(1.0),
        fake_score_steps=2,
        student_optimizer=adam(2e-3),
        fake_score_optimizer=adam(3e-2),
        shape=[1, 4, 4],
        ema=[],
        **settings,
    )
    fit(module, 200, Batch(size=640), 64)
    made = module.sample(512, generator=torch.Generator().manual_seed(1))
    return float((made.mean(0) - target).abs().mean()), float(made.std(0).mean())


@pytest.mark.learn
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_the_student_takes_the_teacher_s_distribution():
    away, spread = learned()
    assert away < 0.15
    assert 0.2 < spread < 0.6
    assert learned(loss_weights={"student/matching": 0.0})[0] > 0.4
