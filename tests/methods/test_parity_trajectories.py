"""The losses of released code, reproduced: methods that learn trajectories; see ``test_parity``."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from parity_networks import (
    F64,
    FAKE,
    STUDENT,
    TEACHER,
    Formula,
    Given,
    Head,
    Preconditioned,
    check,
    copied,
    fixture,
    learner,
)
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.guidance import Guidance, RandomGuidance
from lightning_distill.methods import (
    CTM,
    LCM,
    PCM,
    SCM,
    TCM,
    ConsistencyDistillation,
    FakeBranch,
    PiFlow,
    RFPlusPlus,
    Shortcut,
    SlimFlow,
    SlimFlowDistillation,
    TwinFlow,
    consistency_distillation,
    ctm,
    pcm,
    reflow,
    tcm,
)
from lightning_distill.networks.adversary import Adversary
from lightning_distill.parameterisations import edm_boundary
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving, expand
from lightning_distill.times import Uniform


def null(n):
    """The condition whose unconditional value is a quarter."""
    return {"shift": torch.zeros(n, dtype=F64)}


class Saturating(nn.Module):
    """A log-variance in levels of EDM; less ln 2, as the weight 1 / tan(tau) lacks 1 / sigma_data."""

    def forward(self, tau):
        sigma = 0.5 * tau.tan()
        return 0.3 * sigma / (1 + sigma) - math.log(2.0)


@pytest.mark.parametrize(
    ("case", "settings", "update"),
    [
        ("sct", {"from_data": True}, 2500),
        ("scd", {}, 2500),
        ("scd_end", {}, 20_000),
        ("scd_rms", {"norm": "rms"}, 2500),
        ("scd_guided", {"guidance": Guidance(3.0)}, 2500),
    ],
)
def test_scm(case, settings, update):
    """Samples have unit standard deviation, so c is divided by that of the data; see ``Saturating`` for the weight."""
    given, expected = fixture("SCM")
    constant = given.constant / given.sigma_data
    settings = {"constant": constant, "warmup_updates": given.warmup, "weight": "trig", **settings}
    module = learner(SCM, EDM(), times=Uniform(0.0, 1.0), **settings)
    module.log_variance = Saturating()
    tau = torch.atan(given.sigma / given.sigma_data)
    module.draws = Given(update, tau=tau / (math.pi / 2), noise=given.noise)
    loss = module.student_loss(Batch(x0=given.x0, cond=null(4))).losses["consistency"]
    check(loss, module.student.network, expected[case], offset=math.log(2.0))


# ------------------------------------------------------------------------------------------------ pairs of times
def heun_of_levels(denoise, x, t, r, solver, process):
    """Heun's method in noise levels, as the paper has it; the library's is in flow-matching coordinates."""
    first = (x - denoise(x, t).x0) / expand(t, x)
    trial = x + expand(r - t, x) * first
    second = (trial - denoise(trial, r).x0) / expand(r, x)
    return x + 0.5 * expand(r - t, x) * (first + second)


@pytest.mark.parametrize(("released", "metric"), [("l2", "mse"), ("l1", "l1")])
def test_consistency_distillation(monkeypatch, released, metric):
    given, expected = fixture("ConsistencyDistillation")
    monkeypatch.setattr(consistency_distillation, "solver_step", heun_of_levels)
    module = learner(
        ConsistencyDistillation,
        EDM(),
        Preconditioned(STUDENT, sigma_min=0.002),
        Preconditioned(TEACHER),
        intervals=int(given.times) - 1,
        metric=metric,
        target_ema=ConstantEMA(0.5),
    )
    copied(Formula(FAKE), module.sampling_network())
    module.draws = Given(interval=(given.index + 0.5) / (given.times - 1), noise=given.noise)
    loss = module.student_loss(Batch(x0=given.x0)).losses["consistency"]
    check(loss, module.student.network, expected[released])


@pytest.mark.parametrize("stage", [1, 7])
@pytest.mark.parametrize("c", [0.0, 0.06])
def test_truncated_consistency(stage, c, monkeypatch):
    """One of four samples lies at the transition, whose term is a mean of its own."""
    given, expected = fixture("TCM")
    monkeypatch.setattr(tcm, "restricted", lambda *_: given.sigma)
    module = learner(TCM, EDM(), first_stage=stage, huber=c, boundary=given.transition)
    module.draws = Given(t=given.sigma, edge=given.edge, noise=given.noise)
    loss = module.weighted_sum("student", module.student_loss(Batch(x0=given.x0)))
    check(loss, module.student.network, expected[f"stage{stage}_c{c}"])


def latent(method, given, **settings):
    """A method on epsilon networks of a latent model, with guidance drawn for each sample."""
    guidance = RandomGuidance(given.guidance_low, given.guidance_high)
    module = learner(
        method, VariancePreserving(), kind="epsilon", intervals=int(given.intervals), guidance=guidance, **settings
    )
    position = given.intervals - 1 - given.index  # grids descend
    draws = {"interval": (position + 0.5) / given.intervals, "guidance": given.guidance_u, "noise": given.noise}
    module.draws = Given(**draws)
    return module, draws


@pytest.mark.parametrize(("released", "metric"), [("huber", "pseudo_huber_elementwise"), ("l2", "mse")])
def test_lcm(released, metric):
    """Student and target ignore the scale that they are told."""
    given, expected = fixture("LCM")
    module, _ = latent(LCM, given, metric=metric, target_ema=ConstantEMA(0.5))
    copied(Formula(FAKE), module.sampling_network())
    loss = module.student_loss(Batch(x0=given.x0, cond=null(4))).losses["consistency"]
    check(loss, module.student.network, expected[released])


def test_pcm(monkeypatch):
    """The released code ends the last phase at the scheduler's timestep 0 and plays with relu(1 - D), D < 1 here."""
    given, expected = fixture("PCM")
    end = pcm.segment_end
    monkeypatch.setattr(pcm, "segment_end", lambda t, edges: end(t, edges).clamp_min(1e-3))
    gan = Adversary(taps=("input",), features="teacher", kind="hinge")
    module, draws = latent(PCM, given, num_steps=int(given.phases), gan=gan)
    module.discriminator = head = Head()
    head.weight.data *= 0.3
    module.draws = Given(**draws, gan__noise=given.fake_noise, gan__real_noise=given.real_noise)
    monkeypatch.setattr(module, "game_levels", lambda ends: (given.adversarial_index + 1) / 1000)
    batch = Batch(x0=given.x0, cond=null(5))
    losses = module.student_loss(batch).losses
    check(losses["consistency"], module.student.network, expected["huber"])
    check(losses["gan"], module.student.network, expected["generator"], offset=1.0)
    loss = module.discriminator_loss(batch).losses["gan"]
    assert float(loss.detach()) == pytest.approx(expected["discriminator"]["loss"], rel=1e-9)
    (slope,) = torch.autograd.grad(loss, head.weight)
    assert slope.tolist() == pytest.approx(expected["discriminator"]["head"], rel=1e-9)
    module.metric = "mse"
    check(module.student_loss(batch).losses["consistency"], module.student.network, expected["l2"])


# ------------------------------------------------------------------------------------------------ two times
class TwoTimePreconditioned(Formula):
    """The formula of two times within the scalings of EDM."""

    def forward(self, x, t, r=None):
        skip, out = (expand(c, x) for c in edm_boundary(t, 0.5, 0.0))
        return skip * x + out * super().forward(x / expand((t**2 + 0.25).sqrt(), x), t, r)


def test_ctm(monkeypatch):
    """Trajectories end at 0, for which 1e-12 stands in the released code; the game sees clean samples here."""
    given, expected = fixture("CTM")
    monkeypatch.setattr(ctm, "solver_step", heun_of_levels)
    gan = Adversary(taps=("input",), features="teacher", kind="hinge")
    intervals = int(given.levels) - 1
    module = learner(
        CTM,
        EDM(given.sigma_min),
        TwoTimePreconditioned(STUDENT),
        TwoTimePreconditioned(TEACHER),
        intervals=intervals,
        solver_steps=int(given.solver_steps),
        metric="mse",
        gan=gan,
        adaptive=False,
        training_times=Uniform(0.0, 1.0),
    )
    copied(TwoTimePreconditioned(FAKE), module.sampling_network(module.target_name))
    module.discriminator = head = Head()
    monkeypatch.setattr(module, "game_levels", lambda ends: torch.zeros(4, dtype=F64))
    middle = (given.start + given.solver_steps).long()
    monkeypatch.setattr(module, "trajectory_times", lambda n: (given.start.long(), middle, given.end.long()))
    module.draws = Given(
        noise=given.noise,
        denoising__noise=given.denoising_noise,
        denoising__time=given.denoising_sigma / (1 + given.denoising_sigma),
        gan__noise=given.noise,
        gan__real_noise=given.noise,
        gan__real_end=given.noise,
    )
    batch = Batch(x0=given.x0)
    losses = module.student_loss(batch).losses
    for name, recorded in (("consistency", "consistency"), ("denoising", "denoising"), ("gan", "generator")):
        check(losses[name], module.student.network, expected[recorded])
    loss = module.discriminator_loss(batch).losses["gan"]
    assert float(loss.detach()) == pytest.approx(expected["discriminator"]["loss"], rel=1e-9)
    (slope,) = torch.autograd.grad(loss, head.weight)
    assert slope.tolist() == pytest.approx(expected["discriminator"]["head"], rel=1e-9)


def test_shortcut():
    """The released path keeps 1e-5 of the noise at its end, left out in the fixture; velocities there are negative."""
    given, expected = fixture("Shortcut")
    module = learner(
        Shortcut,
        FlowMatching(),
        kind="flow_prediction",
        from_data=True,
        most_steps=int(given.most_steps),
        training_times=Uniform(0.0, 1.0),
        ema=[ConstantEMA(0.5)],
    )
    copied(Formula(FAKE), module.sampling_network())
    levels = math.log2(given.most_steps)
    same = given.level == levels
    module.draws = Given(
        noise=given.noise,
        t=given.t,
        equal=torch.where(same, 0.0, 0.99),
        size=torch.where(same, 0.5, (given.level + 0.5) / levels),
        step=torch.where(same, 0.5, given.t - 0.5 / 2**given.level),
    )
    loss = module.student_loss(Batch(x0=given.x0)).losses["shortcut"]
    check(loss, module.student.network, expected)


class Signed(Formula):
    """The formula of two times, or of their negatives."""

    sign = 1.0

    def forward(self, x, t, r=None):
        return super().forward(x, self.sign * t, None if r is None else self.sign * r)


class Negative(FakeBranch):
    """Both times of a formula with a minus."""

    def check(self, student, checkpointing):
        assert isinstance(student.network, Signed)

    @contextmanager
    def chosen(self, student, cond):
        student.network.sign = -1.0
        yield cond
        student.network.sign = 1.0


def twin(given, **settings):
    """TwinFlow with the fixture's draws; every sample is in all of the three terms."""
    module = learner(
        TwinFlow,
        FlowMatching(),
        Signed(STUDENT),
        kind="flow_prediction",
        fake_branch=Negative(),
        training_times=Uniform(0.0, 1.0),
        matching_times=Uniform(0.0, 1.0),
        **settings,
    )
    module.draws = Given(
        noise=given.noise,
        start=given.start,
        fake__time=given.fake_time,
        fake__noise=given.fake_noise,
        matching__time=given.matching_time,
        matching__noise=given.matching_noise,
    )
    module.pair_times = lambda n: (given.t, given.r)
    return module


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("released", ["barron_reweighting", "l2"])
def test_twin_flow(released, order):
    """The released robust loss adds 1e-8 to c^2 where it divides the error."""
    given, expected = fixture("TwinFlow")
    added = math.sqrt(given.c**2 + given.c_added)
    module = twin(given, order=order, spacing="even", robust=None if released == "l2" else added)
    factor = 1.0 if released == "l2" else added / given.c
    loss = module.flow_map_term(Batch(x0=given.x0))
    check(loss, module.student.network, expected[f"flow_map_{released}_{order}"], factor=factor)


def test_twin_flow_branches():
    """Matching has half the gradient of a squared error, without a reweighting."""
    given, expected = fixture("TwinFlow")
    module = twin(given)
    losses = module.student_loss(Batch(x0=given.x0)).losses
    check(losses["fake"], module.student.network, expected["fake"])
    check(losses["matching"], module.student.network, expected["matching"], factor=2, value=False)


# ------------------------------------------------------------------------------------------------ rectified flows
@pytest.mark.parametrize(
    ("kind", "update"), [("linear", 0), ("linear", 250), ("linear", 1000), ("cosine", 0), ("cosine", 250)]
)
def test_slim_flow(kind, update):
    given, expected = fixture("SlimFlow")
    module = learner(
        SlimFlow,
        FlowMatching(),
        kind="flow_prediction",
        annealing_updates=int(given.warmup),
        annealing_kind=kind,
        times=Uniform(0.0, 1.0),
    )
    module.draws = Given(update, t=given.t, fresh=given.fresh)
    loss = module.student_loss(Batch(x0=given.x0, noise=given.noise)).losses["velocity"]
    check(loss, module.student.network, expected[f"{kind}_{update}"])


@pytest.mark.parametrize(("released", "metric"), [("l2", "mse"), ("l1", "l1")])
def test_slim_flow_distillation(released, metric):
    """Samples are compared here, velocities there, which differ alike; t counts from noise there."""
    given, expected = fixture("SlimFlowDistillation")
    module = learner(SlimFlowDistillation, FlowMatching(), kind="flow_prediction", metric=metric)
    module.draws = Given(fresh=given.fresh, t=1.0 - given.u)
    losses = module.student_loss(Batch(x0=given.x0, noise=given.noise)).losses
    check(sum(losses.values()), module.student.network, expected[released])


@pytest.mark.parametrize("released", ["l2-squared", "huber", "lpips-huber"])
def test_rf_plus_plus(released, monkeypatch):
    """Huber's term is not divided by the number D of elements here, and its constant, c D there, is given."""
    given, expected = fixture("RFPlusPlus")
    robust, perceptual = released != "l2-squared", released == "lpips-huber"
    module = learner(
        RFPlusPlus,
        FlowMatching(),
        kind="flow_prediction",
        metric="pseudo_huber" if robust else "mse",
        huber=4 * given.huber_per_element,
        times=Uniform(0.0, 1.0),
        time_weight="data" if perceptual else "one",
        perceptual_weight="inverse",
    )
    if perceptual:
        module.perceptual = True
        half = lambda _distance, _module, x, x0, cond: (0.5 * (x - x0)).square().flatten(1).mean(1)  # noqa: E731
        monkeypatch.setattr(reflow, "perceived", half)
    module.draws = Given(t=given.t)
    losses = module.student_loss(Batch(x0=given.x0, noise=given.noise)).losses
    loss = losses["velocity"] / 4 if robust else losses["velocity"]
    check(loss + losses.get("perceptual", 0.0), module.student.network, expected[released])


# ------------------------------------------------------------------------------------------------ policies
class Ended(Formula):
    """The formula with a last linear layer; all weights are sines of their index."""

    def __init__(self, phase):
        super().__init__(phase)
        self.last = nn.Linear(4, 4, dtype=F64)
        self.fill(self.last, phase + 4, 0.6, 0.2)

    @staticmethod
    @torch.no_grad()
    def fill(layer, phase, *sizes):
        for parameter, size, shift in zip((layer.weight, layer.bias), sizes, (0, 1)):
            sines = torch.sin(1.7 * torch.arange(parameter.numel(), dtype=F64) + phase + shift)
            parameter.data = size * sines.view(parameter.shape)

    def forward(self, x, t):
        return self.last(super().forward(x, t).flatten(1)).view_as(x)


@pytest.mark.parametrize(
    ("policy", "case", "points", "settings", "update"),
    [
        ("mixture", "plain", 3, {}, 2000),
        ("mixture", "mixed", 2, {}, 1000),
        ("mixture", "window", 3, {"window": 0.25}, 2000),
        ("mixture", "dropout", 3, {"dropout": 0.3}, 2000),
        ("grid", "plain", 3, {}, 2000),
        ("grid", "mixed", 2, {}, 1000),
        ("grid", "window", 3, {"window": 0.25}, 2000),
    ],
)
def test_pi_flow(policy, case, points, settings, update):
    """Twice as large, without the factor 1/2; substeps are counted in each interval, there in a whole trajectory."""
    given, expected = fixture("PiFlow")
    module = learner(
        PiFlow,
        FlowMatching(),
        Ended(STUDENT),
        Formula(TEACHER),
        kind="flow_prediction",
        num_steps=2,
        policy=policy,
        components=int(given.components),
        points=points,
        substeps=int(given.substeps),
        decay_updates=int(given.decay),
        training_times=Uniform(0.0, 1.0),
        **settings,
    )
    network = module.student.network
    network.fill(network.policy_head.layer, STUDENT + 6, 0.4, 0.3)
    own = given.own_window if case == "window" else vars(given)[f"own_{points}"]
    draws = {f"own{i}": column for i, column in enumerate(own.unbind(1))}
    draws |= {f"theirs{i}": column for i, column in enumerate(vars(given)[f"theirs_{points}"].unbind(1))}
    draws |= {f"dropout{i}": column for i, column in enumerate(given.dropped.unbind(1))}
    module.draws = Given(update, segment=given.raw_time, noise=given.noise, **draws)
    loss = module.student_loss(Batch(x0=given.x0)).losses["imitation"]
    check(loss, network, expected[f"{policy}_{case}"], factor=0.5)
