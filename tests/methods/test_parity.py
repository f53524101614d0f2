"""The losses of released code, reproduced: tiny networks given by a formula, numbers recorded from the official code.

Each fixture names a repository, a commit, the functions that were run, their inputs, and the losses and gradients that
they gave in double precision. Where a method differs on purpose, the test states the relation.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from parity_networks import (
    F64,
    FIXTURES,
    STUDENT,
    TEACHER,
    VIDEO,
    Formula,
    Given,
    Head,
    Preconditioned,
    built,
    check,
    copied,
    denoiser,
    fixture,
    learner,
    of_normal,
    scores,
)
from torch import nn

import lightning_distill.losses.subinterval as subinterval_losses
from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.guidance import Guidance
from lightning_distill.losses.adversarial import approximate_r1
from lightning_distill.losses.f_divergences import log_ratio
from lightning_distill.losses.reward_weights import MeanValue
from lightning_distill.losses.score_matching import matching_weight, score_difference
from lightning_distill.methods import (
    DMD2,
    ECT,
    GDD,
    LADD,
    RCM,
    TDM,
    VSD,
    ConsistencyTraining,
    DiffInstruct,
    DisBack,
    FDistill,
    MeanFlow,
    ProgressiveDistillation,
    RewardedDMD,
    SiD,
    subinterval,
    tdm,
)
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.frozen_features import FrozenFeatures
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving, expand
from lightning_distill.times import Uniform

#: relative error where released code computes levels or weights in single precision
SINGLE = 1e-6


# ------------------------------------------------------------------------------------------------ score differences
def test_dmd2():
    given, expected = fixture("DMD2")
    everywhere = Uniform(0.0, 1.0)
    module = scores(
        DMD2,
        EDM(),
        gan=Adversary(taps=("input",)),
        student_times=[given.start],
        matching_times=everywhere,
        critic_times=everywhere,
        critic_space="edm",
    )
    module.discriminator = head = Head()
    module.draws = Given(
        start=given.z,
        matching__time=given.matching_sigma / 80,
        matching__noise=given.matching_noise,
        gan__time=given.gan_sigma / 80,
        gan__noise=given.gan_noise,
    )
    batch, student = Batch(x0=given.real), module.student.network
    losses = module.student_loss(batch).losses
    check(losses["matching"], student, expected["matching"], rel=SINGLE)
    check(losses["gan"], student, expected["generator"], rel=SINGLE)
    module.draws = Given(
        critic__time=given.critic_sigma / 80, critic__noise=given.critic_noise, gan__real_noise=given.real_noise
    )
    losses = module.fake_score_loss(batch).losses
    check(losses["denoising"], module.fake_score.network, expected["denoising"], rel=SINGLE)
    assert float(losses["gan"].detach()) == pytest.approx(expected["discriminator"]["loss"], rel=SINGLE)
    (slope,) = torch.autograd.grad(losses["gan"], head.weight)
    assert slope.tolist() == pytest.approx(expected["discriminator"]["head"], rel=SINGLE)


def test_disback():
    """The first updates only degrade; then each snapshot is the target in turn, the last one first."""
    given, expected = fixture("DisBack")
    everywhere = Uniform(0.0, 1.0)
    stage = 10
    module = scores(
        DisBack,
        EDM(),
        waypoints=int(given.snapshots),
        degradation_updates=stage,
        backtracking_updates=int(given.interval),
        student_times=[given.start],
        matching_times=everywhere,
        critic_times=everywhere,
        critic_space="edm",
    )
    draws = {
        "start": given.z,
        "matching__time": given.matching_sigma / 80,
        "matching__noise": given.matching_noise,
        "critic__time": given.critic_sigma / 80,
        "critic__noise": given.critic_noise,
    }
    targets = []
    for update in range(len(expected["targets"])):
        module.draws = Given(stage + update, **draws)
        index = module.target_index()
        targets.append(0 if index is None else index + 1)
    assert targets == expected["targets"]
    for snapshot in module.waypoints:
        copied(Formula(given.snapshot_phase), snapshot)
    batch, student = Batch(size=3), module.student.network
    for update, name in ((0, "snapshot"), (len(targets), "teacher")):
        module.draws = Given(stage + update, **draws)
        loss = module.student_loss(batch).losses["matching"]
        check(loss, student, expected[f"matching_{name}"], rel=SINGLE)
    module.draws = Given(0, **draws)
    assert float(module.student_loss(batch).losses["matching"].detach()) == 0.0
    loss = module.fake_score_loss(batch).losses["denoising"]
    check(loss, module.fake_score.network, expected["degradation"], rel=SINGLE)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid(alpha):
    """Means over elements in the place of 100 times their sum; times are the method's own."""
    given, expected = fixture("SiD")
    module = scores(SiD, EDM(), alpha=alpha, student_times=[given.start], critic_space="edm")
    module.draws = Given(start=given.z, matching__time=given.matching_u, matching__noise=given.matching_noise)
    loss = module.student_loss(Batch(size=3)).losses["fisher"]
    check(loss, module.student.network, expected[f"generator_{alpha}"], factor=100 * 4, rel=SINGLE)
    module.critic_times = Uniform(0.0, 1.0)
    module.draws = Given(critic__time=given.critic_sigma / 80, critic__noise=given.critic_noise)
    loss = module.fake_score_loss(Batch(size=3)).losses["denoising"]
    check(loss, module.fake_score.network, expected["fake_score"], factor=100 * 4, rel=SINGLE)


def test_diff_instruct():
    """Means in the place of sums over elements; the value of a surrogate says nothing."""
    given, expected = fixture("DiffInstruct")
    module = scores(DiffInstruct, EDM(), student_times=[given.start], critic_space="edm")
    module.draws = Given(
        start=given.z,
        matching__time=of_normal(given.matching_sigma, -1.2, 1.2),
        matching__noise=given.matching_noise,
        critic__time=of_normal(given.critic_sigma, -1.2, 1.2),
        critic__noise=given.critic_noise,
    )
    loss = module.student_loss(Batch(size=3)).losses["matching"]
    check(loss, module.student.network, expected["generator"], factor=4, value=False)
    loss = module.fake_score_loss(Batch(size=3)).losses["denoising"]
    check(loss, module.fake_score.network, expected["fake_score"], factor=4)


def test_vsd():
    """A mean in the place of a sum over elements."""
    given, expected = fixture("VSD")
    module = scores(
        VSD,
        VariancePreserving(),
        ("epsilon", "sample", "epsilon"),
        guidance=Guidance(given.guidance),
        matching_times=Uniform(0.0, 1.0),
    )
    time = (given.index + 1).expand(3) / 1000
    module.draws = Given(start=given.z, matching__time=time, matching__noise=given.noise)
    loss = module.student_loss(Batch(cond={"shift": torch.zeros(3, dtype=F64)})).losses["matching"]
    check(loss, module.student.network, expected, factor=4, value=False)


@pytest.mark.parametrize("name", ["kl", "js", "sf", "neyman", "sh", "jf"])
def test_f_distill(name):
    """Running means of past samples in the place of those of the batch and of its bins."""
    given, expected = fixture("FDistill")
    want = expected[name]
    own = {"sf": "softened_rkl", "sh": "hellinger", "jf": "jeffreys"}.get(name, name)
    limits = {"ratio_min": given.ratio_min, "ratio_max": given.ratio_max, "divergence": own}
    u = log_ratio(given.logits)

    def module(bins):
        gan, everywhere = Adversary(taps=("input",)), Uniform(0.0, 1.0)
        times = {"matching_times": everywhere, "critic_times": everywhere}
        return scores(FDistill, FlowMatching(), gan=gan, ratio_bins=bins, **times, **limits)

    h = module(0).ratio_weight(u, given.t)
    h = h / h.mean()
    assert h.tolist() == pytest.approx(want["h"], rel=1e-5)
    x = given.x.requires_grad_()
    weight = matching_weight("dmd", x, given.real, given.t, FlowMatching()) * expand(h, x)
    loss = score_difference(x, given.real, given.fake, weight)
    assert float(loss.detach()) == pytest.approx(want["loss"], rel=1e-5)
    assert float(torch.autograd.grad(loss, x)[0].norm()) == pytest.approx(want["gradient_norm"], rel=1e-5)
    binned = module(2)
    binned.ratio_state[0, :2] = torch.tensor(want["bins"])
    h = binned.ratio_weight(u, given.t)
    assert (h / h.mean()).tolist() == pytest.approx(want["h_binned"], rel=1e-5)


def test_tdm(monkeypatch):
    """Twice as large, without the factor 1/2; the released script diffuses from one index above the end of a step.

    Its critic has the importance weights of an average element, and min(SNR, 5) as weight, below 5 here.
    """
    given, expected = fixture("TDM")
    module = scores(
        TDM,
        VariancePreserving("linear", 1e-4, 0.02),
        ("epsilon",) * 3,
        student_times=[0.8, 0.6, 0.4, 0.2],
        guidance=Guidance(given.guidance),
        critic_condition_on="none",
        critic_target="x0_is",
        critic_space="epsilon",
    )
    monkeypatch.setattr(module, "step_ends", lambda: [0.601, 0.401, 0.201, 0.001])
    monkeypatch.setattr(subinterval, "restricted", lambda *_: (given.time_index + 1) / 1000)
    module.draws = Given(start=given.z, stops=(given.step + 0.5) / 4, matching__noise=given.noise)
    batch = Batch(cond={"shift": torch.zeros(4, dtype=F64)})
    points = module.rollout(batch).prediction.x_t.flatten(1)
    torch.testing.assert_close(points, torch.tensor(expected["points"], dtype=F64), rtol=1e-5, atol=1e-6)
    loss = module.student_loss(batch).losses["matching"]
    check(loss, module.student.network, expected["generator"], factor=2, value=False)
    averaged = torch.tensor(expected["critic"]["weights"], dtype=F64)

    def of_an_element(*arguments):
        whole = subinterval_losses.importance_weight(*arguments)
        torch.testing.assert_close(whole, 4 * (4 * averaged.log()).softmax(0), rtol=1e-5, atol=0.0)
        return averaged

    monkeypatch.setattr(tdm, "importance_weight", of_an_element)
    monkeypatch.setattr(subinterval, "restricted", lambda *_: (given.critic_time_index + 1) / 1000)
    module.draws = Given(start=given.z, stops=(given.step + 0.5) / 4, critic__noise=given.critic_noise)
    loss = module.fake_score_loss(batch).losses["denoising"]
    check(loss, module.fake_score.network, expected["critic"])


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_rewarded_dmd(beta):
    """With a mean reward of 0 and a mean weight of 1, as in the released code, which has no means."""
    given, expected = fixture("RewardedDMD")
    module = scores(
        RewardedDMD,
        FlowMatching(),
        reward=MeanValue(),
        beta=beta,
        guidance=Guidance(given.guidance),
        matching_times=Uniform(0.0, 1.0),
    )
    module.reward_state.copy_(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    module.draws = Given(start=given.z, matching__time=given.t, matching__noise=given.noise)
    loss = module.student_loss(Batch(cond={"shift": torch.zeros(1, dtype=F64)})).losses["matching"]
    check(loss, module.student.network, expected[f"beta_{beta}"], value=beta == 0.0, rel=SINGLE)


# ------------------------------------------------------------------------------------------------ adversarial
def test_ladd():
    """The penalty's neighbours are given here: the released ones are those of the clean sample."""
    given, expected = fixture("LADD")
    networks = [denoiser(phase, FlowMatching()) for phase in (TEACHER, STUDENT)]
    gan = Adversary(taps=("input",), features="teacher", times=Uniform(0.0, 1.0))
    module = built(LADD, *networks, gan=gan)
    module.discriminator = head = Head()
    module.draws = Given(start=given.z, gan__time=given.t, gan__noise=given.noise, gan__real_noise=given.noise)
    batch = Batch(x0=given.real)
    check(module.student_loss(batch).losses["gan"], module.student.network, expected["generator"])
    loss = module.discriminator_loss(batch).losses["gan"]
    near = head({"input": given.real + given.r1_std * given.r1_noise})
    penalty = approximate_r1(module.real_logits(batch, given.t), near, 1.0)
    for name, value in (("discriminator", loss), ("approximate_r1", penalty)):
        assert float(value.detach()) == pytest.approx(expected[name]["loss"], rel=SINGLE)
        (slope,) = torch.autograd.grad(value, head.weight)
        assert slope.tolist() == pytest.approx(expected[name]["head"], rel=SINGLE)


class Curved(nn.Module):
    """Two discriminators on the sample, which are not linear."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.sin(1.7 * torch.arange(8, dtype=F64) + 0.9).view(2, 4))

    def forward(self, features):
        a, b = (features["0"].flatten(1) @ w for w in self.weight)
        return torch.stack([a + b.tanh(), a * b.tanh()], dim=1)


@pytest.mark.parametrize(("released", "kind"), [("ns", "logistic"), ("hinge", "hinge")])
def test_gdd(released, kind):
    """Means over the batch in the place of sums; the penalty is that of the mean of two logits, not of their sum.

    Noise of the smallest level is left out.
    """
    given, expected = fixture("GDD")
    student = denoiser(STUDENT, EDM())
    features = FrozenFeatures(nn.Sequential(nn.Identity()), ["0"], channels=2)
    module = built(GDD, denoiser(TEACHER, EDM()), student, features=features, kind=kind, student_times=[given.start])
    module.discriminator = head = Curved()
    still = torch.zeros_like(given.z)
    module.draws = Given(start=given.z, gan__noise=still, gan__real_noise=still)
    batch, n = Batch(x0=given.real), len(given.z)
    check(module.student_loss(batch).losses["gan"], student.network, expected[f"generator_{released}"], factor=n)
    losses = module.discriminator_loss(batch).losses
    pairs = ((n * losses["gan"], f"discriminator_{released}"), (0.5 * given.gamma * 2**2 * losses["r1"], "r1"))
    for value, name in pairs:
        assert float(value.detach()) == pytest.approx(expected[name]["loss"], rel=1e-9)
        (slope,) = torch.autograd.grad(value, head.weight, retain_graph=True)
        assert slope.flatten().tolist() == pytest.approx(expected[name]["head"], rel=1e-9)


# ------------------------------------------------------------------------------------------------ consistency
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("c", [0.0, 0.06])
def test_ect(stage, c):
    given, expected = fixture("ECT")
    module = learner(ECT, EDM(), first_stage=stage, huber=c)
    module.draws = Given(t=of_normal(given.sigma, -1.1, 2.0), noise=given.noise)
    loss = module.student_loss(Batch(x0=given.x0)).losses["consistency"]
    check(loss, module.student.network, expected[f"stage{stage}_c{c}"])


@pytest.mark.parametrize(("released", "metric"), [("l2", "mse"), ("l1", "l1")])
def test_consistency_training(released, metric):
    given, expected = fixture("ConsistencyTraining")
    module = learner(
        ConsistencyTraining,
        EDM(),
        Preconditioned(STUDENT, sigma_min=0.002),
        schedule="fixed",
        last_intervals=given.times - 1,
        metric=metric,
        target_ema=ConstantEMA(0.5),
    )
    copied(Formula(TEACHER), module.sampling_network())
    module.draws = Given(interval=(given.index + 0.5) / (given.times - 1), noise=given.noise)
    loss = module.student_loss(Batch(x0=given.x0)).losses["consistency"]
    check(loss, module.student.network, expected[released], rel=SINGLE)


def test_progressive_distillation():
    given, expected = fixture("ProgressiveDistillation")
    rho = 7
    high, low = 80.0 ** (1 / rho), 0.002 ** (1 / rho)
    times = [(high + i / given.steps * (low - high)) ** rho for i in range(given.steps)]
    networks = [Preconditioned(phase) for phase in (STUDENT, TEACHER)]
    module = learner(ProgressiveDistillation, EDM(), *networks, stages=1, student_times=times)
    module.draws = Given(step=(given.index + 0.5) / given.steps, noise=given.noise)
    loss = module.student_loss(Batch(x0=given.x0)).losses["progressive"]
    check(loss, module.student.network, expected, rel=SINGLE)


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_mean_flow(power):
    given, expected = fixture("MeanFlow")
    module = learner(
        MeanFlow,
        FlowMatching(),
        kind="flow_prediction",
        from_data=True,
        power=power,
        constant=given.constant,
        equal_share=0.0,
        training_times=Uniform(0.0, 1.0),
    )
    module.draws = Given(t=given.t, r=given.r, noise=given.noise)
    loss = module.student_loss(Batch(x0=given.x0)).losses["mean_flow"]
    check(loss, module.student.network, expected[f"p{power}"])


def test_rcm():
    """Sums over elements; no factor 1/2 in the score term; the critic's error is that of ``edm`` with sigma_data 1."""
    given, expected = fixture("RCM", VIDEO)
    elements, batch = math.prod(VIDEO), Batch(x0=given.x0)

    def flow_time(tau):
        return tau.sin() / (tau.sin() + tau.cos())

    everywhere = Uniform(0.0, 1.0)
    module = scores(
        RCM,
        FlowMatching(),
        ("flow_prediction",) * 3,
        VIDEO,
        sigma_data=1.0,
        times=everywhere,
        matching_times=everywhere,
        critic_times=everywhere,
        critic_space="edm",
    )
    student = module.student.network
    draws = {
        "tau": given.tau / (math.pi / 2),
        "noise": given.noise,
        "start": given.z,
        "matching__time": flow_time(given.matching_tau),
        "matching__noise": given.matching_noise,
        "critic__time": flow_time(given.matching_tau),
        "critic__noise": given.critic_noise,
    }
    for update in (250, 5000):
        module.draws = Given(update, **draws)
        losses = module.student_loss(batch).losses
        check(losses["consistency"], student, expected[f"scm_{update}"], factor=100 * elements, rel=SINGLE)
    check(losses["matching"], student, expected["dmd"], factor=2 * elements, rel=SINGLE)
    loss = module.fake_score_loss(batch).losses["denoising"]
    check(loss, module.fake_score.network, expected["critic"], factor=elements, rel=SINGLE)


# ------------------------------------------------------------------------------------------------ the fixtures
def test_every_fixture_is_replayed():
    from lightning_distill import methods

    names = sorted(path.stem for path in FIXTURES.glob("*.json"))
    assert all(hasattr(methods, name) for name in names)
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_parity*.py"))
    assert all(f'fixture("{name}"' in source for name in names)
    assert all(path.stat().st_size < 30_000 for path in FIXTURES.iterdir())


def test_the_table_of_methods_says_what_was_compared(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from methods_table import evidence

    assert evidence("DMD2", "").startswith("[parity](https://github.com/tianweiy/DMD2/tree/8d8fa55633")
    assert evidence("GNDM", "Notes: Reconstructed from") == "reconstructed"
    assert evidence("DecoupledDMD", "") == "derived"
