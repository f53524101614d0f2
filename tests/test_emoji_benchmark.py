"""benchmarks/emoji.py on small stand-ins: every part runs, stops and goes on; its own arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path

import emoji
import make_tables
import pytest
import tiny_text
import torch
from emoji_package import package

from lightning_distill.networks.text_entries import TOKENS


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A command line, with the files that it names."""
    folder = tmp_path_factory.mktemp("emoji")
    package(folder / "package", count=80)
    tiny_text.bert(folder / "encoder")
    names = {"package": "package", "text-encoder": "encoder", "cache": "cache", "out": "out"}
    paths = [word for key, value in names.items() for word in (f"--{key}", str(folder / value))]
    return [*paths, "--features", "pixels8", "--columns", "3", "--smoke"]


@pytest.fixture(scope="module")
def figures(words):
    return emoji.main(words)


def option(words, name):
    return Path(words[words.index(f"--{name}") + 1])


@pytest.mark.slow
def test_everything_is_trained_and_measured(words, figures):
    rows = {(row["who"], row["nfe"]): row for row in figures["rows"]}
    assert list(rows) == [("teacher", 5), ("student", 4), ("teacher", 4), ("student", 1), ("teacher", 1)]
    assert {row["guidance"] for row in figures["rows"] if row["who"] == "teacher"} == {2.0}
    names = figures["captions"]["names"]
    assert figures["chance"] == pytest.approx(1 / names)
    assert names < figures["captions"]["held_out"] <= 24  # skin tones are not names of their own
    assert figures["frechet"] == "fd_pixels8_pca23"
    assert {stage: spent["updates"] for stage, spent in figures["training"].items()} == dict.fromkeys(emoji.STAGES, 2)
    assert all(spent["cpu_seconds"] > 0 for spent in figures["training"].values())
    out = option(words, "out")
    assert (out / "emoji.png").stat().st_size > 1000
    assert json.loads((out / "results/latest/emoji.json").read_text())["rows"] == figures["rows"]


@pytest.mark.slow
def test_what_is_trained_is_not_trained_again(words, figures, monkeypatch):
    out = option(words, "out")
    before = (out / "teacher/version_0/checkpoints/last.ckpt").stat().st_mtime_ns
    monkeypatch.setattr(emoji, "trainer_cli", lambda words: pytest.fail(f"trained {words}"))
    again = emoji.main(words)
    assert [row["kid"] for row in again["rows"]] == [row["kid"] for row in figures["rows"]]
    assert (out / "teacher/version_0/checkpoints/last.ckpt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_interrupted_stage_goes_on(words, figures):
    """The note of the stage says two updates more than its checkpoint has."""
    args = emoji.arguments(words)
    note = args.out / "teacher.json"
    done = json.loads(note.read_text())
    note.write_text(json.dumps({"updates": 4}))
    try:
        captions = [picture.caption for picture in emoji.emoji_pictures(args.package)]
        store = emoji.caption_store(captions, str(args.text_encoder), cache=args.cache)
        with pytest.warns(UserWarning, match="student_scheduler.total_steps: 2 in the checkpoint, 4 now"):
            spent = emoji.train("teacher", 0.0, args, store)
    finally:
        note.write_text(json.dumps(done))
    content = torch.load(emoji.find_checkpoint(args.out / "teacher/version_0"), weights_only=False)
    assert content["global_step"] == 4
    assert spent["cpu_seconds"] > done["cpu_seconds"]  # what the first part took is counted
    assert store.shapes[TOKENS][-1] == tiny_text.WIDTH  # and the network follows the text encoder
    weight = content["state_dict"]["student.network.down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    assert weight.shape[1] == tiny_text.WIDTH


def test_features_and_components():
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    features = emoji.PixelMeans()(images)
    assert features.shape == (5, emoji.PixelMeans.num_features)
    torch.testing.assert_close(features[2, 64 + 8 + 3], images[2, 1, 4:8, 12:16].mean())
    x = torch.randn(500, 4) * torch.tensor([1.0, 5.0, 0.1, 3.0]) + 7
    found = emoji.Components(x, 2).statistics(x)
    torch.testing.assert_close(found.mean, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-8)
    variances = torch.linalg.eigvalsh(torch.cov(x.double().T))[-2:]
    torch.testing.assert_close(found.cov.diagonal(), variances)


def test_progress_is_that_of_kid():
    rows = [
        {"who": w, "nfe": n, "kid": k} for w, n, k in [("teacher", 50, 0.1), ("teacher", 1, 0.5), ("student", 1, 0.2)]
    ]
    assert emoji.kid_progress(rows[2], rows) == pytest.approx(0.75)
    assert emoji.kid_progress(rows[0], rows) is None
    rows[1]["kid"] = 0.05  # a teacher that does not fall with steps
    assert emoji.kid_progress(rows[2], rows) is None


@pytest.mark.slow
def test_the_table_is_made_from_the_record(words, figures, monkeypatch):
    monkeypatch.setattr(make_tables, "LATEST", option(words, "out") / "results" / "latest")
    text = make_tables.emoji()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| (teacher|student)", line)]
    assert [(r[0].strip(), r[1].strip(), r[2].strip()) for r in rows] == [
        ("teacher", "5", "10"),
        ("teacher", "4", "8"),
        ("teacher", "1", "2"),
        ("student", "4", "4"),
        ("student", "1", "1"),
    ]
    by_row = {(row["who"], row["nfe"]): row for row in figures["rows"]}
    assert float(rows[3][3]) == round(by_row["student", 4]["recall"], 3)
    assert float(rows[4][4]) == round(1e3 * by_row["student", 1]["kid"], 1)
    page = make_tables.marked("a <!-- x:begin -->old<!-- x:end --> b", "x", "new")
    assert page == "a <!-- x:begin -->\nnew\n<!-- x:end --> b"
    monkeypatch.setattr(make_tables, "LATEST", Path("nowhere"))
    assert "to fill this table" in make_tables.emoji()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"npm pack emoji-datasource-google"):
        emoji.main(["--package", str(tmp_path), "--text-encoder", str(tmp_path), "--out", str(tmp_path / "out")])
    package(tmp_path / "package", count=5)
    words = ["--package", str(tmp_path / "package"), "--text-encoder", str(tmp_path / "none")]
    words += ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    with pytest.raises(FileNotFoundError, match=r"give the folder of a text model"):
        emoji.main(words)
