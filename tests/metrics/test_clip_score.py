"""CLIP score with a tiny random CLIP: the definition, other packages, and what is missing."""

from __future__ import annotations

import json
import time

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from lightning_distill.metrics import CLIPScore

PROMPTS = ["a red square", "two cats", "a dog", "zebra crossing", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model of 16 hidden units with a tokenizer of single letters, as ``save_pretrained`` writes them."""
    root = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=20,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        **size,
    )
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **size)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    model = CLIPModel(config).eval()
    with torch.no_grad():  # freshly initialised towers give nearly one direction for everything
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model.save_pretrained(root)
    CLIPProcessor(images, tokenizer).save_pretrained(root)
    return root


def pictures(n=5):
    return torch.rand(n, 3, 20, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_score_is_the_cosine_of_both_towers(folder):
    """Through the towers one by one, with the pixels normalised by hand."""
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    images = (images * 127.5 + 127.5).round() / 127.5 - 1
    model = CLIPModel.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    expected = []
    with torch.no_grad():
        for image, prompt in zip(images, PROMPTS):
            tokens = tokenizer([prompt], return_tensors="pt")
            text = model.text_projection(model.text_model(**tokens).pooler_output)
            pixels = ((image + 1) / 2 - mean) / std
            seen = model.visual_projection(model.vision_model(pixels[None]).pooler_output)
            expected.append(100 * torch.cosine_similarity(text, seen).clamp_min(0))
    found = CLIPScore(str(folder)).score(images, PROMPTS)
    torch.testing.assert_close(found, torch.cat(expected), atol=0.01, rtol=1e-3)
    assert found.shape == (5,)
    assert len(found.unique()) > 2
    assert found.max() > 1


def test_the_score_is_that_of_torchmetrics(folder):
    from torchmetrics.multimodal import CLIPScore as Other

    class Tensors:
        """The model with towers that answer with tensors, as torchmetrics expects; newer transformers wrap them."""

        def __init__(self, model):
            self.model = model
            self.config = model.config

        def to(self, device):
            return self

        def get_image_features(self, *args):
            out = self.model.get_image_features(*args)
            return out if isinstance(out, torch.Tensor) else out.pooler_output

        def get_text_features(self, *args):
            out = self.model.get_text_features(*args)
            return out if isinstance(out, torch.Tensor) else out.pooler_output

    scorer, images = CLIPScore(str(folder)), pictures()
    model, processor = scorer.build()
    found = scorer.score(images, PROMPTS)
    as_bytes = (images * 127.5 + 127.5).round().to(torch.uint8)
    for image, prompt, score in zip(as_bytes, PROMPTS, found):
        other = Other(lambda: (Tensors(model), processor))
        other.update(image, prompt)
        assert score.item() == pytest.approx(other.compute().item(), abs=1e-3)
    assert (found > 0).sum() >= 2


def test_batches_channels_and_long_prompts(folder):
    images, scorer = pictures(), CLIPScore(str(folder), batch_size=2)
    whole = CLIPScore(str(folder)).score(images, PROMPTS)
    torch.testing.assert_close(scorer.score(images, PROMPTS), whole, atol=1e-3, rtol=1e-4)
    grey = images[:, :1]
    torch.testing.assert_close(scorer.score(grey, PROMPTS), scorer.score(grey.expand(-1, 3, -1, -1), PROMPTS))
    # 18 words of one letter fit between the two marks; what follows is cut
    fits, longer = " ".join("a" * 18), " ".join("a" * 18 + "z" * 50)
    same = images[:1].expand(2, -1, -1, -1)
    scores = scorer.score(same, [fits, longer])
    assert scores[0] == pytest.approx(scores[1].item(), abs=1e-4)
    model, _ = scorer.build()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_scores_are_cut_at_zero_one_by_one(folder):
    images = pictures(40)
    scores = CLIPScore(str(folder)).score(images, ["cat"] * 20 + ["dog"] * 20)
    model, processor = CLIPScore(str(folder)).build()
    assert scores.min() >= 0
    assert scores.max() <= 100
    with torch.no_grad():
        model.visual_projection.weight.mul_(-1.0)
    turned = CLIPScore(str(folder))
    turned._parts = (model, processor)
    other = turned.score(images, ["cat"] * 20 + ["dog"] * 20)
    assert ((scores == 0) != (other == 0)).all()  # one of two opposite directions is always cut


def test_a_missing_folder_is_told_at_once(tmp_path, monkeypatch, folder):
    monkeypatch.delenv("LIGHTNING_DISTILL_CLIP", raising=False)
    start = time.perf_counter()
    for call in (CLIPScore().check, lambda: CLIPScore().score(pictures(1), ["a"])):
        with pytest.raises(FileNotFoundError, match=r"CLIPScore\(folder=\.\.\.\) or LIGHTNING_DISTILL_CLIP=FOLDER"):
            call()
    for name in (folder / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{name} has no config\.json.*LIGHTNING_DISTILL_CLIP"):
            CLIPScore(str(name)).build()
    assert time.perf_counter() - start < 1.0
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors"):
        CLIPScore(str(tmp_path)).check()
    monkeypatch.setenv("LIGHTNING_DISTILL_CLIP", str(folder))
    CLIPScore().check()


def test_bad_input(folder):
    scorer = CLIPScore(str(folder))
    with pytest.raises(ValueError, match="5 images and 4 prompts"):
        scorer.score(pictures(), PROMPTS[:4])
    with pytest.raises(ValueError, match=r"1 or 3, H, W\), got \(1, 2, 8, 8\)"):
        scorer.score(torch.zeros(1, 2, 8, 8), ["a"])


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 8, 8), (2,)])
def test_samples_that_are_no_images_are_told_at_once(folder, shape):
    score = CLIPScore(str(folder))
    score.check((3, 32, 32))
    with pytest.raises(ValueError, match="reads images of 1 or 3 channels, but the method's samples"):
        score.check(shape)
