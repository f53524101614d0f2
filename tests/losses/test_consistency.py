"""Discrete consistency: orders of error of the pairs, distances, weights and schedules."""

import math
from itertools import pairwise

import pytest
import torch
from exact_maps import COV, F64, MEAN
from torch import nn

from lightning_distill.losses.consistency import (
    cm_ema_decay,
    cm_steps,
    consistency_loss,
    distance,
    ect_target,
    ect_time,
    huber_constant,
    ict_probabilities,
    ict_steps,
    pair_weight,
    phase_edges,
    progressive_target,
    solver_step,
)
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser, gaussian_flow_map
from lightning_distill.prediction import Prediction
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving
from lightning_distill.samplers import transport

MIXTURE = GaussianMixture(MEAN[None], covariances=COV[None])
PROCESSES = [EDM(), FlowMatching(), VariancePreserving(), TrigFlow()]
by_process = pytest.mark.parametrize("process", PROCESSES, ids=["edm", "flow", "vp", "trig"])


def consistent(x, t, process):
    return gaussian_flow_map(MEAN, COV, x, t, torch.zeros_like(t), process)


def pair(process, n=64):
    eps, x0 = torch.randn(n, 2, dtype=F64), MIXTURE.sample(n)[0].double()
    level = torch.full((n,), 0.9, dtype=F64)
    t = process.t_from_log_snr(-2 * level.log())
    return x0, eps, t


@by_process
@pytest.mark.parametrize(("solver", "ratio"), [("euler", 4.0), ("heun", 8.0), ("training", 2.0)])
def test_local_errors_of_pairs(process, solver, ratio):
    x0, eps, t = pair(process)
    x = process.add_noise(x0, eps, t)
    level = process.sigma(t) / process.alpha(t)
    errors = []
    for h in (0.04, 0.02, 0.01):
        r = process.t_from_log_snr(-2 * (level - h).log())
        if solver == "training":
            x_r = process.add_noise(x0, eps, r)
        else:
            x_r = solver_step(analytic_denoiser(MIXTURE, process), x, t, r, solver, process)
        errors.append((consistent(x, t, process) - consistent(x_r, r, process)).norm().item())
    # VP's times are rounded to nothing, but its levels between two indices are interpolated
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(ratio, rel=0.12)


@by_process
def test_pairs_of_an_exact_solver_have_no_loss(process):
    x0, eps, t = pair(process)
    x, r = process.add_noise(x0, eps, t), 0.7 * t
    x_r = gaussian_flow_map(MEAN, COV, x, t, r, process)
    loss = consistency_loss(consistent(x, t, process), consistent(x_r, r, process), pair_weight("inverse_gap", t, r))
    assert loss.item() < 1e-12


@by_process
def test_progressive_target_is_one_step_for_two(process):
    x0, eps, t = pair(process)
    x, denoise = process.add_noise(x0, eps, t), analytic_denoiser(MIXTURE, process)
    middle, r = 0.8 * t, 0.5 * t
    end = transport(denoise(transport(denoise(x, t), middle), middle), r)
    target = progressive_target(x, end, t, r, process)
    torch.testing.assert_close(transport(Prediction.from_x0(target, x, t, process), r), end, rtol=0, atol=1e-10)
    # to clean data the target is the end itself
    torch.testing.assert_close(progressive_target(x, end, t, torch.zeros_like(t), process), end)


# ------------------------------------------------------------------------------------------------ distances
def test_distances():
    a, b = torch.randn(2, 3, 4, 5, dtype=F64)
    d = (a - b).flatten(1)
    torch.testing.assert_close(distance(a, b, "l2"), d.square().sum(1))
    torch.testing.assert_close(distance(a, b, "mse"), d.square().mean(1))
    torch.testing.assert_close(distance(a, b, "l1"), d.abs().mean(1))
    c = huber_constant(20)
    assert c == pytest.approx(0.00054 * math.sqrt(20))
    assert huber_constant(3 * 32 * 32) == pytest.approx(0.03, abs=1e-4)  # the paper's value on CIFAR-10
    torch.testing.assert_close(distance(a, b), (d.square().sum(1) + c**2).sqrt() - c)
    torch.testing.assert_close(distance(a, b, c=0.5), (d.square().sum(1) + 0.25).sqrt() - 0.5)
    expected = ((d.square() + 1e-6).sqrt() - 1e-3).mean(1)
    torch.testing.assert_close(distance(a, b, "pseudo_huber_elementwise"), expected)
    torch.testing.assert_close(distance(a, b, lambda a, b: (a - b).amax((1, 2))), d.amax(1))


def test_limits_of_pseudo_huber():
    small, large = torch.full((1, 4), 1e-9), torch.full((1, 4), 1e6)
    zero = torch.zeros(1, 4)
    # d^2 / 2c, without cancellation in float32; |d| - c
    assert distance(small, zero, c=0.1).item() == pytest.approx(4e-18 / 0.2, rel=1e-5)
    assert distance(large, zero, c=0.1).item() == pytest.approx(2e6 - 0.1, rel=1e-6)
    same = zero.clone().requires_grad_()
    for metric in ("pseudo_huber", "pseudo_huber_elementwise"):
        value = distance(same, zero, metric, 0.0)
        value.sum().backward()
        assert value.item() == 0.0
        assert torch.equal(same.grad, zero)
    assert distance(large, zero, "pseudo_huber_elementwise", 0.0).item() == pytest.approx(1e6)


def test_gradient_reaches_the_online_side_only():
    net = nn.Linear(2, 2, dtype=F64)
    x = torch.randn(5, 2, dtype=F64)
    target = torch.randn(5, 2, dtype=F64, requires_grad=True)
    weight = torch.linspace(0.5, 2.0, 5)
    loss = consistency_loss(net(x), target, weight)
    loss.backward()
    assert target.grad is None
    for parameter in net.parameters():
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(flat.numel()):
            value, h, ends = flat[i].item(), 1e-6, []
            for sign in (1, -1):
                flat[i] = value + sign * h
                ends.append(consistency_loss(net(x), target, weight).item())
            flat[i] = value
            assert grad[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_weights():
    t, r = torch.tensor([2.0, 5.0]), torch.tensor([1.0, 1.0])
    assert pair_weight("one", t, r).tolist() == [1, 1]
    assert pair_weight("inverse_gap", t, r).tolist() == [1, 0.25]
    assert pair_weight("inverse_sqrt_gap", t, r).tolist() == [1, 0.5]
    edm = EDM()
    assert pair_weight("inverse_variance", t, r, edm).tolist() == pytest.approx([0.25, 0.04])
    c_out = torch.tensor([0.5 * s / math.sqrt(s**2 + 0.25) for s in (2.0, 5.0)])
    torch.testing.assert_close(pair_weight("inverse_c_out", t, r, edm).float(), 1 / c_out)
    torch.testing.assert_close(pair_weight("inverse_c_out2", t, r, edm).float(), 1 / c_out**2)
    # the same noise levels in flow matching, and pure noise, of which EDM has none
    flow, ends = FlowMatching(), torch.tensor([0.0, 0.0])
    same = pair_weight("inverse_c_out", t / (1 + t), ends, flow)
    torch.testing.assert_close(same.float(), 1 / c_out)
    assert pair_weight("inverse_c_out", torch.ones(1), torch.zeros(1), flow, 0.5).tolist() == [2.0]
    assert pair_weight("inverse_variance", torch.ones(1), torch.zeros(1), flow).tolist() == [0.0]


# ------------------------------------------------------------------------------------------------ schedules
def test_schedule_of_consistency_training():
    """s0 = 2, s1 = 150, 800,000 updates: from 2 to 151 times, mu from .9 up."""
    total = 800_000
    counts = [cm_steps(k, total) for k in range(0, total + 1, 50_000)]
    assert counts[0] == 2
    assert counts[-1] == cm_steps(2 * total, total) == 151
    assert all(a <= b for a, b in pairwise(counts))
    assert cm_steps(total // 4, total) == math.ceil(math.sqrt((151**2 - 4) / 4 + 4) - 1) + 1
    assert cm_ema_decay(2) == pytest.approx(0.9)
    assert cm_ema_decay(151) == pytest.approx(0.9 ** (2 / 151))


def test_schedule_of_improved_consistency_training():
    """s0 = 10, s1 = 1280, 400,000 updates: 11, 21, .., 1281 times, each for an eighth of the run."""
    total = 400_000
    assert [ict_steps(k * 50_000, total) for k in range(8)] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert ict_steps(49_999, total) == 11
    assert ict_steps(total, total) == 1281


def test_probabilities_of_noise_levels():
    levels = torch.logspace(-3, 2, 4001, dtype=F64)
    mass = ict_probabilities(levels)
    assert mass.sum().item() == pytest.approx(1.0)
    log = levels.log()
    middle = 0.5 * (log[1:] + log[:-1])
    mean = (mass * middle).sum()
    assert mean.item() == pytest.approx(-1.1, abs=0.05)
    assert ((mass * (middle - mean) ** 2).sum().sqrt()).item() == pytest.approx(2.0, abs=0.1)


def test_times_of_easy_consistency_tuning():
    t = torch.tensor([0.1, 1.0, math.log(7) - 1e-6, math.log(7) + 1e-3, 10.0, 80.0], dtype=F64)
    # stage 0 with q = 2: r = 0 below ln 7, where (1 + 8 sigmoid(-t)) / 2 is 1
    first = ect_time(t, 0)
    assert first[:3].tolist() == [0, 0, 0]
    assert (first[3:] > 0).all()
    stages = torch.stack([ect_time(t, s) for s in range(12)])
    assert (stages.diff(dim=0) >= 0).all()
    assert (stages < t).all()
    torch.testing.assert_close(stages[-1], t, rtol=3e-3, atol=0)
    assert ect_time(t, 0, q=256.0)[1].item() == pytest.approx(1 - (1 + 8 / (1 + math.e)) / 256)
    # where r = 0 the target is the clean sample
    f, x0 = torch.full((6, 2), float("nan")), torch.randn(6, 2)
    f[3:] = 1.0
    target = ect_target(f, x0, first)
    assert torch.equal(target[:3], x0[:3])
    assert torch.equal(target[3:], f[3:])


def test_phases():
    times = [t / 50 for t in range(50, 0, -1)]
    edges = phase_edges(times, 4)
    assert edges[0] == 1.0
    assert len(edges) == 4
    counts = [sum(low < t <= high for t in times) for high, low in pairwise([*edges, 0.0])]
    assert sorted(counts) == [12, 12, 13, 13]
    assert phase_edges(times, 1) == [1.0]
    assert phase_edges(times, 50) == times
    with pytest.raises(ValueError, match="do not fit"):
        phase_edges(times, 51)


def test_bad_input():
    a = torch.randn(2, 3)
    with pytest.raises(ValueError, match="unknown metric"):
        distance(a, a, "lpips")
    with pytest.raises(ValueError, match="one number per pair"):
        distance(a, a, lambda a, b: (a - b).mean())
    with pytest.raises(ValueError, match="unknown pair weight"):
        pair_weight("snr", a[:, 0], a[:, 1])
    with pytest.raises(ValueError, match="needs the noise process"):
        pair_weight("inverse_c_out", a[:, 0], a[:, 1])
    with pytest.raises(ValueError, match="euler or heun"):
        solver_step(analytic_denoiser(MIXTURE, EDM()), a[:, :2], torch.ones(2), torch.full((2,), 0.5), "rk4", EDM())
