"""The rule by which a result counts: better in two extractors, without lost modes, lost classes or copies.

A Frechet distance alone can be gamed (pictures optimised against the features beat real data), so a student passes
only if progress holds in an extractor that was never used for tuning or checkpoint choice, with noise and reference
samples that the choice has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_distill.records import EvaluationRow

__all__ = ["MINIMUM_SAMPLES", "verdict"]

MINIMUM_SAMPLES = 5_000
#: smallest progress that counts, in every extractor
PROGRESS = 0.9
#: smallest recall as a share of the many-step teacher's
RECALL = 0.9
#: largest difference of class accuracy
ACCURACY = 0.02
#: accepted ratio of nearest-reference distances, student over teacher
NEAREST = (0.8, 1.2)


def verdict(
    row: EvaluationRow, teacher: Sequence[EvaluationRow], distances: Mapping[str, str], least_progress: float = PROGRESS
) -> list[str]:
    """What speaks against a result; nothing means that it passes.

    Args:
        row: the student's figures.
        teacher: the teacher's rows.
        distances: distance by extractor, see ``Evaluator.distances``; two are needed.
        least_progress: smallest progress that counts.

    Returns:
        One sentence for each condition that fails or cannot be checked.
    """
    problems: list[str] = []
    if len(distances) < 2:
        problems.append("only one extractor was used; the rule needs a second one, never used for tuning.")
    if row.num_samples < MINIMUM_SAMPLES:
        problems.append(f"{row.num_samples} samples are too few; the rule needs {MINIMUM_SAMPLES}.")
    for name, distance in distances.items():
        known = [r for r in teacher if distance in r.metrics]
        if not known or f"progress_{name}" not in row.metrics:
            problems.append(f"progress in {name} is unknown: the teacher was not measured at {row.nfe} and many steps.")
            continue
        best = min(known, key=lambda r: r.metrics[distance]).metrics
        value = row.metrics[f"progress_{name}"]
        if value < least_progress:
            problems.append(f"progress in {name} is {value:.3f}, below {least_progress:.2f}.")
        recall, other = row.metrics.get(f"recall_{name}"), best.get(f"recall_{name}")
        if recall is None or other is None:
            problems.append(f"recall in {name} was not measured.")
        elif recall < RECALL * other:
            problems.append(f"recall in {name} is {recall:.3f}, below {RECALL} of the teacher's {other:.3f}.")
        ratio = row.metrics.get(f"nearest_ratio_{name}")
        if ratio is not None and not NEAREST[0] <= ratio <= NEAREST[1]:
            problems.append(
                f"the distance to the nearest reference sample in {name} is {ratio:.2f} of the teacher's, outside "
                f"{NEAREST[0]} to {NEAREST[1]}."
            )
        accuracy, wanted = row.metrics.get("class_accuracy"), best.get("class_accuracy")
        if accuracy is not None and wanted is not None and abs(accuracy - wanted) > ACCURACY:
            problems.append(f"class accuracy is {accuracy:.3f}, more than {ACCURACY} from the teacher's {wanted:.3f}.")
    return problems
