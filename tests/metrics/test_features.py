"""The shipped classifiers, their reference features, and the zoo's paths."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_distill.data.digits import load_digits
from lightning_distill.metrics import (
    FeatureExtractor,
    FeatureStatistics,
    SmallClassifier,
    class_accuracy,
    extract,
    frechet_distance,
    load_classifier,
    load_reference,
)
from lightning_distill.metrics.features import save_classifier
from lightning_distill.metrics.reference import HALVES, Reference, save_reference
from lightning_distill.zoo import list_zoo, zoo_card, zoo_file, zoo_path


def test_the_digits_classifier_reads_unseen_digits():
    classifier = load_classifier("digits")
    images, labels = load_digits("test")
    features = extract(classifier, images, batch_size=100)
    assert features.shape == (360, 64)
    accuracy = class_accuracy(classifier.classify(features), labels)
    assert accuracy >= 0.97
    noted = json.loads((zoo_path("digits") / "classifier.json").read_text())["test_accuracy"]
    assert accuracy == pytest.approx(noted, abs=0.006)


def test_the_digits_reference_is_reproduced_from_the_pictures():
    """Weights, features and statistics in the zoo belong together."""
    reference = load_reference("digits")
    images, _ = load_digits("all")
    whole = FeatureStatistics.from_features(extract(load_classifier("digits"), images))
    assert reference.statistics["train"].n == 1797
    assert frechet_distance(whole, reference.statistics["train"]) < 1e-4
    assert torch.allclose(whole.mean, reference.statistics["train"].mean, atol=1e-4)


@pytest.mark.parametrize(("name", "n", "half", "floor"), [("digits", 1797, 899, 2.0), ("fashion", 60_000, 5_000, 0.5)])
def test_references_hold_two_disjoint_halves_and_their_floor(name, n, half, floor):
    reference = load_reference(name)
    assert reference.statistics["train"].n == n
    assert reference.statistics["train"].cov.dtype == torch.float64
    for key in HALVES:
        features = reference.features[key]
        assert features.shape == (reference.statistics[key].n, 64)
        assert half - 1 <= len(features) == len(reference.labels[key]) <= half
        # stored in half precision, computed in single
        stored = FeatureStatistics.from_features(features)
        assert frechet_distance(stored, reference.statistics[key]) < 1e-4
        assert reference.labels[key].bincount(minlength=10).min() > 0.07 * len(features)
    first, second = (reference.features[key] for key in HALVES)
    pairs = torch.cdist(first[:400], second).min(dim=1).values
    assert pairs.median() > 0.1
    found = frechet_distance(*(reference.statistics[key] for key in HALVES))
    assert found == pytest.approx(reference.info["fd_floors"]["selection_vs_held_out"], abs=1e-3)
    assert 0 < reference.info["fd_floors"]["held_out_vs_train"] < found < floor


def test_the_fashion_classifier_is_as_good_as_noted_and_small():
    folder = zoo_path("fashion")
    assert json.loads((folder / "classifier.json").read_text())["test_accuracy"] >= 0.92
    assert sum(f.stat().st_size for f in folder.iterdir() if f.stem in ("classifier", "reference")) <= 2_000_000
    classifier = load_classifier("fashion")
    reference = load_reference("fashion")
    for half in HALVES:
        # its own training pictures, read from their stored features
        assert class_accuracy(classifier.classify(reference.features[half]), reference.labels[half]) > 0.92
    assert extract(classifier, torch.zeros(3, 1, 32, 32)).shape == (3, 64)


def test_loaded_classifiers_are_frozen_extractors():
    classifier = load_classifier("fashion")
    assert isinstance(classifier, FeatureExtractor)
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())
    images = torch.rand(5, 1, 32, 32) * 2 - 1
    single = torch.cat([extract(classifier, image[None]) for image in images])
    assert torch.allclose(single, extract(classifier, images, batch_size=2), atol=1e-4)
    with pytest.raises(ValueError, match=r"shape \(1, 32, 32\), got \(3, 32, 32\)"):
        classifier(torch.zeros(2, 3, 32, 32))


def test_a_classifier_survives_saving(tmp_path):
    classifier = SmallClassifier(in_channels=3, image_size=16, num_classes=4, widths=(8, 8), strides=(2, 2))
    classifier = classifier.half().float().eval()
    save_classifier(classifier, tmp_path, test_accuracy=0.5)
    loaded = load_classifier(tmp_path)
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(loaded.logits(images), classifier.logits(images))
    assert loaded.num_classes == 4
    with pytest.raises(ValueError, match="one stride per width"):
        SmallClassifier(widths=(8, 8), strides=(2,))


def test_a_reference_survives_saving(tmp_path):
    features = {half: torch.randn(20, 4).half().float() for half in HALVES}
    labels = {half: torch.arange(20) % 3 for half in HALVES}
    statistics = {half: FeatureStatistics.from_features(features[half]) for half in HALVES}
    save_reference(Reference(statistics, features, labels, {"extractor": "fd_cnn"}), tmp_path)
    loaded = load_reference(tmp_path)
    for half in HALVES:
        assert torch.equal(loaded.features[half], features[half])
        assert torch.equal(loaded.labels[half], labels[half])
        assert torch.equal(loaded.statistics[half].cov, statistics[half].cov)
        assert loaded.statistics[half].n == 20
    assert loaded.info["extractor"] == "fd_cnn"


def test_zoo_paths_and_their_errors(tmp_path):
    assert {"digits", "fashion"} <= set(list_zoo())
    assert (zoo_path("digits") / "reference.safetensors").is_file()
    for load in (zoo_path, load_classifier, load_reference, zoo_card):
        with pytest.raises(ValueError, match=r"no entry 'fashoin'; it has .*digits.*fashion"):
            load("fashoin")
    with pytest.raises(FileNotFoundError, match=r"classifier\.safetensors does not exist; .*build_reference\.py"):
        load_classifier(tmp_path)
    (tmp_path / "card.json").write_text('{"seed": 3}')
    assert zoo_file(tmp_path, "card.json", "a test").name == "card.json"


def test_zoo_card_reads_the_card(tmp_path, monkeypatch):
    import lightning_distill.zoo as zoo

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(zoo, "_ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"card\.json does not exist"):
        zoo_card("mine")
    (tmp_path / "mine" / "card.json").write_text('{"seed": 3}')
    assert zoo_card("mine") == {"seed": 3}
