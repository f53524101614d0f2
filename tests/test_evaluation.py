"""Sampling many, judging them, drawing them."""

import io

import pytest
import torch
from PIL import Image
from rich.console import Console

from lightning_distill.data.digits import load_digits
from lightning_distill.evaluation import Evaluator, sample_many
from lightning_distill.evaluation.evaluator import Features
from lightning_distill.evaluation.runner import EvaluationRunner
from lightning_distill.evaluation.table import print_table
from lightning_distill.evaluation.teacher import baseline_key, card_note, card_rows, frechet_excess
from lightning_distill.generation import default_cond, generate, index_noise
from lightning_distill.metrics.extractors import ModuleExtractor, ZooClassifier
from lightning_distill.metrics.features import load_classifier
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.reference import Reference, load_reference
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import ZooDenoiser
from lightning_distill.plots import save_comparison, save_grid
from lightning_distill.processes import FlowMatching
from lightning_distill.records import EvaluationLog, EvaluationRow
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


def test_samples_of_text_are_grouped_by_the_row_of_their_condition():
    seen = []

    class Scores:
        def score(self, images, prompts):
            seen.extend(prompts)
            return torch.tensor([float(round(x.mean().item()) == int(p)) for x, p in zip(images, prompts, strict=True)])

    which = torch.arange(100) % 7
    images = which[:, None, None, None].float().expand(-1, 1, 8, 8)
    settings = {"clip": Scores(), "perceptual": lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)), "rows": 7}
    judge = evaluator(measures=["lpips_diversity", "clip_score"], prompts=[str(i) for i in range(7)], **settings)
    assert judge.measure(judge.features(images, None)) == {"lpips_diversity": 0.0, "clip_score": 1.0}
    assert seen == [str(i) for i in which.tolist()]
    # classes beside other conditions: a row is what two samples have in common, the class what the prompt names
    seen.clear()
    assert judge.measure(judge.features(images, which // 2))["lpips_diversity"] == 0.0
    assert seen == [str(i // 2) for i in which.tolist()]
    noisy = judge.features(images + torch.arange(100)[:, None, None, None] % 2, None)
    assert judge.measure(noisy)["lpips_diversity"] == pytest.approx(1.0)
    assert len({evaluator(measures=["lpips_diversity"], rows=rows).key for rows in (None, 7, 8)}) == 3


class Decided(torch.nn.Module):
    num_features = 4

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return images.flatten(1)[:, :4]

    def classify(self, features):
        return torch.nn.functional.one_hot(torch.zeros(len(features), dtype=torch.long), self.classes).float()


def test_classes_are_judged_by_a_classifier_of_these_classes():
    images, labels = load_digits("test")
    bare = Reference({}, {}, {}, {})

    def accuracy(*extractors, labels=labels, **settings):
        references = {e.name: load_reference("digits") if e.name == "cnn" else bare for e in extractors}
        judge = Evaluator(extractors, references, ["class_accuracy"], **settings)
        return judge.measure(judge.features(images, labels)).get("class_accuracy")

    wide, own, digits = ModuleExtractor(Decided(1008), "wide"), ModuleExtractor(Decided(10)), ZooClassifier("digits")
    assert accuracy(wide) is None
    assert accuracy(own) == pytest.approx((labels == 0).double().mean().item())
    assert accuracy(wide, digits) == accuracy(digits) > 0.97
    few = labels % 5  # ten classes, of which five were asked for
    assert accuracy(own, labels=few) is None
    assert accuracy(own, labels=few, num_classes=10) == pytest.approx((few == 0).double().mean().item())
    assert accuracy(digits, labels=few) == accuracy(digits, labels=few, num_classes=10) is not None


def test_images_are_looked_at_where_features_are_computed():
    """The meta device stands for an accelerator."""
    places = []

    def look(*parts):
        places.extend((part.device.type, len(part)) for part in parts)
        return torch.zeros(len(parts[0]))

    class Scores:
        def score(self, images, prompts):
            return look(images)

    settings = {"perceptual": look, "clip": Scores(), "prompts": [""] * 10, "device": "meta"}
    judge = evaluator(measures=["lpips_diversity", "clip_score"], **settings)
    images = torch.rand(150, 1, 8, 8)
    figures = judge.measure(Features({"cnn": torch.zeros(150, 64)}, torch.arange(150) % 10, images))
    assert figures == {"lpips_diversity": 0.0, "clip_score": 0.0}
    assert {place for place, _ in places} == {"meta"}
    assert max(count for _, count in places) == 64
    assert images.device.type == "cpu"


def test_wrong_evaluators():
    with pytest.raises(ValueError, match="unknown measure 'fdd'"):
        evaluator(measures=["fdd"])
    with pytest.raises(ValueError, match="no reference for the extractor 'cnn'"):
        Evaluator([ZooClassifier("digits")], {})
    with pytest.raises(ValueError, match="two extractors have the same name"):
        Evaluator([ZooClassifier("digits")] * 2, {"cnn": load_reference("digits")})


# ------------------------------------------------------------------------------------------------ the teacher's card
def test_a_card_serves_its_own_samples_and_what_they_hardly_move(teacher):
    held_out, selection = evaluator(), evaluator()
    selection.half = "selection"
    card = card_rows(teacher, held_out, 5000, [8, 50])
    assert card_note(card, held_out, 5000, [8, 50]) == ""
    assert {row.nfe for row in card} == {1, 2, 4, 8, 50}
    # one step: a gap of 7 in FD, against which the excess of 2560 samples is small
    assert card_rows(teacher, selection, 2560, [1, 50]) == card
    note = card_note(card, selection, 2560, [1, 50])
    assert "5000 samples, held-out half" in note
    assert "2560 samples, selection half" in note
    assert "by about 0.002" in note
    # eight steps: the gap is 0.08, and the teacher itself would have progress -0.3
    assert card_rows(teacher, selection, 2560, [8, 50]) is None
    assert card_rows(teacher, selection, 5000, [8, 50]) == card
    assert card_rows(teacher, selection, 50, [1, 50]) is None
    assert card_rows(teacher, held_out, 5000, [3]) is None
    assert card_rows(teacher, held_out, 5000, [8], guidance_scale=2.0) is None


def test_a_card_does_not_serve_other_references_or_names(teacher):
    whole = load_reference("digits")
    moved = FeatureStatistics(whole.statistics["train"].mean + 0.1, whole.statistics["train"].cov, 1797)
    other = Reference({**whole.statistics, "train": moved}, whole.features, whole.labels, whole.info)
    assert card_rows(teacher, Evaluator([ZooClassifier("digits")], {"cnn": other}, half="held_out"), 5000, [8]) is None
    named = Evaluator([ZooClassifier("digits", "mine")], {"mine": whole}, half="held_out")
    assert card_rows(teacher, named, 5000, [8]) is None


@pytest.mark.parametrize("classes", [1, 4])
def test_the_excess_of_few_samples(classes):
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(classes, 6, generator=generator).double()
    scale = torch.tensor([0.2, 0.5, 1.0, 1.0, 2.0, 3.0]).double()

    def draw(n):
        labels = torch.arange(n) % classes
        return centres[labels] + scale * torch.randn(n, 6, generator=generator).double(), labels

    points, labels = draw(100_000)
    whole = FeatureStatistics.from_features(points)
    reference = Reference({"train": whole}, {"selection": points}, {"selection": labels}, {})
    measured = [frechet_distance(FeatureStatistics.from_features(draw(400)[0]), whole) for _ in range(60)]
    assert frechet_excess(reference) / 400 == pytest.approx(sum(measured) / 60, rel=0.15)
    unlabelled = Reference({"train": whole}, {"selection": points}, {}, {})
    if classes == 1:
        assert frechet_excess(unlabelled) == pytest.approx(frechet_excess(reference), rel=0.05)
    else:  # classes drawn at random move the mean, too
        assert frechet_excess(unlabelled) > 1.3 * frechet_excess(reference)


def test_the_key_of_a_teachers_row_knows_what_its_figures_depend_on(teacher, tmp_path):
    def look(a, b):
        return (a - b).abs().mean(dim=(1, 2, 3))

    class Clip:
        def __init__(self, folder):
            self.folder, self._built = folder, None

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    one, two = (Clip(str(tmp_path / name)) for name in ("one", "two"))

    def key(**settings):
        wanted = {"measures": ["fd", "clip_score", "lpips_diversity"], "prompts": ["a"], "clip": one}
        return evaluator(**{**wanted, "perceptual": look, **settings}).key

    first = key()
    assert key() == first
    assert len({first, key(prompts=["b"]), key(clip=two), key(perceptual=Clip("alex"))}) == 4
    (tmp_path / "one" / "model.safetensors").write_bytes(b"other weights")
    assert key() != first
    assert evaluator(prompts=["a"]).key == evaluator(prompts=["b"]).key  # not measured with
    keys = {baseline_key("f", teacher, 8, 1.0, 10, 0, "w", shape) for shape in ((1, 8, 8), (1, 16, 16), (3, 8, 8))}
    assert len(keys) == 3


def test_extractors_are_tried_before_sampling(teacher, monkeypatch):
    judge = Evaluator([ZooClassifier("fashion")], {"cnn": load_reference("fashion")})
    runner = EvaluationRunner(judge, 20, 0)
    monkeypatch.setattr("lightning_distill.evaluation.runner.sample_many", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=r"extractor 'cnn' cannot read samples of shape \(1, 8, 8\): this classifier"):
        runner.measure(teacher, [1.0], "ode", (1, 8, 8))


def test_few_samples_per_feature_are_told_once(teacher, monkeypatch):
    lines = []
    monkeypatch.setattr("lightning_distill.evaluation.runner.rank_zero_info", lines.append)
    judge = Evaluator([ModuleExtractor(load_classifier("digits"), "few")], {"few": load_reference("digits")}, ["fd"])
    for n in (30, 30, 640):
        EvaluationRunner(judge, n, 0).measure(teacher, [1.0], "ode", (1, 8, 8))
    (line,) = lines
    assert "30 samples are few for the 64 features of few" in line
    assert "or use 640 or more" in line


def test_the_table_marks_a_teacher_of_other_samples():
    def text(n, half):
        rows = [EvaluationRow("student", 1, {"fd_cnn": 2.0}, "student", num_samples=n, half=half)]
        card = [EvaluationRow("teacher", 1, {"fd_cnn": 3.0}, stage="card", num_samples=5000, half="held_out")]
        console = Console(width=200, record=True, file=io.StringIO())
        print_table(EvaluationLog(rows, card), console)
        return console.export_text()

    assert "*" not in text(5000, "held_out")
    assert "teacher*" in text(2560, "held_out")
    assert "* from its card, 5000 samples, held-out half; the student: 5000 samples, selection half" in text(
        5000, "selection"
    )


def test_the_table_shows_the_teacher_of_the_students_samples():
    def rows(n, role, **facts):
        return [EvaluationRow(role, k, {"fd_cnn": float(k)}, num_samples=n, **facts) for k in (1, n)]

    log = EvaluationLog(rows(60, "student", weights="ema", step=2), [*rows(50, "teacher"), *rows(60, "teacher")])
    console = Console(width=200, record=True, file=io.StringIO())
    print_table(log, console)
    text = console.export_text()
    assert text.count("teacher") == 2
    assert "50 steps" not in text
    assert "*" not in text


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
