"""What a subclass of ``DistillationModule`` can forget without an error of Python's, refused before any training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

__all__ = ["check_hooks", "check_hyperparameters", "check_phases", "check_trained", "parameters_of"]

#: hooks whose base does something here that training or checkpoints need, and what
HOOKS = {
    "configure_model": "builds the networks",
    "load_state_dict": "restores a checkpoint",
    "on_before_optimizer_step": "clips gradients and skips steps that are not finite",
    "on_fit_start": "checks the run",
    "on_load_checkpoint": "compares the checkpoint with the run",
    "on_save_checkpoint": "writes what makes the checkpoint loadable",
    "on_train_batch_start": "decides which phases run",
    "on_train_end": "tells of loss weights that did nothing",
    "on_train_start": "seeds each process",
    "setup": "refuses strategies that cannot train several phases",
}


def check_hooks(method: type) -> None:
    """Refuse a class whose hooks hide those of its bases.

    Args:
        method: a subclass of ``DistillationModule``; only the hooks that it defines itself are looked at.

    Raises:
        TypeError: a hook calls neither ``super()`` nor the hook of a base by name.
    """
    for hook, effect in HOOKS.items():
        code = getattr(inspect.unwrap(vars(method).get(hook, None) or _nothing), "__code__", None)
        if hook in vars(method) and code is not None and not {"super", hook} & set(code.co_names):
            raise TypeError(
                f"{method.__name__}.{hook} does not call super().{hook}(...), which {effect}; add the call as its "
                "first line."
            )


def check_phases(module: DistillationModule) -> None:
    """Refuse phases that do not begin with the student's, which counts updates and feeds the averages."""
    first = next(iter(module.phases), None)
    if first != "student" or not module.phases["student"]:
        raise ValueError(
            f"{type(module).__name__}.phases begins with {first!r}; the first phase is called 'student', since its "
            "steps are those that max_steps, averages and logging count."
        )


def check_trained(module: DistillationModule) -> None:
    """Refuse roles that do not exist and networks that no phase trains.

    Raises:
        ValueError: a name in ``phases`` or ``targets`` is no attribute, or a submodule with parameters that require
            gradients belongs to no phase.
    """
    kind = type(module).__name__
    roles = {role for names in module.phases.values() for role in names}
    for name in sorted(roles | set(module.targets)):
        if not hasattr(module, name):
            where = "phases" if name in roles else "targets"
            raise ValueError(
                f"{kind}.{where} names the role {name!r}, but there is no self.{name}; build_roles() sets it, to None "
                "where a configuration does without."
            )
    owned = {id(p) for role in roles for p in module.role_parameters(role)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in owned:
            child = name.split(".", 1)[0]
            raise ValueError(
                f"self.{child} of {kind} has parameters that require gradients and is in no phase, so nothing would "
                f"train or save it: add {child!r} to phases, or freeze it with self.{child}.requires_grad_(False)."
            )


def check_hyperparameters(module: LightningModule | LightningDataModule) -> None:
    """Refuse what ``save_hyperparameters`` would put into checkpoints that safe loading could not read.

    Args:
        module: method or data module of a fit.

    Raises:
        ValueError: one of the hyper-parameters is more than tensors and plain values.
    """
    for name, value in module.hparams.items():
        if not _plain(value):
            raise ValueError(
                f"save_hyperparameters() of {type(module).__name__} keeps {name!r}, a {type(value).__name__}, in every "
                "checkpoint, where safe loading refuses it; leave it out with "
                f"save_hyperparameters(ignore=[{name!r}])."
            )


def _plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_plain(key) and _plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _nothing() -> None:
    """Stands for a hook that is not there."""


def parameters_of(role: nn.Module | nn.Parameter | None) -> list[nn.Parameter]:
    """Trained parameters of a role: a network, a single parameter, or None where the configuration has none."""
    if role is None:
        return []
    every = [role] if isinstance(role, nn.Parameter) else role.parameters()
    return [parameter for parameter in every if parameter.requires_grad]
