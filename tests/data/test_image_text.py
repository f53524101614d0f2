"""Pictures with captions, from folders and from tar shards; broken ones are named."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_distill.data.image_folder import _Pictures
from lightning_distill.data.image_text import find_image_text, from_prompts, records_digest
from lightning_distill.data.prompts import Prompt


def png(seed, height=4, width=6):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue(), torch.from_numpy(pixels).permute(2, 0, 1)


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_captions_beside_pictures(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.png").write_bytes(png(1)[0])
    (tmp_path / "b.txt").write_text(" a cat \n")
    (tmp_path / "deep" / "a.png").write_bytes(png(2)[0])
    (tmp_path / "deep" / "a.json").write_text(json.dumps({"caption": "a dog", "title": "The Dog"}))
    records = find_image_text(tmp_path)
    assert [r.text for r in records] == ["a cat", "a dog"]
    assert torch.equal(records[1].image(), png(2)[1])
    assert records[0].image_size() == (4, 6)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b.png has no caption: write b.txt or b.json beside it"):
        find_image_text(tmp_path)


def test_metadata_files(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i)[0])
    (tmp_path / "metadata.csv").write_text("file_name,text,weight\n1.png,one,2\n0.png,zero,1\n")
    records = find_image_text(tmp_path)
    assert [(r.file.name, r.text, r.weight) for r in records] == [("1.png", "one", 2.0), ("0.png", "zero", 1.0)]
    assert torch.equal(records[0].image(), png(1)[1])
    (tmp_path / "metadata.csv").write_text("file_name,text\n2.png,two\n")
    with pytest.raises(FileNotFoundError, match=r"metadata.csv names the picture .*2.png, which does not exist"):
        find_image_text(tmp_path)
    (tmp_path / "metadata.csv").write_text("name,text\n2.png,two\n")
    with pytest.raises(ValueError, match=r"there is no column 'file_name', only name, text"):
        find_image_text(tmp_path)


def test_shards_are_read_in_any_order(tmp_path):
    shard(
        tmp_path / "b.tar",
        [("x/2.png", png(2)[0]), ("x/2.json", b'{"prompt": "two"}'), ("x/3.cls", b"5"), ("x/2.extra.txt", b"no")],
    )
    shard(tmp_path / "a.tar", [("0.txt", b"zero"), ("0.png", png(0)[0]), ("1.png", png(1)[0]), ("1.txt", b"one")])
    records = find_image_text(tmp_path)
    assert [r.text for r in records] == ["zero", "one", "two"]
    for i in (2, 0, 1):
        assert torch.equal(records[i].image(), png(i)[1])
    assert find_image_text(tmp_path / "a.tar")[1] == records[1]
    assert records[2].name.endswith("b.tar:x/2.png")


def test_bad_shards(tmp_path):
    whole = shard(tmp_path / "a.tar", [("0.txt", b"zero"), ("0.png", png(0)[0])])
    content = whole.read_bytes()
    # the header of the picture is whole, its content is not
    whole.write_bytes(content[: 3 * 512 + 20])
    with pytest.raises(ValueError, match=r"the shard .*a.tar is truncated, damaged or compressed"):
        find_image_text(whole)
    whole.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="is truncated, damaged or compressed"):
        find_image_text(tmp_path)
    shard(whole, [("0.png", png(0)[0])])
    with pytest.raises(ValueError, match=r"the sample .*a.tar:0 has a .png but no .txt or .json"):
        find_image_text(whole)
    shard(whole, [("0.png", png(0)[0]), ("0.json", b'{"prompt": ""}')])
    with pytest.raises(ValueError, match=r"0.json has no text under prompt or caption or text"):
        find_image_text(whole)
    shard(whole, [("0.txt", b"zero")])
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        find_image_text(whole)
    whole.rename(tmp_path / "a.tar.gz")
    with pytest.raises(ValueError, match=r"a.tar.gz is compressed .* unpack it to a plain .tar"):
        find_image_text(tmp_path)


def test_broken_and_missing_pictures_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0, 40, 40)[0][:200])
    (tmp_path / "a.txt").write_text("a cat")
    (record,) = find_image_text(tmp_path)
    with pytest.raises(ValueError, match=r"the picture .*a.png cannot be read"):
        record.image()
    (tmp_path / "a.png").write_bytes(b"no picture")
    for read in (record.image, record.image_size):
        with pytest.raises(ValueError, match=r"the picture .*a.png cannot be read"):
            read()
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a.png cannot be read .*restore or remove it"):
        record.content()
    with pytest.raises(FileNotFoundError, match="holds neither pictures"):
        find_image_text(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"does not exist; give a folder or a .tar file"):
        find_image_text(tmp_path / "nothing")


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 255, 51)  # black: transparent, opaque, a fifth of it
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    (record,) = find_image_text(tmp_path)
    assert record.image()[0, 0].tolist() == [255, 0, 204]


def test_frames_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), (60 * i, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "a.txt").write_text("red grows")
    (record,) = find_image_text(tmp_path)
    video = record.frames(3)
    assert video.shape == (3, 3, 4, 4)
    assert video[0, :, 0, 0].tolist() == [0, 60, 120]
    with pytest.raises(ValueError, match=r"a.webp has 4 frames, but 5 are asked for"):
        record.frames(5)


def test_records_of_a_prompt_file(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0)[0])
    (record,) = from_prompts([Prompt("a cat", image=tmp_path / "a.png", weight=2.0)])
    assert (record.text, record.weight) == ("a cat", 2.0)
    assert torch.equal(record.image(), png(0)[1])
    with pytest.raises(ValueError, match=r"1 of 2 prompts have no picture \(first: 'a dog'\)"):
        from_prompts([Prompt("a cat", image=tmp_path / "a.png"), Prompt("a dog")])


def test_the_digest_follows_what_matters(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0)[0])
    (tmp_path / "a.txt").write_text("a cat")
    digest = records_digest(find_image_text(tmp_path))
    assert digest == records_digest(find_image_text(tmp_path))
    (tmp_path / "a.txt").write_text("a dog")
    assert records_digest(find_image_text(tmp_path)) != digest
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "a.png").write_bytes(png(0, 5, 6)[0])
    assert records_digest(find_image_text(tmp_path)) != digest


def oriented(orientation, path, kind, **settings):
    """What a viewer shows (three colours in a row, each a square), saved in the pixels of another orientation."""
    shown = np.zeros((8, 24, 3), np.uint8)
    shown[:, :8, 0] = shown[:, 8:16, 1] = shown[:, 16:, 2] = 255
    shown[:4] //= 2
    back = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}[orientation]  # fmt: skip
    pixels = Image.fromarray(shown)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = pixels if back is None else pixels.transpose(Image.Transpose[back])
    stored.save(path, kind, exif=exif, **settings)
    return shown


@pytest.mark.parametrize(
    ("kind", "settings"), [("png", {}), ("jpeg", {"quality": 100, "subsampling": 0}), ("webp", {"lossless": True}),
                           ("tiff", {})],
)  # fmt: skip
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_read_upright(tmp_path, kind, settings, orientation):
    shown = oriented(orientation, tmp_path / f"a.{kind}", kind, **settings)
    (tmp_path / "a.txt").write_text("three colours")
    (record,) = find_image_text(tmp_path)
    read = record.image().permute(1, 2, 0).numpy().astype(int)
    assert record.image_size() == (8, 24) == read.shape[:2]
    assert abs(read - shown).max() <= (60 if kind == "jpeg" else 0)
    found = _Pictures([tmp_path / f"a.{kind}"], None, 3, 8)[0]  # of the middle, the green square
    assert found.mean(dim=(1, 2)).argmax() == 1
    assert found[1, 0].mean() < found[1, -1].mean()


def test_damaged_exif_and_frames(tmp_path):
    oriented(1, tmp_path / "a.jpg", "jpeg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(
        content.replace(b"Exif\0\0MM", b"Exif\0\0??").replace(b"Exif\0\0II", b"Exif\0\0??")
    )
    (tmp_path / "a.txt").write_text("three colours")
    (record,) = find_image_text(tmp_path)
    assert record.image().shape == (3, *record.image_size()) == (3, 8, 24)  # as stored, rather than not at all
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (4, 6), (60 * i, 0, 0)) for i in range(2)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, exif=exif)
    (tmp_path / "a.jpg").unlink()
    (record,) = find_image_text(tmp_path)
    assert record.frames(2).shape == (3, 2, *record.image_size()) == (3, 2, 4, 6)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 128, 129, 257, 32896, 65406, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 254, 255]
    (tmp_path / "a.txt").write_text("a ramp")
    for name, saved in (("a.png", values), ("a.tif", values.astype(np.int32))):
        Image.fromarray(saved).save(tmp_path / name)
        (record,) = find_image_text(tmp_path)
        assert record.image().tolist() == [[expected]] * 3
        grey = _Pictures([tmp_path / name], None, 1, 1)[0]
        assert grey.item() == pytest.approx(expected[3] / 127.5 - 1)  # of the middle
        (tmp_path / name).unlink()
    Image.fromarray(values).save(tmp_path / "a.png", transparency=257)
    (record,) = find_image_text(tmp_path)
    assert record.image()[0].tolist() == [[*expected[:3], 255, *expected[4:]]]
    (tmp_path / "a.png").unlink()
    for saved, kind in (
        (np.float32([[0.5]]), "floating-point numbers"),
        (np.int32([[70000]]), "integers of more than"),
    ):
        Image.fromarray(saved).save(tmp_path / "a.tif")
        (record,) = find_image_text(tmp_path)
        sentence = rf"the picture .*a.tif cannot be read \(its pixels are {kind}.* of which no range is known"
        with pytest.raises(ValueError, match=sentence):
            record.image()
        with pytest.raises(ValueError, match=sentence):
            _Pictures([record.file], None, 3, 1)[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_both_readers_lay_transparency_over_white(tmp_path, channels):
    Image.fromarray(np.full((2, 2, 4), (0, 0, 0, 51), np.uint8), "RGBA").save(tmp_path / "a.png")
    found = _Pictures([tmp_path / "a.png"], None, channels, 2)[0]
    torch.testing.assert_close(found, torch.full((channels, 2, 2), 204 / 127.5 - 1))


def test_whatever_the_decoder_raises_names_the_picture(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(0)[0])
    (tmp_path / "a.txt").write_text("a cat")
    (record,) = find_image_text(tmp_path)
    # as for damaged GIF, TIFF and PPM files
    for error in (
        IndexError("index out of range"),
        TypeError("Missing dimensions"),
        ValueError("no number"),
        KeyError(),
    ):

        def broken(*args, error=error):
            raise error

        monkeypatch.setattr(Image, "open", broken)
        reads = (
            record.image,
            record.image_size,
            lambda: record.frames(2),
            lambda: _Pictures([record.file], None, 3, 2)[0],
        )
        for read in reads:
            with pytest.raises(ValueError, match=rf"the picture .*a.png cannot be read \({error or 'KeyError'}"):
                read()


def test_a_column_is_read_from_the_json(tmp_path):
    folder, tar = tmp_path / "folder", tmp_path / "a.tar"
    folder.mkdir()
    files = {"0.png": png(0)[0], "0.txt": b"short", "0.json": b'{"caption": "short", "long": "a long caption"}'}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    shard(tar, list(files.items()))
    for root in (folder, tar):
        assert [r.text for r in find_image_text(root)] == ["short"]
        assert [r.text for r in find_image_text(root, "long")] == ["a long caption"]
        with pytest.raises(ValueError, match=r"0.json has no text under longer"):
            find_image_text(root, "longer")
    (folder / "0.json").unlink()
    with pytest.raises(ValueError, match=r"0.png has no caption under 'long': write 0.json beside it"):
        find_image_text(folder, "long")
    shard(tar, [("0.png", png(0)[0]), ("0.txt", b"short")])
    with pytest.raises(ValueError, match=r"a.tar:0 has a .png but no .json; add its caption under 'long'"):
        find_image_text(tar, "long")


def test_samples_of_shards_that_would_be_left_out_are_told(tmp_path):
    whole = [("b.png", png(0)[0]), ("b.txt", b"two"), ("b.mask.png", png(1)[0]), ("c.cls", b"5")]
    dotted = [(f"a.{i}.{kind}", content) for i in (1, 2) for kind, content in (("png", png(0)[0]), ("txt", b"one"))]
    unknown = [("d.xyz", b"?"), ("d.txt", b"three")]
    assert len(find_image_text(shard(tmp_path / "a.tar", whole))) == 1
    for others, count, first in (
        (dotted, 2, "a.1"),
        (unknown, 1, "d"),
        (unknown + dotted, 3, "d"),
        (dotted[1:], 2, "a.1"),
    ):
        root = shard(tmp_path / "a.tar", others[:1] + whole + others[1:])
        sentence = rf"{count} of the samples in the shards \(first: .*a.tar:{first}\) have no picture of a known type"
        with pytest.raises(ValueError, match=rf"{sentence}.*; rename or convert them, or .*--skip-broken"):
            find_image_text(root)
        with pytest.warns(UserWarning, match=rf"{sentence}.*they are left out"):
            assert [r.text for r in find_image_text(root, skip_broken=True)] == ["two"]
    with pytest.raises(FileNotFoundError, match=r"holds no picture .* in its shards; 2 of the samples .*a.tar:a.1"):
        find_image_text(shard(tmp_path / "a.tar", dotted), skip_broken=True)


def test_half_characters_in_captions(tmp_path):
    root = shard(tmp_path / "a.tar", [("0.png", png(0)[0]), ("0.json", b'{"prompt": "a cat \\ud83d"}')])
    with pytest.raises(ValueError, match=r"a.tar:0.json: half of a character ends 'a cat .ud83d'"):
        find_image_text(root)
