"""What the text of every shipped configuration promises."""

import json
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from shipped import COMPLETE, ROOT, load

from lightning_distill.configs import config_path
from lightning_distill.networks.small import small_text_unet


@pytest.mark.parametrize("name", COMPLETE)
def test_is_complete_and_explained(name):
    text = config_path(name).read_text()
    assert text.startswith("# "), "the first line says what it is for"
    config = load(name)
    assert config["seed_everything"] == 0
    assert config["trainer"]["max_steps"] > 0


@pytest.mark.parametrize("name", COMPLETE)
def test_schedules_end_with_the_run(name):
    config = load(name)
    settings = config["model"]["init_args"]
    for key, value in settings.items():
        schedule = value["init_args"] if key.endswith("_scheduler") else {}
        if schedule.get("decay", "none") != "none":
            waiting = settings.get("regression_steps", 0) if key != "student_scheduler" else 0
            assert schedule["total_steps"] == config["trainer"]["max_steps"] - waiting
            assert schedule.get("decay_start", 0) < schedule["total_steps"]


def test_unknown_configurations_are_named():
    with pytest.raises(FileNotFoundError, match=r"method/nothing.yaml does not exist; that folder has .*dmd2"):
        config_path("method/nothing.yaml")


def test_the_folder_of_the_repository_is_the_shipped_one():
    top = Path(__file__).parents[2] / "configs"
    assert top.resolve() == ROOT.resolve()


def test_the_network_of_the_emoji_teacher_is_the_one_of_the_package():
    spec = load("teacher/emoji.yaml")["model"]["init_args"]["network"]["init_args"]["network"]
    made = UNet2DConditionModel(**spec["init_args"])
    settings = [json.loads(network.to_json_string()) for network in (made, small_text_unet())]
    assert settings[0] == settings[1]
