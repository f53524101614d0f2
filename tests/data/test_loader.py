"""The loader: order, ranks, position, and real interrupted runs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from lightning_distill.batch import Batch
from lightning_distill.data import DistillationDataModule, InMemory, ResumableLoader, Toy2D

pytestmark = pytest.mark.filterwarnings("ignore:Be aware", "ignore:Using ModelCheckpoint with manual")


def test_lists_of_conditions_go_with_their_samples():
    captions = [f"c{i}" for i in range(6)]
    source = InMemory(Batch(cond={"prompt": captions, "all": "same"}, x0=torch.arange(6.0)[:, None], size=6))
    batch = source.gather(torch.tensor([4, 0, 4]), 0)
    assert batch.cond == {"prompt": ["c4", "c0", "c4"], "all": "same"}
    assert batch.x0.flatten().tolist() == [4, 0, 4]


def numbers(n: int) -> InMemory:
    values = torch.arange(n)
    return InMemory(
        Batch(cond={"class_labels": values % 3}, x0=values[:, None].float(), noise=-values[:, None].float())
    )


class MapStyle(Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index % 3


def seen(loader) -> list[list[int]]:
    return [batch.x0.flatten().int().tolist() for batch in loader]


def test_an_epoch_shows_every_sample_once_and_epochs_differ():
    loader = ResumableLoader(numbers(100), batch_size=8, seed=3)
    first, second = seen(loader), seen(loader)
    assert len(first) == len(loader) == 12
    flat = [value for batch in first for value in batch]
    assert len(set(flat)) == 96
    assert first != second
    assert seen(ResumableLoader(numbers(100), batch_size=8, seed=3)) == first
    assert seen(ResumableLoader(numbers(100), batch_size=8, seed=4)) != first


def test_every_tensor_of_a_batch_is_gathered_by_the_same_indices():
    for batch in ResumableLoader(numbers(50), batch_size=7):
        assert torch.equal(batch.noise, -batch.x0)
        assert torch.equal(batch.cond["class_labels"], batch.x0.flatten().long() % 3)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is there")
def test_pinning_without_an_accelerator_leaves_batches_as_they_are():
    data = Toy2D(batch_size=8, pin_memory=True)
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.x0, next(iter(Toy2D(batch_size=8).train_dataloader())).x0)


def test_unshuffled_order_is_the_stored_one():
    assert seen(ResumableLoader(numbers(7), batch_size=2, shuffle=False)) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("n", [24, 37, 100, 5])
@pytest.mark.parametrize(("world_size", "local", "slices"), [(2, 4, 1), (3, 2, 1), (2, 3, 2), (4, 1, 5)])
def test_ranks_together_see_what_one_process_sees(n, world_size, local, slices):
    whole = ResumableLoader(numbers(n), local * world_size, slices=slices)
    parts = [
        ResumableLoader(numbers(n), local, slices=slices, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(2):
        expected, ranks = seen(whole), [seen(part) for part in parts]
        assert len({len(r) for r in ranks} | {len(expected)}) == 1
        for index, batch in enumerate(expected):
            # every slice of the single process is the concatenation of that slice over the ranks
            joined = [
                value for s in range(slices) for rank in ranks for value in rank[index][s * local : (s + 1) * local]
            ]
            assert joined == batch


def test_global_sample_index_has_its_documented_place():
    loader = ResumableLoader(numbers(40), batch_size=4, rank=1, world_size=2, seed=1)
    order = loader.order(0)
    for index, batch in enumerate(seen(loader)):
        assert batch == order[index * 8 + 4 : index * 8 + 8].tolist()


def test_a_source_smaller_than_a_batch_fills_it_by_repetition():
    (batch,) = seen(ResumableLoader(numbers(5), batch_size=12))
    counts = [batch.count(v) for v in range(5)]
    assert sum(counts) == 12
    assert set(counts) <= {2, 3}


@pytest.mark.parametrize("workers", [0, 2])
def test_map_style_data_sets_give_the_same_batches_as_tensors_in_memory(workers):
    expected = ResumableLoader(numbers(22), batch_size=4, seed=5)
    loader = ResumableLoader(MapStyle(22), batch_size=4, seed=5, num_workers=workers)
    state = torch.get_rng_state()
    for _ in range(2):
        for batch, other in zip(loader, expected, strict=True):
            assert torch.equal(batch.x0, other.x0)
            assert torch.equal(batch.cond["class_labels"], other.cond["class_labels"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_position_counts_batches_handed_out_not_prefetched_ones(workers):
    uninterrupted = ResumableLoader(MapStyle(40), batch_size=4)
    expected = seen(uninterrupted) + seen(uninterrupted)
    loader = ResumableLoader(MapStyle(40), batch_size=4, num_workers=workers)
    iterator = iter(loader)
    got = [next(iterator).x0.flatten().int().tolist() for _ in range(3)]
    state = loader.state_dict()
    del iterator
    assert state["batch"] == 3
    resumed = ResumableLoader(MapStyle(40), batch_size=4, num_workers=workers)
    resumed.load_state_dict(state)
    assert got + seen(resumed) + seen(resumed) == expected


def test_a_state_saved_after_the_last_batch_continues_with_the_next_epoch():
    loader = ResumableLoader(numbers(12), batch_size=4)
    seen(loader)
    resumed = ResumableLoader(numbers(12), batch_size=4)
    resumed.load_state_dict(loader.state_dict())
    assert seen(resumed) == seen(loader)
    assert resumed.epoch == 1


def test_world_size_may_change_between_runs_if_the_global_batch_stays():
    loader = ResumableLoader(numbers(64), batch_size=8)
    iterator = iter(loader)
    next(iterator)
    state, rest = loader.state_dict(), [b.x0.flatten().int().tolist() for b in iterator]
    halves = [ResumableLoader(numbers(64), batch_size=4, rank=r, world_size=2) for r in range(2)]
    for half in halves:
        half.load_state_dict(state)
    assert [a + b for a, b in zip(*map(seen, halves), strict=True)] == rest


def test_other_settings_warn_and_keep_the_number_of_samples_seen():
    state = {"epoch": 2, "batch": 6, "seed": 0, "global_batch": 4, "samples": 64}
    loader = ResumableLoader(numbers(64), batch_size=8)
    with pytest.warns(UserWarning, match="global_batch 4 -> 8"):
        loader.load_state_dict(state)
    assert (loader.epoch, loader.batch) == (2, 3)


@pytest.mark.parametrize(
    ("n", "settings", "message"),
    [
        (0, {"batch_size": 4}, "no samples"),
        (9, {"batch_size": 0}, "must both be 1 or more"),
        (9, {"batch_size": 2, "rank": 2, "world_size": 2}, "rank 2 does not exist"),
    ],
)
def test_bad_settings_say_what_is_wrong(n, settings, message):
    with pytest.raises(ValueError, match=message):
        ResumableLoader(MapStyle(n), **settings)


# ---------------------------------------------------------------------------------------------------- Trainer
class Recorder(LightningModule):
    """Records which samples a run sees; manual optimisation, as the package's methods have it."""

    def __init__(self, slices=1):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.slices_per_cycle = slices
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.x0.flatten().int().tolist())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.weight - batch.x0.mean()).square())
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Numbers(DistillationDataModule):
    shape = (1,)
    num_classes = 3
    sigma_data = 5.77

    def __init__(self, map_style=False, **kwargs):
        super().__init__(**kwargs)
        self.map_style = map_style

    def make_source(self):
        return MapStyle(20) if self.map_style else numbers(20)


def trainer(tmp_path, **kwargs):
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
    }
    return Trainer(default_root_dir=tmp_path, **(settings | kwargs))


@pytest.mark.parametrize("map_style", [False, True])
@pytest.mark.parametrize("stop", [1, 4, 5, 7, 10, 12])
def test_an_interrupted_run_continues_with_the_very_next_batch(tmp_path, stop, map_style):
    """5 batches an epoch: stops within epochs, on their last batch, and in later epochs."""
    data = {"batch_size": 4, "map_style": map_style}
    whole = Recorder()
    trainer(tmp_path, max_steps=14, enable_checkpointing=False).fit(whole, Numbers(**data))
    first, second = Recorder(), Recorder()
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    trainer(tmp_path, max_steps=stop, callbacks=saving).fit(first, Numbers(**data))
    checkpoint = tmp_path / f"step={stop}.ckpt"
    trainer(tmp_path, max_steps=14, enable_checkpointing=False).fit(second, Numbers(**data), ckpt_path=checkpoint)
    assert len(whole.seen) == 14
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.weight, whole.weight)


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resuming_agrees_where_epochs_are_cut_short(tmp_path, stop):
    settings = {"limit_train_batches": 3}
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_steps=9, enable_checkpointing=False, **settings).fit(whole, Numbers(batch_size=4))
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    trainer(tmp_path, max_steps=stop, callbacks=saving, **settings).fit(first, Numbers(batch_size=4))
    resumed = trainer(tmp_path, max_steps=9, enable_checkpointing=False, **settings)
    resumed.fit(second, Numbers(batch_size=4), ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert whole.seen[:3] != whole.seen[3:6]
    assert first.seen + second.seen == whole.seen


def test_resuming_from_an_epoch_end_checkpoint_of_an_epoch_based_run(tmp_path):
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(whole, Numbers(batch_size=4))
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(tmp_path, max_epochs=1, callbacks=saving).fit(first, Numbers(batch_size=4))
    resumed = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    resumed.fit(second, Numbers(batch_size=4), ckpt_path=tmp_path / "last.ckpt")
    assert len(whole.seen) == 15
    assert first.seen + second.seen == whole.seen


def test_batches_grow_with_the_slices_of_the_method(tmp_path):
    module = Recorder(slices=3)
    data = Numbers(batch_size=2)
    fit = trainer(tmp_path, max_steps=2, enable_checkpointing=False)
    fit.fit(module, data)
    assert [len(batch) for batch in module.seen] == [6, 6]
    assert fit.num_training_batches == 3
    assert fit.train_dataloader.seed == 0


def test_lightning_keeps_the_loader_and_gives_it_the_rank(tmp_path):
    """With a parallel strategy a DataLoader's sampler is replaced; this loader must survive and know its
    rank."""
    data = Numbers(batch_size=2)
    fit = trainer(tmp_path, max_steps=2, strategy="ddp", devices=1, enable_checkpointing=False)
    module = Recorder()
    fit.fit(module, data)
    assert type(fit.train_dataloader) is ResumableLoader
    assert fit.distributed_sampler_kwargs == {"num_replicas": 1, "rank": 0}
    assert module.seen == seen(ResumableLoader(numbers(20), batch_size=2))[:2]

    class Parallel:
        distributed_sampler_kwargs = {"num_replicas": 2, "rank": 1}
        lightning_module = module

    data.trainer = Parallel()
    loader = data.train_dataloader()
    assert (loader.rank, loader.world_size, len(loader)) == (1, 2, 5)


class Augmented(Dataset):
    """Random numbers of all three global generators beside the index."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()).item(), random.random(), np.random.rand()])


class Fetching(Augmented):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("source", [Augmented(), Fetching()], ids=["items", "batches"])
def test_augmentations_do_not_depend_on_processes_or_interruptions(source):
    def loader(**settings):
        return ResumableLoader(source, settings.pop("batch_size", 3), seed=5, **settings)

    before = torch.get_rng_state()
    whole = [batch.x0 for batch in loader()]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b.x0) for a, b in zip(whole, loader(num_workers=2)))
    assert len(torch.cat(whole)[:, 1:].unique()) == 72
    first = loader()
    for _, _ in zip(range(3), first):
        pass
    resumed = loader(num_workers=2)
    resumed.load_state_dict({**first.state_dict(), "batch": 3})
    assert torch.equal(next(iter(resumed)).x0, whole[3])
    again = loader()
    epochs = [[batch.x0 for batch in again] for _ in range(2)]
    assert not set(torch.cat(epochs[0])[:, 1].tolist()) & set(torch.cat(epochs[1])[:, 1].tolist())
    if type(source) is Augmented:  # others share the numbers of a batch
        double = next(iter(loader(batch_size=6))).x0
        assert torch.equal(torch.cat([next(iter(loader(rank=r, world_size=2))).x0 for r in range(2)]), double)
