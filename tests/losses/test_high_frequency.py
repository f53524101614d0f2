"""The high-pass filter against plane waves, whose frequencies are known."""

import math

import pytest
import torch

from lightning_distill.losses.high_frequency import high_frequency_distance, high_pass

F64 = torch.float64


def wave(cycles_down, cycles_right, height=12, width=16):
    rows, columns = torch.meshgrid(torch.arange(height).to(F64), torch.arange(width).to(F64), indexing="ij")
    return torch.cos(2 * math.pi * (cycles_down * rows / height + cycles_right * columns / width))[None, None]


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 3), (2, 2), (5, 7), (6, 8)])
def test_a_wave_passes_or_is_removed_by_its_frequency(down, right):
    frequency = math.hypot(down / 12, right / 16)
    x = wave(down, right)
    assert torch.allclose(high_pass(x, frequency - 1e-6), x, atol=1e-12)
    assert high_pass(x, frequency + 1e-6).abs().max() < 1e-12


def test_brightness_and_slow_changes_do_not_count():
    a = torch.randn(3, 2, 12, 16, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert high_frequency_distance(a, a + 0.7, 0.1).max() < 1e-25
    assert high_frequency_distance(a, a + wave(1, 0), 0.1).max() < 1e-25
    assert torch.allclose(high_frequency_distance(a, a + wave(5, 7), 0.1), torch.full((3,), 0.5, dtype=F64))


def test_the_filter_is_a_projection_and_keeps_odd_sizes():
    x = torch.randn(1, 1, 7, 9, generator=torch.Generator().manual_seed(0))
    once = high_pass(x, 0.2)
    assert once.shape == x.shape
    assert torch.allclose(high_pass(once, 0.2), once, atol=1e-6)
    with pytest.raises(ValueError, match="needs images"):
        high_pass(torch.randn(4, 2), 0.1)
