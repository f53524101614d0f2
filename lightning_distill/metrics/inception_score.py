"""Inception Score: sharp and varied class decisions (arXiv:1606.03498)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inception_score"]


def inception_score(logits: Tensor, splits: int = 1) -> float:
    """Exp E_x KL(p(y|x) || p(y)), the mean over equal parts of the samples.

    Args:
        logits: class scores of a classifier, (N, K), in any order of samples.
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
        log_p = part.log_softmax(dim=1)
        p = log_p.exp()
        log_marginal = p.mean(dim=0).clamp_min(torch.finfo(p.dtype).tiny).log()
        scores.append((p * (log_p - log_marginal)).sum(dim=1).mean().exp())
    return torch.stack(scores).mean().item()
