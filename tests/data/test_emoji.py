"""The emoji problem on a small stand-in for the npm package."""

import pytest
import tiny_text
import torch
from emoji_package import package
from safetensors.torch import load_file

from lightning_distill.data import Emoji, StoreWriter
from lightning_distill.data.emoji import caption_store, emoji_pictures, is_held_out, load_emoji
from lightning_distill.networks.plain_text import TransformersText


@pytest.fixture
def root(tmp_path):
    return package(tmp_path / "package")


def test_names_and_skin_tones(root, tmp_path, monkeypatch):
    pictures = emoji_pictures(root)
    assert len(pictures) == 30 + 2 * 6 + 1
    captions = [p.caption for p in pictures]
    assert captions[:3] == ["red cat 0", "red cat 0, light skin tone", "red cat 0, light skin tone and dark skin tone"]
    assert captions[-1] == "apple logo new"
    assert {p.name for p in pictures[:3]} == {"red cat 0"}
    assert len(set(captions)) == len(captions)
    monkeypatch.setenv("LIGHTNING_DISTILL_DATA", str(tmp_path))
    assert emoji_pictures() == pictures  # the folder that holds the package will do


def test_parts_are_apart_and_stay_so(root):
    train, held = Emoji(str(root), held_out=0.3), Emoji(str(root), held_out=0.3, split="held_out")
    assert sorted([*train.rows.tolist(), *held.rows.tolist()]) == list(range(43))
    names = [{d.pictures[i].name for i in d.rows.tolist()} for d in (train, held)]
    assert not names[0] & names[1]  # all skin tones of an emoji are on one side
    assert len(names[1]) > 2
    wide = Emoji(str(root), held_out=0.6, split="held_out")
    assert set(held.rows.tolist()) < set(wide.rows.tolist())
    share = sum(is_held_out(f"name {i}", 0.1) for i in range(5000)) / 5000
    assert share == pytest.approx(0.1, abs=0.015)
    assert is_held_out("name 3", 0.1) == is_held_out("name 3", 0.1)


def test_pictures_are_over_white(root):
    pictures = emoji_pictures(root)
    images = load_emoji(pictures)
    assert images.shape == (43, 3, 64, 64)
    assert (images[:, :, :16] == 255).all()
    small = load_emoji(pictures, 32)
    expected = images.float().reshape(43, 3, 32, 2, 32, 2).mean(dim=(3, 5)).round()
    assert torch.equal(small, expected.to(torch.uint8))
    assert torch.equal(small[:, :, 10, 10], images[:, :, 20, 20])


def test_batches_with_embeddings(root, tmp_path):
    encoder = tiny_text.bert(tmp_path / "bert")
    settings = {"text_encoder": str(encoder), "max_length": 12, "cache": str(tmp_path / "cache"), "held_out": 0.3}
    data = Emoji(str(root), size=32, batch_size=4, **settings)
    data.prepare_data()
    data.setup("fit")
    assert data.shape == (3, 32, 32)
    text = TransformersText(encoder, max_length=12)
    source = data.source
    batch = source.gather(torch.tensor([5, 0]), 0)
    expected = text.encode([data.captions[5], data.captions[0]])
    for key in ("encoder_hidden_states", "encoder_attention_mask"):
        torch.testing.assert_close(batch.cond[key], expected[key], rtol=1e-5, atol=1e-6)
    images = load_emoji(data.pictures, 32)[data.rows]
    torch.testing.assert_close(batch.x0, images[[5, 0]].float() / 127.5 - 1)
    stored = list((tmp_path / "cache").glob("captions-*/shard_000000.safetensors"))
    assert len(stored) == 1
    before = stored[0].stat().st_mtime_ns
    held = Emoji(str(root), split="held_out", cond_keys=["pooled_projections"], **settings)
    held.prepare_data()  # the same store serves both parts
    assert stored[0].stat().st_mtime_ns == before
    assert held.source.gather(torch.arange(2), 0).cond["pooled_projections"].shape == (2, 8)
    assert next(iter(data.train_dataloader())).x0.shape == (4, 3, 32, 32)


def test_the_empty_caption_lies_beside_the_store(root, tmp_path):
    encoder = tiny_text.bert(tmp_path / "bert")
    captions = [p.caption for p in emoji_pictures(root)]
    store = caption_store(captions, str(encoder), max_length=6, cache=str(tmp_path / "cache"))
    null = load_file(store.folder / "null_cond.safetensors")
    assert set(null) == {"encoder_hidden_states", "encoder_attention_mask"}
    expected = TransformersText(encoder, max_length=6).encode([""])
    assert torch.equal(null["encoder_hidden_states"], expected["encoder_hidden_states"])
    assert null["encoder_attention_mask"].sum() < 6
    assert null["encoder_hidden_states"].shape[1:] == tuple(store.shapes["encoder_hidden_states"])


def test_without_conditions(root):
    batch = Emoji(str(root)).make_source().gather(torch.arange(3), 0)
    assert batch.cond == {}
    assert batch.x0.min() >= -1
    assert batch.x0.max() <= 1


def test_a_store_of_other_captions_is_refused(root, tmp_path):
    writer = StoreWriter(tmp_path / "s", {"what": "captions"}, 43)
    writer.write(0, {"encoder_hidden_states": torch.zeros(43, 2, 3)}, [{"prompt": "a cat"}] * 43)
    data = Emoji(str(root), store=str(tmp_path / "s"))
    with pytest.raises(ValueError, match="is not of the 43 captions of these pictures"):
        data.prepare_data()


def test_what_is_missing_is_named(root, tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_DISTILL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"npm pack emoji-datasource-google.*or through LIGHT"):
        Emoji()
    with pytest.raises(FileNotFoundError, match=r"there is no emoji.json in .*npm pack emoji-datasource-google"):
        Emoji(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="the pictures come in 64 x 64"):
        Emoji(str(root), size=48)
    with pytest.raises(ValueError, match="give a fraction between 0 and 1"):
        Emoji(str(root), held_out=0.0)
    with pytest.raises(FileNotFoundError, match=r"has no config.json; give the folder of a text model"):
        Emoji(str(root), text_encoder=str(tmp_path))
    (root / "img/google/64/3.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"the picture .*3.png cannot be read"):
        load_emoji(emoji_pictures(root))
    (root / "img/google/64/3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"3.png is missing \(1 of 43 pictures\)"):
        Emoji(str(root))
    (root / "emoji.json").write_text('[{"image": "1.png"}]')
    with pytest.raises(ValueError, match=r"emoji.json is damaged \(KeyError\('name'\)\)"):
        Emoji(str(root))
