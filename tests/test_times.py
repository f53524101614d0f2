"""Training-time distributions against closed forms, and few-step lists against diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from jsonargparse import ArgumentParser

from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving
from lightning_distill.time_coverage import check_coverage, density_ratio
from lightning_distill.times import (
    Beta,
    Karras,
    LogitNormal,
    LogNormal,
    Shifted,
    TimeDistribution,
    Uniform,
    UniformIndex,
    few_step_times,
    t_min,
    validate_times,
)

F64 = torch.float64
PROCESSES = [
    FlowMatching(),
    VariancePreserving(),
    VariancePreserving(zero_terminal_snr=True),
    EDM(),
    TrigFlow(),
]
DISTRIBUTIONS = [
    Uniform(),
    Uniform(0.0, 1.0),
    Shifted(3.0),
    LogitNormal(),
    LogitNormal(0.5, 2.0, 0.1, 0.9),
    LogNormal(),
    LogNormal(2.0, 4.0),
    Karras(),
    UniformIndex(),
    UniformIndex(20, 979),
    Beta(2.0, 1.0),
    Beta(0.5, 0.5),
]
by_process = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "vp", "vp-ztsnr", "edm", "trig"])
U = (torch.arange(1000, dtype=F64) + 0.5) / 1000


@by_process
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_quantiles_rise_and_stay_inside(distribution, process):
    if isinstance(distribution, UniformIndex) and isinstance(process, EDM):
        with pytest.raises(ValueError, match="no meaning in EDM"):
            distribution.quantile(U, process)
        return
    # the ends too: uniform generators return 0, and rounding to float32 returns 1
    u = torch.cat([torch.tensor([0.0, 1e-12], dtype=F64), U, torch.tensor([1 - 1e-12, 1.0], dtype=F64)])
    t = distribution.quantile(u, process)
    assert t.dtype == F64
    assert t.shape == u.shape
    assert bool((t.diff() >= 0).all())
    assert 0 < t_min(process) <= t.min()
    assert t.max() <= process.t_max
    assert len(t.unique()) > 100
    assert distribution.quantile(torch.rand(2, 3), process).shape == (2, 3)


def test_uniform_takes_fractions_of_t_max():
    torch.testing.assert_close(Uniform(0.02, 0.98).quantile(U, FlowMatching()), 0.02 + 0.96 * U)
    torch.testing.assert_close(Uniform(0.5, 1.0).quantile(U, TrigFlow()), math.pi / 2 * (0.5 + 0.5 * U))


def test_shifted_follows_sd3():
    t = Shifted(3.0).quantile(U, FlowMatching())
    torch.testing.assert_close(t, 3 * U / (1 + 2 * U))


def test_logit_normal_has_its_distribution_function():
    t = LogitNormal(0.5, 2.0).quantile(U, FlowMatching())
    cdf = torch.distributions.Normal(0.5, 2.0).cdf(torch.logit(t))
    torch.testing.assert_close(cdf, U, rtol=0, atol=1e-7)
    low, high = 0.1, 0.9
    t = LogitNormal(0.5, 2.0, low, high).quantile(U, FlowMatching())
    normal = torch.distributions.Normal(torch.tensor(0.5, dtype=F64), 2.0)
    below, above = normal.cdf(torch.logit(torch.tensor([low, high], dtype=F64)))
    torch.testing.assert_close((normal.cdf(torch.logit(t)) - below) / (above - below), U, rtol=0, atol=1e-10)
    assert low < t.min() < 0.11
    assert 0.89 < t.max() < high


@by_process
def test_log_normal_means_the_same_noise_level_in_every_process(process):
    t = LogNormal(-1.2, 1.2).quantile(U, process)
    log_ratio = -0.5 * process.log_snr(t)
    z = torch.distributions.Normal(0.0, 1.0).icdf(U)
    inside = (t > t_min(process)) & (t < process.t_max)
    assert inside.sum() > 900
    torch.testing.assert_close(log_ratio[inside], (-1.2 + 1.2 * z)[inside], rtol=0, atol=1e-6)


def test_karras_levels_are_those_of_sid():
    # SiD: index .5 of the Karras grid is sigma 2.515, index .8 is 24.4
    sigma = Karras().quantile(torch.tensor([0.5, 0.8]), EDM())
    assert sigma[0].item() == pytest.approx(2.515, abs=1e-3)
    assert sigma[1].item() == pytest.approx(24.4, abs=0.05)
    assert Karras(high=0.8).quantile(torch.tensor(1.0), EDM()).item() == pytest.approx(sigma[1].item(), rel=1e-6)
    flow = Karras().quantile(torch.tensor([0.5]), FlowMatching())
    assert (flow / (1 - flow)).item() == pytest.approx(2.515, abs=1e-3)


def test_uniform_index_hits_every_index_equally():
    process = VariancePreserving()
    u = (torch.arange(9600, dtype=F64) + 0.5) / 9600
    index = process.index_from_t(UniformIndex(20, 979).quantile(u, process)).round().long()
    counts = torch.bincount(index, minlength=1000)
    assert counts[20:980].unique().tolist() == [10]
    assert counts.sum() == counts[20:980].sum()
    last = UniformIndex().quantile(torch.tensor([0.0, 1.0]), process)
    torch.testing.assert_close(last, process.t_from_index(torch.tensor([0, 999])), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("a", "b", "inverse"),
    [
        (1.0, 1.0, lambda u: u),
        (2.0, 1.0, torch.sqrt),
        (1.0, 2.0, lambda u: 1 - (1 - u).sqrt()),
        (0.5, 0.5, lambda u: (math.pi / 2 * u).sin().square()),
        (5.0, 1.0, lambda u: u**0.2),
    ],
)
def test_beta_matches_its_closed_forms(a, b, inverse):
    torch.testing.assert_close(Beta(a, b).quantile(U, FlowMatching()), inverse(U), rtol=0, atol=2e-4 if a < 1 else 1e-6)


@pytest.mark.parametrize(
    ("reference", "proposal", "expected"),
    [
        (Uniform(0.0, 1.0), Uniform(0.0, 1.0), 1.0),
        (Uniform(0.02, 0.98), Uniform(0.0, 1.0), 1 / 0.96),
        (Beta(2.0, 1.0), Uniform(0.0, 1.0), 2.0),  # density 2t
        (Shifted(3.0), Uniform(0.0, 1.0), 3.0),  # ds/dt at t = 1
        (Uniform(0.25, 0.75), Beta(2.0, 1.0), 4.0),  # 2 / (2 * .25)
        (UniformIndex(), Uniform(0.0, 1.0), 1.0),
        (Uniform(0.0, 1.0), UniformIndex(), 1.0),
    ],
)
def test_density_ratio_is_the_largest_quotient(reference, proposal, expected):
    assert density_ratio(reference, proposal, VariancePreserving()) == pytest.approx(expected, rel=0.12)


def test_critic_times_must_cover_matching_times():
    flow = FlowMatching()
    check_coverage(Uniform(0.02, 0.98), Uniform(0.0, 1.0), flow)
    check_coverage(Karras(low=0.02, high=0.98), Karras(), EDM())
    check_coverage(Uniform(0.25, 0.75), Beta(2.0, 1.0), flow, limit=5.0)
    assert density_ratio(Uniform(0.02, 0.98), Uniform(0.02, 0.9), flow) == math.inf
    with pytest.raises(ValueError, match=r"Uniform\(low=0.02, high=0.9\).*has no times.*limit 10"):
        check_coverage(Uniform(0.02, 0.98), Uniform(0.02, 0.9), flow)
    with pytest.raises(ValueError, match="4 times fewer"):
        check_coverage(Uniform(0.25, 0.75), Beta(2.0, 1.0), flow, limit=3.0)


def test_few_step_times_of_vp_are_the_schedulers():
    process = VariancePreserving()
    assert few_step_times(process, 4) == [1.0, 0.75, 0.5, 0.25]
    for n in (1, 2, 3, 4, 7, 8, 50):
        scheduler = DDIMScheduler(timestep_spacing="trailing")
        scheduler.set_timesteps(n)
        index = process.index_from_t(torch.tensor(few_step_times(process, n), dtype=F64))
        torch.testing.assert_close(index, scheduler.timesteps.double(), rtol=0, atol=1e-9)
    for n in (1, 2, 4, 8):
        scheduler = LCMScheduler(original_inference_steps=n)
        scheduler.set_timesteps(n)
        index = process.index_from_t(torch.tensor(few_step_times(process, n), dtype=F64))
        torch.testing.assert_close(index, scheduler.timesteps.double(), rtol=0, atol=1e-9)


def test_few_step_times_of_the_other_processes():
    assert few_step_times(FlowMatching(), 4) == [1.0, 0.75, 0.5, 0.25]
    assert few_step_times(FlowMatching(), 4, shift=3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5])
    # Wan: 1000, 937.5, 833.3, 625
    assert few_step_times(FlowMatching(shift=5.0), 4) == pytest.approx([1.0, 0.9375, 0.83333333, 0.625])
    assert few_step_times(FlowMatching(shift=5.0), 2, shift=1.0) == [1.0, 0.5]
    assert few_step_times(TrigFlow(), 2) == [math.pi / 2, math.pi / 4]
    assert few_step_times(EDM(), 1) == [80.0]
    # every step has its share of the way; a grid down to sigma_min would end with a step that does nothing
    assert few_step_times(EDM(), 4) == pytest.approx([80.0, 17.528, 2.5152, 0.16976], rel=1e-4)
    assert few_step_times(EDM(), 2) == pytest.approx([80.0, 2.5152], rel=1e-4)
    assert few_step_times(VariancePreserving(), 4, shift=3.0) == [1.0, 0.9, 0.75, 0.5]


def test_few_step_times_refuses_nonsense():
    with pytest.raises(ValueError, match="at least one step"):
        few_step_times(FlowMatching(), 0)
    with pytest.raises(ValueError, match="no meaning in EDM"):
        few_step_times(EDM(), 4, shift=3.0)
    with pytest.raises(ValueError, match="fall strictly"):
        few_step_times(VariancePreserving(num_train_timesteps=10), 20)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], "empty"),
        ([0.5, 1.0], "fall strictly"),
        ([1.0, 0.5, 0.5], "fall strictly"),
        ([1.0, 0.5, 0.0], r"outside \(0, 1\]"),
        ([999.0, 499.0], r"outside \(0, 1\]"),
        ([1.0, math.nan], r"outside \(0, 1\]"),
    ],
)
def test_validate_times_names_the_mistake(times, message):
    with pytest.raises(ValueError, match=message):
        validate_times(times, FlowMatching())


def test_validate_times_accepts_lists_of_every_process():
    for process in PROCESSES:
        validate_times([process.t_max, 0.3 * process.t_max], process)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(0.5, 0.5),
        lambda: Uniform(-0.1, 1.0),
        lambda: Uniform(0.0, 1000.0),
        lambda: Shifted(0.0),
        lambda: LogitNormal(std=0.0),
        lambda: LogNormal(std=-1.0),
        lambda: Karras(2.0, 1.0),
        lambda: UniformIndex(0, 1000),
        lambda: UniformIndex(5, 4),
        lambda: Beta(0.1, 1.0),
    ],
)
def test_constructors_refuse_nonsense(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Uniform", {"low": 0.1}),
        ("Shifted", {"shift": 5}),
        ("LogitNormal", {"mean": 1.0}),
        ("LogNormal", {"mean": -0.8, "std": 1.6}),
        ("Karras", {"sigma_max": 10.0}),
        ("UniformIndex", {"low": 20, "high": 979}),
        ("Beta", {"a": 2.0, "b": 1.0}),
    ],
)
def test_every_distribution_can_be_written_in_yaml(name, arguments):
    parser = ArgumentParser()
    parser.add_argument("--times", type=TimeDistribution)
    config = {"times": {"class_path": f"lightning_distill.times.{name}", "init_args": arguments}}
    built = parser.instantiate_classes(parser.parse_object(config)).times
    assert type(built).__name__ == name
    for key, value in arguments.items():
        assert getattr(built, key) == value
