"""Sampling many, judging them, drawing them."""

import pytest
import torch
from PIL import Image

from lightning_distill.data.digits import load_digits
from lightning_distill.evaluation import Evaluator, sample_many
from lightning_distill.generation import default_cond, generate, index_noise
from lightning_distill.metrics.extractors import ZooClassifier
from lightning_distill.metrics.reference import Reference, load_reference
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import ZooDenoiser
from lightning_distill.plots import save_comparison, save_grid
from lightning_distill.processes import FlowMatching
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


def evaluator(**settings):
    return Evaluator([ZooClassifier("digits")], {"cnn": load_reference("digits")}, half="held_out", **settings)


def test_figures_tell_data_from_noise_and_copies(teacher):
    judge = evaluator(measures=["fd", "precision_recall", "class_accuracy", "nearest", "duplicates", "kid"])

    def figures(images, labels):
        return judge.measure(judge.features(images, labels))

    images, labels = load_digits("train")
    real = figures(images, labels)
    assert real["fd_cnn"] < 0.5
    assert real["class_accuracy"] > 0.97

    made, asked = sample_many(teacher, 500, few_step_times(teacher.process, 20), "ode", seed=0)
    noise = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    good, bad = figures(made, asked), figures(noise, asked)
    assert bad["nearest_cnn"] > 1.2 * good["nearest_cnn"]
    assert bad["fd_cnn"] > 5 * good["fd_cnn"]
    assert bad["kid_cnn"] > 5 * good["kid_cnn"]
    assert bad["class_accuracy"] < 0.3 < 0.95 < good["class_accuracy"]
    assert bad["recall_cnn"] < 0.2 < good["recall_cnn"]

    one_class = made[asked == 3]
    collapsed = figures(one_class, None)
    assert "class_accuracy" not in collapsed
    assert collapsed["recall_cnn"] < good["recall_cnn"] / 2
    assert collapsed["precision_cnn"] > 0.5


def test_progress_is_measured_against_the_best_teacher():
    judge = evaluator()
    teacher = [{"fd_cnn": 10.0, "nearest_cnn": 3.0}, {"fd_cnn": 1.0, "nearest_cnn": 2.0}, {"fd_cnn": 2.0}]
    found = judge.with_progress({"fd_cnn": 4.0, "nearest_cnn": 2.2}, teacher[0], teacher)
    assert found["progress_cnn"] == pytest.approx(6 / 9)
    assert found["nearest_ratio_cnn"] == pytest.approx(1.1)
    assert judge.with_progress({"fd_cnn": 4.0}, None, []) == {"fd_cnn": 4.0}


def test_a_reference_of_bare_statistics_leaves_out_what_needs_samples():
    whole = load_reference("digits")
    bare = Evaluator([ZooClassifier("digits")], {"cnn": Reference({"train": whole.statistics["train"]}, {}, {}, {})})
    figures = bare.measure(bare.features(*load_digits("test")))
    assert figures.keys() == {"fd_cnn", "vendi_cnn", "class_accuracy"}


def test_measures_of_the_images_themselves():
    class Scores:
        def score(self, images, prompts):
            return torch.tensor([float(prompt == f"class {i % 10}") for i, prompt in enumerate(prompts)])

    images, labels = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10
    judge = evaluator(
        measures=["lpips_diversity", "clip_score"],
        perceptual=lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)),
        clip=Scores(),
        prompts=[f"class {i}" for i in range(10)],
    )
    figures = judge.measure(judge.features(images, labels))
    assert figures["clip_score"] == 1.0
    assert figures["lpips_diversity"] == pytest.approx((images[:10] - images[10:]).abs().mean().item(), rel=1e-5)


def test_wrong_evaluators():
    with pytest.raises(ValueError, match="unknown measure 'fdd'"):
        evaluator(measures=["fdd"])
    with pytest.raises(ValueError, match="no reference for the extractor 'cnn'"):
        Evaluator([ZooClassifier("digits")], {})
    with pytest.raises(ValueError, match="two extractors have the same name"):
        Evaluator([ZooClassifier("digits")] * 2, {"cnn": load_reference("digits")})


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


def test_the_noise_scale_reaches_the_fresh_noise_only():
    network = Denoiser(ResidualMLP((2,), 8, 1), FlowMatching(), "flow_prediction")

    def samples(times, scale):
        return sample_many(network, 6, times, "renoise", 0, noise_scale=scale)[0]

    assert torch.equal(samples([1.0], 0.5), samples([1.0], 1.0))
    assert not torch.equal(samples([1.0, 0.5], 0.5), samples([1.0, 0.5], 1.0))
