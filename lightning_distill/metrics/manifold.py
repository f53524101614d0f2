"""Precision and recall of generated samples by nearest-neighbour manifolds (arXiv:1904.06991)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["PrecisionRecall", "precision_recall"]


@dataclass(frozen=True)
class PrecisionRecall:
    """Fidelity and coverage, both in [0, 1].

    Attributes:
        precision: share of generated samples that lie within the manifold of the real ones.
        recall: share of real samples that lie within the manifold of the generated ones.
    """

    precision: float
    recall: float


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = 3, batch_size: int = 2_000) -> PrecisionRecall:
    """Precision and recall; a manifold is the union of the balls that reach each sample's k-th neighbour.

    Both depend on the numbers of samples: compare figures only at equal sizes.

    Args:
        generated: features of generated samples, (n, d).
        real: features of real samples, (m, d).
        neighbours: k >= 1; both sets need more samples than that.
        batch_size: rows of the distance matrix that are held at a time.

    Returns:
        Precision and recall as torch-fidelity computes them.

    Raises:
        ValueError: wrong shapes or too few samples.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"precision and recall compare two matrices of features, got shapes {tuple(generated.shape)} and "
            f"{tuple(real.shape)}; use one extractor for both."
        )
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need more than {neighbours} samples of each "
            "kind, "
            f"got {len(generated)} generated and {len(real)} real ones."
        )
    values = prc_features_to_metric(
        generated.float(),
        real.float(),
        prc_neighborhood=neighbours,
        prc_batch_size=batch_size,
        save_cpu_ram=True,
        verbose=False,
    )
    return PrecisionRecall(values["precision"], values["recall"])
