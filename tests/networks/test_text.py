"""Text conditions are exactly those that the stock pipeline computes for itself, for every family."""

import inspect
import json
from types import SimpleNamespace

import diffusers
import pytest
import tiny_text
import torch
from safetensors.torch import load_file, save_file
from tiny_text import LENGTH, MAKERS

from lightning_distill.networks.families import FAMILIES
from lightning_distill.networks.json_files import read_json
from lightning_distill.networks.plain_text import TransformersText
from lightning_distill.networks.text import PipelineText, text_digest

PROMPTS = ["a red cat", "small blue house under the moon"]
ROWS = {"flux": {}, "qwen_image": {}, "hunyuan_video": {}}


class Seen(Exception):
    pass


def stock_embeddings(folder, prompts, **call):
    """What ``encode_prompt`` returns within the stock pipeline's own ``__call__``, once per branch of guidance."""
    index = read_json(folder / "model_index.json")
    cls = getattr(diffusers, index["_class_name"])
    kept = ("tokenizer", "text_encoder", "scheduler")
    nothing = {k: None for k, v in index.items() if isinstance(v, list) and (not k.startswith(kept) or not v[0])}
    pipe = cls.from_pretrained(folder, **nothing)
    config = {"sample_size": 8, "patch_size": 2, "patch_size_t": 1, "in_channels": 4, "time_cond_proj_dim": None}
    config |= {"guidance_embeds": False, "joint_attention_dim": 16, "image_dim": None}
    if "wan" in cls.__module__:
        config["patch_size"] = (1, 2, 2)
    network = SimpleNamespace(config=SimpleNamespace(**config), dtype=torch.float32, in_channels=4)
    setattr(pipe, "unet" if "unet" in index else "transformer", network)
    results, original = [], pipe.encode_prompt
    branches = 2 if "true_cfg_scale" in call else 1

    def recorded(*args, **kwargs):
        results.append(original(*args, **kwargs))
        if len(results) == branches:
            raise Seen
        return results[-1]

    pipe.encode_prompt = recorded
    parameters = inspect.signature(cls.__call__).parameters
    if "num_frames" in parameters:
        call["num_frames"] = 5
    if "use_resolution_binning" in parameters:
        call["use_resolution_binning"] = False
    with pytest.raises(Seen), torch.no_grad():
        pipe(prompt=list(prompts), height=64, width=64, **call)
    return results


@pytest.mark.sparse(2)
@pytest.mark.parametrize("name", MAKERS)
def test_equals_the_stock_pipeline(name, tmp_path):
    folder = MAKERS[name](tmp_path / name)
    text = PipelineText(folder)
    mine, null = text.encode(PROMPTS), text.null()
    call = {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]} if name in ROWS else {}
    results = stock_embeddings(folder, PROMPTS, **call)
    stock = results[0] if isinstance(results[0], tuple) else (results[0],)
    for key, value in zip(text.entry.outputs, stock):
        if not key or value is None:
            continue
        where, key = (null, key.removeprefix("null ")) if key.startswith("null ") else (mine, key)
        for row in range(2):
            same(where[key][row if where is mine else 0], value[row], text.entry.ragged, key)
    for key, value in zip(text.entry.outputs, results[1] if len(results) == 2 else ()):
        if key and value is not None:
            same(null[key][0], value[0], text.entry.ragged, key)


def same(mine, stock, ragged, key):
    if ragged:  # ours is padded to the pipeline's maximal length, with zeros
        assert not mine[len(stock) :].any()
        mine = mine[: len(stock)]
    if key == "encoder_attention_mask":
        assert torch.equal(mine.bool(), stock.bool())
    else:
        torch.testing.assert_close(mine, stock.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.sparse(2)
@pytest.mark.parametrize("name", MAKERS)
def test_conditions_are_those_of_the_network(name, tmp_path):
    folder = MAKERS[name](tmp_path / name)
    text = PipelineText(folder)
    index = read_json(folder / "model_index.json")
    network = next(v[1] for k, v in index.items() if k in ("unet", "transformer"))
    if name in ("pixart_sigma", "flux", "sd15"):  # the configurations written there name another class or none
        network = {"pixart_sigma": "PixArtTransformer2DModel", "flux": "FluxTransformer2DModel"}.get(name, network)
    family = FAMILIES[network]
    assert set(text.keys) <= set(family.cond_keys)
    assert set(family.required) <= set(text.keys)
    assert set(text.null()) == set(text.keys) - {"time_ids", "resolution", "aspect_ratio"}


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "sdxl", "wan"])
def test_a_prompt_does_not_depend_on_its_batch(name, tmp_path):
    text = PipelineText(MAKERS[name](tmp_path / name))
    together = text.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        for key, value in text.encode([prompt]).items():
            torch.testing.assert_close(value[0], together[key][row], rtol=1e-5, atol=1e-6)


def test_ragged_prompts_are_padded_to_one_length_behind_a_mask(tmp_path):
    text = PipelineText(MAKERS["z_image"](tmp_path / "z"), max_length=20)
    out = text.encode(PROMPTS)
    mask = out["encoder_attention_mask"]
    assert mask.shape == (2, 20)
    assert mask.dtype == torch.uint8
    counts = mask.sum(dim=1).tolist()
    assert counts[0] < counts[1] < 20
    for tokens, n in zip(out["encoder_hidden_states"], counts):
        assert tokens[:n].abs().sum(dim=1).gt(0).all()
        assert not tokens[n:].any()


def test_size_conditions(tmp_path):
    folder = MAKERS["sdxl"](tmp_path / "xl")
    assert PipelineText(folder).encode(["a cat"])["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    wide = PipelineText(folder, size=(96, 160)).encode(["a cat"])["time_ids"]
    assert wide.tolist() == [[96, 160, 0, 0, 96, 160]]
    alpha = MAKERS["pixart_alpha"](tmp_path / "alpha")
    out = PipelineText(alpha, size=(96, 160)).encode(["a cat"])
    assert out["resolution"].tolist() == [[96, 160]]
    assert out["aspect_ratio"][0, 0] == pytest.approx(0.6)
    config = alpha / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 64}))
    assert "resolution" not in PipelineText(alpha).keys  # the smaller models do not take it


def test_sdxl_means_zeros_by_no_prompt_and_text_by_a_negative_one(tmp_path):
    text = PipelineText(MAKERS["sdxl"](tmp_path / "xl"))
    assert not any(value.any() for value in text.null().values())
    assert all(value.any() for value in text.null("blue dog").values())


def test_the_digest_covers_text_and_nothing_else(tmp_path):
    folder = MAKERS["sd15"](tmp_path / "sd")
    before = text_digest(folder)
    tiny_text.vae(folder)
    assert text_digest(folder) == before
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert text_digest(folder) != before


def test_dtype(tmp_path):
    folder = MAKERS["flux"](tmp_path / "flux")
    full, half = PipelineText(folder).encode(["a cat"]), PipelineText(folder, torch.bfloat16).encode(["a cat"])
    assert all(value.dtype == torch.bfloat16 for value in half.values())
    for key, value in full.items():
        torch.testing.assert_close(half[key].float(), value, rtol=0.1, atol=0.1)


def test_half_precision_files_alone_are_found(tmp_path):
    folder = MAKERS["sd15"](tmp_path / "sd")
    expected = PipelineText(folder).encode(["a cat"])
    file = folder / "text_encoder" / "model.safetensors"
    file.rename(file.with_name("model.fp16.safetensors"))
    assert torch.equal(
        PipelineText(folder).encode(["a cat"])["encoder_hidden_states"], expected["encoder_hidden_states"]
    )


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index.json does not exist; give the folder of a diffusers"):
        PipelineText(tmp_path)
    folder = MAKERS["sd15"](tmp_path / "sd")
    with pytest.raises(ValueError, match="max_length=9: StableDiffusionPipeline has a fixed number of tokens"):
        PipelineText(folder, max_length=9)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "DDPMPipeline"}))
    with pytest.raises(ValueError, match="DDPMPipeline, whose encode_prompt is not described"):
        PipelineText(folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoPipeline"}))
    with pytest.raises(ValueError, match="names the pipeline 'NoPipeline', which diffusers"):
        PipelineText(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"the text encoders of .* cannot be loaded"):
        PipelineText(folder).encode(["a cat"])
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer is missing or empty"):
        PipelineText(folder)


def test_a_plain_text_model(tmp_path):
    folder = tiny_text.bert(tmp_path / "bert")
    keys = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
    text = TransformersText(folder, max_length=LENGTH, keys=keys)
    out = text.encode(PROMPTS)
    tokenizer, model = text._build()
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            hidden = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        n = len(hidden)
        assert out["encoder_attention_mask"][row].tolist() == [1] * n + [0] * (LENGTH - n)
        torch.testing.assert_close(out["encoder_hidden_states"][row, :n], hidden, rtol=1e-4, atol=1e-5)
        assert not out["encoder_hidden_states"][row, n:].any()
        mean = hidden.mean(dim=0)
        torch.testing.assert_close(out["pooled_projections"][row], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert set(TransformersText(folder).encode(["a"])) == set(keys[:2])
    with pytest.raises(FileNotFoundError, match=r"has no config.json; give the folder of a text model"):
        TransformersText(tmp_path)
    with pytest.raises(ValueError, match="a plain text model gives"):
        TransformersText(folder, keys=("text_embeds",))


@pytest.mark.sparse(2)
@pytest.mark.parametrize("name", MAKERS)
def test_a_negative_prompt_takes_the_place_of_the_empty_one(name, tmp_path):
    text = PipelineText(MAKERS[name](tmp_path / name))
    null, plain = text.null("blue dog"), text.encode(["blue dog"])
    for key, value in null.items():
        if name not in ("sana", "lumina2"):  # these write an instruction before the prompt alone
            assert torch.equal(value, plain[key])
    assert any(not torch.equal(value, null[key]) for key, value in text.null().items())


@pytest.mark.parametrize("name", ["sd15", "lcm"])
def test_a_negative_prompt_of_the_first_pipelines(name, tmp_path):
    text = PipelineText(MAKERS[name](tmp_path / name))
    assert torch.equal(
        text.null("blue dog")["encoder_hidden_states"], text.encode(["blue dog"])["encoder_hidden_states"]
    )


def test_shards_of_a_variant_alone(tmp_path):
    folder = MAKERS["pixart_sigma"](tmp_path / "p")
    expected = PipelineText(folder).encode(PROMPTS)
    part = folder / "text_encoder"
    tiny_text.t5().save_pretrained(part, variant="bf16", max_shard_size="1KB")
    (part / "model.safetensors").unlink()
    assert len(list(part.glob("model.bf16-00001-of-*.safetensors"))) == 1
    for key, value in PipelineText(folder).encode(PROMPTS).items():
        assert torch.equal(value, expected[key])


def test_the_identity_has_what_the_null_depends_on(tmp_path):
    folder = MAKERS["sdxl"](tmp_path / "xl")
    before, zeros = PipelineText(folder).identity(), PipelineText(folder).null()
    index = read_json(folder / "model_index.json")
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    text = PipelineText(folder)
    assert text.identity() != before
    assert not zeros["encoder_hidden_states"].any()
    assert torch.equal(text.null()["encoder_hidden_states"], text.encode([""])["encoder_hidden_states"])
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": True}))
    assert PipelineText(folder).identity() == before


def test_lengths_that_no_pipeline_samples_with(tmp_path):
    folder = MAKERS["flux"](tmp_path / "flux")
    assert PipelineText(folder, max_length=512).settings["max_sequence_length"] == 512
    with pytest.raises(ValueError, match=r"max_length=513: FluxPipeline samples with 512 tokens at most"):
        PipelineText(folder, max_length=513)


def plain_model(folder, model, pad=True, length=LENGTH):
    model.save_pretrained(folder)
    tokenizer = tiny_text.tokenizer(length=length)
    if not pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cls", ["T5EncoderModel", "T5ForConditionalGeneration", "UMT5EncoderModel"])
def test_plain_encoders_of_models_with_a_decoder(cls, tmp_path):
    model = tiny_text.t5(cls)
    text = TransformersText(plain_model(tmp_path / "t5", model), max_length=20)  # its positions have no end
    out = text.encode(PROMPTS)
    with torch.no_grad():
        batch = tiny_text.tokenizer()(PROMPTS[0], return_tensors="pt")
        hidden = model.get_encoder()(**batch).last_hidden_state[0]
    n = len(hidden)
    torch.testing.assert_close(out["encoder_hidden_states"][0, :n], hidden, rtol=1e-4, atol=1e-5)
    assert out["encoder_attention_mask"].shape == (2, 20)


def test_plain_models_with_a_decoder_alone_are_refused(tmp_path):
    import transformers

    config = transformers.BartConfig(
        vocab_size=tiny_text.VOCABULARY, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    text = TransformersText(plain_model(tmp_path / "bart", tiny_text.random_model("BartModel", config)))
    with pytest.raises(ValueError, match=r"is a bart model, whose output is its decoder's; give a text encoder"):
        text.encode(["a cat"])


def test_a_tokenizer_without_padding(tmp_path):
    without = TransformersText(plain_model(tmp_path / "a", tiny_text.decoder("LlamaModel"), pad=False), max_length=8)
    padded = TransformersText(plain_model(tmp_path / "b", tiny_text.decoder("LlamaModel")), max_length=8)
    expected = padded.encode(PROMPTS)
    for key, value in without.encode(PROMPTS).items():
        torch.testing.assert_close(value, expected[key])


def test_lengths_beyond_the_positions_of_a_plain_model(tmp_path):
    folder = tiny_text.bert(tmp_path / "bert")
    assert TransformersText(folder, max_length=64).encode(["a cat"])["encoder_attention_mask"].shape == (1, 64)
    with pytest.raises(ValueError, match=r"max_length=65: the text model .*bert takes 64 tokens at most"):
        TransformersText(folder, max_length=65)
    assert TransformersText(folder).max_length == 32
    short = plain_model(tmp_path / "clip", tiny_text.clip(projection=False))
    assert TransformersText(short).encode(["a cat"])["encoder_attention_mask"].shape == (1, LENGTH)
    tiny_text.tokenizer(length=60).save_pretrained(folder)  # as where positions are kept for marks
    with pytest.raises(ValueError, match="takes 60 tokens at most"):
        TransformersText(folder, max_length=61)
