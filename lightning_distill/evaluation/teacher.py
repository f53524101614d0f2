"""The teacher's own figures: the baselines that every student is compared with, measured once.

They depend on the teacher's weights, the grid, the noise and the measures only, so they are kept in a file under a key
of all these; a second run reads them instead of sampling the teacher again. A shipped teacher has its figures on its
card.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_distill.environment import cache_folder
from lightning_distill.evaluation.evaluator import Evaluator
from lightning_distill.guidance import Guidance
from lightning_distill.metrics.extractors import ZooClassifier
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.records import EvaluationRow
from lightning_distill.zoo import zoo_card

__all__ = ["TeacherCache", "baseline_key", "card_rows"]


def baseline_key(
    fingerprint: str, teacher: Denoiser, steps: int, guidance: float | Guidance, n: int, seed: int, what: str
) -> str:
    """Key of a row: everything that the teacher's figures depend on.

    Args:
        fingerprint: SHA-256 of the teacher's weights.
        teacher: for its process, prediction type and the dtype of its weights.
        steps: number of Euler steps.
        guidance: w, or a policy.
        n: number of samples.
        seed: of their noise.
        what: key of the evaluator.
    """
    dtype = next((str(p.dtype) for p in teacher.network.parameters()), "")
    how = (vars(teacher.process), type(teacher.process).__name__, teacher.prediction_type, dtype)
    text = repr((fingerprint, how, steps, guidance, n, seed, what))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def card_rows(
    teacher: Denoiser, evaluator: Evaluator, steps: Sequence[int], guidance_scale: float | Guidance = 1.0
) -> list[EvaluationRow] | None:
    """Rows from the card of a shipped teacher; None where the settings do not match the card's.

    Args:
        teacher: the teacher.
        evaluator: must measure with nothing but the classifier of the teacher's own zoo entry.
        steps: numbers of Euler steps wanted.
        guidance_scale: w of the rows, or a policy.
    """
    entry = teacher.zoo_name
    own = all(isinstance(e, ZooClassifier) and e.data == entry for e in evaluator.extractors)
    if entry is None or not own or not evaluator.extractors:
        return None
    figures: dict[str, Any] = zoo_card(entry)["figures"]
    table: dict[str, dict[str, float]] = figures["by_steps"]
    if guidance_scale != figures["guidance_scale"] or any(str(k) not in table for k in steps):
        return None
    return [
        EvaluationRow(
            "teacher",
            int(k),
            dict(values),
            stage="card",
            num_samples=figures["samples"],
            seed=figures["noise_seed"],
            half=figures["half"],
        )
        for k, values in table.items()
    ]


class TeacherCache:
    """Rows of teachers as JSON files.

    Args:
        folder: where they are kept; None is ``LIGHTNING_DISTILL_CACHE`` or ``~/.cache/lightning_distill``.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = cache_folder(folder) / "teachers"

    def get(self, key: str) -> EvaluationRow | None:
        """The row under ``key``; None if there is none that can be read."""
        try:
            return EvaluationRow(**json.loads((self.folder / f"{key}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def put(self, key: str, row: EvaluationRow) -> None:
        """Keep a row; a folder that cannot be written only costs the next run its time."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"{key}.{os.getpid()}.part"
            part.write_text(json.dumps(asdict(row)) + "\n")
            os.replace(part, self.folder / f"{key}.json")
        except OSError:
            return
