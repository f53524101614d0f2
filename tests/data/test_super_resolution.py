"""Degradation against Pillow's, and the pictures of another data module with their low-resolution versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_distill.batch import Batch
from lightning_distill.data import Digits, ImageFolder, SuperResolution, Toy2D
from lightning_distill.data.digits import load_digits
from lightning_distill.data.super_resolution import Degradation, degrade


def by_pillow(picture, factor):
    image = Image.fromarray(picture.numpy().astype(np.float32))
    size = (picture.shape[1], picture.shape[0])
    small = image.resize((size[0] // factor, size[1] // factor), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small.resize(size, Image.Resampling.BICUBIC)).copy())


@pytest.mark.parametrize("factor", [2, 4])
def test_it_is_pillow_s_bicubic_there_and_back(factor):
    pictures = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    made = degrade(pictures, factor)
    for i in range(2):
        for c in range(3):
            torch.testing.assert_close(made[i, c], by_pillow(pictures[i, c], factor), atol=2e-6, rtol=1e-5)


def test_it_is_linear_keeps_constants_and_loses_detail():
    a, b = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    torch.testing.assert_close(degrade(2.0 * a - b, 2), 2.0 * degrade(a, 2) - degrade(b, 2))
    torch.testing.assert_close(degrade(torch.full((1, 1, 8, 8), 0.3), 4), torch.full((1, 1, 8, 8), 0.3))
    assert degrade(a, 1) is a
    assert a.std() > 1.2 * degrade(a, 2).std() > 1.5 * degrade(a, 4).std()
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1.0
    inner = degrade(checks[None, None], 2)[..., 2:-2, 2:-2]
    assert inner.abs().max() < 0.05  # the finest pattern is gone
    assert torch.equal(Degradation(2)(a), degrade(a, 2))


def batches(data):
    data.setup("fit")
    return list(data.train_dataloader())


def test_digits_come_with_their_low_resolution():
    data = SuperResolution(Digits(), factor=4, easier=[2], batch_size=32, seed=5)
    plain = batches(Digits(batch_size=32, seed=5))
    made = batches(data)
    assert (data.sigma_data, data.mean, data.shape, data.num_classes) == (0.752, -0.39, (1, 8, 8), 10)
    assert len(made) == len(plain) == 1437 // 32
    for ours, theirs in zip(made[:3], plain[:3]):
        assert torch.equal(ours.x0, theirs.x0)
        assert torch.equal(ours.cond["class_labels"], theirs.cond["class_labels"])
        assert torch.equal(ours.cond["low"], degrade(theirs.x0, 4))
        assert torch.equal(ours.cond["low_2"], degrade(theirs.x0, 2))
        assert set(ours.cond) == {"class_labels", "low", "low_2"}
    x0 = load_digits()[0]
    errors = [(degrade(x0, k) - x0).square().mean().item() for k in (2, 4, 8)]
    assert errors == sorted(errors)
    # eight times smaller is one grey value
    assert degrade(x0, 8).flatten(1).std(1).max() < 1e-6


def test_map_style_data_sets_are_degraded_item_by_item(tmp_path):
    generator = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(tmp_path / f"{index}.png")
    settings = {"size": 8, "sigma_data": 0.58}
    data = SuperResolution(ImageFolder(str(tmp_path), **settings), factor=2, batch_size=3)
    for batch in batches(data):
        assert isinstance(batch, Batch)
        assert batch.x0.shape == (3, 3, 8, 8)
        torch.testing.assert_close(batch.cond["low"], degrade(batch.x0, 2))


def test_what_cannot_be_degraded_is_refused():
    with pytest.raises(ValueError, match=r"needs pictures \(C, H, W\), and Toy2D has \(2,\)"):
        SuperResolution(Toy2D("ring"))
    with pytest.raises(ValueError, match="factor=3: give a divisor of the pictures' height 8"):
        SuperResolution(Digits(), factor=3)
    with pytest.raises(ValueError, match="give every factor once"):
        SuperResolution(Digits(), factor=2, easier=[2])
    with pytest.raises(ValueError, match=r"degrade needs pictures"):
        degrade(torch.randn(3, 8, 8), 2)
    with pytest.raises(ValueError, match="factor=0"):
        degrade(torch.randn(1, 3, 8, 8), 0)
