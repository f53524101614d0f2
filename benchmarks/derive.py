"""Configurations of problems in the plane, rewritten for the shipped teachers of the digits and of Fashion-MNIST.

A method in two dimensions is told from a method on pictures by its teacher, data, networks and number of updates, while
its own settings stay. Students and critics start from the teacher, since there is a network to start from; schedules
and settings that count updates are scaled to the number that fits into a time. Discriminators read blocks of the
network, which know the class, in place of bare samples.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from clock import CpuSeconds

from lightning_distill.cli import trainer_cli

__all__ = ["PROBLEMS", "Problem", "derive", "fitted"]


@dataclass(frozen=True)
class Problem:
    """What is exchanged in a configuration of the plane.

    Attributes:
        teacher: name of the shipped one.
        data: class of its pictures.
        pictures: arguments of that class.
        taps: blocks that discriminators read: there is no network behind the exact teachers of the plane.
        batch: largest one.
        rate: learning rates of student and critics over those in the plane, where networks start from random weights.
        tail: share of the updates over which learning rates fall to zero, for methods without schedules of their own;
            None for constant ones.
        classes: their number.
        probe: updates of a short run by which a whole one is planned.
    """

    teacher: str
    data: str
    pictures: dict[str, Any]
    taps: tuple[str, ...]
    batch: int
    rate: dict[str, float]
    tail: float | None = None
    classes: int = 10
    probe: int = 48


PROBLEMS = {
    "digits": Problem("digits", "Digits", {"split": "all"}, ("blocks.1", "blocks.3"), 128, {"student": 0.3}),
    "fashion": Problem(
        "fashion",
        "FashionMNIST",
        {},
        ("down_blocks.2", "mid_block"),
        48,
        {"student": 0.3, "fake_score": 0.6, "discriminator": 0.6},
        tail=0.6,
        probe=16,
    ),
}
#: how many updates of a short run are not counted when a whole one is planned
WARM = 8
#: settings that say when something begins or ends, beside those that end in "_updates"
_MOMENTS = ("matching_from", "gan_from")


def derive(config: dict[str, Any], problem: Problem, updates: int, start: str | None = None) -> dict[str, Any]:
    """The configuration of a method for pictures.

    Args:
        config: of a problem in the plane, as read from its file.
        problem: which pictures.
        updates: student updates of the new run.
        start: run folder whose student this one's begins as, None for the teacher.

    Raises:
        ValueError: the method needs another teacher or other data than pictures are.
    """
    config = json.loads(json.dumps(config))  # aliases of YAML become copies
    model, trainer, data = config["model"]["init_args"], config["trainer"], config["data"]
    teacher, source = model["teacher"], data["class_path"].rpartition(".")[2]
    process = teacher.get("init_args", {}).get("process")
    if teacher["class_path"] != "AnalyticTeacher" or process != "FlowMatching" or source not in ("Prior", "Toy2D"):
        raise ValueError(
            f"{config['model']['class_path']} has the teacher {teacher['class_path']} in {process} and the data "
            f"{source}; {problem.teacher} has a network and pictures."
        )
    if model.get("rendering") == "data":
        raise ValueError(f"{config['model']['class_path']} starts from renderings of samples; pictures have none.")
    share = updates / trainer["max_steps"]
    trainer["max_steps"] = updates
    model["teacher"] = {"class_path": "ZooDenoiser", "init_args": {"name": problem.teacher}}
    del model["shape"]
    if "gan" in model:
        model["gan"]["init_args"]["taps"] = list(problem.taps)
    for key in [key for key, value in model.items() if _is_new(value)]:
        del model[key]  # its default is a copy of the teacher
    _started_from_the_teacher(model)
    if start is not None:
        role = {"class_path": "FromCheckpoint", "init_args": {"path": start}}
        if "student" in model:
            model["student"]["init_args"]["role"] = role
        else:
            model["student"] = role
    for role, rate in problem.rate.items():
        if f"{role}_optimizer" in model:
            model[f"{role}_optimizer"]["init_args"]["lr"] *= rate
    for key, value in model.items():
        if key.endswith("_updates") or key in _MOMENTS:
            model[key] = [max(1, round(share * n)) for n in value] if isinstance(value, list) else round(share * value)
            if key == "degradation_updates":  # of DisBack, in which its snapshots have to fit
                model[key] = max(model[key], model["waypoints"] + 1)
        elif key.endswith("_scheduler"):
            _scaled(value["init_args"], share, updates)
    if problem.tail is not None:
        _with_tails(model, round((1.0 - problem.tail) * updates), updates)
    if "classes" in model:
        model["classes"] = [list(range(problem.classes // 2)), list(range(problem.classes // 2, problem.classes))]
    pictures = {"num_classes": problem.classes} if source == "Prior" else problem.pictures
    new = source if source == "Prior" else problem.data
    given = data.get("init_args", {}).get("batch_size", problem.batch)
    batch = min(problem.batch, given)  # smaller ones have many points a sample
    config["data"] = {"class_path": new, "init_args": {**pictures, "batch_size": batch}}
    return config


def fitted(
    config: Path, problem: Problem, seconds: float, folder: Path, words: list[str], start: str | None = None
) -> Path:
    """A derived configuration of as many updates as fit into a time, written into a folder.

    Args:
        config: file of a problem in the plane.
        problem: which pictures.
        seconds: CPU seconds of one thread.
        folder: for the file.
        words: of the command line that trains.
        start: see ``derive``.
    """
    plane = yaml.safe_load(config.read_text())
    probe = _written(derive(plane, problem, problem.probe, start), folder / "probe.yaml")
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false"]
    clock = f"--trainer.callbacks+={CpuSeconds.__module__}.CpuSeconds"
    with tempfile.TemporaryDirectory() as own:
        cli = trainer_cli(["fit", "-c", str(probe), *words, *quiet, clock, f"--trainer.default_root_dir={own}"])
    found = next(c for c in cli.trainer.callbacks if type(c).__name__ == "CpuSeconds").per_update[WARM:]
    updates = max(problem.probe, int(seconds * len(found) / sum(found)))
    return _written(derive(plane, problem, updates, start), folder / config.name)


def _is_new(value: Any) -> bool:
    """Whether a role is a network of its own, made for the plane."""
    return isinstance(value, dict) and value.get("class_path") == "Explicit"


def _with_tails(model: dict[str, Any], start: int, updates: int) -> None:
    """A schedule that falls to zero for every optimizer that has none."""
    for role in [key.removesuffix("_optimizer") for key in model if key.endswith("_optimizer")]:
        if f"{role}_scheduler" not in model:
            tail = {"warmup_steps": 10, "total_steps": updates, "decay": "linear", "decay_start": max(11, start)}
            model[f"{role}_scheduler"] = {"class_path": "WarmupDecay", "init_args": tail}


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
