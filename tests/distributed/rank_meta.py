"""Runs whose networks are read by every process, or by the first alone; the script of ``test_meta_device``."""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))

from rank_runs import BATCH, leave, smooth_adam, trainer, whole
from tiny_pipelines import MAKERS
from torch.distributed.tensor import DTensor

from lightning_distill.batch import Batch
from lightning_distill.data import InMemory, ResumableLoader
from lightning_distill.methods import DMD2, DistillationModule
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.roles import Copy, Explicit, Lora
from lightning_distill.networks.small import small_dit
from lightning_distill.networks.specs import NewDenoiser, PretrainedDenoiser
from lightning_distill.processes import FlowMatching
from lightning_distill.strategies import RoleFSDP2

UPDATES = 2
#: pipeline and how the roles are made: positions that no file holds, and adapters on a shared backbone
PIPELINES = {"pixart_sigma": Copy, "wan": lambda: Lora(rank=3, dora=True)}


def dit(layers: int) -> NewDenoiser:
    """A network of 11 labels, so that the last rows of some tensors are fewer."""
    return NewDenoiser(
        lambda: small_dit(8, 1, 10, num_layers=layers, num_attention_heads=2), FlowMatching(), "flow_prediction"
    )


def build(name: str, folder: Path) -> tuple[DistillationModule, Batch]:
    settings: dict[str, Any] = {"student_optimizer": smooth_adam, "fake_score_optimizer": smooth_adam}
    n = 2 * UPDATES * BATCH
    if name == "new":
        labels = torch.arange(n) % 10
        batch = Batch(x0=torch.randn(n, 1, 8, 8), cond={"class_labels": labels})
        roles = {"fake_score": Explicit(dit(2)), "gan": Adversary(taps=("transformer_blocks.1",), width=4)}
        return DMD2(dit(3), **roles, **settings), batch
    tiny, role = MAKERS[name](), PIPELINES[name]
    teacher = PretrainedDenoiser(str(folder / name))
    module = DMD2(teacher, student=role(), fake_score=role(), shape=list(tiny.shape), **settings)
    return module, Batch(x0=torch.randn(n, *tiny.shape), cond=tiny.cond(n))


def host_bytes() -> int:
    """Memory of all tensors since the last ``gc.freeze``, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, DTensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Counted(RoleFSDP2):
    """Counts when networks are built and sharded, and while tensors are sent, now and then."""

    built: int
    peak: int

    def setup(self, trainer: Any) -> None:
        self.built = self.peak = host_bytes()
        scatter, calls = dist.scatter, itertools.count()

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) % 10 == 0:
                self.peak = max(self.peak, host_bytes())
            return scatter(*args, **kwargs)

        dist.scatter = counted
        try:
            super().setup(trainer)
        finally:
            dist.scatter = scatter
        self.peak = max(self.peak, host_bytes())


def main(folder: Path, names: list[str]) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    counts = {}
    for name in names:
        for meta in (False, True):
            torch.manual_seed(0)
            module, batch = build(name, folder)
            strategy = Counted(meta_device=meta)
            gc.collect()
            gc.freeze()  # what there is now is not looked at again
            run = trainer(UPDATES, devices=world, strategy=strategy, use_distributed_sampler=False)
            loader = ResumableLoader(
                InMemory(batch), BATCH // world, slices=module.slices_per_cycle, seed=3, rank=rank, world_size=world
            )
            run.fit(module, loader)
            label = f"{name}-{'meta' if meta else 'usual'}"
            counts[label] = {"built": strategy.built, "peak": strategy.peak, "teacher": module.teacher_fingerprint()}
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            state = {key: whole(tensor) for key, tensor in tensors.items()}
            for key, tensor in tensors.items():
                assert not isinstance(tensor, DTensor) or torch.equal(state[key], tensor.full_tensor()), key
            torch.save(state, folder / f"{label}-{rank}.pt")
            del run, loader, module, strategy, tensors, state, batch
            gc.unfreeze()
    (folder / f"counts{rank}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
