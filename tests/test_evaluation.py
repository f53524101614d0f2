"""Sampling many, judging them, drawing them."""

import pytest
import torch
from PIL import Image

from lightning_distill.data.digits import load_digits
from lightning_distill.evaluation import evaluate_samples, sample_many
from lightning_distill.generation import default_cond, generate, index_noise
from lightning_distill.metrics.features import load_classifier
from lightning_distill.metrics.reference import load_reference
from lightning_distill.networks.specs import ZooDenoiser
from lightning_distill.plots import save_comparison, save_grid
from lightning_distill.times import few_step_times


@pytest.fixture(scope="module")
def teacher():
    return ZooDenoiser("digits").build()


@pytest.mark.parametrize(("sampler", "steps"), [("renoise", 3), ("ode", 3), ("renoise", 1)])
def test_batches_do_not_matter(teacher, sampler, steps):
    times = few_step_times(teacher.process, steps)
    whole, labels = sample_many(teacher, 45, times, sampler, seed=2)
    parts, again = sample_many(teacher, 45, times, sampler, seed=2, batch_size=13)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=0)
    assert torch.equal(labels, again)
    assert labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    other, _ = sample_many(teacher, 45, times, sampler, seed=3)
    assert (other - whole).abs().mean() > 0.1
    head, _ = sample_many(teacher, 20, times, sampler, seed=2)
    torch.testing.assert_close(head, whole[:20], atol=2e-5, rtol=0)


def test_deterministic_samplers_agree_with_generate(teacher):
    times = few_step_times(teacher.process, 4)
    images, _ = sample_many(teacher, 20, times, "ode", seed=1, guidance_scale=2.0)
    noise = index_noise(20, (1, 8, 8), 1)
    expected = generate(teacher, noise, default_cond(teacher, 20), times, "ode", guidance_scale=2.0)
    torch.testing.assert_close(images, expected.clamp(-1, 1), atol=2e-5, rtol=0)


def test_unknown_samplers(teacher):
    with pytest.raises(ValueError, match=r"unknown sampler 'eular'; choose one of .*ode"):
        sample_many(teacher, 2, [1.0], "eular", seed=0)


def test_figures_tell_data_from_noise_and_copies(teacher):
    reference, classifier = load_reference("digits"), load_classifier("digits")
    images, labels = load_digits("train")
    real = evaluate_samples(images, labels, reference, classifier)
    assert real["fd_cnn"] < 0.5
    assert real["class_accuracy"] > 0.97
    assert "nearest_ratio" not in real

    made, asked = sample_many(teacher, 500, few_step_times(teacher.process, 20), "ode", seed=0)
    noise = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    good = evaluate_samples(made, asked, reference, classifier, teacher_images=made)
    bad = evaluate_samples(noise, asked, reference, classifier, teacher_images=made)
    assert good["nearest_ratio"] == pytest.approx(1.0)
    assert bad["nearest_ratio"] > 1.2
    assert bad["fd_cnn"] > 5 * good["fd_cnn"]
    assert bad["class_accuracy"] < 0.3 < 0.95 < good["class_accuracy"]
    assert bad["recall"] < 0.2 < good["recall"]

    one_class = made[asked == 3]
    collapsed = evaluate_samples(one_class, None, reference, classifier)
    assert "class_accuracy" not in collapsed
    assert collapsed["recall"] < good["recall"] / 2
    assert collapsed["precision"] > 0.5


def test_pictures(tmp_path):
    images = torch.linspace(-1, 1, 12 * 3 * 8 * 8).reshape(12, 3, 8, 8)
    save_grid(images, tmp_path / "grid.png", columns=4, scale=2)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (4 * 18 + 2, 3 * 18 + 2)  # 16 pixels and 2 of padding each
        assert max(picture.getpixel((4 * 18 - 2, 3 * 18 - 2))) > 250
        assert max(picture.getpixel((2, 2))) < 20
    save_comparison({"left": images, "right": -images}, tmp_path / "two.png", columns=4)
    with Image.open(tmp_path / "two.png") as picture:
        assert picture.width > picture.height
    save_grid(torch.randn(50, 2), tmp_path / "points.png")
    save_comparison({"a": torch.randn(50, 2), "b": torch.randn(50, 2)}, tmp_path / "both.png")
    sizes = [Image.open(tmp_path / name).width for name in ("points.png", "both.png")]
    assert sizes[1] == 2 * sizes[0]
