"""Consistency of streams that are denoised together: targets, terms, guidance, learning, bad input."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import fit
from small_problems import ready
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA, PowerEMA
from lightning_distill.generation import generate
from lightning_distill.guidance import Guidance
from lightning_distill.methods import ConsistencyDistillation, FlashWAM
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein
from lightning_distill.networks.analytic import AnalyticNetwork, analytic_denoiser, ring
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy, Explicit, Lora, Role
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.stream_mixture import StreamMixture, ring_action
from lightning_distill.networks.streams import StreamMLP, StreamsDenoiser, StreamsNetwork
from lightning_distill.processes import FlowMatching
from lightning_distill.samplers import transport
from lightning_distill.schedules import WarmupDecay
from lightning_distill.streams import Stream, StreamProcess

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")

F64 = torch.float64
PROCESS = StreamProcess({"video": Stream([2], 5.0), "action": Stream([1])})
MEAN = torch.tensor([[0.2, 0.3, -0.5]], dtype=F64)
COV = torch.tensor([[[0.6, 0.3, -0.2], [0.3, 0.8, 0.1], [-0.2, 0.1, 0.4]]], dtype=F64)
MIXTURE = StreamMixture(MEAN, COV)
LINEAR = {"video": "linear", "action": "linear"}


def exact(mixture, labelled=False):
    return Denoiser(AnalyticNetwork(mixture, PROCESS), PROCESS, "sample", sigma_data=1.253)


def clean_end(x, t, steps=24):
    """The end of the trajectory from each sample's own time, by RK4."""
    h = -t[:, None] / steps
    for i in range(steps):
        s = t * (1 - i / steps)
        k1 = MIXTURE.velocity(x, s, PROCESS)
        k2 = MIXTURE.velocity(x + h / 2 * k1, s + h[:, 0] / 2, PROCESS)
        k3 = MIXTURE.velocity(x + h / 2 * k2, s + h[:, 0] / 2, PROCESS)
        k4 = MIXTURE.velocity(x + h * k3, s + h[:, 0], PROCESS)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


class ExactEnds(StreamsNetwork):
    """The exact consistency function of a joint Gaussian, with a parameter that spoils it."""

    def __init__(self):
        super().__init__(nn.Identity(), PROCESS)
        self.fault = nn.Parameter(torch.zeros(3, dtype=F64))

    def forward(self, x, t):
        return (x - clean_end(x, t)) / PROCESS.sigma(t) + self.fault


class Given(Role):
    def __init__(self, network):
        self.network = network

    def build(self, source, name=None):
        return Denoiser(self.network, source.process, "flow_prediction")


def exact_module(method=FlashWAM, fault=(0.0, 0.0, 0.0), **settings):
    network = ExactEnds()
    settings = {"boundaries": LINEAR, "target_ema": "none", "metric": "mse", "flow_weight": 0.0, "ema": [], **settings}
    module = method(exact(MIXTURE), student=Given(network), **settings)
    with torch.no_grad():
        network.fault.copy_(torch.tensor(fault))
    return ready(module)


def data(n=256):
    return Batch(x0=MIXTURE.sample(n, torch.Generator().manual_seed(2))[0].double())


def rms(terms):
    return {name: terms.losses[f"consistency_{name}"].item() ** 0.5 for name in ("video", "action")}


# ------------------------------------------------------------------------------------------------ residuals
class ExactSteps(FlashWAM):
    """Pairs on the trajectory itself."""

    def earlier(self, x_t, t, r, batch, eps):
        h = (r - t)[:, None] / 24
        for i in range(24):
            s = t + (r - t) * i / 24
            k1 = MIXTURE.velocity(x_t, s, PROCESS)
            k2 = MIXTURE.velocity(x_t + h / 2 * k1, s + h[:, 0] / 2, PROCESS)
            k3 = MIXTURE.velocity(x_t + h / 2 * k2, s + h[:, 0] / 2, PROCESS)
            k4 = MIXTURE.velocity(x_t + h * k3, s + h[:, 0], PROCESS)
            x_t = x_t + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x_t


def test_the_exact_functions_have_no_residual_on_exact_pairs():
    found = rms(exact_module(ExactSteps, intervals=4).student_loss(data(64)))
    # the last pairs end at t = 1e-4 instead of 0
    assert max(found.values()) < 3e-4
    spoilt = rms(exact_module(ExactSteps, intervals=4, fault=(0.3, 0.0, 0.0)).student_loss(data(64)))
    assert spoilt["action"] > 0.05
    assert spoilt["video"] == pytest.approx(found["video"], rel=1e-6)


class FromOneTime(FlashWAM):
    """Pairs that start at t = .8."""

    def pair_times(self, n):
        t = torch.full((n,), 0.8, dtype=F64)
        return t, t - 1.0 / self.intervals


def test_errors_of_the_solver_have_its_order_in_every_stream():
    def errors(solver):
        return [rms(exact_module(FromOneTime, intervals=n, solver=solver).student_loss(data())) for n in (8, 16, 32)]

    for solver, low, high in (("euler", 3.5, 4.5), ("heun", 7.0, 9.0)):
        found = errors(solver)
        for name in ("video", "action"):
            ratios = [a[name] / b[name] for a, b in pairwise(found)]
            print(solver, name, [round(r, 2) for r in ratios])
            assert low < ratios[-1] < high


def test_the_gradient_of_a_term_is_that_of_its_stream_alone():
    module = exact_module(intervals=4, fault=(0.1, 0.2, 0.3))
    batch = data(64)
    for name, own in (("action", slice(0, 1)), ("video", slice(1, 3))):
        loss = module.student_loss(batch).losses[f"consistency_{name}"]
        (slope,) = torch.autograd.grad(loss, module.student.network.fault)
        others = torch.ones(3, dtype=torch.bool)
        others[own] = False
        assert slope[own].abs().min() > 0
        assert (slope[others] == 0).all()
        pair = module.pair(batch)
        gap, target = module.ends(pair)[0].detach(), module.target(pair.x_r, pair.r, batch, None)
        # d mse / d fault = mean over samples and elements of 2 (f - target) (-sigma), target without gradient
        want = -2.0 * ((gap - target) * PROCESS.sigma(pair.t)).mean(0)[own] / (own.stop - own.start)
        torch.testing.assert_close(slope[own], want)


def test_pairs_are_a_share_of_the_time_apart_and_end_at_the_clean_end():
    module = exact_module(intervals=4)
    t, r = module.pair_times(5000)
    above = t > 0.25 + 1e-4
    torch.testing.assert_close(t[above] - r[above], torch.full_like(t[above], 0.25))
    assert (r[~above] == 1e-4).all()
    assert (t > r).all()
    assert t.mean().item() == pytest.approx(0.5, abs=0.02)
    x = torch.randn(8, 3, dtype=F64)
    assert torch.equal(module.target(x, torch.full((8,), 1e-4, dtype=F64), Batch(size=8), None), x)


def test_the_flow_term_is_flow_matching_of_its_streams():
    module = exact_module(intervals=4, flow_weight=0.01)
    batch = data(64)
    terms = module.student_loss(batch)
    assert set(terms.losses) == {"consistency_video", "consistency_action", "flow_video", "flow_action"}
    eps, pair = module.draws.normal("noise", batch.x0.shape), module.pair(batch)
    torch.testing.assert_close(pair.x_t, PROCESS.add_noise(batch.x0, eps, pair.t))
    velocity = module.student.network(pair.x_t, pair.t)
    want = 0.01 * (velocity - (eps - batch.x0))[:, :1].square().mean()
    torch.testing.assert_close(terms.losses["flow_action"], want)
    only = exact_module(intervals=4, flow_weight=0.01, regularised=["action"]).student_loss(batch)
    assert set(only.losses) == {"consistency_video", "consistency_action", "flow_action"}


def test_by_default_noisy_streams_preserve_variance_and_others_are_linear_and_regularised():
    spec = StreamsDenoiser(lambda: StreamMLP({"video": [2], "action": [1]}, 8, 1), PROCESS)
    module = ready(FlashWAM(spec, ema=[]))
    assert module.student.network.boundaries == {"action": "linear", "video": "variance_preserving"}
    assert module.regularised == ["action"]
    assert set(module.teacher.network.boundaries.values()) == {"linear"}
    assert [p.name for p in module.ema_profiles] == [ConstantEMA(0.995).name]


def test_guidance_of_one_stream_leaves_the_others_unguided():
    mixture = ring_action(labelled=True)
    student = StreamsDenoiser(lambda: StreamMLP({"video": [2], "action": [1]}, 8, 1, num_classes=8), PROCESS, 1.253)
    x, labels = mixture.sample(32, torch.Generator().manual_seed(0))
    batch = Batch(x0=x, cond={"class_labels": labels})
    t = torch.full((32,), 0.7, dtype=F64)

    def made(**settings):
        module = ready(FlashWAM(exact(mixture), student=Explicit(student), ema=[], target_ema="none", **settings))
        return PROCESS.unpack(module.guided_teacher(batch)(x, t).x0)

    plain, full, one = made(), made(guidance=Guidance(3.0)), made(guidance=Guidance(3.0), guided=["video"])
    torch.testing.assert_close(one["video"], full["video"])
    torch.testing.assert_close(one["action"], plain["action"])
    assert not torch.allclose(full["action"], plain["action"], atol=0.05)


# ------------------------------------------------------------------------------------------------ learning
UPDATES = 350


@pytest.fixture(scope="module")
def problem():
    mixture = ring_action()
    noise = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1))
    reference = mixture.sample(4000, torch.Generator().manual_seed(7))[0]
    return mixture, noise, reference


def figures(x, reference):
    """Distances of both streams, and the spread of the action about what the video says."""
    made, wanted = PROCESS.unpack(x), PROCESS.unpack(reference)
    found = {name: sliced_wasserstein(made[name], wanted[name]) for name in made}
    return found | {"spread": (made["action"][:, 0] - made["video"].prod(1) / 2).std().item()}


def learned(problem, updates=UPDATES, **settings):
    mixture, noise, reference = problem
    torch.manual_seed(0)
    spec = StreamsDenoiser(lambda: StreamMLP({"video": [2], "action": [1]}, 128, 3), PROCESS, sigma_data=1.253)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=4e-3, betas=(0.9, 0.99), fused=True)

    def decay(optimizer):
        return WarmupDecay(optimizer, 20, updates, "linear", decay_start=updates // 3, final=0.02)

    common = {
        "intervals": 8,
        "solver": "heun",
        "metric": "mse",
        "target_ema": ConstantEMA(0.9),
        "ema": [PowerEMA(0.05)],
    }
    module = FlashWAM(
        exact(mixture),
        student=Explicit(spec),
        student_optimizer=adam,
        student_scheduler=decay,
        **{**common, **settings},
    )
    fit(module, updates, Batch(x0=mixture.sample(50_000, torch.Generator().manual_seed(0))[0]))
    found = figures(module.sample(len(noise), noise=noise), reference)
    print({name: round(value, 3) for name, value in found.items()})
    return found, module


@pytest.mark.long
@pytest.mark.learn
def test_one_step_beats_the_teachers_two_in_both_streams_and_keeps_them_together(problem):
    mixture, noise, reference = problem
    teacher = figures(generate(exact(mixture), noise, {}, [1.0, 0.5], "ode"), reference)
    print({name: round(value, 3) for name, value in teacher.items()})
    found, module = learned(problem)
    assert found["video"] < 0.25 * teacher["video"]
    assert found["action"] < 0.4 * teacher["action"]
    # an action that has nothing to do with the video is .9 off, one of the data .15
    apart = PROCESS.unpack(reference)
    alone = (apart["action"][torch.randperm(4000), 0] - apart["video"].prod(1) / 2).std().item()
    assert found["spread"] < 0.55 * alone
    # trained as one consistency function and read as another
    network = module.sampling_network().network
    network.set_boundaries(LINEAR)
    read = figures(module.sample(len(noise), noise=noise), reference)
    assert read["video"] > 5.0 * found["video"]


@pytest.mark.learn
@pytest.mark.slow
@pytest.mark.parametrize("stream", ["video", "action"])
def test_without_the_term_of_a_stream_it_is_not_learned(problem, stream):
    other = {"video": "action", "action": "video"}[stream]
    found, _ = learned(problem, loss_weights={f"student/consistency_{stream}": 0.0})
    assert found[stream] > {"video": 0.5, "action": 0.25}[stream]
    assert found[other] < 0.25
    assert found["spread"] > 0.5


# ------------------------------------------------------------------------------------------------ bad input
def small(**settings):
    spec = StreamsDenoiser(lambda: StreamMLP({"video": [2], "action": [1]}, 8, 1), PROCESS)
    return FlashWAM(spec, ema=[], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": "inverse_variance"}, "one noise level"),
        ({"flow_weight": -1.0}, "must not be negative"),
        ({"intervals": 0}, "at least one"),
        ({"solver": "rk4"}, "choose euler or heun"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"boundaries": {"video": "linear"}}, "each of the streams"),
        ({"boundary_sigma_data": 0.0}, "must be positive"),
        ({"guided": ["sound"]}, "guided names"),
        ({"regularised": ["sound"]}, "regularised names"),
        ({"student": Lora(rank=1, target_modules=["inner"])}, "an adapter shares the teacher's network"),
        (
            {
                "student": Explicit(
                    StreamsDenoiser(lambda: StreamMLP({"a": [3]}, 8, 1), StreamProcess({"a": Stream([3])}))
                )
            },
            "give both one process",
        ),
    ],
)
def test_contradictions_are_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings).configure_model()


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="use ConsistencyDistillation"):
        FlashWAM(analytic_denoiser(ring(), FlowMatching()), ema=[]).configure_model()
    plain = Denoiser(ResidualMLP((3,), 8, 1), PROCESS, "flow_prediction")
    with pytest.raises(ValueError, match="give StreamsDenoiser"):
        FlashWAM(plain, student=Copy(), ema=[]).configure_model()


def test_adapters_have_the_outputs_of_their_network():
    module = ready(small(student=Lora(rank=1, target_modules=["inner"]), boundaries=LINEAR, target_ema="none"))
    x, t = torch.randn(4, 3), torch.rand(4)
    assert torch.equal(module.student(x, t).x0, module.teacher(x, t).x0)
    terms = module.student_loss(Batch(x0=torch.randn(8, 3)))
    assert bool(torch.isfinite(module.weighted_sum("student", terms)))


def test_steps_of_the_teacher_are_those_of_the_sampler():
    module = ready(small(intervals=2, target_ema="none"))
    x, t, r = torch.randn(4, 3), torch.full((4,), 0.8, dtype=F64), torch.full((4,), 0.3, dtype=F64)
    want = transport(module.teacher(x, t), r)
    torch.testing.assert_close(module.earlier(x, t, r, Batch(size=4), x), want)
    assert isinstance(module, ConsistencyDistillation)
