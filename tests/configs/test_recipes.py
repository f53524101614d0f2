"""What the comments of the recipes promise: where things come from, and that the commands named make what is read."""

import re
import shlex
from pathlib import Path

import pytest
from recipe_stand_ins import conditions_of, pairs_of, stand_in, tiny_of
from shipped import FILES, ROOT, load

from lightning_distill.cli import main
from lightning_distill.commands import cache
from lightning_distill.commands.trajectories import teacher_spec
from lightning_distill.configs import config_path
from lightning_distill.data.store import Store
from lightning_distill.trajectories import teacher_fingerprint

RECIPES = [name for name in FILES if name.startswith("recipe/")]


def comment(name):
    """The comment at the head of a file, without its marks."""
    text = config_path(name).read_text()
    return "\n".join(line.removeprefix("#") for line in text[: text.index("seed_everything")].splitlines())


def commands(name):
    """The words of every command of "Before:", as a shell would split them."""
    _, before = comment(name).split("Before:")
    lines = before.replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if line.strip().startswith("lightning-distill ")]
    assert all(words[0] == "lightning-distill" for words in found)
    return [words[1:] for words in found]


def option(words, name):
    return words[words.index(name) + 1]


def folders(config, where=""):
    """Every relative path in a configuration, by its key."""
    if isinstance(config, dict):
        return {k: v for key, value in config.items() for k, v in folders(value, f"{where}.{key}").items()}
    if isinstance(config, list):
        return {k: v for i, value in enumerate(config) for k, v in folders(value, f"{where}.{i}").items()}
    is_loss_weight = where.startswith(".model.init_args.loss_weights")
    return {where: config} if isinstance(config, str) and "/" in config and not is_loss_weight else {}


@pytest.mark.parametrize("name", RECIPES)
def test_everything_that_is_read_is_made_by_a_command_of_the_comment(name):
    config = load(name)
    read = folders(config)
    model = read.pop(".model.init_args.teacher.init_args.path")
    made = {option(words, "--out"): words for words in commands(name)}
    assert set(read.values()) == set(made), "no more and no less"
    for words in made.values():
        if words[0] == "cache":
            given = cache._parser().parse_args(words[1:])
            assert given.pipeline == model
            assert bool(given.images) == config["data"]["class_path"].endswith("CachedLatents")
        else:
            assert words[0] == "trajectories"
            assert option(words, "--cond") == str(conditions_of(config))
            assert option(words, "--out") == str(pairs_of(config))
            assert float(option(words, "--guidance")) == config["model"]["init_args"]["guidance"]["init_args"]["scale"]
    if (store := conditions_of(config)) is not None:
        assert next(iter(made)) == str(store), "pairs are made with the conditions of the store"


@pytest.mark.parametrize("name", RECIPES)
def test_source_strategy_and_memory_are_stated(name):
    text = comment(name)
    source = re.search(r"^ Source: (.*?)^ (?:Strategy|Memory):", text, re.DOTALL | re.MULTILINE).group(1)
    assert re.search(r"arXiv:\d{4}\.\d{5}\b", source)
    strategies = re.findall(r"configs/(strategy/\w+\.yaml)", text)
    assert strategies
    assert all((ROOT / strategy).is_file() for strategy in strategies)
    assert re.search(r"^ Memory: docs/recipes.md", text, re.MULTILINE)
    assert f"lightning-distill plan -c configs/{name}" in text
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert f"](../configs/{name})" in page.read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_guided_text_models_say_where_the_unconditional_embedding_goes(name):
    config = load(name)["model"]["init_args"]
    assert ("guidance" in config) == ("null_cond.safetensors" in comment(name))
    tiny = tiny_of(Path(config["teacher"]["init_args"]["path"]))
    # a network that is told its guidance has no second pass, nor has one that always knows a class
    assert ("guidance" in config) == (tiny.guidance is None and bool(tiny.cond_shapes))


@pytest.mark.sparse(4, test=2)
@pytest.mark.parametrize("name", [name for name in RECIPES if pairs_of(load(name)) is not None])
def test_the_teacher_of_the_pairs_is_that_of_the_recipe(name, tmp_path, monkeypatch):
    """The command of the comment makes pairs that the recipe takes: its teacher, its conditions, its guidance."""
    monkeypatch.chdir(tmp_path)
    config, pairs = load(name), str(pairs_of(load(name)))
    fitting = stand_in(config)
    shape = Store(pairs).key["shape"]
    (words,) = (words for words in commands(name) if words[0] == "trajectories")
    Path("pairs").rename("stand_in_pairs")
    small = ["--num=4", "--steps=1", "--batch-size=4", "--device=cpu"]
    if "--shape" in words:
        small += ["--shape", *map(str, shape)]
    assert main([*words, *small]) == 0
    run = ["-c", str(config_path(name)), *fitting, "--trainer.accelerator=cpu", "--data.init_args.batch_size=2"]
    assert main(["fit", *run, "--trainer.fast_dev_run=true"]) == 0
    spec = teacher_spec(option(words, "--teacher"))
    assert Store(pairs).key["teacher"] == teacher_fingerprint(spec.build())
    spec.dtype = "float32" if spec.dtype == "bfloat16" else "bfloat16"
    assert Store(pairs).key["teacher"] != teacher_fingerprint(spec.build()), "another dtype, another teacher"
