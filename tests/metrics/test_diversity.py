"""Diversity of a set: known values, and agreement with the definitions."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_distill.metrics import duplicate_rate, pairwise_diversity, vendi_score


# ------------------------------------------------------------------------------------------------ Vendi score
@pytest.mark.parametrize(("groups", "each", "d"), [(1, 30, 8), (5, 1, 8), (4, 25, 8), (6, 3, 40)])
def test_vendi_counts_equal_groups(groups, each, d):
    """Every group has one direction and any lengths: k groups count as k, both where n > d and where n < d."""
    x = torch.eye(d)[:groups].repeat(each, 1) * (0.1 + torch.rand(groups * each, 1))
    assert vendi_score(x) == pytest.approx(groups, rel=1e-6)


def test_vendi_of_unequal_groups_is_the_entropy_of_their_shares():
    x = torch.eye(5)[torch.tensor([0] * 70 + [1] * 20 + [2] * 10)]
    expected = math.exp(-sum(p * math.log(p) for p in (0.7, 0.2, 0.1)))
    assert vendi_score(x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(40, 7), (7, 40), (12, 12)])
def test_vendi_is_that_of_the_kernel_matrix(n, d):
    x = torch.randn(n, d, dtype=torch.float64) + 0.5
    kernel = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    values = torch.linalg.eigvalsh(kernel / n)
    values = values[values > 1e-14]
    assert vendi_score(x) == pytest.approx((-(values * values.log()).sum()).exp().item(), rel=1e-8)
    assert 1.0 < vendi_score(x) < min(n, d)


# ------------------------------------------------------------------------------------------------ pairs
def test_pairwise_diversity_of_known_sets():
    same = pairwise_diversity(torch.tensor([[1000.0, 1.0, 2.0]]).repeat(30, 1))
    assert (same.cosine, same.euclidean) == pytest.approx((0.0, 0.0), abs=1e-12)
    orthogonal = pairwise_diversity(torch.eye(6))
    assert (orthogonal.cosine, orthogonal.euclidean) == pytest.approx((1.0, math.sqrt(2)), rel=1e-12)
    opposite = pairwise_diversity(torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))
    assert (opposite.cosine, opposite.euclidean) == pytest.approx((2.0, 3.0))


@pytest.mark.parametrize("batch_size", [7, 1_000])
def test_pairwise_diversity_is_the_mean_over_pairs(batch_size):
    x = torch.randn(25, 4, dtype=torch.float64) + 1
    pairs = [(x[i], x[j]) for i in range(25) for j in range(i)]
    cosine = sum(1 - torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs) / len(pairs)
    euclidean = sum((a - b).norm().item() for a, b in pairs) / len(pairs)
    found = pairwise_diversity(x, batch_size=batch_size)
    assert (found.cosine, found.euclidean) == pytest.approx((cosine, euclidean), rel=1e-10)


# ------------------------------------------------------------------------------------------------ duplicates
def test_real_data_have_the_rate_that_was_asked_for():
    real, fresh = torch.randn(1_500, 4), torch.randn(1_500, 4)
    for quantile in (0.01, 0.1):
        assert duplicate_rate(real, real, quantile) == pytest.approx(quantile, abs=2 / 1_500)
        assert duplicate_rate(fresh, real, quantile) == pytest.approx(quantile, abs=0.5 * quantile + 0.005)


def test_copies_are_counted():
    real, fresh = torch.randn(1_000, 8) + 50, torch.randn(1_000, 8) + 50
    fresh[:200] = fresh[200:400]  # 400 samples have a twin, exact or nearly so
    assert duplicate_rate(fresh, real) == pytest.approx(0.4, abs=0.02)
    assert duplicate_rate(fresh + 1e-4 * torch.randn_like(fresh), real) == pytest.approx(0.4, abs=0.02)
    assert duplicate_rate(fresh[:1].repeat(1_000, 1), real) == 1.0


def test_real_data_with_twins_leave_exact_twins_visible():
    real = torch.randn(500, 4)
    real[:20] = real[20:40]  # 8 % twins, so that the threshold at 1 % is 0
    assert duplicate_rate(torch.randn(1, 4).repeat(500, 1), real) == 1.0
    assert duplicate_rate(torch.randn(500, 4), real) == 0.0
    assert duplicate_rate(real, real) == pytest.approx(0.08)


def test_sets_of_different_sizes_are_compared_at_the_smaller_one():
    real = torch.randn(2_000, 4)
    assert duplicate_rate(torch.randn(200, 4), real, 0.1) == pytest.approx(
        duplicate_rate(torch.randn(200, 4), real[:200], 0.1), abs=0.1
    )
    # 10 of the first 400 are twins; behind them nothing is looked at
    samples = torch.arange(1_000.0)[:, None]
    samples[:5] = samples[5:10]
    samples[400:] = 0.0
    assert duplicate_rate(samples, torch.arange(400.0)[:, None] * 0.5, 0.01) == pytest.approx(10 / 400)


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vendi_score(torch.zeros(0, 3)), r"n >= 1, got \(0, 3\)"),
        (lambda: vendi_score(torch.full((4, 3), float("nan"))), r"4 of 4 feature vectors contain NaN"),
        (lambda: pairwise_diversity(torch.zeros(1, 3)), r"n >= 2, got \(1, 3\)"),
        (lambda: duplicate_rate(torch.zeros(5), torch.zeros(5, 1)), r"got \(5,\)"),
        (lambda: duplicate_rate(torch.zeros(5, 2), torch.zeros(5, 3)), r"\(5, 2\) and \(5, 3\)"),
        (lambda: duplicate_rate(torch.zeros(5, 2), torch.zeros(5, 2), 1.5), r"quantile=1\.5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
