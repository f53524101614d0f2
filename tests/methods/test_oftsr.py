"""OFTSR: the trajectory constraint, its order, the source, the knob, what it learns, messages."""

from __future__ import annotations

import pytest
import torch
from exact_students import F64, FLOW, MIXTURE, ExactAverage, exact_module, loss_and_slope
from small_problems import mlp, ready, shift
from test_trajectory_learning import distilled, error, ring_problem, two_times  # noqa: F401  (a fixture)
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.callbacks.samples import trajectory_strips
from lightning_distill.evaluation import sample_many
from lightning_distill.evaluation.teacher import baseline_key
from lightning_distill.generation import generate
from lightning_distill.losses.flow_maps import flow_jump
from lightning_distill.losses.oftsr import alignment_loss, perturbed_source, runge_kutta_velocity, trajectory_target
from lightning_distill.methods import DMD2, OFTSR, TeacherTraining
from lightning_distill.networks.analytic import analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy
from lightning_distill.networks.second_time import add_second_time, second_time_of
from lightning_distill.networks.time_embeddings import TimeEmbedding
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import FlowMatching, VariancePreserving
from lightning_distill.trajectories import Recipe, trajectory_records


class Exact:
    """Velocity and average velocity of the Gaussian."""

    @staticmethod
    def velocity(x, t):
        return MIXTURE.velocity(x, t, FLOW)

    @staticmethod
    def average(x, t, r):
        return ExactAverage()(x, t, r).detach()


def sources(n=64, **kwargs):
    return Batch(noise=torch.randn(n, 2, generator=torch.Generator().manual_seed(2)).double(), **kwargs)


# ------------------------------------------------------------------------------------------------ formulas
@pytest.mark.parametrize(("ratio", "order"), [(None, 2), (0.5, 3), (1.0, 3)])
def test_the_exact_map_obeys_the_constraint_to_the_order_of_the_step(ratio, order):
    x, one, r = torch.randn(8, 2, dtype=F64), torch.ones(8, dtype=F64), torch.linspace(0.3, 0.9, 8, dtype=F64)
    u, errors = Exact.average(x, one, r), []
    for h in (0.04, 0.02, 0.01):
        y, later = flow_jump(x, u, one, r), r - h
        v, first = runge_kutta_velocity(Exact.velocity, y, r, later, ratio or 0.5)
        torch.testing.assert_close(first, Exact.velocity(y, r))
        target = trajectory_target(u, first if ratio is None else v, r, later)
        errors.append(float((target - Exact.average(x, one, later)).abs().max()))
    assert errors[1] / errors[2] > 0.9 * 2.0**order
    # the wrong way in time
    wrong = trajectory_target(u, -Exact.velocity(y, r), r, later)
    assert float((wrong - Exact.average(x, one, later)).abs().max()) > 10 * errors[-1]


def test_second_order_steps_integrate_lines_in_time():
    x, t, r = torch.zeros(3, 1, dtype=F64), torch.full((3,), 0.9, dtype=F64), torch.full((3,), 0.4, dtype=F64)
    for ratio in (0.3, 0.5, 2 / 3, 1.0):
        v, _ = runge_kutta_velocity(lambda y, s: 3.0 * s[:, None] + 1.0, x, t, r, ratio)
        torch.testing.assert_close(v, torch.full((3, 1), 3.0 * 0.65 + 1.0, dtype=F64))


def test_targets_have_no_graph_and_the_alignment_has_one():
    u = torch.randn(4, 2, dtype=F64, requires_grad=True)
    v = torch.randn(4, 2, dtype=F64, requires_grad=True)
    r = torch.linspace(0.2, 0.8, 4, dtype=F64)
    assert not trajectory_target(u, v, r, r - 0.1).requires_grad
    loss = alignment_loss(u, v, r)
    assert float(loss.detach()) == pytest.approx(float((r[:, None] ** 2 * (u - v).detach().square()).mean()))
    assert torch.autograd.grad(loss, [u, v], allow_unused=True)[1] is None


def test_a_perturbed_source_keeps_its_scale():
    source, eps = torch.randn(50_000), torch.randn(50_000)
    assert torch.equal(perturbed_source(source, eps, 0.0), source)
    assert torch.equal(perturbed_source(source, eps, 1.0), eps)
    assert float(perturbed_source(source, eps, 0.6).std()) == pytest.approx(1.0, abs=0.02)


# ------------------------------------------------------------------------------------------------ the class
def test_the_exact_map_has_no_trajectory_loss():
    def losses(fault=0.0, **settings):
        module = exact_module(OFTSR, two_times=True, fault=fault, **settings)
        _, slope, terms = loss_and_slope(module, sources())
        return {name: float(value.detach()) for name, value in terms.losses.items()} | {"slope": slope}

    exact, fine = losses(), losses(time_step=0.025)
    assert exact["boundary"] < 1e-12
    assert exact["trajectory"] / fine["trajectory"] > 20  # sixth power of the step, away from the margins
    assert exact["trajectory"] < 1e-5
    spoilt = losses(0.1)
    assert min(spoilt["boundary"], spoilt["trajectory"]) > 100 * max(exact["boundary"], exact["trajectory"])
    assert spoilt["slope"] > 0.0
    # alignment is not zero there: trajectories are bent
    assert exact["alignment"] > 1e-4
    module = exact_module(OFTSR, two_times=True)
    assert module.weighted_sum("student", module.student_loss(sources())) < 0.02 * exact["alignment"]


def test_restoring_is_one_step_with_a_knob():
    module = exact_module(OFTSR, two_times=True)
    source = sources(8).noise
    torch.testing.assert_close(module.restore(source), MIXTURE.flow_map(source, 1.0, 0.0, FLOW), atol=1e-6, rtol=0)
    assert torch.equal(module.restore(source), module.sample(8, noise=source).to(F64))
    mean = MIXTURE.posterior_mean(source, torch.ones(8, dtype=F64), FLOW)
    torch.testing.assert_close(module.restore(source, realism=0.0), mean)
    half = torch.full((8,), 0.5, dtype=F64)
    along = Exact.average(source, torch.ones(8, dtype=F64), half)
    torch.testing.assert_close(module.restore(source, realism=0.5), source - along)
    # fidelity falls on the way to realism, since the mean has the least error
    spread = [float((module.restore(source, realism=w) - mean).square().mean()) for w in (0.0, 0.5, 1.0)]
    assert spread == sorted(spread)
    with pytest.raises(ValueError, match="realism=2"):
        module.restore(source, realism=2)


class Dropping(nn.Sequential):
    """A network with dropout, whatever the times."""

    def forward(self, x, t, r=None):
        return super().forward(x)


def test_restoring_is_without_dropout():
    network = Dropping(nn.Linear(2, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    teacher = Denoiser(network, FLOW, "flow_prediction", sigma_data=1.12)
    module = ready(OFTSR(teacher, source="gaussian", shape=[2], ema=[]))
    module.train()
    x = torch.randn(8, 2)
    assert torch.equal(module.restore(x), module.restore(x))
    torch.testing.assert_close(module.restore(x), module.sample(8, noise=x))
    assert module.student.training


class Conditional(nn.Module):
    """A network that sees the low-resolution sample beside the noisy one."""

    shape = (2,)

    def __init__(self):
        super().__init__()
        self.time_embedding = nn.Linear(1, 4)
        self.inner = nn.Linear(4, 2)

    def forward(self, x, t, low=None):
        embedded = self.time_embedding(t[:, None].to(x.dtype))
        return self.inner(torch.cat([x, low], 1)) + embedded[:, :2]


def test_the_source_may_be_a_condition():
    teacher = Denoiser(Conditional(), FLOW, "flow_prediction")
    low = torch.randn(6, 2)
    module = ready(OFTSR(teacher, student=embedded(), source="low", perturbation=0.3, ema=[]))
    noise = module.draws.normal("perturbation", (6, 2))
    torch.testing.assert_close(module.sources(Batch(cond={"low": low})), 0.91**0.5 * low + 0.3 * noise)
    shift(module.student)
    terms = module.student_loss(Batch(cond={"low": low}))
    assert all(float(value.detach()) > 0 for value in terms.losses.values())
    assert module.restore(low, {"low": low}, realism=0.7).shape == (6, 2)
    with pytest.raises(ValueError, match="begin at the condition 'low', which is missing"):
        module.student_loss(Batch(size=6))
    with pytest.raises(ValueError, match=r"which is shape \(6, 3\)"):
        module.student_loss(Batch(cond={"low": torch.randn(6, 3)}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturbation": 1.5}, "share of noise"),
        ({"margin": 0.5}, "fit between the margins"),
        ({"time_step": 0.99}, "fit between the margins"),
        ({"ratio": 0.0}, "within the step"),
        ({"sampler": "renoise"}, "choose flow_map"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        OFTSR(mlp(), **settings)


def embedded():
    class Embedded(TwoTime):
        def install(self, denoiser):
            if second_time_of(denoiser.network) is None:
                add_second_time(denoiser.network, embedding=TimeEmbedding("time_embedding"))

    return Embedded(Copy())


def halving():
    """A flow from twice a sample to the sample: v = x_src - x0 = x_src / 2, which the network is told."""
    network = Conditional()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.inner.weight[0, 2] = network.inner.weight[1, 3] = 0.5
    return Denoiser(network, FLOW, "flow_prediction")


def test_a_teacher_is_trained_between_data_and_their_sources():
    x0 = torch.randn(8, 2)
    batch = Batch(x0=x0, cond={"low": 2.0 * x0})
    module = ready(TeacherTraining(halving(), source="low", label_dropout=0.0, num_steps=4, shape=[2], ema=[]))
    assert module.student_loss(batch).losses["denoising"] < 1e-12
    noisy = ready(TeacherTraining(halving(), source="low", perturbation=0.5, label_dropout=0.0, shape=[2], ema=[]))
    assert noisy.student_loss(batch).losses["denoising"] > 0.01
    # samples begin where the training did, not at noise
    torch.testing.assert_close(module.sample(8, batch.cond), x0)
    with pytest.raises(ValueError, match=r"begin at the condition 'low', which is shape \(8, 3\)"):
        module.sample(8, {"low": torch.randn(8, 3)})
    with pytest.raises(ValueError, match="begin at the condition 'low', which is missing"):
        module.sample(8, {})
    with pytest.raises(ValueError, match="is straight, and this network works with VariancePreserving"):
        ready(TeacherTraining(mlp_of(VariancePreserving()), source="low"))
    with pytest.raises(ValueError, match="share of noise in the source"):
        TeacherTraining(halving(), source="low", perturbation=2.0)


def mlp_of(process):
    denoiser = mlp()
    return Denoiser(denoiser.network, process, "epsilon")


def test_students_of_such_a_teacher_begin_there():
    x0 = torch.randn(8, 2)
    low = {"low": 2.0 * x0}
    trained = ready(TeacherTraining(halving(), source="low", label_dropout=0.0, shape=[2], ema=[]))
    teacher = trained.student.requires_grad_(False).eval()
    module = ready(OFTSR(teacher, student=embedded(), source="low", shape=[2]))
    terms = module.student_loss(Batch(x0=x0, cond=low))
    assert max(float(value.detach()) for value in terms.losses.values()) < 1e-12
    for made in (module.sample(8, low), module.predict_step(Batch(cond=low), 0), module.restore(low["low"], low)):
        torch.testing.assert_close(made, x0)
    torch.testing.assert_close(module.sample(8, low, weights="student"), x0)
    for settings in ({"source": "low", "perturbation": 0.5}, {"source": "gaussian"}):
        with pytest.raises(ValueError, match=r"give OFTSR\(source='low', perturbation=0\)"):
            ready(OFTSR(teacher, student=embedded(), shape=[2], **settings))
    with pytest.raises(ValueError, match=r"DMD2 trains from noise; use OFTSR\(source='low'\)"):
        ready(DMD2(teacher, shape=[2]))
    facts = Recipe("pairs", (1.0, 0.5))
    with pytest.raises(ValueError, match="begin at the condition 'low', and stores"):
        trajectory_records(teacher, facts, 0, 2, (2,), {"low": torch.randn(2, 2)})


class Restoring(nn.Module):
    """A velocity that is told the picture at which it begins."""

    shape = (2,)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x, t, low=None, r=None):
        times = [t.to(x)[:, None], (t if r is None else r).to(x)[:, None]]
        return self.layer(torch.cat([x, low, *times], 1))


def test_callbacks_and_evaluation_begin_at_the_source_as_well():
    torch.manual_seed(0)
    low = 3.0 + torch.randn(4, 2)

    def conditions(network, n, first=0):
        return {"low": low[first : first + n]}

    module = ready(OFTSR(Denoiser(Restoring(), FlowMatching(), "flow_prediction"), source="low", shape=[2])).eval()
    network = module.sampling_network()
    exact = module.sample(4, {"low": low}, noise=torch.zeros(4, 2))  # a share of 0 of the noise
    made, _ = sample_many(network, 4, module.student_times, module.sampler, 0, shape=(2,), conditions=conditions)
    torch.testing.assert_close(made, exact)
    seen = []
    for role in (module.teacher, network):
        role.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    sample_many(module.teacher, 4, [1.0, 0.5], "ode", 0, shape=(2,), conditions=conditions)
    torch.testing.assert_close(seen[0], low)
    seen.clear()
    trajectory_strips(module, 2, 4, 0, None, conditions)
    torch.testing.assert_close(seen[0], low)
    with pytest.raises(ValueError, match="begin at the condition 'low', which is missing"):
        sample_many(network, 4, [1.0], "flow_map", 0, shape=(2,))
    plain = Denoiser(Restoring(), FlowMatching(), "flow_prediction")
    keys = {baseline_key("same", t, 4, 1.0, 10, 0, "", (2,)) for t in (plain, module.teacher)}
    assert len(keys) == 2  # rows from pure noise are no rows of this teacher


def test_noise_may_be_the_source():
    module = ready(OFTSR(mlp(), source="gaussian"))
    found = module.sources(Batch(size=20_000))
    assert float(found.std()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(found, module.sources(Batch(size=20_000)))


def test_bad_batches_and_teachers_are_named():
    with pytest.raises(ValueError, match=r"the batch has no Batch\(noise=...\)"):
        ready(OFTSR(mlp())).student_loss(Batch(size=4))
    process = VariancePreserving(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="use a teacher trained with FlowMatching, or BOOT"):
        exact_module(OFTSR, two_times=True, process=process)
    with pytest.raises(ValueError, match="one step from t_max"):
        exact_module(OFTSR, two_times=True).sample(3, num_steps=2, noise=torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"give sample\(noise=...\) these pictures"):
        exact_module(OFTSR, two_times=True).sample(3)


@pytest.mark.long
@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
def test_one_step_is_near_the_end_and_the_knob_moves_towards_the_mean(ring_problem):  # noqa: F811
    mixture, _, noise, ends = ring_problem
    starts = Batch(noise=torch.randn(20_000, 2, generator=torch.Generator().manual_seed(3)))
    settings = {"student": two_times(), "time_step": 0.1}
    module = distilled((mixture, starts, noise, ends), OFTSR, settings, 2e-3, updates=300, batch_size=128)
    found = error(module.restore(noise), ends)
    two = error(generate(analytic_denoiser(mixture, FlowMatching()), noise, {}, [1.0, 0.5], "ode"), ends)
    faithful = module.restore(noise, realism=0.0)
    print(f"oftsr: {found:.3f}, the teacher in two steps {two:.3f}; realism 0: {float(faithful.std()):.3f}")
    assert found < 0.5 < two
    # the mean of the ring is its centre
    assert float(faithful.std()) < 0.35 * float(module.restore(noise).std())
