"""Two processes with half the batch each train what one process trains with the whole batch, for every method.

One pair of processes runs all cases of all strategies (see ``rank_runs``): by default one case under either strategy,
``long`` a few under each, ``slow`` every case of every method under all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rank_runs import CASES, named, start, train

from lightning_distill.methods import LearnedSolver

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),
]

STRATEGIES = ["role_ddp", "role_fsdp2"]
PLAIN = "ddp_find_unused_parameters_true"
CONTROL = "without_averaging"
#: micro-batches, taps that end a forward
FIRST = [("role_ddp", "accumulate"), ("role_fsdp2", "unet_gan")]
#: shared backbones, parameters that only some micro-batches reach, blocks
SAMPLE = [
    *(("role_ddp", name) for name in ("told_interval_lora", "rare_expert")),
    ("role_fsdp2", "dit_lora"),
    (PLAIN, "gan_fake_score"),
    ("replicated", "gan_fake_score"),
]
#: says so before anything runs
REFUSED = [("role_fsdp2", case.name) for case in CASES if case.method is LearnedSolver]
#: a further way to shard
SPECIAL = [("whole_networks", "dit_lora")]


def everything() -> list[tuple[str, str]]:
    product = [(strategy, case.name) for strategy in [*STRATEGIES, PLAIN] for case in CASES]
    return [*SPECIAL, *(pair for pair in product if pair not in REFUSED)]


def runs(folder: Path, plan: list[tuple[str, str]]) -> Path:
    by_strategy: dict[str, list[str]] = {}
    for strategy, name in plan:
        by_strategy.setdefault(strategy, []).append(name)
    start(folder, json.dumps(by_strategy), timeout=1500)
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return runs(tmp_path_factory.mktemp("first"), [*FIRST, (CONTROL, "one_step")])


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    return runs(tmp_path_factory.mktemp("sample"), SAMPLE)


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    return runs(tmp_path_factory.mktemp("all"), everything())


def distances(folder: Path, strategy: str, name: str) -> tuple[dict[str, float], float]:
    """By tensor, how far two processes are from one, relative to its size; and how far they are from each other."""
    error = folder / strategy / f"{name}.error"
    assert not error.exists(), error.read_text()
    first, second = (torch.load(folder / strategy / f"{name}{end}") for end in (".pt", ".second.pt"))
    (case,) = named([name])
    one = train(case, folder / "one" / strategy / name)
    assert one.keys() == first.keys()
    assert any(key.startswith(("student.", "schedule.")) for key in one)
    far = {
        key: float((first[key].double() - value.double()).abs().max()) / max(1.0, float(value.abs().max()))
        for key, value in one.items()
    }
    apart = max(float((first[key].double() - second[key].double()).abs().max()) for key in one)
    return far, apart


def check(folder: Path, strategy: str, name: str) -> None:
    far, apart = distances(folder, strategy, name)
    worst = max(far, key=far.__getitem__)
    assert far[worst] < 1e-5, f"{worst} is off by {far[worst]:.1e}"
    assert apart == 0.0


@pytest.mark.parametrize(("strategy", "name"), FIRST)
def test_two_processes_train_what_one_does(first, strategy, name):
    check(first, strategy, name)


def test_the_comparison_can_fail(first):
    far, apart = distances(first, CONTROL, "one_step")
    assert max(far.values()) > 1e-3
    assert apart > 1e-3


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "name"), SAMPLE)
def test_two_processes_train_more_cases_as_one_does(sampled, strategy, name):
    check(sampled, strategy, name)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "name"), everything())
def test_every_case_on_two_processes(all_runs, strategy, name):
    check(all_runs, strategy, name)
