"""References made from images or statistics, and the files they are kept in."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill.batch import Batch
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.loader import InMemory
from lightning_distill.evaluation import references
from lightning_distill.evaluation.references import reference_samples, resolve_reference
from lightning_distill.metrics import (
    FeatureStatistics,
    ModuleExtractor,
    Reference,
    ReferenceCache,
    extract,
    frechet_distance,
    load_reference,
    reference_from_images,
    statistics_reference,
)
from lightning_distill.metrics import reference as module
from lightning_distill.metrics.reference import HALVES, save_reference


class Pixels(nn.Module):
    """The pixels themselves, scaled and moved."""

    num_features = 12

    def __init__(self, scale=1.0, offset=0.0):
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, images):
        return images.flatten(1) * self.scale + self.offset


def made(n=41, **settings):
    labels = settings.pop("labels", torch.arange(n))
    extractor = ModuleExtractor(Pixels(settings.pop("scale", 1.0), settings.pop("offset", 0.0)), "pixels")
    images = torch.rand(n, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return images, reference_from_images(extractor, images, labels, **settings)


# ------------------------------------------------------------------------------------------------ from images
def test_halves_are_disjoint_and_the_statistics_are_those_of_all_images():
    images, reference = made()
    labels = torch.cat([reference.labels[half] for half in HALVES])
    assert [len(reference.features[half]) for half in HALVES] == [20, 20]
    assert len(set(labels.tolist())) == 40
    for half in HALVES:
        assert torch.equal(reference.features[half], images.flatten(1)[reference.labels[half]])
        part = FeatureStatistics.from_features(reference.features[half])
        assert torch.equal(reference.statistics[half].cov, part.cov)
    whole = FeatureStatistics.from_features(images.flatten(1))
    assert torch.equal(reference.statistics["train"].cov, whole.cov)
    assert reference.statistics["train"].n == 41
    floor = frechet_distance(*(reference.statistics[half] for half in HALVES))
    assert reference.info["fd_floors"]["selection_vs_held_out"] == pytest.approx(floor)
    assert floor > reference.info["fd_floors"]["held_out_vs_train"] > 0
    assert reference.info["extractor"] == "fd_pixels"


def test_the_split_follows_the_seed_and_no_global_generator():
    state = torch.get_rng_state()
    first, again, other = (made(seed=seed)[1].labels["selection"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first.sort().values, other.sort().values)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_limit_keeps_fewer_features_but_all_statistics():
    images, reference = made(n=41, most=7)
    assert {len(reference.features[half]) for half in HALVES} == {7}
    assert reference.statistics["train"].n == 41
    with pytest.raises(ValueError, match=r"one label per image, got \(40,\) for 41 images"):
        reference_from_images(ModuleExtractor(Pixels()), images, torch.arange(40))
    with pytest.raises(ValueError, match="two images or more, got 1"):
        reference_from_images(ModuleExtractor(Pixels()), images[:1])


# ------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ([0, 9], torch.uint8),
        ([0, 255], torch.uint8),
        ([3, 256], torch.int32),
        ([-1, 999], torch.int32),
        ([0, 2**40], torch.int64),
        ([], torch.uint8),
    ],
)
def test_labels_of_any_size_survive(tmp_path, labels, dtype):
    labels = {half: torch.tensor(labels, dtype=torch.int64) for half in HALVES}
    features = {half: torch.zeros(len(labels[half]), 3) for half in HALVES}
    save_reference(Reference({}, features, labels, {}), tmp_path)
    loaded = load_reference(tmp_path)
    with module.safe_open(str(tmp_path / "reference.safetensors"), framework="pt") as file:
        assert file.get_tensor("selection.labels").dtype == dtype
    for half in HALVES:
        assert torch.equal(loaded.labels[half], labels[half])
        assert loaded.labels[half].dtype == torch.int64
        assert torch.equal(loaded.features[half], features[half])


@pytest.mark.parametrize(
    ("scale", "offset", "narrow"),
    [(1.0, 0.0, True), (1e4, 0.0, True), (1e6, 0.0, False), (1e-7, 0.0, False), (0.01, 500.0, False)],
)
def test_features_are_stored_narrow_only_where_that_is_exact_enough(tmp_path, scale, offset, narrow):
    """Half precision overflows above 65504, knows nothing below 6e-8, and rounds 500.01 to 500."""
    _, reference = made(scale=scale, offset=offset)
    save_reference(reference, tmp_path)
    loaded = load_reference(tmp_path)
    for half in HALVES:
        spread = reference.features[half].std()
        assert torch.equal(loaded.features[half], reference.features[half]) != narrow
        assert (loaded.features[half] - reference.features[half]).abs().max() < 0.05 * spread


def test_wide_features_survive(tmp_path):
    features = {half: torch.randn(8, 2048).relu() for half in HALVES}
    save_reference(Reference({}, features, {}, {"extractor": "fid"}), tmp_path)
    loaded = load_reference(tmp_path)
    assert loaded.labels == {}
    for half in HALVES:
        torch.testing.assert_close(loaded.features[half], features[half], atol=2e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------------ statistics
def test_a_reference_of_statistics_only(tmp_path):
    features = torch.randn(50, 4)
    mean, cov = features.mean(0).double().numpy(), np.cov(features.double().numpy(), rowvar=False)
    np.savez(tmp_path / "imagenet.npz", mu=mean, sigma=cov)
    reference = statistics_reference(tmp_path / "imagenet.npz")
    assert reference.features == {}
    assert reference.labels == {}
    assert set(reference.statistics) == {"train"}
    found = frechet_distance(FeatureStatistics.from_features(features), reference.statistics["train"])
    assert found == pytest.approx(0.0, abs=1e-6)
    save_reference(reference, tmp_path)
    assert load_reference(tmp_path).features == {}
    np.savez(tmp_path / "other.npz", mu=mean)
    with pytest.raises(ValueError, match=r"other\.npz lacks \['sigma'\]"):
        statistics_reference(tmp_path / "other.npz")


# ------------------------------------------------------------------------------------------------ cache
@pytest.fixture
def builds():
    """A builder and the list of its calls."""
    calls = []

    def build():
        calls.append(1)
        return made()[1]

    return build, calls


def test_a_reference_is_made_once(tmp_path, builds):
    build, calls = builds
    first = ReferenceCache(tmp_path).get("cnn-1", build)
    second = ReferenceCache(tmp_path).get("cnn-1", build)
    assert len(calls) == 1
    assert torch.equal(first.features["selection"], second.features["selection"])  # as rounded by the file
    assert torch.equal(first.labels["held_out"], second.labels["held_out"])
    assert first.info == second.info
    ReferenceCache(tmp_path).get("cnn-2", build)
    assert len(calls) == 2
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == [f"references/cnn-{i}/reference.safetensors" for i in (1, 2)]
    extracted = extract(Pixels(), made()[0])
    torch.testing.assert_close(
        second.features["selection"], extracted[second.labels["selection"]], atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("key", ["../outside", "a/b: c", "x" * 500, ""])
def test_any_key_stays_inside_the_folder(tmp_path, builds, key):
    build, calls = builds
    cache = ReferenceCache(tmp_path / "cache")
    cache.get(key, build)
    cache.get(key, build)
    cache.get(key + "!", build)
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    assert len(list((tmp_path / "cache" / "references").iterdir())) == 2


def test_where_references_are_kept(tmp_path, monkeypatch, builds):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LIGHTNING_DISTILL_CACHE", raising=False)
    assert ReferenceCache().folder == tmp_path / "home" / ".cache" / "lightning_distill" / "references"
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "variable"))
    assert ReferenceCache().folder == tmp_path / "variable" / "references"
    assert ReferenceCache(tmp_path / "given").folder == tmp_path / "given" / "references"
    assert list(tmp_path.iterdir()) == []  # nothing is made before it is needed
    ReferenceCache().get("k", builds[0])
    assert (tmp_path / "variable" / "references" / "k" / "reference.safetensors").is_file()


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "other"])
def test_a_damaged_file_is_made_again(tmp_path, builds, damage):
    build, calls = builds
    whole = ReferenceCache(tmp_path).get("k", build)
    file = tmp_path / "references" / "k" / "reference.safetensors"
    content = file.read_bytes()
    if damage == "other":
        module.save_file({"x": torch.zeros(1)}, str(file))
    else:
        file.write_bytes({"cut": content[:-100], "garbage": b"x" * 500, "empty": b""}[damage])
    with pytest.warns(UserWarning, match=r"reference\.safetensors cannot be read .* is made again"):
        again = ReferenceCache(tmp_path).get("k", build)
    assert len(calls) == 2
    assert torch.equal(again.features["selection"], whole.features["selection"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReferenceCache(tmp_path).get("k", build)
    assert len(calls) == 2


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    _, reference = made(scale=1e6, labels=torch.arange(41) * 2**40)  # stored as they are, without conversion
    cache = ReferenceCache(tmp_path)
    found = cache.get("k", lambda: reference)
    file = tmp_path / "references" / "k" / "reference.safetensors"
    with file.open("r+b") as handle:
        handle.write(b"\0" * file.stat().st_size)
    for half in HALVES:
        assert torch.equal(found.features[half], reference.features[half])
        assert torch.equal(found.labels[half], reference.labels[half])
        assert torch.equal(found.statistics[half].cov, reference.statistics[half].cov)


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, builds, monkeypatch):
    def interrupted(tensors, path, metadata):
        Path(path).write_bytes(b"the first half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ReferenceCache(tmp_path).get("k", builds[0])
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, builds):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written .* the next run will start over"):
        reference = ReferenceCache(tmp_path / "file").get("k", builds[0])
    assert len(reference.features["selection"]) == 20


# ------------------------------------------------------------------------------------------------ of the run's data
class Sorted(DistillationDataModule):
    """Ten classes of 120 samples, stored one behind the other; sample i is i."""

    num_classes, sigma_data, shape = 10, 1.0, (3, 2, 2)

    def make_source(self):
        x0, labels = torch.arange(1200.0)[:, None, None, None].expand(-1, 3, 2, 2) / 600, torch.arange(1200) // 120
        return self.listed(x0.clone(), labels)

    def listed(self, x0, labels):
        return InMemory(Batch(x0=x0, cond={"class_labels": labels}))


class SortedItems(Sorted):
    def listed(self, x0, labels):
        return TensorDataset(x0, labels)


class Loaders(LightningDataModule):
    """The same in loaders of torch's own."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def val_dataloader(self):
        return DataLoader(SortedItems().source, batch_size=100, **self.settings)


@pytest.mark.parametrize("kind", ["batches", "items", "loader", "shuffled_loader"])
def test_a_part_of_sorted_data_has_all_classes(kind, monkeypatch):
    lines = []
    monkeypatch.setattr(references, "_say_once", lines.append)
    data = {"batches": Sorted, "items": SortedItems, "loader": Loaders}.get(kind, lambda: Loaders(shuffle=True))()
    samples, labels = reference_samples(data, 300)
    assert samples.shape == (300, 3, 2, 2)
    assert labels.unique().tolist() == list(range(10))
    assert torch.equal((samples[:, 0, 0, 0] * 600).round().long() // 120, labels)
    if kind != "shuffled_loader":
        told = f"The reference has 300 of the 1200 samples of {type(data).__name__}, drawn at random."
        assert torch.equal(reference_samples(data, 300)[0], samples)
        assert len(samples[:, 0, 0, 0].unique()) == 300
        whole, labels = reference_samples(data, 1200)
        assert torch.equal(whole[:, 0, 0, 0], torch.arange(1200.0) / 600)
        assert lines == [told, told]


def test_loaders_with_an_order_of_their_own_keep_it():
    chosen = torch.utils.data.SubsetRandomSampler(range(600, 1000))
    labels = reference_samples(Loaders(sampler=chosen), 300)[1]
    assert labels.unique().tolist() == [5, 6, 7, 8]


def test_references_of_data_know_every_sample_and_label(tmp_path):
    def change(sample=None, label=None):
        data = Sorted()
        if sample is not None:
            data.source.data.x0[sample, 0, 1] += 0.5
        if label is not None:
            data.source.data.cond["class_labels"][label] = 3
        found = resolve_reference("data", ModuleExtractor(Pixels(), "pixels"), data, cache=tmp_path)
        return found, len(list((tmp_path / "references").iterdir()))

    assert change()[1] == change()[1] == 1
    for count, changes in enumerate([{"sample": 1}, {"sample": 700}, {"label": 1}, {"label": 700}], start=2):
        assert change(**changes)[1] == count
    assert change()[1] == 5
    scaled = ModuleExtractor(Pixels(2.0), "pixels")
    moved = resolve_reference("data", scaled, Sorted(), cache=tmp_path)
    assert torch.allclose(moved.statistics["train"].mean, 2 * change()[0].statistics["train"].mean)
