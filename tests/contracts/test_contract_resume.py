"""A run that is interrupted and resumed ends exactly where the uninterrupted one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from method_cases import CASES, EPOCH, Case, dmd2, flow_mlp, points, trainer, without_data

from lightning_distill.checkpoints import restore_generators
from lightning_distill.methods import DMD2
from lightning_distill.networks.roles import Lora

pytestmark = pytest.mark.filterwarnings(
    "ignore:ConstantEMA",
    "ignore:.*eval mode",
    "ignore:Using ModelCheckpoint with manual",
    "ignore:Checkpoint directory",
    "ignore:Be aware",
)

STEPS = EPOCH + 3


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two checkpoints differ in any bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"]


class Batches(Callback):
    """The data each cycle sees, and the update that its draws belong to."""

    def __init__(self):
        self.seen, self.updates = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([batch.x0, *batch.cond.values()])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.updates.append(pl_module.draws.update)


def final_state(case, module, path, loader=None, ckpt_path=None, **settings):
    seen = Batches()
    loader = loader or case.loader(module)
    fit = trainer(STEPS, callbacks=[seen, *settings.pop("callbacks", [])], **settings)
    fit.fit(module, loader, ckpt_path=ckpt_path)
    fit.save_checkpoint(path)
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == STEPS
    assert seen.updates == list(range(STEPS))[-len(seen.seen) :]  # across epochs: no noise comes twice
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "lightning_distill", "global_step", "epoch")
    return {**{key: state[key] for key in kept}, "position": loader.state_dict()}, seen.seen


def check_resume(case, build, folder, stops):
    every = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    want, batches = final_state(case, build(), folder / "whole.ckpt", callbacks=[every], enable_checkpointing=True)
    for stop in stops:
        torch.manual_seed(1000 + stop)  # a fresh process has another global state
        module = build()
        path = folder / f"step={stop}.ckpt"
        got, rest = final_state(case, module, folder / "resumed.ckpt", ckpt_path=path)
        assert not differences(batches[stop:], rest)
        assert not differences(want, got)
        assert differences(want["state_dict"], torch.load(path, weights_only=True)["state_dict"])


@pytest.mark.sparse(6)
def test_resumed_runs_are_uninterrupted_runs_bit_for_bit(case, build, tmp_path):
    """Stops within an epoch, on its last batch and within the next one."""
    stops = (2, EPOCH, EPOCH + 1) if case.name in ("one_step", "shared_3", "gan_fake_score") else (3,)
    check_resume(case, build, tmp_path, stops)


@pytest.mark.parametrize("name", ["shifted_residual", "easier_condition"])
def test_frozen_copies_of_adapters_are_kept(name, tmp_path):
    """Targets that are adapters live in the teacher's network, too."""
    case = next(case for case in CASES if case.name == name)
    check_resume(case, lambda: case.build(tmp_path, student=Lora(rank=2)), tmp_path, [2, 4])


def test_global_generators_are_restored(tmp_path):
    """Dropout of adapters is the one draw that comes from them."""
    lora = dmd2(student=lambda: Lora(rank=2, dropout=0.3), fake_score=lambda: Lora(rank=2))
    case = Case("dropout", DMD2, flow_mlp, lambda: without_data(points()), lora)
    check_resume(case, lambda: case.build(tmp_path), tmp_path, (2,))


def states_of(*seeds):
    kept = torch.get_rng_state()
    states = torch.stack([torch.manual_seed(seed).get_state() for seed in seeds])
    torch.set_rng_state(kept)
    return {"cpu": states}


def drawn(states, rank, world_size):
    """What a process draws after its generators have been restored."""
    restore_generators(states, rank, world_size)
    return float(torch.rand(()))


def test_each_process_gets_its_own_generator_back():
    with torch.random.fork_rng():
        want = [float(torch.manual_seed(seed) and torch.rand(())) for seed in (5, 6)]
        assert [drawn(states_of(5, 6), rank, 2) for rank in range(2)] == want
        # another number of processes: the one state that all had, or new ones that differ
        assert [drawn(states_of(5, 5), rank, 3) for rank in range(3)] == [want[0]] * 3
        others = [drawn(states_of(5, 6), rank, 3) for rank in range(3)]
        assert len({*others, *want}) == 5
        assert [drawn(states_of(5, 6), rank, 3) for rank in range(3)] == others
        assert drawn(states_of(5, 7), 0, 1) not in others
        # what earlier versions wrote
        assert [drawn({"cpu": states_of(5)["cpu"][0]}, rank, 2) for rank in range(2)] == [want[0]] * 2


def test_weights_loaded_outside_a_run_leave_the_generators_alone(tmp_path):
    case = next(c for c in CASES if c.name == "one_step")
    module = case.build(tmp_path)
    fit = trainer(1)
    fit.fit(module, case.loader(module))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    other = case.build(tmp_path)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    other.on_load_checkpoint(saved)
    other.load_state_dict(saved["state_dict"])
    assert torch.equal(torch.get_rng_state(), before)
    assert not differences(dict(module.state_dict()), dict(other.state_dict()))


def test_stopped_runs_are_resumed_too(tmp_path):
    """A run that reached its own max_steps, and is then asked for more."""
    case = next(c for c in CASES if c.name == "gan_fake_score")
    want, batches = final_state(case, case.build(tmp_path), tmp_path / "whole.ckpt")
    torch.manual_seed(0)  # as the uninterrupted run
    first = case.build(tmp_path)
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, filename="first")
    trainer(3, callbacks=[saving], enable_checkpointing=True).fit(first, case.loader(first))
    got, rest = final_state(case, case.build(tmp_path), tmp_path / "second.ckpt", ckpt_path=tmp_path / "first.ckpt")
    assert not differences(want, got)
    assert not differences(batches[3:], rest)


def test_differences_are_found():
    state = {"a": [torch.zeros(2), 1.0], "b": {"c": "x"}}
    assert not differences(state, {"a": [torch.zeros(2), 1.0], "b": {"c": "x"}})
    assert differences(state, {"a": [torch.tensor([0.0, 1e-30]), 1.0], "b": {"c": "x"}}) == ["/a[0]"]
    assert differences(state, {"a": [torch.zeros(2), 1.0], "b": {}}) == ["/b: keys ['c']"]
