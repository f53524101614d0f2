"""Sample metrics: known values, and that each one sees the fault it is there for."""

from __future__ import annotations

import math

import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from lightning_distill.data.toy import sample_toy
from lightning_distill.metrics import (
    FeatureStatistics,
    class_accuracy,
    frechet_distance,
    kernel_distance,
    load_reference,
    nearest_distances,
    nearest_reference_ratio,
    precision_recall,
    progress,
    sliced_wasserstein,
)


@pytest.fixture(scope="module")
def digits():
    return load_reference("digits")


# ------------------------------------------------------------------------------------------ precision, recall
@pytest.mark.parametrize("batch_size", [37, 10_000])
def test_precision_and_recall_are_those_of_torch_fidelity(batch_size):
    generated, real = torch.randn(150, 5) * 1.3 + 0.3, torch.randn(200, 5)
    expected = prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=False, verbose=False
    )
    found = precision_recall(generated, real, batch_size=batch_size)
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert 0.2 < found.precision < found.recall < 1.0


def test_precision_and_recall_by_hand():
    """Radii of 1 around 0, 1, 2 and of 1 around 10, 11: every ball is known."""
    real = torch.tensor([[0.0], [1.0], [2.0]])
    generated = torch.tensor([[0.5], [2.5], [10.0], [11.0]])
    found = precision_recall(generated, real, neighbours=1)
    assert found.precision == 0.5
    assert found.recall == 1.0
    found = precision_recall(torch.tensor([[0.4], [0.5], [10.0], [10.2]]), real, neighbours=1)
    assert found.recall == pytest.approx(0.0)


def test_precision_and_recall_errors():
    with pytest.raises(ValueError, match="got 3 generated and 50 real"):
        precision_recall(torch.randn(3, 2), torch.randn(50, 2))
    with pytest.raises(ValueError, match="one extractor"):
        precision_recall(torch.randn(30, 2), torch.randn(50, 3))


# ------------------------------------------------------------------------------------- which metric sees what
def test_memorised_samples_show_in_the_nearest_distance_not_in_fd(digits):
    real, held_out = digits.features["selection"], digits.features["held_out"]
    copies = real + 0.02 * torch.randn_like(real)
    fd = frechet_distance(FeatureStatistics.from_features(copies), digits.statistics["selection"])
    honest = frechet_distance(digits.statistics["held_out"], digits.statistics["selection"])
    assert fd < 0.1 * honest
    assert nearest_reference_ratio(copies, held_out, real) < 0.2
    half = real.shape[0] // 2
    assert 0.8 < nearest_reference_ratio(held_out[:half], held_out[half:], real) < 1.2
    assert nearest_reference_ratio(held_out + 2.0 * torch.randn_like(held_out), held_out, real) > 2


def test_a_dropped_class_shows_in_recall_and_fd(digits):
    real, held_out = digits.features["selection"], digits.features["held_out"]
    labels = digits.labels["held_out"]
    whole = precision_recall(held_out, real)
    dropped = held_out[labels > 3]
    found = precision_recall(dropped, real)
    assert found.recall < whole.recall - 0.25
    assert found.precision > whole.precision - 0.05
    fd = frechet_distance(FeatureStatistics.from_features(dropped), digits.statistics["selection"])
    assert fd > 3 * frechet_distance(digits.statistics["held_out"], digits.statistics["selection"])


def test_noise_shows_in_precision(digits):
    real, held_out = digits.features["selection"], digits.features["held_out"]
    noisy = held_out + 1.5 * torch.randn_like(held_out)
    assert precision_recall(noisy, real).precision < 0.5 * precision_recall(held_out, real).precision


def test_wrong_conditions_show_in_class_accuracy():
    labels = torch.arange(100) % 10
    logits = torch.eye(10)[labels] + 0.1 * torch.rand(100, 10)
    assert class_accuracy(logits, labels) == 1.0
    wrong = labels.clone()
    wrong[:7] = (wrong[:7] + 1) % 10
    assert class_accuracy(logits, wrong) == pytest.approx(0.93)
    with pytest.raises(ValueError, match=r"\(100, 10\) and \(99,\)"):
        class_accuracy(logits, labels[1:])


# -------------------------------------------------------------------------------------------------- distances
def test_sliced_wasserstein_of_a_shift_is_exact():
    """W2 of a projected shift is |theta . m|, whose mean square over the plane's directions is |m|^2 / 2."""
    x = torch.randn(500, 2)
    shift = torch.tensor([3.0, -4.0])
    assert sliced_wasserstein(x, x + shift) == pytest.approx(5 / math.sqrt(2), rel=1e-6)
    assert sliced_wasserstein(x, x[torch.randperm(500)]) == pytest.approx(0.0, abs=1e-12)
    y = torch.randn(300, 16)
    found = sliced_wasserstein(y, y + 2.0, projections=4_000)
    assert found == pytest.approx(2.0, rel=0.05)  # |m| / sqrt(d) = 2 sqrt(16) / sqrt(16)


def test_sliced_wasserstein_of_scaled_gaussians():
    """W2 between N(0, s^2) and N(0, r^2) on a line is |s - r|, in every direction."""
    x = torch.randn(20_000, 2)
    assert sliced_wasserstein(2.0 * x, 0.5 * x) == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize(("n", "m"), [(400, 400), (400, 1200), (1000, 370)])
def test_sliced_wasserstein_of_different_sizes(n, m):
    x, y = torch.randn(n, 2), torch.randn(m, 2)
    shift = torch.tensor([2.0, 0.0])
    floor = sliced_wasserstein(x, y)
    assert floor < 0.2
    assert sliced_wasserstein(x, y + shift) == pytest.approx(math.sqrt(2), abs=0.2)
    if m == 3 * n:
        assert sliced_wasserstein(x, x.repeat(3, 1)) < 0.05


def test_sliced_wasserstein_floor_of_ring4_and_of_a_missing_mode():
    generator = torch.Generator().manual_seed(0)
    (a, _), (b, labels) = (sample_toy("ring4", 4_000, generator) for _ in range(2))
    assert sliced_wasserstein(a, b) < 0.06
    assert sliced_wasserstein(a, b[labels != 0]) > 0.3


def test_sliced_wasserstein_errors():
    with pytest.raises(ValueError, match="cannot compare"):
        sliced_wasserstein(torch.randn(5, 2), torch.randn(5, 3))
    with pytest.raises(ValueError, match="NaN or inf"):
        sliced_wasserstein(torch.full((5, 2), float("nan")), torch.randn(5, 2))


def test_kernel_distance_is_unbiased_and_grows_with_a_shift():
    values = [kernel_distance(torch.randn(200, 8), torch.randn(200, 8)) for _ in range(40)]
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    assert min(values) < 0 < max(values)
    assert abs(mean) < 3 * spread / math.sqrt(len(values))
    assert kernel_distance(torch.randn(200, 8) + 1.0, torch.randn(300, 8)) > 10 * spread


def test_kernel_distance_is_the_double_sum():
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    n = 6
    own = sum(k(v[i], v[j]) for v in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    cross = sum(k(x[i], y[j]) for i in range(n) for j in range(n)) / n**2
    assert kernel_distance(x, y) == pytest.approx(own - 2 * cross, rel=1e-10)


def test_nearest_distances_are_exact_for_copies():
    reference = 1000 + torch.randn(50, 64)
    assert nearest_distances(reference[:20] + 1e-3, reference, batch_size=7) == pytest.approx(
        torch.full((20,), 8e-3), rel=0.05
    )
    with pytest.raises(ValueError, match="equal width"):
        nearest_reference_ratio(torch.randn(5, 2), torch.randn(5, 3), torch.randn(5, 2))


def test_progress():
    assert progress(42.1, 42.1, 2.1) == 0.0
    assert progress(42.1, 2.1, 2.1) == 1.0
    assert progress(42.1, 12.1, 2.1) == pytest.approx(0.75)
    assert progress(10.0, 1.0, 2.0) > 1.0
    with pytest.raises(ValueError, match="does not fall with steps"):
        progress(2.0, 1.0, 2.0)
