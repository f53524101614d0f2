"""What an evaluated run leaves behind: ``metrics.json``, read by the report, the alarm and whoever plots.

A row is one set of samples (whose, how many steps, which weights, at which student update) with its figures. Rows of
the teacher are the baselines; they carry no update, and belong to the student's rows of as many samples of the same
noise and half of the reference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

__all__ = ["EvaluationLog", "EvaluationRow", "metric_name"]

FORMAT = 1
FILENAME = "metrics.json"


@dataclass(frozen=True)
class EvaluationRow:
    """Figures of one set of samples.

    Attributes:
        role: ``student`` or ``teacher``.
        nfe: network evaluations per sample.
        metrics: figures by name, for example ``fd_cnn``, ``recall_cnn``, ``progress_cnn``, ``class_accuracy``.
        weights: ``ema``, the name of a further average, or ``student`` (the raw weights); ``teacher`` for the teacher.
        step: student updates at the time; None for the teacher.
        stage: ``fit``, ``validate`` or ``test``; ``card`` for figures taken from a shipped teacher's card.
        num_samples: number of samples.
        seed: noise seed of the samples.
        half: which half of the reference was used, ``selection`` or ``held_out``.
        seconds: wall time of sampling and measuring.
    """

    role: Literal["student", "teacher"]
    nfe: int
    metrics: dict[str, float]
    weights: str = "teacher"
    step: int | None = None
    stage: str = "fit"
    num_samples: int = 0
    seed: int = 0
    half: str = "selection"
    seconds: float = 0.0

    @property
    def samples(self) -> tuple[int, int, str]:
        """Number, noise and half of the reference: rows with equal ones can be compared."""
        return self.num_samples, self.seed, self.half

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells a measurement from every other: all but the figures, which NaN makes different from themselves."""
        return tuple(value for name, value in vars(self).items() if name != "metrics")


def metric_name(stage: str, metric: str, nfe: int, weights: str) -> str:
    """Name under which a figure is logged, for example ``val/fd_cnn/nfe1/ema``.

    Args:
        stage: ``val`` or ``test``.
        metric: figure, with the extractor in it.
        nfe: steps of the sampler.
        weights: which network's.
    """
    return f"{stage}/{metric}/nfe{nfe}/{weights}"


@dataclass
class EvaluationLog:
    """All rows of a run.

    Attributes:
        rows: student rows in the order they were measured.
        teacher: baseline rows, of every set of samples that was measured; the one with the largest ``nfe`` is the
            many-step teacher.
        reference: what the samples were compared with: name, number of samples, real-vs-real floors by metric.
    """

    rows: list[EvaluationRow] = field(default_factory=list)
    teacher: list[EvaluationRow] = field(default_factory=list)
    reference: dict[str, Any] = field(default_factory=dict)

    def of(self, weights: str, nfe: int) -> list[EvaluationRow]:
        """Rows of one network at one number of steps, oldest first."""
        return [row for row in self.rows if row.weights == weights and row.nfe == nfe]

    def baselines(self, row: EvaluationRow) -> list[EvaluationRow]:
        """The teacher's rows that a row of the student is compared with: those of equal ``samples``.

        Where there are none, those of the teacher's card; without these all.
        """
        equal = [other for other in self.teacher if other.samples == row.samples]
        return equal or [other for other in self.teacher if other.stage == "card"] or self.teacher

    def compared(self, rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
        """The teacher's rows that any of these rows is compared with; all for no rows."""
        wanted = {other.identity for row in rows for other in self.baselines(row)}
        return [other for other in self.teacher if not rows or other.identity in wanted]

    def baseline(self, nfe: int | None = None, row: EvaluationRow | None = None) -> EvaluationRow | None:
        """The teacher's row at a number of steps.

        Args:
            nfe: steps; None for the most.
            row: row of the student that it is compared with; None looks among all.

        Returns:
            None if it was not measured.
        """
        rows = self.teacher if row is None else self.baselines(row)
        if nfe is None:
            return max(rows, key=lambda other: other.nfe, default=None)
        return next((other for other in rows if other.nfe == nfe), None)

    def update(self, other: EvaluationLog) -> None:
        """Take up what another log has and this one has not; nothing is lost.

        Args:
            other: its figures count where both have the teacher's of the same steps and samples, or the same floor.
        """
        known = {row.identity for row in self.rows}
        self.rows += [row for row in other.rows if row.identity not in known]
        teacher = {(row.nfe, row.samples): row for row in self.teacher}
        for row in other.teacher:
            old = teacher.get((row.nfe, row.samples), row)
            teacher[row.nfe, row.samples] = replace(row, metrics={**old.metrics, **row.metrics})
        self.teacher = list(teacher.values())
        floors = {**self.reference.get("floors", {}), **other.reference.get("floors", {})}
        self.reference = {**self.reference, **other.reference, **({"floors": floors} if floors else {})}

    def save(self, folder: str | Path) -> Path:
        """Write ``metrics.json`` into a folder, atomically."""
        path = Path(folder) / FILENAME
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        os.replace(part, path)
        return path

    def as_dict(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        return {
            "format": FORMAT,
            "reference": self.reference,
            "teacher": [asdict(row) for row in self.teacher],
            "student": [asdict(row) for row in self.rows],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> EvaluationLog:
        """The inverse of ``as_dict``.

        Raises:
            ValueError: the content is of another format.
            KeyError, TypeError: it is damaged.
        """
        if content["format"] != FORMAT:
            raise ValueError(f"metrics of format {content['format']} cannot be read, this version reads {FORMAT}.")
        student, teacher = ([EvaluationRow(**row) for row in content[key]] for key in ("student", "teacher"))
        reference = content["reference"]
        if not isinstance(reference, dict) or not isinstance(reference.get("floors", {}), dict):
            raise TypeError("its reference is no mapping")
        return cls(student, teacher, reference)

    @classmethod
    def load(cls, folder: str | Path, missing_ok: bool = False) -> EvaluationLog:
        """Read ``metrics.json`` of a run folder.

        Args:
            folder: run folder.
            missing_ok: an empty log where there is no such file.

        Raises:
            FileNotFoundError: the run was not evaluated.
            ValueError: the file is damaged or of another format.
        """
        path = Path(folder) / FILENAME
        if not path.is_file():
            if missing_ok:
                return cls()
            raise FileNotFoundError(
                f"{path} does not exist: the run was not evaluated. Add GenerativeEvaluation to trainer.callbacks, or "
                f"run 'lightning-distill evaluate {folder}'."
            )
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}).") from None
