"""The teacher's own figures: the baselines that every student is compared with, measured once.

They depend on the teacher's weights, the grid, the noise and the measures only, so they are kept in a file under a key
of all these; a second run reads them instead of sampling the teacher again. A shipped teacher has its figures on its
card. They are of one number of samples and one half of the reference, and small sets have larger Frechet distances, so
the card serves other evaluations only where that hardly moves the progress.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_distill.environment import cache_folder
from lightning_distill.evaluation.evaluator import Evaluator
from lightning_distill.guidance import Guidance
from lightning_distill.metrics.contents import content
from lightning_distill.metrics.extractors import ZooClassifier
from lightning_distill.metrics.reference import Reference, load_reference
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.records import EvaluationRow
from lightning_distill.zoo import zoo_card

__all__ = ["TeacherCache", "baseline_key", "card_note", "card_rows", "frechet_excess"]

#: largest error of the progress for which a card of another number of samples is good enough
_LARGEST_ERROR = 0.05


def baseline_key(
    fingerprint: str,
    teacher: Denoiser,
    steps: int,
    guidance: float | Guidance,
    n: int,
    seed: int,
    what: str,
    shape: Sequence[int],
) -> str:
    """Key of a row: everything that the teacher's figures depend on.

    Args:
        fingerprint: SHA-256 of the teacher's weights.
        teacher: for everything else that says how it is called: class, dtype of the weights, processes, prediction
            type, scales of the data, its family with the null conditions and the guidance that it is told.
        steps: number of Euler steps.
        guidance: w, or a policy.
        n: number of samples.
        seed: of their noise.
        what: key of the evaluator.
        shape: of one sample.
    """
    dtype = next((str(p.dtype) for p in teacher.network.parameters()), "")
    processes = [p and (type(p), vars(p)) for p in (teacher.process, teacher.network_process)]
    how = (
        *(type(teacher), type(teacher.network), dtype, processes, teacher.prediction_type, teacher.family, guidance),
        *(teacher.sigma_data, teacher.data_scale, teacher.null_class, teacher.jumps, teacher.sampling_guidance),
    )
    text = repr((fingerprint, content(how), steps, n, seed, what, tuple(shape)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def frechet_excess(reference: Reference) -> float:
    """Expected Frechet distance of n samples above that of infinitely many, times n.

    For Gaussian features of the reference's covariance S = B + W (between and within classes, the classes cycled
    through, as ``sample_many`` does), to the second order in the errors of mean and covariance. With eigenvalues l of S
    and w = diag(W), b = l - w in its eigenvectors:

        n E[excess] = sum_i w_i + 1/2 sum_ij (1 + [i = j]) (l_i l_j - b_i b_j) / (l_i + l_j)

    Args:
        reference: its ``train`` statistics give S, the labelled features of its halves W; without labels W = S.

    Returns:
        squared units of the features; a prediction for samples that resemble the data, not a bound.
    """
    values, vectors = torch.linalg.eigh(reference.statistics["train"].cov.double())
    total = values.clamp_min(1e-9 * values[-1].item() + 1e-30)
    within = total
    if reference.labels and reference.labels.keys() == reference.features.keys():
        points = torch.cat([reference.features[half] for half in sorted(reference.features)]).double() @ vectors
        labels = torch.cat([reference.labels[half] for half in sorted(reference.features)])
        classes = [points[labels == c] for c in labels.unique()]
        scatter = sum((part - part.mean(0)).square().sum(0) for part in classes)
        within = torch.minimum(torch.as_tensor(scatter) / len(points), total)
    between = total - within
    pairs = (torch.outer(total, total) - torch.outer(between, between)) / (total[:, None] + total)
    return (within.sum() + 0.5 * (pairs.sum() + pairs.trace())).item()


def card_rows(
    teacher: Denoiser,
    evaluator: Evaluator,
    num_samples: int,
    steps: Sequence[int],
    guidance_scale: float | Guidance = 1.0,
) -> list[EvaluationRow] | None:
    """Rows from the card of a shipped teacher; None where the settings do not match the card's.

    Another noise seed is none of them. Another half of the reference leaves the Frechet distance as it is, and another
    number of samples is accepted where it moves the progress at the given steps by 0.05 at most: say ``card_note``.

    Args:
        teacher: the teacher.
        evaluator: must measure with nothing but the classifier and the reference of the teacher's own zoo entry.
        num_samples: samples of the rows that are compared with the teacher's.
        steps: numbers of Euler steps wanted.
        guidance_scale: w of the rows, or a policy.
    """
    entry = teacher.zoo_name
    own = all(isinstance(e, ZooClassifier) and (e.data, e.name) == (entry, "cnn") for e in evaluator.extractors)
    if entry is None or not own or not evaluator.extractors:
        return None
    figures: dict[str, Any] = zoo_card(entry)["figures"]
    table: dict[str, dict[str, float]] = figures["by_steps"]
    if guidance_scale != figures["guidance_scale"] or any(str(k) not in table for k in steps):
        return None
    shipped, used = load_reference(entry).statistics["train"].mean, evaluator.references["cnn"].statistics["train"].mean
    if not torch.equal(shipped, used):
        return None
    rows = [
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
    return rows if _progress_error(rows, evaluator, num_samples, steps) <= _LARGEST_ERROR else None


def card_note(rows: Sequence[EvaluationRow], evaluator: Evaluator, num_samples: int, steps: Sequence[int]) -> str:
    """What a reader of ``card_rows`` must know: one sentence, or nothing where samples and half are the card's.

    Args:
        rows: the card's.
        evaluator: of the student.
        num_samples: of the student's rows.
        steps: numbers of steps wanted.
    """
    card = rows[0]
    if (card.num_samples, card.half) == (num_samples, evaluator.half):
        return ""
    error = _progress_error(rows, evaluator, num_samples, steps)
    return (
        f"The teacher's figures are those of its card ({card.num_samples} samples, {_words(card.half)}), the student "
        f"has {num_samples} samples, {_words(evaluator.half)}: this moves its progress by about {error:.1g}; do not "
        "compare recall, coverage and the like closely."
    )


def _progress_error(
    rows: Sequence[EvaluationRow], evaluator: Evaluator, num_samples: int, steps: Sequence[int]
) -> float:
    """How far another number of samples than the card's moves the progress, at most over the steps."""
    error = 0.0
    for suffix, distance in evaluator.distances.items():
        far = abs(1 / num_samples - 1 / rows[0].num_samples) * frechet_excess(evaluator.references[suffix])
        values = {row.nfe: row.metrics[distance] for row in rows}
        best = min(values.values())  # where the teacher is at its best there is no progress
        error = max([error, *(far / (values[k] - best) for k in steps if values[k] > best)])
    return error


def _words(half: str) -> str:
    return f"{half.replace('_', '-')} half of the reference"


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
