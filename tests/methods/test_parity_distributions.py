"""The losses of released code, reproduced: further methods that match distributions; see ``test_parity``."""

from __future__ import annotations

import pytest
import torch
from parity_networks import F64, Given, Head, check, fixture, scores
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.methods import ACDMD, CDM, UniInstruct, subinterval
from lightning_distill.networks.adversary import Adversary
from lightning_distill.processes import EDM, FlowMatching
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
