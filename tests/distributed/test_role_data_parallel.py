"""The reducer and its strategy: bytes, buckets, first weights, parameters without gradients, non-finite losses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_runs import start
from torch import nn

from lightning_distill.strategies.reducer import GradientReducer, _views, buckets_of

pytestmark = pytest.mark.filterwarnings("ignore")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "reduce_bytes.py"


# ------------------------------------------------------------------------------------------------ parts
def test_buckets_keep_the_order_and_never_mix_dtypes():
    tensors = [torch.zeros(n, dtype=d) for n, d in [(4, torch.float32), (2, torch.float64), (1, torch.float32)]]
    tensors += [torch.zeros(8), torch.zeros(1)]
    # 16 bytes close a bucket: [0] is full at once, [1] too; 2 waits for 3
    assert buckets_of(tensors, [0, 1, 2, 3, 4], 16) == [[0], [1], [2, 3], [4]]
    assert buckets_of(tensors, [4, 3, 2, 1, 0], 10**6) == [[4, 3, 2, 0], [1]]
    assert buckets_of(tensors, [], 16) == []


def test_views_have_the_memory_format_of_the_parameters():
    like = [torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.zeros(5), torch.zeros(3, 2).t()]
    flat = torch.arange(sum(t.numel() for t in like), dtype=torch.float32)
    views = list(_views(flat, like))
    assert [v.shape for v in views] == [t.shape for t in like]
    assert views[0].is_contiguous(memory_format=torch.channels_last)
    assert sorted(torch.cat([v.flatten() for v in views]).tolist()) == flat.tolist()  # every place once
    views[1].fill_(-1.0)
    assert int((flat == -1.0).sum()) == 5  # and not a copy


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_outside_of_begin_and_finish_are_left_alone(one_process):
    layer = nn.Linear(3, 2)
    reducer = GradientReducer(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    assert reducer.bytes_reduced == 0
    before = layer.weight.grad.clone()
    reducer.begin()
    layer(torch.ones(1, 3)).sum().backward()
    reducer.finish()
    torch.testing.assert_close(layer.weight.grad, 2 * before)  # what had been accumulated is part of the average
    assert reducer.bytes_reduced == 4 * 8
    reducer.close()
    reducer.begin()
    layer(torch.ones(1, 3)).sum().backward()
    assert not reducer._ready
    assert reducer._buckets[0].waiting == {0, 1}


def test_parameters_without_gradient_join_with_their_first(one_process):
    used, unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
    reducer = GradientReducer([used, unused])

    def backward(*parameters):
        for parameter in (used, unused):
            parameter.grad = None
        reducer.begin()
        sum(p.sum() for p in parameters).backward()
        reducer.finish()

    backward(used)
    assert unused.grad is None
    assert reducer.bytes_reduced == 8
    backward(used, unused)
    assert torch.equal(unused.grad, torch.ones(2))
    assert reducer.bytes_reduced == 8 + 16
    backward(used)
    assert torch.equal(unused.grad, torch.zeros(2))


def test_buckets_start_while_the_backward_pass_runs(one_process, monkeypatch):
    net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    reducer = GradientReducer(net.parameters(), bucket_bytes=64)
    events = []
    net[0].weight.register_hook(lambda _: events.append("first layer"))
    original = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, *a, **k: events.append(t.numel()) or original(t, *a, **k))
    for _ in range(2):
        net.zero_grad()
        events.clear()
        reducer.begin()
        net(torch.ones(1, 4)).sum().backward()
        reducer.finish()
    assert events == [16, 16, "first layer", 16]


# ------------------------------------------------------------------------------------------------ two processes
@pytest.mark.slow
@pytest.mark.distributed
def test_a_step_moves_the_bytes_of_the_network_that_steps(tmp_path):
    out = tmp_path / "rows.json"
    start("--teacher", "digits", "--into", out, script=BENCHMARK)
    rows = json.loads(out.read_text())
    ours = [row for row in rows if row["strategy"] == "role_ddp"]
    plain = [row for row in rows if row["strategy"] != "role_ddp"]
    assert len(ours) == len(plain) == 4
    for row in ours:
        assert row["bytes"] == row["parameter_bytes"] > 0
    for row in plain:  # student and fake score are equally large here, and both are always reduced
        assert row["bytes"] == 2 * row["parameter_bytes"]


SCRIPT = """
import json, os, sys
sys.path.insert(0, {here!r})
from rank_runs import *
from lightning_distill.strategies.role_data_parallel import check_teacher

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
(case,) = named(["gan_fake_score"])
found = {{}}


def runs(label, change, strategy, **settings):
    module = build(case, folder / f"files{{rank}}", **settings)
    change(module)
    try:
        state = train(case, folder / f"files{{rank}}", strategy, rank, 2, module=module)
        found[label] = {{"sum": float(sum(v.double().abs().sum() for v in state.values())),
                         "skipped": state["skipped_steps"].tolist(),
                         "unused": None if not hasattr(module.student, "unused") else module.student.unused.grad}}
    except Exception as error:
        found[label] = {{"error": str(error)}}


def other_start(module):
    if rank == 1:
        with torch.no_grad():
            for p in [*module.student.parameters(), *module.fake_score.parameters(), *module.student_ema.parameters()]:
                p.add_(1.0)


def one_sided_nan(module):
    original = module.weighted_sum

    def weighted_sum(phase, terms):
        loss = original(phase, terms)
        return loss * float("nan") if rank == 1 and phase == "student" and module.draws.update == 1 else loss

    module.weighted_sum = weighted_sum


def unused(module):
    module.student.unused = torch.nn.Parameter(torch.zeros(3))
    module.forget_parameters()


def other_teacher(module):
    if rank == 1:
        with torch.no_grad():
            next(module.teacher.parameters()).add_(1.0)


def stray(module):
    original = module.student_loss

    def student_loss(batch):
        module.running_phase = None
        return original(batch)

    module.student_loss = student_loss


for name in ("role_ddp", "role_fsdp2"):
    runs(f"{{name}}/plain", lambda module: None, name)
    runs(f"{{name}}/nan", one_sided_nan, name)
    runs(f"{{name}}/other teacher", other_teacher, name)
runs("role_ddp/other start", other_start, "role_ddp")
runs("role_fsdp2/other start", other_start, "role_fsdp2")
runs("role_ddp/unused", unused, "role_ddp", ema=[])
runs("role_ddp/stray", stray, "role_ddp")
(folder / f"found{{rank}}.json").write_text(json.dumps(found))
leave()
"""


ACCUMULATED = """
import json, os, sys
sys.path.insert(0, {here!r})
from rank_runs import *
from lightning_distill.strategies.reducer import GradientReducer

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
dist.init_process_group("gloo")
found = {{}}
for label, ranks in (("all", (0, 1)), ("first", (0,)), ("second", (1,))):
    used, early, never = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    reducer = GradientReducer([early, used, never])
    factor = rank + 1.0
    (factor * (used.sum() + (10.0 * early.sum() if rank in ranks else 0.0))).backward()
    reducer.begin()
    (factor * used.sum()).backward()
    reducer.finish()
    found[label] = [None if p.grad is None else p.grad.tolist() for p in (used, early, never)]
    reducer.close()
(folder / f"accumulated{{rank}}.json").write_text(json.dumps(found))
leave()
"""


@pytest.mark.distributed
def test_gradients_of_earlier_micro_batches_are_averaged(tmp_path):
    """A parameter that only micro-batches before the last reach, on all processes or on one of them."""
    script = tmp_path / "script.py"
    script.write_text(ACCUMULATED.format(here=str(Path(__file__).parent)))
    start(tmp_path, script=script)
    first, second = (json.loads((tmp_path / f"accumulated{rank}.json").read_text()) for rank in range(2))
    assert first == second
    want = {"all": 15.0, "first": 5.0, "second": 10.0}  # means of 10 and 20, where they are
    assert first == {label: [[3.0, 3.0], [early, early], None] for label, early in want.items()}


@pytest.mark.long
@pytest.mark.distributed
def test_start_skipping_and_refusals(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    start(tmp_path, script=script)
    first, second = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for name in ("role_ddp", "role_fsdp2"):
        assert first[f"{name}/plain"]["skipped"] == [0.0, 0.0]
        assert first[f"{name}/nan"]["skipped"] == [1.0, 0.0]
        assert math.isfinite(first[f"{name}/nan"]["sum"])
        assert "different teachers" in first[f"{name}/other teacher"]["error"]
    assert first["role_ddp/other start"] == first["role_ddp/plain"]  # the first process' weights won
    assert "different networks" in first["role_fsdp2/other start"]["error"]
    assert first["role_ddp/unused"]["unused"] is None
    assert "outside of a phase" in first["role_ddp/stray"]["error"]
