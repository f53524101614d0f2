"""Inception Score: known values, and those of other packages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch_fidelity.metric_isc import isc_features_to_metric

from lightning_distill.metrics import inception_score


@pytest.mark.parametrize(("n", "splits"), [(200, 1), (200, 10), (60, 4)])
def test_the_score_is_that_of_torch_fidelity(n, splits):
    logits = 3 * torch.randn(n, 7)
    expected = isc_features_to_metric(logits, splits=splits, shuffle=False)["inception_score_mean"]
    assert 1.5 < expected < 7
    assert inception_score(logits, splits) == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`")
def test_the_score_is_that_of_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    class Logits(nn.Module):
        num_features = 7

        def forward(self, x):
            return x

    logits = 3 * torch.randn(200, 7)
    metric = InceptionScore(feature=Logits(), splits=1)
    metric.update(logits)
    assert inception_score(logits) == pytest.approx(metric.compute()[0].item(), rel=1e-5)


def test_known_values():
    certain = 1e4 * torch.eye(10)[torch.arange(100) % 10]
    assert inception_score(certain) == pytest.approx(10.0)
    assert inception_score(certain[:, :4][:40]) == pytest.approx(
        # 4 of 10 classes are named with certainty, the other 6 of 10 rows are undecided between 4
        math.exp(math.log(4) - 0.6 * math.log(4))
    )
    assert inception_score(certain[:1].repeat(50, 1)) == pytest.approx(1.0)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1.0)
    certain[certain == 0] = -math.inf
    assert inception_score(certain) == pytest.approx(10.0)


def test_sorted_samples_score_1_in_parts():
    sorted_by_class = 1e4 * torch.eye(10)[torch.arange(100) // 10]
    assert inception_score(sorted_by_class, splits=10) == pytest.approx(1.0)
    assert inception_score(sorted_by_class, splits=1) == pytest.approx(10.0)


def test_bad_input():
    with pytest.raises(ValueError, match=r"N >= splits=10, got \(4, 3\)"):
        inception_score(torch.zeros(4, 3), splits=10)
