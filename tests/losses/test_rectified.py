"""Straightness, annealed noise, and Bellman knots against brute force and hand-made flows."""

from itertools import combinations, pairwise

import pytest
import torch

from lightning_distill.generation import generate
from lightning_distill.losses.rectified import (
    annealed_noise,
    annealing,
    best_knots,
    jump_costs,
    straightness,
    total_cost,
)
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.processes import FlowMatching
from lightning_distill.samplers import heun, ode, start_noise
from lightning_distill.times import UShaped

F64 = torch.float64


# ------------------------------------------------------------------------------------------------ Gaussian flow
def gaussian():
    return analytic_denoiser(GaussianMixture([[0.7]], std=0.4), FlowMatching())


def test_the_map_of_a_gaussian_flow_is_known_and_its_one_step_collapses():
    eps = torch.linspace(-2.0, 2.0, 9, dtype=F64)[:, None]
    grid = torch.linspace(1.0, 1.0 / 400, 400, dtype=F64).tolist()
    assert torch.allclose(heun(gaussian(), eps, grid, FlowMatching()), 0.7 + 0.4 * eps, atol=2e-5)
    assert torch.allclose(ode(gaussian(), eps, [1.0], FlowMatching()), torch.full_like(eps, 0.7), atol=1e-6)


def test_straightness_is_zero_for_the_reflow_of_a_gaussian_and_not_before():
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(2000, 1, generator=generator, dtype=F64)
    x0, t = 0.7 + 0.4 * eps, torch.rand(2000, generator=generator, dtype=F64)
    x = FlowMatching().add_noise(x0, eps, t)
    straight = eps - x0
    assert straightness(straight, eps, x0).max() == 0.0
    bent = gaussian()(x, t).flow_prediction
    assert straightness(bent, eps, x0).mean() > 0.05


# ------------------------------------------------------------------------------------------------ annealing
@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
def test_annealing_goes_from_one_to_exactly_zero(kind):
    shares = [annealing(k, 10, kind) for k in range(13)]
    assert shares[0] == 1.0
    assert shares[10:] == [0.0, 0.0, 0.0]
    assert all(a > b for a, b in pairwise(shares[:11]))


def test_annealed_noise_has_unit_variance_and_exact_ends():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(100_000, 1, generator=generator) for _ in range(2))
    assert annealed_noise(a, b, 0.0) is a
    assert annealed_noise(a, b, 1.0) is b
    mixed = annealed_noise(a, b, 0.6)
    assert mixed.var().item() == pytest.approx(1.0, abs=0.02)
    assert torch.corrcoef(torch.stack([mixed[:, 0], a[:, 0]]))[0, 1].item() == pytest.approx(0.8, abs=0.01)


def test_unknown_annealing_is_refused():
    with pytest.raises(ValueError, match="choose linear, cosine or exponential"):
        annealing(0, 10, "square")


# ------------------------------------------------------------------------------------------------ U-shaped times
def test_u_shaped_times_have_the_shares_of_their_law():
    u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    t = UShaped(4.0).quantile(u, FlowMatching())
    assert (t < 0.1).double().mean().item() == pytest.approx(0.1725, abs=2e-4)
    assert ((t > 0.4) & (t < 0.6)).double().mean().item() == pytest.approx(0.1133, abs=2e-4)
    assert torch.allclose(t + t.flip(0), torch.ones_like(t), atol=2e-4)
    with pytest.raises(ValueError, match="a must be positive"):
        UShaped(0.0)


# ------------------------------------------------------------------------------------------------ knots
def fine(curve, velocity, steps=24):
    """Costs of a one-dimensional trajectory given over s in [0, 1], followed as time falls from 1."""
    s = torch.linspace(0.0, 1.0, steps + 1, dtype=F64)
    return jump_costs(curve(s)[:, None, None], -velocity(s[:-1])[:, None, None], 1.0 - s)


@pytest.mark.parametrize(
    ("curve", "velocity", "expected"),
    [
        (lambda s: s**2, lambda s: 2 * s, [0, 6, 12, 18, 24]),
        (
            lambda s: (1 + 5 / 24) ** (24 * s),
            lambda s: 5 * (1 + 5 / 24) ** (24 * s),
            [0, 12, 17, 21, 24],
        ),  # Euler's of dx/ds = 5 x
        (lambda s: 1 - torch.exp(-8 * s), lambda s: 8 * torch.exp(-8 * s), [0, 2, 5, 10, 24]),
    ],
    ids=["uniform", "late", "early"],
)
def test_knots_crowd_where_a_trajectory_bends(curve, velocity, expected):
    assert best_knots(fine(curve, velocity), 4) == expected


def test_a_straight_trajectory_costs_nothing():
    costs = fine(lambda s: 3.0 * s, lambda s: torch.full_like(s, 3.0))
    assert costs[costs.isfinite()].max() < 1e-28


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_knots_are_the_best_of_all_partitions(steps):
    costs = torch.rand(9, 9, generator=torch.Generator().manual_seed(steps), dtype=F64)
    costs[torch.tril_indices(9, 9).unbind(0)] = float("inf")
    everything = [[0, *inner, 8] for inner in combinations(range(1, 8), steps - 1)]
    found = best_knots(costs, steps)
    assert total_cost(costs, found) == pytest.approx(min(total_cost(costs, knots) for knots in everything))
    assert found in everything


def test_costs_below_the_diagonal_are_never_used():
    costs = fine(lambda s: s**2, lambda s: 2 * s)
    assert torch.equal(costs.isfinite(), torch.ones_like(costs).triu(1).bool())
    free = costs.clone()
    free[torch.tril_indices(25, 25).unbind(0)] = 0.0
    assert best_knots(free, 4) == best_knots(costs, 4)
    with pytest.raises(ValueError, match="1 to 24 jumps"):
        best_knots(costs, 25)


# ------------------------------------------------------------------------------------------------ sampler
def test_the_starting_noise_sampler_is_euler_for_one_step_and_for_straight_flows():
    eps = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    bent = gaussian()
    assert torch.equal(start_noise(bent, eps, [1.0], FlowMatching()), ode(bent, eps, [1.0], FlowMatching()))
    times = [1.0, 0.75, 0.5, 0.25]
    three = [sampler(bent, eps, times, FlowMatching()) for sampler in (start_noise, ode)]
    assert not torch.allclose(*three)

    # the line from eps to .7 + .4 eps: x0 of a point on it
    def straight(x, t):
        s = t.reshape(-1, *[1] * (x.ndim - 1))
        e = (x - (1 - s) * 0.7) / (s + (1 - s) * 0.4)
        return type(bent(x, t.expand(len(x)))).from_x0(0.7 + 0.4 * e, x, t, FlowMatching())

    for sampler in (start_noise, ode):
        assert torch.allclose(sampler(straight, eps, times, FlowMatching()), 0.7 + 0.4 * eps, atol=1e-10)
    assert generate(bent, eps.float(), {}, times, "start_noise").shape == (64, 1)
