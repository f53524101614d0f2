"""What an evaluated run leaves behind: ``metrics.json``, read by the report, the alarm and whoever plots.

A row is one set of samples (whose, how many steps, which weights, at which student update) with its figures. Rows of
the teacher are the baselines; they carry no update.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
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
        teacher: baseline rows; the one with the largest ``nfe`` is the many-step teacher.
        reference: what the samples were compared with: name, number of samples, real-vs-real floors by metric.
    """

    rows: list[EvaluationRow] = field(default_factory=list)
    teacher: list[EvaluationRow] = field(default_factory=list)
    reference: dict[str, Any] = field(default_factory=dict)

    def of(self, weights: str, nfe: int) -> list[EvaluationRow]:
        """Rows of one network at one number of steps, oldest first."""
        return [row for row in self.rows if row.weights == weights and row.nfe == nfe]

    def baseline(self, nfe: int | None = None) -> EvaluationRow | None:
        """The teacher's row at ``nfe`` steps, or with None the one with most steps; None if it was not measured."""
        if nfe is None:
            return max(self.teacher, key=lambda row: row.nfe, default=None)
        return next((row for row in self.teacher if row.nfe == nfe), None)

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
        return cls(student, teacher, content["reference"])

    @classmethod
    def load(cls, folder: str | Path) -> EvaluationLog:
        """Read ``metrics.json`` of a run folder.

        Raises:
            FileNotFoundError: the run was not evaluated.
            ValueError: the file is damaged or of another format.
        """
        path = Path(folder) / FILENAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: the run was not evaluated. Add GenerativeEvaluation to trainer.callbacks, or "
                f"run 'lightning-distill evaluate {folder}'."
            )
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}).") from None
