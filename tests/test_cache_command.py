"""The cache command: what it writes, how it goes on after being killed, and what it refuses."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_text
import torch
from PIL import Image
from safetensors.torch import load_file

from lightning_distill.cli import main
from lightning_distill.data.store import Store
from lightning_distill.networks.autoencoders import LatentCodec
from lightning_distill.networks.text import PipelineText
from lightning_distill.randomness import RandomStreams

PROMPTS = [f"a red cat {'over the moon ' * (i % 4)}and a {word}" for i, word in enumerate(tiny_text.WORDS[:22])]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    tiny_text.vae(tiny_text.sdxl(folder / "xl"))
    tiny_text.z_image(folder / "z")
    tiny_text.bert(folder / "bert")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, pipelines):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "user_cache"))
    for name in ("xl", "z", "bert"):
        os.symlink(pipelines / name, name)
    Path("p.txt").write_text("\n".join(PROMPTS))
    Path("images").mkdir()
    generator = np.random.default_rng(0)
    for i in range(9):
        size = (40, 24) if i % 3 else (24, 24)
        Image.fromarray(generator.integers(0, 256, (*size, 3)).astype(np.uint8)).save(f"images/{i}.png")
        Path(f"images/{i}.txt").write_text(PROMPTS[i])


def cache(*words, out="store", expect=0):
    status = main(["cache", *map(str, words), "--out", out, "--device", "cpu"])
    assert status == expect
    return None if expect else out


def prompts(*words, pipeline="xl", **kwargs):
    return cache(
        *("--pipeline", pipeline, "--prompts", "p.txt", "--dtype", "float32"),
        *("--shard-size", 5, "--batch-size", 2, *words),
        **kwargs,
    )


def images(*words, **kwargs):
    base = ("--pipeline", "xl", "--images", "images", "--dtype", "float32", "--shard-size", 4, "--batch-size", 3)
    return cache(*base, *words, **kwargs)


def shards(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).rglob("shard_*")) if p.suffix != ".lock"}


def test_embeddings_and_the_null(capsys):
    store = Store(prompts())
    assert len(store) == len(PROMPTS)
    text = PipelineText("xl")
    rows = torch.tensor([3, 21, 0])
    found, expected = store.gather(rows), text.encode([PROMPTS[i] for i in rows])
    assert set(found) == set(expected) == {"encoder_hidden_states", "text_embeds", "time_ids"}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert [fact["prompt"] for fact in store.facts(rows)] == [PROMPTS[i] for i in rows]
    null = load_file("store/null_cond.safetensors")
    assert {k: tuple(v.shape) for k, v in null.items()} == {"encoder_hidden_states": (1, 12, 16), "text_embeds": (1, 8)}
    out = capsys.readouterr()
    assert out.out.startswith("store: 22 records (encoder_hidden_states 12x16, text_embeds 8, time_ids 6)")
    assert "22 of 22 records to encode" in out.err
    assert store.verify() == []


def test_the_null_fits_a_teacher():
    from lightning_distill.networks.denoiser import Denoiser
    from lightning_distill.processes import FlowMatching

    prompts("--max-length", 20, "--negative-prompt", "blue house", pipeline="z")
    import tiny_pipelines

    null = load_file("store/null_cond.safetensors")
    network = tiny_pipelines.z_image().network
    denoiser = Denoiser(network, FlowMatching(), "flow_prediction", null_cond=null)
    cond = Store("store").gather([0, 1, 2])
    assert cond["encoder_hidden_states"].shape == (3, 20, 8)
    made = denoiser.null_cond(cond)
    expected = PipelineText("z", max_length=20).null("blue house")
    assert torch.equal(made["encoder_hidden_states"], expected["encoder_hidden_states"].expand(3, -1, -1))
    assert torch.equal(made["encoder_attention_mask"], expected["encoder_attention_mask"].expand(3, -1))


def kill_after(count, words, folder):
    """Run the command in a process of its own and kill it without warning once ``count`` shards are there."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=slowly, args=(words,))
    process.start()
    deadline = time.monotonic() + 60
    while len(list(Path(folder).glob("shard_*.json"))) < count:
        assert process.is_alive(), "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def slowly(words):
    torch.set_num_threads(1)
    original = PipelineText.encode

    def encode(self, texts):
        time.sleep(0.1)
        return original(self, texts)

    PipelineText.encode = encode
    words()


def test_killed_and_run_again_it_writes_the_same_shards():
    prompts(out="whole")
    kill_after(2, prompts, "store")
    written = shards("store")
    assert 2 <= len([name for name in written if name.endswith(".json")]) < 5
    prompts()
    assert shards("store") == shards("whole")
    assert len(shards("whole")) == 3 * 5
    for name, content in written.items():
        assert shards("whole")[name] == content


def test_a_damaged_shard_is_written_again(capsys):
    prompts()
    before = shards("store")
    file = Path("store/shard_000001.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    Path("store/null_cond.safetensors").write_bytes(b"12")
    capsys.readouterr()
    prompts()
    shown = capsys.readouterr().err
    assert "store/shard_000001.safetensors does not match its checksum; made again\n" in shown
    assert shown.count("made again") == 1
    assert "5 of 22 records to encode" in shown
    assert shards("store") == before
    Path("store/shard_000000.jsonl").write_text("{}\n")
    Path("store/shard_000003.safetensors").unlink()
    prompts()
    shown = capsys.readouterr().err
    assert "store/shard_000000.jsonl has 3 bytes instead of" in shown
    assert "store/shard_000003.safetensors is missing; made again\n" in shown
    assert shards("store") == before
    assert load_file("store/null_cond.safetensors")
    prompts()
    assert "to encode" not in capsys.readouterr().err  # nothing is left to do


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes_share_the_work():
    prompts(out="whole")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=slowly, args=(prompts,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert shards("store") == shards("whole")


@pytest.mark.slow
@pytest.mark.distributed
def test_workers():
    prompts(out="whole")
    prompts("--workers", 2)
    assert shards("store") == shards("whole")
    Path("images/4.png").write_bytes(b"no picture")
    assert images("--resolution", 16, "--workers", 2, out="images_store", expect=2) is None


def test_pictures_become_latents_and_sizes():
    store = Store(images("--resolution", 16))
    found = store.gather([0, 1, 5])
    assert found["x0"].shape == (3, 4, 8, 8)
    assert found["time_ids"].tolist() == [
        [24, 24, 0, 0, 16, 16],
        [40, 24, 5, 0, 16, 16],  # 40 x 24 is resized to 27 x 16, and 11 rows are cut off
        [40, 24, 5, 0, 16, 16],
    ]
    codec = LatentCodec("xl")
    with Image.open("images/0.png") as picture:
        x = torch.from_numpy(np.array(picture.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    noise = RandomStreams(0).normal("latents", 0, 0, (1, 4, 8, 8))
    expected = codec.encode(x[None] / 127.5 - 1, lambda shape: noise)
    assert (found["x0"][:1] - expected).abs().max() < 0.05  # up to the rounding of two bicubic filters
    assert (found["x0"][:1] - expected).abs().mean() < 0.01


def test_one_store_per_size():
    images("--resolution", 24, "--buckets", "--bucket-step", 8)
    square, tall = Store("store/24x24"), Store("store/32x16")
    assert (len(square), len(tall)) == (3, 6)
    assert square.shapes["x0"] == (4, 12, 12)
    assert tall.shapes["x0"] == (4, 16, 8)
    assert Path("store/null_cond.safetensors").is_file()
    assert {f["prompt"] for s in (square, tall) for f in s.facts(range(len(s)))} == set(PROMPTS[:9])


def test_broken_pictures_stop_it_or_are_left_out(capsys):
    path = Path("images/5.png")
    path.write_bytes(path.read_bytes()[:-300])
    images("--resolution", 16, expect=2)
    error = capsys.readouterr().err
    assert "5.png cannot be read" in error
    assert "--skip-broken" in error
    assert (Path("store") / "shard_000000.json").is_file()  # what came before it is kept
    before = shards("store")
    images("--resolution", 16, "--skip-broken")
    facts = Store("store").facts(range(9))
    assert [f["weight"] for f in facts] == [1.0] * 5 + [0.0] + [1.0] * 3
    assert before.items() <= shards("store").items()
    told = "1 of the pictures cannot be read and are never drawn (first: images/5.png)\n"
    assert told in capsys.readouterr().out
    images("--resolution", 16, "--skip-broken")  # nothing is left to do, but it is still so
    assert told in capsys.readouterr().out


def test_broken_headers_do_not_stop_buckets(capsys):
    Path("images/5.png").write_bytes(b"no picture")
    words = ("--resolution", 24, "--buckets", "--bucket-step", 8)
    images(*words, expect=2)
    assert "Or go on with --skip-broken." in capsys.readouterr().err
    images(*words, "--skip-broken")
    facts = Store("store/24x24").facts(range(4))
    assert [f["weight"] for f in facts] == [1.0, 1.0, 0.0, 1.0]
    assert len(Store("store/32x16")) == 5


def test_stores_of_other_encoders_are_not_put_beside_each_other(capsys):
    images("--resolution", 24, "--buckets", "--bucket-step", 8)
    before = shards("store")
    images("--resolution", 16, "--buckets", "--bucket-step", 8, "--negative-prompt", "blue", expect=2)
    assert "24x24 holds a store with negative_prompt=None, not 'blue'; stores in" in capsys.readouterr().err
    assert shards("store") == before
    assert not Path("store/16x16").exists()


def test_the_null_is_that_of_the_stores_beside_it(capsys):
    words = ("--resolution", 24, "--buckets", "--bucket-step", 8)
    images(*words)
    file = Path("store/null_cond.safetensors")
    zeros, written = load_file(file), file.stat().st_mtime_ns
    images(*words)
    assert file.stat().st_mtime_ns == written  # kept
    for folder in ("24x24", "32x16"):
        shutil.rmtree(f"store/{folder}")
    images(*words, "--negative-prompt", "blue dog")
    null, expected = load_file(file), PipelineText("xl").null("blue dog")
    assert not zeros["text_embeds"].any()
    assert all(torch.equal(null[key], value) for key, value in expected.items())


def test_stores_of_pictures_that_were_read_in_another_way_are_not_continued(monkeypatch, capsys):
    from lightning_distill.data import encoding

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "READING", 1)
        images("--resolution", 16)
    images("--resolution", 16, expect=2)
    assert f"holds a store with reading=1, not {encoding.READING};" in capsys.readouterr().err


def test_a_negative_prompt_of_some_rows_is_told(capsys):
    Path("n.csv").write_text("prompt,negative_prompt\na cat,blurry\na dog,\na bird,blurry\n")
    cache("--pipeline", "xl", "--prompts", "n.csv", "--dtype", "float32")
    assert "1 of 3 rows have no negative_prompt; that of the others, 'blurry', holds for all" in capsys.readouterr().err
    assert torch.equal(
        load_file("store/null_cond.safetensors")["text_embeds"], PipelineText("xl").null("blurry")["text_embeds"]
    )


@pytest.mark.parametrize("key", ["encoder_hidden_states", "x0"])
def test_embeddings_and_latents_that_are_not_finite_are_refused(monkeypatch, capsys, key):
    encode, codec = PipelineText.encode, LatentCodec.encode

    def broken_text(self, texts):
        made = encode(self, texts)
        made["encoder_hidden_states"][[text == PROMPTS[4] for text in texts]] = float("inf")
        return made

    def broken_latents(self, x, noise=None):
        made = codec(self, x, noise)
        made[1:] = float("nan")
        return made

    if key == "x0":
        monkeypatch.setattr(LatentCodec, "encode", broken_latents)
    else:
        monkeypatch.setattr(PipelineText, "encode", broken_text)
    images("--resolution", 16, expect=2)
    row = 1 if key == "x0" else 4
    error = capsys.readouterr().err
    assert f"{key} of record {row} (" in error
    assert f"{row}.png') has NaN or inf as float32; encode with a wider type, --dtype float32 or bfloat16" in error


def test_a_plain_text_model():
    cache("--text-encoder", "bert", "--prompts", "p.txt", "--dtype", "float32", "--max-length", 9)
    store = Store("store")
    assert store.shapes == {"encoder_attention_mask": (9,), "encoder_hidden_states": (9, 8)}
    assert store.gather([0])["encoder_attention_mask"].dtype == torch.uint8


def test_the_key_follows_the_content(capsys, pipelines):
    key = Store(prompts()).key
    Path("q.jsonl").write_text("\n".join(f'{{"prompt": "{text}"}}' for text in PROMPTS))
    shutil.copy("q.jsonl", "p2.jsonl")
    words = ("--pipeline", "xl", "--prompts", "p2.jsonl", "--dtype", "float32", "--shard-size", 5, "--batch-size", 2)
    cache(*words)  # the same prompts in another format are the same store
    shutil.copytree(pipelines / "xl", "other")
    weights = load_file("other/text_encoder/model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1.0
    from safetensors.torch import save_file

    save_file(weights, "other/text_encoder/model.safetensors", metadata={"format": "pt"})
    prompts(pipeline="other", expect=2)
    assert "holds a store with text_encoder=" in capsys.readouterr().err
    prompts(pipeline="other", out="second")
    changed = {k for k, v in Store("second").key.items() if key[k] != v}
    assert changed == {"text_encoder"}
    Path("p.txt").write_text("\n".join(PROMPTS[::-1]))
    prompts(expect=2)
    assert "holds a store with records=" in capsys.readouterr().err
    prompts("--resolution", 32, expect=2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--pipeline", "xl"], "one of the arguments --prompts --images is required"),
        (["--pipeline", "none", "--prompts", "p.txt"], "none/model_index.json does not exist"),
        (["--pipeline", "xl", "--prompts", "none.txt"], "the prompt file none.txt does not exist"),
        (["--pipeline", "xl", "--images", "images"], "--resolution is needed for pictures"),
        (["--pipeline", "z", "--images", "images", "--resolution", "16"], "holds no autoencoder"),
        (["--text-encoder", "bert", "--images", "images", "--resolution", "16"], "--vae is needed with --text-encoder"),
        (["--pipeline", "xl", "--prompts", "p.txt", "--batch-size", "0"], "--batch-size 0: give 1 or more"),
        (["--pipeline", "xl", "--prompts", "p.txt", "--max-length", "9"], "has a fixed number of tokens"),
        (["--pipeline", "xl", "--prompts", "n.csv"], "holds 2 different texts ('blurry', 'dark', ...), but guidance"),
        (
            ["--pipeline", "xl", "--images", "images", "--resolution", "20", "--buckets"],
            "must be a multiple of the step",
        ),
    ],
)
def test_bad_input(words, sentence, capsys):
    Path("n.csv").write_text("prompt,negative_prompt\na cat,blurry\na dog,dark\n")
    assert main(["cache", *words, "--out", "store", "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert "\n" not in error
    assert not Path("store").exists()


def test_an_unknown_device(capsys):
    assert main(["cache", "--pipeline", "xl", "--prompts", "p.txt", "--out", "store", "--device", "warp"]) == 2
    assert "--device warp cannot be used" in capsys.readouterr().err


@pytest.fixture
def teacher(pipelines):
    """SD 1.5's layout with a network: text encoder, autoencoder, UNet and scheduler in one folder."""
    import diffusers
    from tiny_pipelines import random_network

    folder = tiny_text.vae(tiny_text.sd15(Path("sd")))
    network = random_network(
        "UNet2DConditionModel", sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4,
        cross_attention_dim=tiny_text.WIDTH,
    )  # fmt: skip
    network.save_pretrained(folder / "unet")
    for file in (folder / "scheduler").iterdir():
        file.unlink()
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.long
@pytest.mark.sparse(2)
@pytest.mark.parametrize("kind", ["CachedConditions", "CachedLatents"])
def test_a_guided_student_is_distilled_from_a_store(teacher, kind, capsys):
    import yaml

    source = ("--prompts", "p.txt") if kind == "CachedConditions" else ("--images", "images", "--resolution", 16)
    cache("--pipeline", "sd", *source, "--dtype", "float32")
    spec = {"path": "sd", "null_cond": "store/null_cond.safetensors"}
    data = {"path": "store", "batch_size": 4}
    if kind == "CachedLatents":
        data["sigma_data"] = Store("store").gather(range(9))["x0"].std().item()
    config = {
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "class_path": "DMD2",
            "init_args": {
                "teacher": {"class_path": "PretrainedDenoiser", "init_args": spec},
                "guidance": {"class_path": "Guidance", "init_args": {"scale": 4.0}},
                "fake_score_steps": 1,
            },
        },
        "data": {"class_path": kind, "init_args": data},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", "run.yaml"]) == 0
    file = next(Path("store").glob("shard_*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    assert main(["fit", "-c", "run.yaml"]) == 2
    refusal = capsys.readouterr().err.strip().splitlines()[-1]
    assert "store/shard_000000.safetensors does not match its checksum; run the command" in refusal
    assert main(["fit", "-c", "run.yaml", "--data.verify=false"]) == 0
    file.write_bytes(whole)
    weights = load_file("sd/text_encoder/model.safetensors")
    weights[next(iter(weights))] += 1.0
    from safetensors.torch import save_file

    save_file(weights, "sd/text_encoder/model.safetensors", metadata={"format": "pt"})
    assert main(["fit", "-c", "run.yaml"]) == 2


def test_the_refusal_of_a_foreign_store_names_both(teacher, capsys):
    cache("--pipeline", "sd", "--prompts", "p.txt", "--dtype", "float32")
    (Path("sd") / "tokenizer" / "added_tokens.json").write_text("{}")
    words = ["--model=DMD2", "--model.teacher=PretrainedDenoiser", "--model.teacher.path=sd", "--data=CachedConditions"]
    assert main(["fit", *words, "--data.path=store", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]) == 2
    assert "the store store was made with another text encoder" in capsys.readouterr().err
