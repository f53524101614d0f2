"""Brightness, contrast and colour: known values."""

from __future__ import annotations

import colorsys
from dataclasses import astuple

import pytest
import torch
from torchvision.transforms.functional import rgb_to_grayscale

from lightning_distill.metrics import ImageMoments, drift, image_moments


def flat(r, g, b, n=3):
    """Images of one colour, given in [0, 1]."""
    return (torch.tensor([r, g, b]).reshape(1, 3, 1, 1) * 2 - 1).expand(n, 3, 4, 5)


@pytest.mark.parametrize(
    ("colour", "brightness", "saturation"),
    [
        ((0.0, 0.0, 0.0), 0.0, 0.0),
        ((1.0, 1.0, 1.0), 1.0, 0.0),
        ((1.0, 0.0, 0.0), 0.299, 1.0),
        ((0.0, 0.5, 0.0), 0.2935, 1.0),
        ((0.8, 0.4, 0.4), 0.299 * 0.8 + 0.701 * 0.4, 0.5),
    ],
)
def test_flat_colours(colour, brightness, saturation):
    found = image_moments(flat(*colour))
    assert (found.brightness, found.saturation) == pytest.approx((brightness, saturation), abs=1e-6)
    assert found.contrast == pytest.approx(0.0, abs=1e-6)
    assert found.channels == pytest.approx(colour, abs=1e-6)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_the_moments_are_those_of_other_packages(batch_size):
    images = torch.rand(5, 3, 6, 7) * 2 - 1
    unit = (images + 1) / 2
    grey = rgb_to_grayscale(unit.double())
    pixels = unit.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    saturation = sum(colorsys.rgb_to_hsv(*p)[1] for p in pixels) / len(pixels)
    found = image_moments(images, batch_size)
    assert found.saturation == pytest.approx(saturation, abs=1e-6)
    assert found.brightness == pytest.approx(grey.mean().item(), abs=1e-3)  # torchvision rounds its weights
    assert found.contrast == pytest.approx(grey.flatten(1).std(dim=1, correction=0).mean().item(), abs=1e-3)
    assert found.channels == pytest.approx(unit.mean(dim=(0, 2, 3)).tolist(), abs=1e-6)


def test_contrast_is_within_pictures_and_not_between_them():
    black_and_white = torch.cat([flat(0, 0, 0), flat(1, 1, 1)])
    assert image_moments(black_and_white).contrast == pytest.approx(0.0)
    assert image_moments(black_and_white).brightness == pytest.approx(0.5)
    halves = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2).expand(4, 1, 8, 2)
    assert astuple(image_moments(halves)) == (0.5, 0.5, 0.0, (0.5,))
    assert image_moments(halves * 0.5).contrast == pytest.approx(0.25)
    assert image_moments(halves * 3.0).contrast == pytest.approx(0.5)  # cut as a saved picture is


def test_drift_says_what_changed_and_which_way():
    images = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    before = image_moments(images)
    brighter = drift(image_moments(images + 0.2), before)
    assert brighter.brightness == pytest.approx(0.1, abs=1e-6)
    assert brighter.channels == pytest.approx((0.1, 0.1, 0.1), abs=1e-6)
    assert brighter.contrast == pytest.approx(0.0, abs=1e-6)
    stronger = drift(image_moments(images * 1.5), before)
    assert stronger.contrast == pytest.approx(0.5 * before.contrast, rel=1e-4)
    assert abs(stronger.brightness) < 0.01
    assert stronger.saturation > 0.1
    redder = drift(image_moments(images + torch.tensor([0.2, 0, 0]).reshape(3, 1, 1)), before)
    assert redder.channels == pytest.approx((0.1, 0.0, 0.0), abs=1e-6)
    assert drift(before, before) == ImageMoments(0.0, 0.0, 0.0, (0.0, 0.0, 0.0))


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(3, 8, 8\)"):
        image_moments(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="NaN or inf"):
        image_moments(torch.full((1, 1, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="of 3 and of 1 channels"):
        drift(image_moments(torch.zeros(1, 3, 2, 2)), image_moments(torch.zeros(1, 1, 2, 2)))
