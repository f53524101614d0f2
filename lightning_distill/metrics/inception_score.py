"""Inception Score: sharp and varied class decisions (arXiv:1606.03498)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.special import entr

__all__ = ["inception_score"]


def inception_score(logits: Tensor, splits: int = 1) -> float:
    """Exp of the mutual information of sample and class; the mean over equal parts of the samples.

        exp( E_x KL(p(y|x) || p(y)) ) = exp( H(E_x p(y|x)) - E_x H(p(y|x)) )

    Args:
        logits: class scores of a classifier, (N, K). With several parts the samples must be in random order: parts
            sorted by class hold one class each and score 1.
        splits: number of parts; published figures use 10 parts of 5,000 samples.

    Returns:
        Score in [1, K], computed in float64.

    Raises:
        ValueError: wrong shape, or fewer samples than parts.
    """
    if logits.ndim != 2 or splits < 1 or len(logits) < splits:
        raise ValueError(f"inception score needs logits (N, K) with N >= splits={splits}, got {tuple(logits.shape)}.")
    scores = []
    for part in logits.double().tensor_split(splits):
        p = part.softmax(dim=1)
        scores.append((entr(p.mean(dim=0)).sum() - entr(p).sum(dim=1).mean()).exp())
    return torch.stack(scores).mean().item()
