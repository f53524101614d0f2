"""One update of a method on the tiny pipeline of a family, for the tests of exports and benchmarks/support.py."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from family_settings import DATA_FREE, FROM_PICTURES, LEFT_OUT
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from tiny_pipelines import Tiny

from lightning_distill.batch import Batch
from lightning_distill.methods import DistillationModule
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.specs import PretrainedDenoiser

__all__ = ["build", "train_once"]


class OneBatch:
    """A loader of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        return iter([self.batch])

    def __len__(self) -> int:
        return 1


def build(
    method: type[DistillationModule], tiny: Tiny, folder: Path, lora: bool, num_steps: int = 2, **settings: Any
) -> DistillationModule:
    """A method on a teacher read from the saved tiny pipeline; LoRA roles where the method takes them.

    Args:
        method: class of the method.
        tiny: of the family.
        folder: where the pipeline is saved.
        lora: adapters instead of full copies.
        num_steps: of the student.
        settings: further arguments of the method.
    """
    tiny.save(folder)
    if not tiny.zeros:
        save_file({key: value.contiguous() for key, value in tiny.null().items()}, folder / "null_cond.safetensors")
    source = PretrainedDenoiser(str(folder), guidance=tiny.guidance, shape=list(tiny.shape))
    names = _arguments(method)
    options: dict[str, Any] = {"num_steps": num_steps, "shape": list(tiny.shape), "ema": [], "check_data": False}
    options["student_optimizer"] = lambda p: torch.optim.SGD(p, lr=1e-2)
    if "sampler" in names and method.__name__ == "TeacherTraining":
        options["sampler"] = "renoise" if tiny.name == "sana_sprint" else "ode"
    for role in ("student", "fake_score"):
        if role in names:
            options[role] = Lora(rank=2) if lora else Copy()
    options |= settings
    options = {key: value for key, value in options.items() if value is not LEFT_OUT}
    if "network" in names:
        if lora:
            raise ValueError(f"{method.__name__} trains every weight of a network of its own, not an adapter.")
        return method(source, **{k: v for k, v in options.items() if k != "student"})
    return method(source, **options)


def _arguments(method: type) -> set[str]:
    names: set[str] = set()
    for cls in method.__mro__:
        if "__init__" in vars(cls):
            names |= set(inspect.signature(vars(cls)["__init__"]).parameters)
    return names


def train_once(module: DistillationModule, tiny: Tiny, samples: int = 4) -> None:
    """Random adapters and critics, so that every term has a gradient, and one update on random latents."""
    module.configure_model()
    for name, role in module.named_children():
        if isinstance(role, Denoiser) and name != "teacher":
            with torch.no_grad():
                for key, parameter in role.named_parameters():
                    if parameter.requires_grad and ("lora_B" in key or name != "student"):
                        parameter.add_(0.05 * torch.randn_like(parameter))
    n = samples * module.slices_per_cycle
    x0 = None if type(module).__name__ in DATA_FREE else torch.randn(n, *tiny.shape)
    sources = torch.randn(n, *tiny.shape) if type(module).__name__ in FROM_PICTURES else None
    batch = Batch(x0=x0, noise=sources, cond=tiny.cond(n), size=n)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, OneBatch(batch))
    if trainer.global_step != 1 or float(module.skipped_steps.sum()) != 0:
        raise RuntimeError(f"{type(module).__name__} skipped its update.")
