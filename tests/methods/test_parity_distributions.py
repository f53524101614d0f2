"""The losses of released code, reproduced: further methods that match distributions; see ``test_parity``."""

from __future__ import annotations

import pytest
import torch
from parity_networks import F64, FAKE, STUDENT, TEACHER, Formula, Given, Head, built, check, denoiser, fixture, scores
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.methods import ACDMD, CDM, SwiftBrush, UniInstruct, subinterval
from lightning_distill.networks.adversary import Adversary
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving
from lightning_distill.times import Uniform

#: relative error where the library computes weights in single precision
SINGLE = 1e-6


class Constant(nn.Module):
    """A discriminator that says what it is told."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, features):
        return self.logits[:, None]


def test_uni_instruct():
    """Means over elements in the place of sums; ratios are given, as the released estimate of them is none.

    The released discriminator's loss has the factor 1/2 and the mean of the denoising weights.
    """
    given, expected = fixture("UniInstruct")
    everywhere = Uniform(0.0, 1.0)
    module = scores(
        UniInstruct,
        EDM(),
        gan=Adversary(taps=("input",)),
        divergence="kl",
        through_ratio=False,
        student_times=[given.start],
        matching_times=everywhere,
        critic_times=everywhere,
        critic_space="edm",
    )
    module.discriminator = Constant(given.ratio.log())
    batch = Batch(x0=given.real)
    module.draws = Given(start=given.z, matching__time=given.matching_sigma / 80, matching__noise=given.matching_noise)
    loss = module.student_loss(batch).losses["expansion"]
    check(loss, module.student.network, expected["forward_kl"], factor=given.scale * 4, rel=SINGLE)
    module.discriminator = head = Head()
    module.draws = Given(
        start=given.z,
        critic__time=given.critic_sigma / 80,
        critic__noise=given.critic_noise,
        gan__real_noise=given.critic_noise,
    )
    losses = module.fake_score_loss(batch).losses
    check(losses["denoising"], module.fake_score.network, expected["denoising"], factor=4, rel=SINGLE)
    weight = (given.critic_sigma.square() + given.sigma_data**2) / (given.critic_sigma * given.sigma_data).square()
    loss = 0.5 * weight.mean() * losses["gan"]
    assert float(loss.detach()) == pytest.approx(expected["discriminator"]["loss"], rel=SINGLE)
    (slope,) = torch.autograd.grad(loss, head.weight)
    assert slope.tolist() == pytest.approx(expected["discriminator"]["head"], rel=SINGLE)


class Generator(Formula):
    """The student's clean samples at the last of 1,000 times, with the released code's rounded alpha."""

    last_alpha_squared = 0.0

    def forward(self, x, t, shift=None):
        eps = super().forward(x, t, shift=shift)
        return (x - (1 - self.last_alpha_squared) ** 0.5 * eps) / self.last_alpha_squared**0.5


def test_swiftbrush():
    """The released code drops the condition of a tenth of the batches, this one that of a tenth of the samples."""
    given, expected = fixture("SwiftBrush")
    Generator.last_alpha_squared = given.last_alpha_squared
    process = VariancePreserving()
    teacher, student, fake = (
        denoiser(phase, process, kind, network(phase), null_cond={"shift": 0.25})
        for phase, kind, network in (
            (TEACHER, "epsilon", Formula),
            (STUDENT, "sample", Generator),
            (FAKE, "epsilon", Formula),
        )
    )
    everywhere = Uniform(0.0, 1.0)
    times = {"matching_times": everywhere, "critic_times": everywhere}
    module = built(SwiftBrush, teacher, student, fake, guidance=Guidance(given.guidance), **times)
    module.draws = Given(
        start=given.z,
        matching__time=(given.matching_index + 1) / 1000,
        matching__noise=given.matching_noise,
        critic__time=(given.critic_index + 1) / 1000,
        critic__noise=given.critic_noise,
    )
    batch = Batch(cond={"shift": torch.zeros(3, dtype=F64)})
    check(module.student_loss(batch).losses["matching"], module.student.network, expected["matching"], rel=SINGLE)
    check(module.fake_score_loss(batch).losses["denoising"], module.fake_score.network, expected["critic"], rel=SINGLE)


def test_cdm(monkeypatch):
    """Twice as large, without the factor 1/2; the released guidance counts from the conditional prediction."""
    given, expected = fixture("CDM")
    everywhere = Uniform(0.0, 1.0)
    module = scores(
        CDM,
        FlowMatching(),
        ("flow_prediction",) * 3,
        student_times=given.times.tolist(),
        guidance=Guidance(given.guidance),
        random_steps=0,
        matching_times=everywhere,
        engine_times=everywhere,
        critic_times=everywhere,
    )
    module.draws = draws = Given(
        start=given.z,
        matching__time=given.matching_sigma,
        matching__noise=given.matching_noise,
        engine__time=given.engine_sigma / given.times[given.stop],
        engine__noise=given.engine_noise,
        beside__time=given.beside_sigma / given.times[given.stop],
        continuous__time=given.continuous_sigma,
        continuous__noise=given.continuous_noise,
        critic__time=given.critic_sigma,
        critic__noise=given.critic_noise,
    )
    monkeypatch.setattr(draws, "integer", lambda name, high: given.stop)
    batch = Batch(cond={"shift": torch.zeros(3, dtype=F64)})
    losses = module.student_loss(batch).losses
    for name in ("engine", "matching", "continuous"):
        check(losses[name], module.student.network, expected[name], factor=2, rel=SINGLE)
    loss = module.fake_score_loss(batch).losses["denoising"]
    check(loss, module.fake_score.network, expected["critic"])


def test_ac_dmd(monkeypatch):
    """The student is sampled without fresh noise here; times of consistency stay above the end of the step."""
    given, expected = fixture("ACDMD")
    everywhere = Uniform(0.0, 1.0)
    module = scores(
        ACDMD,
        FlowMatching(),
        ("flow_prediction",) * 3,
        student_times=given.times.tolist(),
        sampler="ode",
        guidance=Guidance(given.guidance),
        eta=given.eta,
        critic_condition_on="none",
        critic_weight="clamped",
        matching_times=everywhere,
        critic_times=everywhere,
    )
    widest = torch.minimum(given.critic_time - given.times[1], torch.tensor(0.2, dtype=F64))
    module.draws = Given(
        start=given.z,
        matching__noise=given.matching_noise,
        back__noise=given.back_noise,
        critic__noise=given.critic_noise,
        consistency__time=given.consistency_step / widest,
        consistency__noise0=given.consistency_noise0,
        consistency__noise1=given.consistency_noise1,
    )
    batch = Batch(cond={"shift": torch.zeros(3, dtype=F64)})
    monkeypatch.setattr(subinterval, "restricted", lambda *_: given.matching_time)
    loss = module.student_loss(batch).losses["matching"]
    check(loss, module.student.network, expected["generator"])
    monkeypatch.setattr(subinterval, "restricted", lambda *_: given.critic_time)
    losses = module.fake_score_loss(batch).losses
    check(losses["denoising"], module.fake_score.network, expected["critic"])
    check(losses["consistency"], module.fake_score.network, expected["consistency"])
