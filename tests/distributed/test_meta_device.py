"""Networks that only the first process has read train as if every process had, and no other process ever holds one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rank_meta import PIPELINES
from rank_runs import start
from tiny_pipelines import MAKERS
from torch import nn

from lightning_distill.strategies.handed_out import structure, take_off

NAMES = [*PIPELINES, "new"]


def test_values_are_kept_on_request_only_and_tied_ones_are_refused():
    network = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(2, 2, 1).to(memory_format=torch.channels_last), nn.Linear(3, 2))
    network[2].bias.requires_grad_(False)
    before, described = {name: p.detach().clone() for name, p in network.named_parameters()}, structure(network)
    values = take_off(network, keep=True)
    assert values.keys() == before.keys()
    assert all(torch.equal(values[name], before[name]) for name in before)
    assert all(p.is_meta for p in network.parameters())
    assert structure(network) == described
    assert "2.bias (2,) torch.float32 False" in described.splitlines()
    assert take_off(network, keep=False) == {}
    network[2].weight = network[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 2\.weight are one tied parameter"):
        take_off(network, keep=True)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def name(request):
    """Of the case."""
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, name):
    """What two processes made of it in both ways."""
    root = tmp_path_factory.mktemp("meta")
    if name in PIPELINES:
        MAKERS[name]().save(root / name)
    start(root, name, script=Path(__file__).parent / "rank_meta.py")
    return root


@pytest.mark.distributed
def test_all_tensors_are_those_of_the_usual_construction(folder, name):
    usual = torch.load(folder / f"{name}-usual-0.pt")
    assert usual.keys() == torch.load(folder / f"{name}-meta-0.pt").keys()
    for rank in range(2):
        meta = torch.load(folder / f"{name}-meta-{rank}.pt")
        assert [key for key, value in usual.items() if not torch.equal(value, meta[key])] == []


@pytest.mark.distributed
def test_no_process_but_the_first_holds_a_network(folder, name):
    first, second = (json.loads((folder / f"counts{rank}.json").read_text()) for rank in range(2))
    usual, meta = f"{name}-usual", f"{name}-meta"
    assert first[usual]["teacher"] == first[meta]["teacher"] == second[meta]["teacher"]
    assert second[meta]["built"] < 0.15 * second[usual]["built"]  # buffers, heads
    assert second[meta]["peak"] < 0.7 * second[usual]["peak"]
    assert first[meta]["built"] == first[usual]["built"]
