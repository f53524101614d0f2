"""The data sets: contents, scaling, and what they say about missing or broken files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_text
import torch
import yaml
from emoji_package import package
from jsonargparse import ArgumentParser
from PIL import Image
from safetensors.torch import save_file

from lightning_distill.batch import Batch
from lightning_distill.data import (
    Digits,
    DistillationDataModule,
    FashionMNIST,
    ImageFolder,
    InMemory,
    Pairs,
    Prior,
    Toy2D,
    check_scaling,
)
from lightning_distill.data.digits import load_digits
from lightning_distill.data.fashion import DATA_VARIABLE, load_fashion
from lightning_distill.data.idx import read_idx
from lightning_distill.data.store import StoreWriter
from lightning_distill.data.toy import TOYS, sample_toy


def batches(data: DistillationDataModule) -> list[Batch]:
    data.setup("fit")
    return list(data.train_dataloader())


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion_files(tmp_path):
    """A small stand-in with the scale of Fashion-MNIST: 40 pictures, class = index % 10."""
    rng = np.random.default_rng(0)
    images = (rng.random((40, 28, 28)) < 0.396).astype(np.uint8) * 184
    images[:, 0, 0] = np.arange(40)
    labels = (np.arange(40) % 10).astype(np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path, images


# ---------------------------------------------------------------------------------------------------- scaling
def test_scaling_measures_std_about_the_mean_of_each_channel():
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(64, 3, 16, 16, generator=generator) + torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    scaling = check_scaling(x0, 0.5)
    assert scaling.std == pytest.approx(0.5, rel=0.01)
    assert scaling.mean.tolist() == pytest.approx([1.0, 2.0, 3.0], abs=0.02)


@pytest.mark.parametrize("factor", [0.7, 1.3, 127.5])
def test_scaling_refuses_a_wrong_std_and_names_both_figures(factor):
    x0 = 0.5 * factor * torch.randn(64, 1, 16, 16)
    with pytest.raises(ValueError, match=r"standard deviation of .* sigma_data=0.5 is declared"):
        check_scaling(x0, 0.5)


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_scaling_accepts_small_deviations(factor):
    check_scaling(0.5 * factor * torch.randn(64, 1, 16, 16), 0.5)


def test_scaling_refuses_a_wrong_mean():
    with pytest.raises(ValueError, match="per-channel means"):
        check_scaling(torch.randn(256, 3, 8, 8) + 0.5, 1.0, mean=0.0)
    check_scaling(torch.randn(256, 3, 8, 8) + 0.1, 1.0, mean=0.0)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_scaling_of_few_samples_is_not_held_against_them(n):
    for seed in range(200):
        points, _ = sample_toy("ring", n, torch.Generator().manual_seed(seed))
        check_scaling(points, TOYS["ring"][2], mean=0.0)
    if n > 1:
        with pytest.raises(ValueError, match="standard deviation"):
            check_scaling(100 * points, TOYS["ring"][2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scaling_refuses_values_that_are_not_finite(value):
    x0 = torch.randn(10, 1, 4, 4)
    x0[3, 0, 1, 1] = x0[3, 0, 2, 1] = x0[7, 0, 0, 0] = value
    with pytest.raises(ValueError, match="2 of 10 samples contain NaN or inf"):
        check_scaling(x0, 1.0)


class Broken(DistillationDataModule):
    shape = (3,)
    num_classes = None
    sigma_data = 1.0

    def make_source(self):
        return InMemory(Batch(x0=5.0 * torch.randn(100, self.width)))


@pytest.mark.parametrize(
    ("width", "message"), [(3, "Broken has a standard deviation of"), (2, r"shape \(3,\), but has \(2,\)")]
)
def test_setup_refuses_data_that_are_not_as_declared(width, message):
    data = Broken()
    data.width = width
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


# ----------------------------------------------------------------------------------------------------- digits
def test_digits_have_a_fixed_split_and_their_declared_scale():
    train, test, everything = (load_digits(split) for split in ("train", "test", "all"))
    assert (len(train[0]), len(test[0]), len(everything[0])) == (1437, 360, 1797)
    assert torch.equal(torch.cat([train[0], test[0]]), everything[0])
    assert torch.equal(torch.cat([train[1], test[1]]), everything[1])
    assert torch.equal(load_digits("test")[0], test[0])
    assert (everything[0].min(), everything[0].max()) == (-1.0, 1.0)
    assert test[1].bincount(minlength=10).min() > 20
    got = batches(Digits(batch_size=32))
    assert len(got) == 1437 // 32
    assert got[0].x0.shape == (32, 1, 8, 8)
    scaling = Digits().check(1437)
    assert scaling.std == pytest.approx(Digits.sigma_data, rel=0.01)
    assert scaling.mean.item() == pytest.approx(Digits.mean, abs=0.01)


# ---------------------------------------------------------------------------------------------------- fashion
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("by_variable", [False, True])
def test_fashion_reads_plain_and_gzipped_files_from_every_layout(fashion_files, monkeypatch, folder, by_variable):
    root, images = fashion_files
    target = root / folder
    target.mkdir(parents=True, exist_ok=True)
    for file in list(root.glob("train-*")):
        file.rename(target / file.name)
    if by_variable:
        monkeypatch.setenv(DATA_VARIABLE, str(root))
    data = FashionMNIST(root=None if by_variable else str(root), batch_size=8)
    got = batches(data)
    assert len(got) == 5
    for batch in got:
        assert batch.x0.shape == (8, 1, 32, 32)
        assert batch.x0.dtype == torch.float32
        # the first pixel holds the index of the picture, from which the class and all the rest follow
        index = ((batch.x0[:, 0, 2, 2] + 1) * 127.5).round().long()
        assert torch.equal(index % 10, batch.cond["class_labels"])
        expected = torch.from_numpy(images)[index].float() / 127.5 - 1
        assert torch.equal(batch.x0[:, 0, 2:-2, 2:-2], expected)
        border = batch.x0.clone()
        border[:, :, 2:-2, 2:-2] = -1
        assert (border == -1).all()


def test_fashion_without_files_names_the_argument_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=rf"root=\.\.\.\).*{DATA_VARIABLE}"):
        FashionMNIST().setup("fit")
    with pytest.raises(FileNotFoundError, match=rf"train-images-idx3-ubyte.*root=.*{DATA_VARIABLE}.*download=True"):
        FashionMNIST(root=str(tmp_path)).setup("fit")


def test_fashion_downloads_only_on_request(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", lambda root, download: calls.append((root, download)))
    FashionMNIST(root=str(tmp_path)).prepare_data()
    assert calls == []
    FashionMNIST(root=str(tmp_path), download=True).prepare_data()
    assert calls == [(str(tmp_path), True)]


def test_fashion_refuses_files_of_different_data_sets(fashion_files):
    root, _ = fashion_files
    (root / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(39, np.uint8))))
    with pytest.raises(ValueError, match="39 labels"):
        load_fashion(root)


# -------------------------------------------------------------------------------------------------------- IDX
def test_idx_returns_what_was_written(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    (tmp_path / "a").write_bytes(idx(array))
    assert np.array_equal(read_idx(tmp_path / "a", ndim=3).numpy(), array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.gz", gzip.compress(idx(np.zeros((9, 28, 28), np.uint8)), mtime=0)[:-20], "truncated or corrupted"),
        ("noise.gz", b"this is no gzip file", "truncated or corrupted"),
        ("short", idx(np.zeros((9, 28, 28), np.uint8))[:-20], "7036 bytes of data where its header"),
        ("long", idx(np.zeros((9, 28, 28), np.uint8)) + b"\0", "7057 bytes of data where its header"),
        ("html", b"<html>not found</html>", "does not begin like an IDX file"),
        ("empty", b"", "does not begin like an IDX file"),
        ("header", bytes([0, 0, 8, 3, 0, 0]), "does not begin like an IDX file"),
        ("labels", idx(np.zeros(9, np.uint8)), "1 dimensions, expected 3"),
    ],
)
def test_idx_says_in_one_sentence_what_is_wrong_with_a_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_idx_bit_flip_in_a_gzip_file_is_seen(tmp_path):
    content = bytearray(gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8))))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or corrupted"):
        read_idx(tmp_path / "a.gz")


# -------------------------------------------------------------------------------------------------------- 2-D
@pytest.mark.parametrize("name", sorted(TOYS))
def test_toys_have_their_declared_scale_and_classes(name):
    data = Toy2D(name, samples_per_epoch=20_000, labelled=True)
    scaling = data.check(20_000)
    assert scaling.std == pytest.approx(data.sigma_data, rel=0.01)
    assert scaling.mean.abs().max() < 0.03
    points, labels = sample_toy(name, 20_000, torch.Generator().manual_seed(0))
    shares = labels.bincount(minlength=data.num_classes) / len(labels)
    assert len(shares) == data.num_classes
    assert (shares * data.num_classes - 1).abs().max() < 0.1
    # a class is one mode or one square: it is much narrower than the whole
    for label in range(data.num_classes):
        assert points[labels == label].std(dim=0).max() < 0.45


def test_checkerboard_fills_the_dark_squares_only():
    points, _ = sample_toy("checkerboard", 5_000, torch.Generator().manual_seed(0))
    square = points.floor().long() + 2
    assert ((square >= 0) & (square <= 3)).all()
    assert (square.sum(dim=1) % 2 == 0).all()
    assert len({tuple(s) for s in square.tolist()}) == 8


def test_toy_epochs_are_fresh_and_reproducible():
    data, again = Toy2D(samples_per_epoch=512), Toy2D(samples_per_epoch=512)
    loader, other = data.train_dataloader(), again.train_dataloader()
    epochs = [torch.cat([b.x0 for b in loader]) for _ in range(2)]
    assert len(torch.cat(epochs).unique(dim=0)) == 1024
    for epoch in epochs:
        assert torch.equal(torch.cat([b.x0 for b in other]), epoch)
    assert not torch.equal(
        torch.cat([b.x0 for b in Toy2D(samples_per_epoch=512, seed=1).train_dataloader()]), epochs[0]
    )


def test_toy_ranks_together_see_what_one_process_sees():
    whole = next(iter(Toy2D(batch_size=8).train_dataloader())).x0
    parts = []
    for rank in range(2):
        loader = Toy2D(batch_size=4).train_dataloader()
        loader.rank, loader.world_size = rank, 2
        parts.append(next(iter(loader)).x0)
    assert torch.equal(torch.cat(parts), whole)


def test_unknown_toy_lists_the_known_ones():
    with pytest.raises(ValueError, match="'sprial'; choose one of ring, ring4"):
        Toy2D("sprial")


# ------------------------------------------------------------------------------------------------------ prior
def test_prior_classes_are_balanced_and_permuted():
    got = batches(Prior(num_classes=10, samples_per_epoch=200, batch_size=20))
    labels = torch.cat([b.cond["class_labels"] for b in got])
    assert labels.bincount().tolist() == [20] * 10
    assert labels[:10].tolist() != list(range(10))
    assert all(b.x0 is None and b.noise is None and b.size == 20 for b in got)


def test_unconditional_prior_gives_only_a_size():
    (batch, *_) = batches(Prior(samples_per_epoch=64, batch_size=16))
    assert (batch.cond, batch.x0, batch.size) == ({}, None, 16)
    with pytest.raises(ValueError, match="num_classes=0"):
        Prior(num_classes=0)


# ------------------------------------------------------------------------------------------------------ pairs
def pairs(n=20, **changes):
    noise = torch.randn(n, 1, 4, 4)
    tensors = {"noise": noise, "x0": 0.5 * noise, "class_labels": torch.arange(n) % 5}
    return {k: v for k, v in (tensors | changes).items() if v is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pairs_stay_together(tmp_path, dtype):
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in pairs().items()}
    save_file(stored, str(tmp_path / "p.safetensors"))
    data = Pairs(str(tmp_path / "p.safetensors"), batch_size=5)
    assert (data.shape, data.num_classes) == ((1, 4, 4), 5)
    for batch in batches(data):
        assert batch.x0.dtype == batch.noise.dtype == torch.float32
        for x0, noise, label in zip(batch.x0, batch.noise, batch.cond["class_labels"]):
            row = (stored["noise"].float() == noise).flatten(1).all(dim=1).nonzero().item()
            assert torch.equal(stored["x0"][row].float(), x0)
            assert stored["class_labels"][row] == label


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0": None}, r"lacks \['x0'\].*holds \['class_labels', 'noise'\]"),
        ({"noise": torch.randn(20, 1, 4, 5)}, "must have one shape"),
        ({"noise": torch.randn(19, 1, 4, 4)}, "must have one shape"),
        ({"class_labels": torch.arange(19)}, "20 integers, one per pair"),
        ({"class_labels": torch.rand(20)}, "20 integers, one per pair"),
        ({"x0": torch.full((20, 1, 4, 4), float("nan"))}, "20 of 20 samples of x0 contain NaN"),
    ],
)
def test_broken_pairs_say_what_is_wrong(tmp_path, changes, message):
    save_file(pairs(**changes), str(tmp_path / "p.safetensors"))
    with pytest.raises(ValueError, match=message):
        Pairs(str(tmp_path / "p.safetensors"))


def test_pairs_files_that_are_missing_or_no_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"p\.safetensors does not exist; give Pairs\(path="):
        Pairs(str(tmp_path / "p.safetensors"))
    (tmp_path / "p.safetensors").write_bytes(b"12345678 no tensors here")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Pairs(str(tmp_path / "p.safetensors"))


def test_pairs_without_labels_and_with_too_many_classes(tmp_path):
    save_file(pairs(class_labels=None), str(tmp_path / "a.safetensors"))
    data = Pairs(str(tmp_path / "a.safetensors"), batch_size=4)
    assert data.num_classes is None
    assert batches(data)[0].cond == {}
    save_file(pairs(), str(tmp_path / "b.safetensors"))
    assert Pairs(str(tmp_path / "b.safetensors"), num_classes=10).num_classes == 10
    with pytest.raises(ValueError, match="holds the class 4, but num_classes=3"):
        Pairs(str(tmp_path / "b.safetensors"), num_classes=3)


# ----------------------------------------------------------------------------------------------------- folder
def picture(path, value, size=(20, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 2, (size[1], size[0], 3)) * 40 - 20 + value
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).convert(mode).save(path)


def test_image_folder_with_classes(tmp_path):
    for value in range(6):
        picture(tmp_path / ("cat" if value < 3 else "dog") / f"{value}.png", 40 * value + 20)
    data = ImageFolder(str(tmp_path), size=8, batch_size=3, sigma_data=0.55)
    assert (data.shape, data.num_classes, data.class_names) == ((3, 8, 8), 2, ["cat", "dog"])
    for batch in batches(data):
        assert batch.x0.shape == (3, 3, 8, 8)
        grey = ((batch.x0.mean(dim=(1, 2, 3)) + 1) * 127.5 - 20) / 40
        assert torch.equal((grey.round() >= 3).long(), batch.cond["class_labels"])


def test_class_folders_may_be_links(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / "all" / name / "1.png", 100)
    picture(tmp_path / "some" / "c" / "1.png", 100)
    for name in ("a", "b"):
        (tmp_path / "some" / name).symlink_to(tmp_path / "all" / name)
    (tmp_path / "some" / "c" / "back").symlink_to(tmp_path / "some")
    data = ImageFolder(str(tmp_path / "some"), size=8, batch_size=1)
    assert data.class_names == ["a", "b", "c"]
    assert data.labels == [0, 1, 2]


def test_flat_image_folder_has_no_classes(tmp_path):
    for value in range(4):
        picture(tmp_path / f"{value}.jpg", 60 * value + 30, mode="L")
    data = ImageFolder(str(tmp_path), size=12, channels=1, batch_size=2, sigma_data=0.5)
    assert data.num_classes is None
    assert [b.x0.shape for b in batches(data)] == [(2, 1, 12, 12)] * 2
    assert batches(data)[0].cond == {}


def test_image_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageFolder(str(tmp_path / "none"))
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        ImageFolder(str(tmp_path))
    picture(tmp_path / "cat" / "1.png", 100)
    picture(tmp_path / "2.png", 100)
    with pytest.raises(ValueError, match=r"1 of 2\).*move them into a class folder"):
        ImageFolder(str(tmp_path))
    (tmp_path / "2.png").unlink()
    (tmp_path / "cat" / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        ImageFolder(str(tmp_path)).setup("fit")
    with pytest.raises(ValueError, match="channels=4"):
        ImageFolder(str(tmp_path), channels=4)
    with pytest.raises(ValueError, match="size=0"):
        ImageFolder(str(tmp_path), size=0)


# ----------------------------------------------------------------------------------------- configurations
CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_configurations_build_and_take_arguments_of_the_base_class(file, tmp_path, fashion_files, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(fashion_files[0]))
    monkeypatch.chdir(tmp_path)
    save_file(pairs(), "pairs.safetensors")
    made = {"kind": "trajectories", "teacher": "", "cond": "none", "num_classes": None, "point_times": []}
    StoreWriter("trajectories", {**made, "shape": [1, 4, 4], "sigma_data": 0.5}, 20).write(
        0, {name: value for name, value in pairs().items() if name != "class_labels"}
    )
    picture(tmp_path / "images" / "1.png", 100)
    tokens = {"encoder_hidden_states": torch.randn(20, 3, 8)}
    StoreWriter("store", {}, 20).write(0, tokens)
    StoreWriter("latents", {}, 20).write(0, {**tokens, "x0": torch.randn(20, 4, 8, 8)})
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "cache"))
    package(fashion_files[0] / "package", count=8)
    tiny_text.bert(tmp_path / "text_encoder")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--data", type=DistillationDataModule)
    config = parser.parse_args([f"--config={file}", "--data.init_args.seed=7"])
    data = parser.instantiate_classes(config).data
    data.setup("fit")
    assert data.seed == 7
    assert data.train_dataloader().seed == 7
    assert len(data.train_dataloader()) >= 1
    settings = yaml.safe_load(file.read_text())["data"]["init_args"]
    assert data.batch_size == settings["batch_size"]
