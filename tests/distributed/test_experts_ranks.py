"""Experts that only one of two processes has samples for learn, and answer, what they do in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rank_experts
import torch
import torch.distributed as dist
from rank_experts import CASES
from rank_runs import start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import ExpertNetwork, Experts
from lightning_distill.processes import FlowMatching
from lightning_distill.strategies.sharding import block_names, shard_network

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),
]

FAST = [
    ("role_ddp", "student"),
    ("role_fsdp2", "student"),
    ("whole_networks", "student"),
    ("role_ddp", "left_out"),
    ("role_fsdp2", "left_out"),
    ("role_fsdp2", "unmet"),
    ("role_fsdp2", "told_step"),
    ("role_fsdp2", "two_times"),
    ("role_ddp", "two_times"),
]
BY_CLASS = ("student", "unmet", "dit", "told_step")
EVERYTHING = [
    *(("role_ddp", name) for name in BY_CLASS),
    *((strategy, case.name) for strategy in ("role_fsdp2", "whole_networks") for case in CASES),
]
SLOW = [*(pair for pair in EVERYTHING if pair not in FAST), ("replicated", "student")]


def runs(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    plan: dict[str, list[str]] = {}
    for strategy, name in pairs:
        plan.setdefault(strategy, []).append(name)
    start(folder, json.dumps(plan), script=Path(rank_experts.__file__), timeout=400)
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return runs(tmp_path_factory.mktemp("fast"), FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return runs(tmp_path_factory.mktemp("slow"), SLOW)


def check(folder: Path, strategy: str, name: str) -> None:
    """Weights, averages and predictions are those of one process with the whole batch."""
    error = folder / strategy / f"{name}.error"
    assert not error.exists(), error.read_text()
    first, second = (torch.load(folder / strategy / f"{name}.{rank}.pt") for rank in (0, 1))
    (case,) = (case for case in CASES if case.name == name)
    one = rank_experts.run(case, folder / "one" / strategy / name)
    assert one.keys() == first.keys() | second.keys()
    assert sum(key.startswith("sampled ") for key in one) >= 4
    for key, value in one.items():
        for got in (first, second):
            if key in got or not key.startswith("sampled "):
                torch.testing.assert_close(
                    got[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
                )


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "name"), FAST)
def test_two_processes_train_the_experts_that_one_does(fast, strategy, name):
    check(fast, strategy, name)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "name"), SLOW)
def test_more_experts_on_two_processes(slow, strategy, name):
    check(slow, strategy, name)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_blocks_of_all_experts_are_groups(mesh):
    student = Experts(classes=[[0], [1, 2]]).build(rank_experts.flow_dit(), "student")
    assert student.block_names() == ["experts.0.transformer_blocks.0", "experts.1.transformer_blocks.0"]
    assert block_names(student) == []  # that are read from outside
    student = Experts(boundaries=[0.5]).build(rank_experts.flow_mlp(), "student")
    names = block_names(student)
    depth = len(student.network.experts[0].blocks)
    assert names == [f"experts.{k}.blocks.{i}" for k in range(2) for i in range(depth)]
    assert not student.network.sharded
    shard_network(student.network, names, mesh)
    assert student.network.sharded
    assert {n for n, part in student.network.named_modules() if isinstance(part, FSDPModule)} == {"", *names}


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("lists", [False, True])
def test_an_expert_without_samples_here_runs_on_a_row_and_adds_nothing(monkeypatch, value, lists):
    class Scale(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor, self.rows = nn.Parameter(torch.tensor(factor)), []

        def forward(self, x, time, class_labels):
            assert len(x) == len(time) == len(class_labels)
            self.rows.append(len(x))
            return [self.factor * row for row in x] if lists else self.factor * x

    parts = [Scale(2.0), Scale(value), Scale(3.0)]
    network = ExpertNetwork(parts)
    network.route = lambda x, time, kwargs: kwargs["class_labels"]
    x, t, labels = torch.arange(1.0, 7.0).view(3, 2), torch.ones(3), torch.tensor([2, 0, 2])
    given = list(x) if lists else x

    def called():
        out = network(given, t, class_labels=labels)
        return torch.stack(out) if lists else out

    want = called().detach()
    assert [part.rows for part in parts] == [[1], [], [2]]
    # somewhere else there are samples of the second
    elsewhere = torch.tensor([0, 1, 0])
    monkeypatch.setattr("lightning_distill.networks.experts.max_over_processes", lambda counts: counts + elsewhere)
    network.sharded = True
    out = called()
    assert torch.equal(out, want)
    assert [part.rows for part in parts] == [[1, 1], [1], [2, 2]]
    out.sum().backward()
    assert [float(part.factor.grad) for part in parts] == [7.0, 0.0, 14.0]


def test_experts_with_batch_normalisation_are_not_sharded(mesh):
    class Normalised(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.norm = nn.BatchNorm1d(2)

    student = Experts(boundaries=[0.5]).build(Denoiser(Normalised(), FlowMatching(), "flow_prediction"), "student")
    with pytest.raises(ValueError, match=r"batch normalisation in Normalised would count; use strategy=role_ddp"):
        shard_network(student.network, [], mesh)
