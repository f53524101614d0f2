"""Samples of a text-to-image run from the command line: for its own data, and as the latents that they are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import tiny_text
import torch
import yaml
from safetensors.torch import load_file

from lightning_distill.cli import main
from lightning_distill.commands.run_folder import load_run
from lightning_distill.data.store import Store

SETTINGS = {
    "trainer.max_steps": 2,
    "trainer.precision": "32-true",
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "model.init_args.teacher.init_args.path": "sd15",
    "model.init_args.teacher.init_args.dtype": "float32",
    "model.init_args.student.init_args.rank": 2,
    "model.init_args.fake_score.init_args.rank": 2,
    "model.init_args.fake_score_steps": 1,
    "model.init_args.num_steps": 2,
    "model.init_args.accumulate_grad_batches": 1,
    "data.init_args.path": "store",
    "data.init_args.batch_size": 2,
}
GRID = {
    "class_path": "SampleGrid",
    "init_args": {
        "every_n_steps": 1,
        "num_samples": 3,
        "teacher_steps": 1,
        "strip": 2,
        "strip_samples": 1,
        "decoder": {"class_path": "PixelDecoder", "init_args": {"path": "sd15"}},
    },
}
RECIPE = Path(__file__).parents[1] / "configs" / "recipe" / "sdxl_dmd2_4step_lora.yaml"


def pipeline(folder):
    """A Stable Diffusion 1.5 of which every part is there, tiny and random."""
    tiny_text.vae(tiny_text.sd15(folder))
    index = json.loads((folder / "model_index.json").read_text())
    shutil.rmtree(folder / "scheduler")
    tiny_pipelines.sd15().save(folder)
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A folder with a pipeline, a store of embeddings, and a run that drew pictures on its way."""
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LIGHTNING_DISTILL_CACHE", str(folder / "cache"))
        pipeline(Path("sd15"))
        Path("p.txt").write_text("\n".join(f"a {word} cat" for word in tiny_text.WORDS[:5]))
        words = ["--pipeline", "sd15", "--prompts", "p.txt", "--out", "store", "--device", "cpu", "--dtype", "float32"]
        assert main(["cache", *words]) == 0
        shutil.copy("store/null_cond.safetensors", "sd15")
        config = yaml.safe_load(RECIPE.read_text())
        config["trainer"]["callbacks"] = [GRID]
        Path("c.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "-c", "c.yaml", *(f"--{key}={value}" for key, value in SETTINGS.items())]) == 0
    (found,) = folder.rglob("config.yaml")
    return found.parent


@pytest.fixture(autouse=True)
def here(text_run, monkeypatch):
    monkeypatch.chdir(next(p for p in text_run.parents if (p / "sd15").is_dir()))


def test_pictures_in_a_run_with_a_real_length_of_prompts(text_run):
    assert load_file("sd15/null_cond.safetensors")["encoder_hidden_states"].shape == (1, 12, 8)
    names = sorted(p.name for p in (text_run / "samples").iterdir())
    assert names == ["step_000001.png", "step_000002.png", "strip_000001.png", "strip_000002.png"]


def test_samples_of_the_data_of_a_run(text_run, tmp_path, capsys):
    assert main(["sample", str(text_run), "--n", "7", "--seed", "3", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "encoder_hidden_states: of the first rows of the run's CachedConditions" in told
    assert "this run makes latents of shape (4, 8, 8), which are no pictures; lightning-distill export" in told
    arrays = np.load(tmp_path / "samples.npz")
    assert "images" not in arrays
    assert not (tmp_path / "samples.png").exists()
    module = load_run(text_run)
    cond = Store("store").gather(torch.arange(7) % 5)
    expected = module.sample(7, cond, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(arrays["x0"], expected.numpy(), atol=1e-4)


def test_a_guidance_scale_is_the_students(text_run, tmp_path):
    found = []
    for words in ([], ["--guidance", "4"]):
        assert main(["sample", str(text_run), "--n", "2", "--out", str(tmp_path), *words]) == 0
        found.append(np.load(tmp_path / "samples.npz")["x0"])
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_prompts_and_lost_data(text_run, tmp_path, capsys):
    assert main(["sample", str(text_run), "--prompt", "a cat"]) == 2
    assert f"lightning-distill export {text_run} OUT, and sample OUT" in capsys.readouterr().err
    Path("store").rename("away")
    try:
        assert main(["sample", str(text_run), "--out", str(tmp_path)]) == 2
    finally:
        Path("away").rename("store")
    told = capsys.readouterr().err
    assert "needs encoder_hidden_states for every sample, and the data of its run do not give them (store" in told
    assert "sample OUT --prompt TEXT" in told
    assert not list(tmp_path.iterdir())
