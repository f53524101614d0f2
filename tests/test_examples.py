"""Examples run as a user runs them; those for big models get a tiny one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_distill.configs import config_path

EXAMPLES = Path(__file__).parents[1] / "examples"
from recipe_stand_ins import stand_in  # noqa: E402
from test_adm_weights import HEAD, LAYERS, weights  # noqa: E402


def words(name):
    """Arguments of an example, with what they name written below the current folder."""
    if name == "imagenet64_teacher.py":
        torch.save(weights(), "tiny.pt")
        return ["tiny.pt", "teacher", "--size", "16", "--layers", str(LAYERS), "--head", str(HEAD)]
    if name != "sdxl_lora_one_gpu.py":
        return []
    config = yaml.safe_load(config_path("recipe/sdxl_dmd2_4step_lora.yaml").read_text())
    stand_in(config)
    model = config["model"]["init_args"]["teacher"]["init_args"]["path"]
    cache = config["data"]["init_args"]["path"]
    return ["--model", model, "--cache", cache, "--out", "run", "--rank", "2", "--updates", "1", "--batch", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, EXAMPLES / name, *words(name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
