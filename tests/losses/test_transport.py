"""Sinkhorn's plan: marginals, known plans, and the map between two sets."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_distill.losses.transport import barycentric_map, sinkhorn_plan, squared_distances


def sets(n=6, m=6, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, m))


def test_distances_are_those_of_pairs():
    a, b = sets(3, 5)
    want = torch.stack([torch.stack([(x - y).square().mean() for y in b]) for x in a])
    torch.testing.assert_close(squared_distances(a, b), want)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 7)])
def test_marginals_are_uniform(n, m):
    a, b = sets(n, m)
    plan = sinkhorn_plan(squared_distances(a, b), 0.1, 400)
    torch.testing.assert_close(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((m,), 1 / m, dtype=torch.float64), atol=1e-12, rtol=0)


def test_it_approaches_the_best_assignment():
    a, b = sets()
    cost = squared_distances(a, b)
    best = min(itertools.permutations(range(6)), key=lambda p: float(sum(cost[i, j] for i, j in enumerate(p))))
    plan = sinkhorn_plan(cost, 0.01, 2000)
    assert plan.argmax(1).tolist() == list(best)
    assert float((plan * cost).sum()) == pytest.approx(float(sum(cost[i, j] for i, j in enumerate(best))) / 6, rel=0.05)


def test_equal_sets_are_left_where_they_are():
    a, _ = sets()
    cost = squared_distances(a, a)
    torch.testing.assert_close(sinkhorn_plan(cost, 0.002, 500), torch.eye(6).double() / 6, atol=1e-4, rtol=0)
    torch.testing.assert_close(barycentric_map(sinkhorn_plan(cost, 0.002, 500), a), a, atol=1e-3, rtol=0)


def test_on_a_line_it_is_sorting():
    a, b = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[10.0], [30.0], [20.0]])
    moved = barycentric_map(sinkhorn_plan(squared_distances(a, b), 0.002, 3000), b)
    torch.testing.assert_close(moved, torch.tensor([[30.0], [10.0], [20.0]]), atol=0.05, rtol=0)


def test_a_large_epsilon_forgets_who_is_who():
    a, b = sets()
    plan = sinkhorn_plan(squared_distances(a, b), 1e4, 20)
    torch.testing.assert_close(plan, torch.full((6, 6), 1 / 36).double(), rtol=1e-3, atol=0)


def test_mixed_precision_changes_nothing():
    """Predictions of one prompt: a common picture, small differences, and a plan that is nearly the identity."""
    generator = torch.Generator().manual_seed(0)
    common, small = (torch.randn(n, 768, generator=generator) for n in (1, 16))
    a = common + 0.03 * small[:8]
    b = a + 0.01 * small[8:]
    plan = sinkhorn_plan(squared_distances(a, b), iterations=30)
    assert float(plan.diag().sum()) > 0.9
    with torch.autocast("cpu", torch.bfloat16):
        again = sinkhorn_plan(squared_distances(a, b), iterations=30)
        moved = barycentric_map(again, b)
    assert torch.equal(again, plan)
    assert moved.dtype == b.dtype
    assert torch.equal(moved, barycentric_map(plan, b))


def test_sets_may_come_in_groups():
    (a, b), (c, d) = sets(seed=1), sets(seed=2)
    both = sinkhorn_plan(squared_distances(torch.stack([a, c]), torch.stack([b, d])))
    torch.testing.assert_close(both[1], sinkhorn_plan(squared_distances(c, d)))
