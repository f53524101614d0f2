"""What a run folder holds, read once: configuration, curves, figures, pictures, warnings, environment."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from lightning_distill.commands.run_folder import find_run, read_config
from lightning_distill.records import EvaluationLog

__all__ = ["Curve", "Picture", "RunData", "RunWarning", "load_run_data"]


@dataclass(frozen=True)
class Curve:
    """A logged scalar: student updates (n,) ascending, and values (n,), possibly not finite."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Picture:
    """A PNG; ``step`` is None where the name tells none."""

    path: Path
    step: int | None = None


@dataclass(frozen=True)
class RunWarning:
    """A line of ``warnings.jsonl``."""

    step: int
    kind: str
    message: str


@dataclass(frozen=True)
class RunData:
    """A run as far as it left traces.

    Attributes:
        folder: run folder.
        name: for people, for example ``quickstart/version_0``.
        config: ``config.yaml`` as plain data.
        config_text: the same as it was written.
        scalars: curves by tag.
        log: evaluations; None without a ``metrics.json`` that can be read.
        pictures: sample grids by update.
        strips: trajectory strips by update.
        other_pictures: PNGs of the folder itself.
        warnings: in the order they were given.
        environment: ``environment.json``; empty without one.
        started: time of the first logged value, else of the configuration.
        seconds: from the first to the last logged value; None without any.
        notes: a sentence for everything that is missing or damaged.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    config_text: str = ""
    scalars: dict[str, Curve] = field(default_factory=dict)
    log: EvaluationLog | None = None
    pictures: list[Picture] = field(default_factory=list)
    strips: list[Picture] = field(default_factory=list)
    other_pictures: list[Picture] = field(default_factory=list)
    warnings: list[RunWarning] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    started: datetime | None = None
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> dict[str, Any]:
        """Arguments of the method."""
        model = self.config["model"]
        return dict((model.get("init_args") or {}) if isinstance(model, Mapping) else {})

    @property
    def method(self) -> str:
        """Class name of the method."""
        return _class_name(self.config["model"]) or "unknown"

    @property
    def teacher(self) -> str:
        """The teacher in a few words, for example ``ZooDenoiser fashion``."""
        return _described(self.model.get("teacher"))

    @property
    def data(self) -> str:
        """The data in a few words."""
        return _described(self.config.get("data"))

    @property
    def student_steps(self) -> int | None:
        """Number of student steps; None for a run without a student."""
        times = self.model.get("student_times")
        return len(times) if times else self.model.get("num_steps")

    @property
    def updates(self) -> int:
        """Last student update of which there is a record."""
        logged = [int(curve.steps[-1]) + 1 for tag, curve in self.scalars.items() if tag.startswith("train/")]
        measured = [row.step or 0 for row in self.log.rows] if self.log else []
        return max([0, *logged, *measured, *(p.step or 0 for p in self.pictures)])


def load_run_data(folder: str | Path) -> RunData:
    """Read a run folder.

    Args:
        folder: run folder, or the one above its ``version_N``.

    Raises:
        FileNotFoundError: it is no run folder.
        ValueError: its configuration cannot be read.
    """
    run = find_run(folder)
    config = read_config(run)
    notes: list[str] = []
    scalars, times = _read_scalars(run, notes)
    written = (run / "config.yaml").stat().st_mtime
    return RunData(
        folder=run,
        name=_run_name(run),
        config=config,
        config_text=(run / "config.yaml").read_text(),
        scalars=scalars,
        log=_read_log(run, notes),
        pictures=_numbered(run, "step", notes),
        strips=_numbered(run, "strip"),
        other_pictures=[Picture(path) for path in sorted(run.glob("*.png"))],
        warnings=_read_warnings(run, notes),
        environment=_read_environment(run, notes),
        started=datetime.fromtimestamp(times[0] if times else written, timezone.utc),
        seconds=times[1] - times[0] if times else None,
        notes=notes,
    )


# ------------------------------------------------------------------------------------------------ files
def _read_scalars(run: Path, notes: list[str]) -> tuple[dict[str, Curve], tuple[float, float] | None]:
    """Curves, and the times of the first and the last value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(run.glob("events.out.tfevents.*")):
        notes.append("There are no curves: the folder has no TensorBoard event files.")
        return {}, None
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    curves: dict[str, Curve] = {}
    times: list[float] = []
    for name in events.Tags()["scalars"]:
        steps: list[int] = []
        values: list[float] = []
        for event in events.Scalars(name):
            while steps and steps[-1] >= event.step:  # a resumed run goes over its last updates again
                steps.pop()
                values.pop()
            steps.append(event.step)
            values.append(event.value)
            times.append(event.wall_time)
        curves[name] = Curve(np.array(steps), np.array(values, dtype=np.float64))
    if not curves:
        notes.append("There are no curves: the TensorBoard event files hold no values yet, or are damaged.")
        return {}, None
    return curves, (min(times), max(times))


def _read_log(run: Path, notes: list[str]) -> EvaluationLog | None:
    try:
        log = EvaluationLog.load(run)
        rows = [*log.rows, *log.teacher]
        sound = all(
            isinstance(row.nfe, int)
            and isinstance(row.step, (int, type(None)))
            and all(isinstance(value, (int, float)) for value in row.metrics.values())
            for row in rows
        )
        if not sound or not isinstance(log.reference, dict):
            raise ValueError(f"{run / 'metrics.json'} is damaged (a figure is no number).")
    except FileNotFoundError:
        notes.append(
            "There are no figures: the run was not evaluated (no metrics.json). Add GenerativeEvaluation to "
            "trainer.callbacks, or run lightning-distill evaluate on the folder."
        )
        return None
    except (ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{run / 'metrics.json'} is damaged ({error})."
        notes.append(f"There are no figures: {reason}")
        return None
    return log


def _numbered(run: Path, kind: str, notes: list[str] | None = None) -> list[Picture]:
    """``samples/<kind>_<update>.png``, by update."""
    found = []
    for path in (run / "samples").glob(f"{kind}_*.png"):
        if match := re.fullmatch(rf"{kind}_(\d+)", path.stem):
            found.append(Picture(path, int(match[1])))
    if not found and notes is not None:
        notes.append("There are no sample grids (no samples/step_*.png): add SampleGrid to trainer.callbacks.")
    return sorted(found, key=lambda picture: picture.step or 0)


def _read_warnings(run: Path, notes: list[str]) -> list[RunWarning]:
    path = run / "warnings.jsonl"
    found: list[RunWarning] = []
    damaged = 0
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            content = json.loads(line)
            found.append(RunWarning(int(content["step"]), str(content["kind"]), str(content["message"])))
        except (ValueError, KeyError, TypeError):
            damaged += bool(line.strip())
    if damaged:
        lines = "line" if damaged == 1 else "lines"
        notes.append(f"{damaged} {lines} of warnings.jsonl cannot be read and are not shown.")
    return found


def _read_environment(run: Path, notes: list[str]) -> dict[str, Any]:
    path = run / "environment.json"
    if not path.is_file():
        notes.append("It is not known what the run ran on: there is no environment.json.")
        return {}
    try:
        content = json.loads(path.read_text())
        return {str(key): value for key, value in content.items()}
    except (ValueError, AttributeError):
        notes.append("It is not known what the run ran on: environment.json is damaged.")
        return {}


# ------------------------------------------------------------------------------------------------ words
def _run_name(run: Path) -> str:
    folder = run.resolve()
    return f"{folder.parent.name}/{folder.name}" if re.fullmatch(r"version_\d+", folder.name) else folder.name


def _class_name(spec: Any) -> str:
    path = spec.get("class_path") if isinstance(spec, Mapping) else spec
    return path.rsplit(".", 1)[-1] if isinstance(path, str) else ""


def _described(spec: Any) -> str:
    """Class and the argument that says which one."""
    name = _class_name(spec)
    if not name:
        return "none"
    arguments = spec.get("init_args") or {} if isinstance(spec, Mapping) else {}
    for key in ("name", "problem", "path", "folder", "run", "root", "spec"):
        value = arguments.get(key)
        if isinstance(value, (str, Path)) and str(value):
            return f"{name} {Path(value).name if '/' in str(value) else value}"
    return name
