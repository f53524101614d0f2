"""Configurations of problems in the plane, rewritten for the shipped teacher of the digits.

A method in two dimensions is told from a method on digits by its teacher, data, networks and number of updates, while
its own settings stay. Students and critics start from the teacher, since there is a network to start from; schedules
and settings that count updates are scaled to the number that fits into a time. Discriminators read blocks of the
network, which know the class, in place of bare samples.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from clock import CpuSeconds

from lightning_distill.cli import trainer_cli

__all__ = ["derive", "fitted"]

#: student's learning rate on digits over that in the plane, where networks start from random weights
RATE = 0.3
BATCH = 128
CLASSES = 10
#: blocks of the digits' network that discriminators read: there is no network behind the exact teachers of the plane
TAPS = ["blocks.1", "blocks.3"]
#: updates of a short run by which a whole one is planned, and how many of its first are not counted
PROBE, WARM = 48, 8
#: settings that say when something begins or ends, beside those that end in "_updates"
_MOMENTS = ("matching_from", "gan_from")


def derive(config: dict[str, Any], updates: int, start: str | None = None) -> dict[str, Any]:
    """The configuration of a method for digits.

    Args:
        config: of a problem in the plane, as read from its file.
        updates: student updates of the new run.
        start: run folder whose student this one's begins as, None for the teacher.

    Raises:
        ValueError: the method needs another teacher or other data than digits are.
    """
    config = json.loads(json.dumps(config))  # aliases of YAML become copies
    model, trainer, data = config["model"]["init_args"], config["trainer"], config["data"]
    teacher, source = model["teacher"], data["class_path"].rpartition(".")[2]
    process = teacher.get("init_args", {}).get("process")
    if teacher["class_path"] != "AnalyticTeacher" or process != "FlowMatching" or source not in ("Prior", "Toy2D"):
        raise ValueError(
            f"{config['model']['class_path']} has the teacher {teacher['class_path']} in {process} and the data "
            f"{source}; digits have a flow-matching teacher and pictures."
        )
    if model.get("rendering") == "data":
        raise ValueError(f"{config['model']['class_path']} starts from renderings of samples; digits have none.")
    share = updates / trainer["max_steps"]
    trainer["max_steps"] = updates
    model["teacher"] = {"class_path": "ZooDenoiser", "init_args": {"name": "digits"}}
    del model["shape"]
    if "gan" in model:
        model["gan"]["init_args"]["taps"] = TAPS
    for key in [key for key, value in model.items() if _is_new(value)]:
        del model[key]  # its default is a copy of the teacher
    _started_from_the_teacher(model)
    if start is not None:
        role = {"class_path": "FromCheckpoint", "init_args": {"path": start}}
        if "student" in model:
            model["student"]["init_args"]["role"] = role
        else:
            model["student"] = role
    model["student_optimizer"]["init_args"]["lr"] *= RATE
    for key, value in model.items():
        if key.endswith("_updates") or key in _MOMENTS:
            model[key] = [max(1, round(share * n)) for n in value] if isinstance(value, list) else round(share * value)
        elif key.endswith("_scheduler"):
            _scaled(value["init_args"], share, updates)
    if "classes" in model:
        model["classes"] = [list(range(CLASSES // 2)), list(range(CLASSES // 2, CLASSES))]
    pictures = {"Prior": {"num_classes": CLASSES}, "Toy2D": {"split": "all"}}[source]
    new = {"Prior": "Prior", "Toy2D": "Digits"}[source]
    batch = min(BATCH, data.get("init_args", {}).get("batch_size", BATCH))  # smaller ones have many points a sample
    config["data"] = {"class_path": new, "init_args": {**pictures, "batch_size": batch}}
    return config


def fitted(config: Path, seconds: float, folder: Path, words: list[str], start: str | None = None) -> Path:
    """A derived configuration of as many updates as fit into a time, written into a folder.

    Args:
        config: file of a problem in the plane.
        seconds: CPU seconds of one thread.
        folder: for the file.
        words: of the command line that trains.
        start: see ``derive``.
    """
    plane = yaml.safe_load(config.read_text())
    probe = _written(derive(plane, PROBE, start), folder / "probe.yaml")
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false"]
    clock = f"--trainer.callbacks+={CpuSeconds.__module__}.CpuSeconds"
    with tempfile.TemporaryDirectory() as own:
        cli = trainer_cli(["fit", "-c", str(probe), *words, *quiet, clock, f"--trainer.default_root_dir={own}"])
    found = next(c for c in cli.trainer.callbacks if type(c).__name__ == "CpuSeconds").per_update[WARM:]
    updates = max(PROBE, int(seconds * len(found) / sum(found)))
    return _written(derive(plane, updates, start), folder / config.name)


def _is_new(value: Any) -> bool:
    """Whether a role is a network of its own, made for the plane."""
    return isinstance(value, dict) and value.get("class_path") == "Explicit"


def _started_from_the_teacher(settings: Any) -> None:
    """Roles within roles begin as copies of the teacher."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if _is_new(value):
            settings[key] = {"class_path": "Copy"}
        else:
            _started_from_the_teacher(value)


def _scaled(schedule: dict[str, Any], share: float, updates: int) -> None:
    """A learning-rate schedule of another length."""
    for key in ("total_steps", "decay_start"):
        if schedule.get(key) is not None:
            schedule[key] = round(share * schedule[key])
    if schedule.get("warmup_steps"):
        schedule["warmup_steps"] = min(schedule["warmup_steps"], max(1, updates // 20))


def _written(config: dict[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file
