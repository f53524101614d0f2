"""Settings that a checkpoint records of its run, and what a run that resumes it with other ones is told.

Weights, averages, optimizers and schedules are restored from the checkpoint, and with their states the arguments of
optimizers; everything else is the new configuration's. Neither is an error, but nobody should have to find it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule

__all__ = ["changed_settings", "recorded_settings", "tell"]

#: how an optimizer computes, not what
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
_NOTHING = object()


def recorded_settings(module: DistillationModule) -> dict[str, Any]:
    """Plain values for the header of a checkpoint.

    Returns:
        arguments: what every method has;
        model: the section of the command line's configuration, None in Python;
        optimizers: by phase, class and parameter groups; empty outside of a run.
    """
    running = [] if module._trainer is None else module.trainer.optimizers
    return {
        "arguments": _arguments(module),
        "model": _model_section(module),
        "optimizers": {phase: _described(optimizer) for phase, optimizer in zip(module.phases, running)},
    }


def changed_settings(module: DistillationModule, recorded: Mapping[str, Any], same_version: bool = True) -> list[str]:
    """One line per setting that differs from the checkpoint's run, with the value that is used.

    Args:
        module: of the run that resumes; its optimizers need not exist yet.
        recorded: what ``recorded_settings`` returned.
        same_version: whether arguments that only one side knows count.

    Raises:
        ValueError: an optimizer of another class, whose state is another.
    """
    entries = dict(zip(module.phases, module.configure_optimizers()))
    lines = list(_of_optimizers(entries, recorded["optimizers"]))
    section = _model_section(module)
    if section is not None and recorded["model"] is not None:
        found = _differences(_arguments_of(recorded["model"]), _arguments_of(section), "model", same_version)
    else:
        found = _differences(recorded["arguments"], _arguments(module), "model", same_version)
    for name, old, new in found:
        argument, _, rest = name.removeprefix("model.").partition(".")
        phase, _, kind = argument.rpartition("_")
        if kind == "optimizer" and phase in entries:
            continue  # told of above, defaults included
        restored = kind == "scheduler" and rest in _schedule_state(entries.get(phase, {}))
        lines.append(_line(name, old, new, restored))
    return lines


def tell(lines: list[str]) -> None:
    """Warn of changed settings, if there are any."""
    if lines:
        rank_zero_warn(
            "resuming with other settings than those of the run that wrote the checkpoint:\n  " + "\n  ".join(lines)
        )


def _of_optimizers(entries: Mapping[str, Any], recorded: Mapping[str, Any]) -> Iterator[str]:
    for phase, entry in entries.items():
        if phase not in recorded:
            continue
        old, new = recorded[phase], _described(entry["optimizer"])
        if old["class"] != new["class"]:
            raise ValueError(
                f"the checkpoint holds the state of {old['class']} for the phase {phase}, which {new['class']} cannot "
                f"continue; set model.{phase}_optimizer to {old['class']}, or start a new run from the checkpoint's "
                "weights with student=FromCheckpoint(path)."
            )
        for index, (theirs, ours) in enumerate(zip(old["groups"], new["groups"])):
            number = f"[{index}]" if len(new["groups"]) > 1 else ""
            known = {key: value for key, value in ours.items() if key in theirs}
            for name, a, b in _differences(theirs, known, f"model.{phase}_optimizer{number}", False):
                yield _line(name, a, b, restored=True)


def _line(name: str, old: Any, new: Any, restored: bool) -> str:
    which = "the checkpoint's value is used" if restored else "the new value is used"
    return f"{name}: {_shown(old)} in the checkpoint, {_shown(new)} now; {which}."


def _shown(value: Any) -> str:
    text = "nothing" if value is _NOTHING else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------------------------------------- what is recorded
def _arguments(module: DistillationModule) -> dict[str, Any]:
    values = {
        "num_steps": module._num_steps,
        "sampler": module.sampler,
        "loss_weights": module.loss_weights,
        "gradient_clip_val": module.gradient_clip_val,
        "accumulate_grad_batches": module.accumulate_grad_batches,
        "ema": [profile.name for profile in module.ema_profiles],
        "seed": module.streams.seed,
    }
    return {name: _plain(value) for name, value in values.items()}


def _model_section(module: DistillationModule) -> dict[str, Any] | None:
    if module._trainer is None:
        return None
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            # once per run: configurations do not change, and writing one takes a while
            if not hasattr(callback, "model_section"):
                text = callback.parser.dump(callback.config, skip_none=False)
                callback.model_section = yaml.safe_load(text).get("model")  # type: ignore[attr-defined]
            section: dict[str, Any] | None = callback.model_section  # type: ignore[attr-defined]
            return section
    return None


def _arguments_of(section: Mapping[str, Any]) -> dict[str, Any]:
    return dict(section.get("init_args") or {})


def _described(optimizer: Optimizer) -> dict[str, Any]:
    """Class and groups, with the learning rates that schedules start from."""
    inner = getattr(optimizer, "optimizer", optimizer)
    groups = []
    for group in inner.param_groups:
        lr = {"lr": group["initial_lr"]} if "initial_lr" in group else {}
        skipped = ("params", "initial_lr", *_IMPLEMENTATION)
        groups.append({key: _plain(value) for key, value in {**group, **lr}.items() if key not in skipped})
    return {"class": type(inner).__name__, "groups": groups}


def _schedule_state(entry: Mapping[str, Any]) -> set[str]:
    """Names of the arguments, and of more, that a schedule's saved state restores."""
    schedule = entry.get("lr_scheduler", {}).get("scheduler")
    return set() if schedule is None else set(schedule.state_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# ---------------------------------------------------------------------------------------------------- what differs
def _differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], name: str, one_sided: bool
) -> Iterator[tuple[str, Any, Any]]:
    """Every entry in which two mappings differ, with its values; of an object of another class only the class."""
    keys = [key for key in {**theirs, **ours} if one_sided or (key in theirs and key in ours)]
    if "class_path" in keys and theirs["class_path"] != ours["class_path"]:
        keys = ["class_path"]
    for key in keys:
        a, b = theirs.get(key, _NOTHING), ours.get(key, _NOTHING)
        inner = name if key == "init_args" else f"{name}.{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, inner, one_sided)
        elif a != b and not (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
            yield inner, a, b
