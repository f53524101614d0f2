"""What the text of every shipped configuration promises."""

import inspect
import json
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from shipped import COMPLETE, FILES, ROOT, load

from lightning_distill.cli import import_everything
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


@cache
def classes():
    """Those of the package by name, as a configuration names them."""
    import_everything()
    ours = [module for name, module in sys.modules.items() if name.startswith("lightning_distill")]
    return {k: v for module in ours for k, v in vars(module).items() if inspect.isclass(v)}


@cache
def settings_of(name):
    """Names of the arguments of a class, those included that it passes on to its bases."""
    module, _, last = name.rpartition(".")
    cls = getattr(import_module(module), last) if module else classes()[last]
    found = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {p.name for p in parameters}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return found - {"self"}


def unknown_settings(value, place=""):
    """Arguments in a configuration that their classes do not have."""
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in unknown_settings(item, f"{place}[{i}]")]
    if not isinstance(value, dict):
        return []
    given = set(value["init_args"]) if "class_path" in value and "init_args" in value else set()
    own = [f"{place}: {key}" for key in sorted(given - settings_of(value["class_path"]))] if given else []
    return own + [found for key, item in value.items() for found in unknown_settings(item, f"{place}.{key}")]


@pytest.mark.parametrize("name", FILES)
def test_classes_have_the_arguments_given(name):
    """What a run would say after seconds of parsing, for each file (``test_runs`` starts some of them)."""
    assert unknown_settings(load(name)) == []


def test_unknown_arguments_are_found():
    config = load("method/dmd2_ring4.yaml")
    config["model"]["init_args"]["num_stepz"] = 1
    config["model"]["init_args"]["teacher"]["init_args"]["problm"] = "ring4"
    found = unknown_settings(config)
    assert [text.rsplit(": ")[1] for text in found] == ["num_stepz", "problm"]


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
