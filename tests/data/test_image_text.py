"""Pictures with captions, from folders and from tar shards; broken ones are named."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

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
