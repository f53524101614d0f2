"""What a training checkpoint holds: what optimizers own, averages and declared targets; never the teacher.

Frozen sources are recorded by a fingerprint of their weights, so that resuming with another teacher is refused.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_distill.checkpoint_files import require_whole
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.randomness import derive_seed

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

__all__ = [
    "checkpoint_keys",
    "checkpointed_tensors",
    "drop_frozen",
    "fingerprint",
    "parameter_names",
    "reopen_epoch",
    "restore_generators",
    "strict_load",
    "verify_fingerprint",
]


def checkpoint_keys(module: DistillationModule) -> set[str]:
    """Names in ``module.state_dict()`` that a checkpoint keeps.

    Decided by tensor identity rather than by prefix: the adapters of a LoRA student live inside the teacher's backbone.
    """
    roles = {role for names in module.phases.values() for role in names}
    owned = {id(p) for role in roles for p in module.role_parameters(role)}
    owned |= {id(p) for average in module.averages() for p in average}
    frozen = [part for name in module.targets for part in module._modules[name].modules()]  # type: ignore[union-attr]
    owned |= {id(p) for part in frozen if isinstance(part, AdapterDenoiser) for p in part.parameters()}
    teacher = set() if module.teacher is None else {id(t) for t in _tensors(module.teacher)}
    kept = roles | {"student_ema", *module.targets}
    keys = set()
    for name, tensor in _named_tensors(module):
        own = id(tensor) in owned or id(tensor) not in teacher
        if "." not in name or (name.split(".", 1)[0] in kept and own):
            keys.add(name)
    return keys


def checkpointed_tensors(module: DistillationModule) -> list[Tensor]:
    """The parameters and buffers that a checkpoint holds, each once, in a fixed order."""
    keys = checkpoint_keys(module)
    return list({id(tensor): tensor for name, tensor in _named_tensors(module) if name in keys}.values())


def parameter_names(module: DistillationModule) -> list[list[str]]:
    """Checkpoint names of the parameters of each phase's optimizer, in the optimizer's order."""
    keys = checkpoint_keys(module)
    names = {id(tensor): name for name, tensor in _named_tensors(module) if name in keys}
    return [[names[id(p)] for role in roles for p in module.role_parameters(role)] for roles in module.phases.values()]


def drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State-dict hook that removes everything a checkpoint must not hold."""
    keep = {prefix + key for key in checkpoint_keys(module)}  # type: ignore[arg-type]
    for key in [k for k in state_dict if k.startswith(prefix) and k not in keep]:
        del state_dict[key]


def strict_load(module: DistillationModule, state_dict: Mapping[str, Any]) -> None:
    """Raise unless ``state_dict`` holds exactly what this configuration keeps; warn of other settings."""
    own = nn.Module.state_dict(module)
    keys = checkpoint_keys(module) & set(own)
    missing, unexpected = sorted(keys - set(state_dict)), sorted(set(state_dict) - keys)
    if other := [k for k in sorted(keys & set(state_dict)) if own[k].shape != state_dict[k].shape]:
        raise ValueError(
            f"the checkpoint does not fit this {type(module).__name__}: {other[0]} has shape "
            f"{tuple(state_dict[other[0]].shape)} there and {tuple(own[other[0]].shape)} here; resume with the "
            "networks of the run that wrote it."
        )
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint does not fit this {type(module).__name__}: {len(missing)} tensors are missing"
            f"{_examples(missing)}, {len(unexpected)} are unknown{_examples(unexpected)}. Resume with the "
            "configuration of the run that wrote it (roles, ema, discriminator), or start a new run from its weights "
            "with student=FromCheckpoint(path)."
        )
    if lines := module.__dict__.pop("_changed_settings", None):
        from lightning_distill.resumed_settings import tell

        tell(lines)


def _examples(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""


def _named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the values of tensors in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        digest.update(str((tuple(data.shape), data.dtype)).encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def verify_fingerprint(role: str, found: str, recorded: str) -> None:
    """Raise when a run is resumed with another frozen network than it was trained with."""
    if found != recorded:
        raise ValueError(
            f"the {role} of this configuration (sha256 {found[:12]}) is not the one the checkpoint was trained with "
            f"(sha256 {recorded[:12]}); give the original weights, or start a new run. An earlier run is named exactly "
            "with its version, runs/NAME/version_N: without it the newest is read."
        )


def header(module: DistillationModule) -> dict[str, Any]:
    """The package's own part of a checkpoint: method, settings, teacher's fingerprint, states of global generators."""
    from lightning_distill import __version__
    from lightning_distill.resumed_settings import recorded_settings

    entry: dict[str, Any] = {
        "version": __version__,
        "method": type(module).__name__,
        "rng": _generator_states(module),
        "parameters": parameter_names(module),
        "settings": recorded_settings(module),
        "shape": None if module._seen_shape is None else list(module._seen_shape),
    }
    if module.teacher is not None:
        entry["teacher"] = module.teacher_fingerprint()
    return entry


def check_header(module: DistillationModule, entry: Mapping[str, Any] | None) -> None:
    """Refuse foreign checkpoints, other teachers and optimizers; restore the global generators while a fit resumes."""
    if entry is None:
        raise ValueError(
            "this checkpoint was not written by lightning_distill (its header is missing); give a checkpoint of a "
            "distillation run, or load plain weights with PretrainedDenoiser(path)."
        )
    if entry["method"] != type(module).__name__:
        raise ValueError(
            f"the checkpoint was written by {entry['method']}, but this run trains {type(module).__name__}; start a "
            "new run from its weights with student=FromCheckpoint(path)."
        )
    if module.teacher is not None and "teacher" in entry:
        verify_fingerprint("teacher", module.teacher_fingerprint(), entry["teacher"])
    if shape := entry.get("shape"):
        module._seen_shape = tuple(shape)
    if module._trainer is None or module.trainer.state.fn != "fit":
        return  # weights loaded outside a run
    if "settings" in entry:
        from lightning_distill import __version__
        from lightning_distill.resumed_settings import changed_settings

        # told of when the tensors fit, too
        module.__dict__["_changed_settings"] = changed_settings(
            module, entry["settings"], same_version=entry["version"] == __version__
        )
    restore_generators(entry["rng"], module.trainer.global_rank, module.trainer.world_size)


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a fit that ended within an epoch go on within it.

    When ``max_steps`` ends a fit, Lightning counts the epoch as processed, though batches of it are left, and what is
    saved after that would go on with the next epoch.

    Args:
        checkpoint: of Lightning; changed in place.
    """
    fit = checkpoint.get("loops", {}).get("fit_loop", {})
    epoch, batches = fit.get("epoch_progress"), fit.get("epoch_loop.batch_progress")
    if epoch is None or batches is None or batches["is_last_batch"]:
        return
    if epoch["current"]["processed"] > epoch["current"]["completed"]:
        for count in (epoch["current"], epoch["total"]):
            count["processed"] -= 1


def _generator_states(module: DistillationModule) -> dict[str, Tensor]:
    """States of torch's global generators on all processes, (processes, bytes); a collective."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    trainer = module._trainer
    if trainer is None or trainer.world_size == 1:
        return {name: state[None] for name, state in states.items()}
    device = trainer.strategy.root_device
    return {name: trainer.strategy.all_gather(state.to(device)).cpu() for name, state in states.items()}


def restore_generators(states: Mapping[str, Tensor], rank: int, world_size: int) -> None:
    """Set torch's global generators of this process to what a checkpoint holds.

    Where as many processes go on as wrote it, each gets its own state back. Another number of them gets the one state
    where all had the same, else a seed made from the states and the process' number.

    Args:
        states: by ``cpu`` and ``cuda``, (processes, bytes); earlier versions wrote the first process', (bytes,).
        rank: of this process.
        world_size: number of processes now.
    """
    rows = {name: state.reshape(-1, state.shape[-1]) for name, state in states.items()}
    shared = all(bool((row == row[0]).all()) for row in rows.values())
    if not shared and len(rows["cpu"]) != world_size:
        torch.manual_seed(derive_seed(fingerprint(rows.values()), rank))
        return
    own = 0 if shared else rank
    torch.set_rng_state(rows["cpu"][own].clone())  # torch crashes on a part of a storage
    if "cuda" in rows and torch.cuda.is_available():
        torch.cuda.set_rng_state(rows["cuda"][own].clone())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Content of a Lightning checkpoint, memory-mapped; pickled code is refused by ``weights_only``.

    Raises:
        ValueError: the file is damaged, or something else than a Lightning checkpoint.
    """
    if not Path(path).is_dir():
        require_whole(Path(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}); it is incomplete, not a checkpoint, or holds "
            "more than tensors and plain values."
        ) from None
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        what = f"the keys {sorted(map(str, content))[:5]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is no Lightning checkpoint: it has no state_dict but {what}.")
    return content
