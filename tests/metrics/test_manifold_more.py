"""Density and coverage, and which of all metrics sees which fault."""

from __future__ import annotations

import pytest
import torch

from lightning_distill.metrics import (
    FeatureStatistics,
    density_coverage,
    duplicate_rate,
    frechet_distance,
    precision_recall,
    vendi_score,
)
from lightning_distill.metrics.manifold import distances, neighbour_distances


# ------------------------------------------------------------------------------------------------ distances
def test_distances_are_those_of_differences_and_exact_for_copies():
    a, b = torch.randn(40, 64) + 100, torch.randn(30, 64) + 100
    b[:10] = a[:10]
    expected = (a.double()[:, None] - b.double()[None]).norm(dim=-1)
    torch.testing.assert_close(distances(a, b), expected, rtol=1e-9, atol=0)
    assert (distances(a, b)[range(10), range(10)] == 0).all()
    near = a[:20] + 1e-3 * torch.randn(20, 64)
    expected = (a[:20].double() - near.double()).norm(dim=-1)
    torch.testing.assert_close(distances(a[:20], near).diagonal(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch_size", [1, 9, 1_000])
def test_neighbour_distances_leave_out_the_point_itself(batch_size):
    points = torch.tensor([[0.0], [1.0], [3.0], [3.0], [10.0]])
    assert neighbour_distances(points, 1, batch_size).tolist() == pytest.approx([1, 1, 0, 0, 7])
    assert neighbour_distances(points, 2, batch_size).tolist() == pytest.approx([3, 2, 2, 2, 7])


# ------------------------------------------------------------------------------------------- density, coverage
def test_density_and_coverage_by_hand():
    """Open balls of radius 1 around 0, 1 and 5 around 6; samples at .5 (two balls), .6 (two), 9 (one) and 20 (none)."""
    real = torch.tensor([[0.0], [1.0], [6.0]])
    found = density_coverage(torch.tensor([[0.5], [0.6], [9.0], [20.0]]), real, neighbours=1)
    assert (found.density, found.coverage) == pytest.approx((5 / 4, 1.0))
    found = density_coverage(torch.tensor([[0.5], [0.6]]), real, neighbours=1)
    assert (found.density, found.coverage) == pytest.approx((2.0, 2 / 3))


@pytest.mark.parametrize("batch_size", [11, 10_000])
def test_density_and_coverage_are_their_definitions(batch_size):
    generated, real, k = torch.randn(60, 3) * 1.5, torch.randn(80, 3), 4
    density, covered = 0, 0
    for i in range(80):
        others = sorted((real[i] - real[j]).norm().item() for j in range(80) if j != i)
        inside = sum((real[i] - g).norm().item() < others[k - 1] for g in generated)
        density += inside / (k * 60)
        covered += (inside > 0) / 80
    found = density_coverage(generated, real, k, batch_size)
    assert (found.density, found.coverage) == pytest.approx((density, covered), rel=1e-6)
    assert 0.1 < found.coverage < 0.95


def test_expected_values_for_equal_distributions():
    real, fresh = torch.randn(2_000, 5), torch.randn(2_000, 5)
    found = density_coverage(fresh, real, neighbours=5)
    assert found.density == pytest.approx(1.0, abs=0.05)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    copies = density_coverage(real[torch.randperm(2_000)], real, neighbours=5)
    assert (copies.density, copies.coverage) == pytest.approx((1.0, 1.0), abs=1e-12)


def test_one_outlier_moves_precision_but_not_density():
    real = torch.randn(500, 4)
    off = 6 + torch.randn(500, 4)
    precision, density = precision_recall(off, real).precision, density_coverage(off, real).density
    real[0] = 15.0  # its ball reaches back to the data and holds everything between
    assert precision_recall(off, real).precision > precision + 0.9
    assert density_coverage(off, real).density < density + 0.25


def test_bad_input():
    with pytest.raises(ValueError, match="one extractor for both"):
        density_coverage(torch.randn(9, 2), torch.randn(9, 3))
    with pytest.raises(ValueError, match="got 5 and 9"):
        density_coverage(torch.randn(9, 2), torch.randn(5, 2))
    with pytest.raises(ValueError, match="got 9 and 0"):
        density_coverage(torch.randn(0, 2), torch.randn(9, 2))


# ------------------------------------------------------------------------------------- which metric sees what
N = 1_000


def mixture(d, seed, classes=range(8)):
    """Samples of eight Gaussians of std 1 in d dimensions, neighbours 9 apart on a ring: (N, d)."""
    angles = torch.arange(8) * (torch.pi / 4)
    means = torch.zeros(8, d)
    means[:, 0], means[:, 1] = 12 * angles.cos(), 12 * angles.sin()
    generator = torch.Generator().manual_seed(seed)
    which = torch.tensor(list(classes)).repeat(N)[:N]  # equal shares
    return means[which] + torch.randn(N, d, generator=generator)


def figures(samples, real):
    manifold, density = precision_recall(samples, real), density_coverage(samples, real)
    statistics = [FeatureStatistics.from_features(v) for v in (samples, real)]
    return {
        "fd": frechet_distance(*statistics),
        "precision": manifold.precision,
        "recall": manifold.recall,
        "density": density.density,
        "coverage": density.coverage,
        "vendi": vendi_score(samples),
        "duplicates": duplicate_rate(samples, real),
    }


@pytest.fixture(scope="module", params=[2, 16])
def case(request):
    d = request.param
    real, honest = mixture(d, 0), mixture(d, 1)
    return d, real, honest, figures(honest, real)


def test_honest_samples_look_like_data(case):
    d, real, _, found = case
    again = figures(mixture(d, 2), real)
    for name in ("precision", "recall", "density", "coverage", "vendi"):
        assert again[name] == pytest.approx(found[name], rel=0.1), name
    assert found["coverage"] > 0.9
    assert found["duplicates"] < 0.03


def test_a_dropped_class_shows_in_fd_and_coverage(case):
    d, real, _, honest = case
    found = figures(mixture(d, 1, classes=range(7)), real)
    assert found["fd"] > 3 * honest["fd"]
    assert 7 / 8 - 0.05 < found["coverage"] <= 7 / 8 < 0.95 < honest["coverage"]
    assert found["precision"] > honest["precision"] - 0.05


def test_memorised_samples_show_in_recall_vendi_and_duplicates(case):
    d, real, _, honest = case
    few = real[:8].repeat_interleave(N // 8, dim=0)
    few = few + 1e-4 * torch.randn(few.shape, generator=torch.Generator().manual_seed(5))
    found = figures(few, real)
    assert found["recall"] < 0.05 < 0.5 < honest["recall"]
    assert found["duplicates"] > 0.95
    assert found["coverage"] < 0.3
    assert found["precision"] > 0.95  # copies look perfect to precision
    if d == 16:  # in the plane there are two directions however few samples there are
        assert found["vendi"] < 0.9 * honest["vendi"]


def test_noise_shows_in_precision_and_density(case):
    d, real, samples, honest = case
    noise = 3 * torch.randn(samples.shape, generator=torch.Generator().manual_seed(6))
    found = figures(samples + noise, real)
    assert found["precision"] < (0.1 if d == 16 else 0.85) * honest["precision"]
    assert found["density"] < (0.1 if d == 16 else 0.7) * honest["density"]
    assert found["fd"] > 3 * honest["fd"]
    assert found["duplicates"] < 0.03
