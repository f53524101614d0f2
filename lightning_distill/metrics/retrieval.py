"""Caption retrieval: does a picture show what its caption says, measured with a small probe learned on real pictures.

The probe maps picture features linearly to text embeddings. A generated picture counts as right if, among all captions,
its own is the nearest to the probe's output; real pictures that the probe has not seen give the ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["RetrievalResult", "RidgeProbe", "caption_retrieval", "retrieval_recall"]


def retrieval_recall(queries: Tensor, captions: Tensor, targets: Tensor | None = None, k: int = 1) -> float:
    """Share of queries whose own caption is among the k nearest by cosine.

        R@k = mean_i clip((k - a_i) / l_i, 0, 1),     a_i = #{j : s_ij > s_i,own},   l_i = #{j : s_ij = s_i,own}

    with s the cosine similarity. Without ties l_i = 1 and this counts the queries with a_i < k; equal candidates
    come in any order with the same probability, so that constant queries have the recall of chance, not 0 or 1.

    Args:
        queries: (N, D), floating, N >= 1.
        captions: candidates, (M, D).
        targets: index of the right caption of each query, (N,), int64; None means that query i belongs to caption i.
        k: 1 to M.

    Returns:
        in [0, 1]; chance is k / M.

    Raises:
        ValueError: shapes do not agree, k is out of range, or a value is NaN or inf.
    """
    if queries.ndim != 2 or captions.ndim != 2 or queries.shape[1] != captions.shape[1] or len(queries) == 0:
        raise ValueError(
            f"retrieval compares embeddings (N, D) and (M, D), got {tuple(queries.shape)} and {tuple(captions.shape)}."
        )
    if targets is None and len(queries) != len(captions):
        raise ValueError(f"{len(queries)} queries and {len(captions)} captions: say with targets=... which belong.")
    if not 1 <= k <= len(captions):
        raise ValueError(f"k={k} must be between 1 and the {len(captions)} captions.")
    if not (queries.isfinite().all() and captions.isfinite().all()):
        raise ValueError("the embeddings contain NaN or inf; look at the pictures and at the extractor.")
    own = torch.arange(len(queries)) if targets is None else targets
    c = F.normalize(captions.double(), dim=1)
    right = 0.0
    for rows, target in zip(F.normalize(queries.double(), dim=1).split(1024), own.to(captions.device).split(1024)):
        similarity = rows @ c.T
        best = similarity.gather(1, target[:, None])
        above = (similarity > best + 1e-12).sum(dim=1)
        level = ((similarity - best).abs() <= 1e-12).sum(dim=1)
        # of `level` equal candidates, k - above come first
        right += ((k - above) / level).clamp(0.0, 1.0).sum().item()
    return right / len(queries)


@dataclass(frozen=True)
class RidgeProbe:
    """A linear map from picture features to text embeddings.

        y = (x - mean_x) W + mean_y,      W = (X^T X + ridge n s I)^-1 X^T Y,      s = trace(X^T X) / (n d)

    with X and Y the centred training features and embeddings.

    Attributes:
        weight: W, (D_x, D_y), float64.
        mean_x: (D_x,), float64.
        mean_y: (D_y,), float64.
    """

    weight: Tensor
    mean_x: Tensor
    mean_y: Tensor

    @classmethod
    def fit(cls, features: Tensor, embeddings: Tensor, ridge: float = 1e-2) -> RidgeProbe:
        """Closed-form solution.

        Args:
            features: of pictures, (N, D_x), N >= 2.
            embeddings: of their captions, (N, D_y).
            ridge: > 0, in units of the features' mean variance.

        Raises:
            ValueError: shapes do not agree, or ``ridge`` is not positive.
        """
        if features.ndim != 2 or embeddings.ndim != 2 or len(features) != len(embeddings) or len(features) < 2:
            raise ValueError(
                f"a probe needs 2 or more pairs (N, D_x) and (N, D_y), got {tuple(features.shape)} and "
                f"{tuple(embeddings.shape)}."
            )
        if not ridge > 0:
            raise ValueError(f"ridge={ridge}: give a positive number.")
        x, y = features.double(), embeddings.double()
        mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
        x, y = x - mean_x, y - mean_y
        gram = x.T @ x
        scale = gram.trace() / len(gram)
        gram.diagonal().add_(ridge * scale.clamp_min(1e-300))
        return cls(torch.linalg.solve(gram, x.T @ y), mean_x, mean_y)

    def __call__(self, features: Tensor) -> Tensor:
        """Embeddings of picture features (N, D_x), as (N, D_y), float64."""
        return (features.double() - self.mean_x) @ self.weight + self.mean_y


@dataclass(frozen=True)
class RetrievalResult:
    """Recall of generated pictures beside what real ones reach.

    Attributes:
        recall: of the generated pictures, in [0, 1].
        ceiling: of the real pictures with the same captions.
        chance: k / number of captions.
    """

    recall: float
    ceiling: float
    chance: float

    @property
    def relative(self) -> float:
        """0 at chance, 1 at the ceiling; NaN where the probe tells nothing apart."""
        gap = self.ceiling - self.chance
        return (self.recall - self.chance) / gap if gap > 0 else float("nan")


def caption_retrieval(
    generated: Tensor,
    real: Tensor,
    captions: Tensor,
    train_features: Tensor,
    train_captions: Tensor,
    ridges: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
    k: int = 1,
) -> RetrievalResult:
    """R@k of generated pictures, with the ceiling that real pictures of the same captions have.

    The ridge is the one with the highest recall on a fifth of the training pairs, which a first probe does not see; the
    probe that is used is then fitted on all of them.

    Args:
        generated: features of generated pictures, one per caption, (N, D_x).
        real: features of the real pictures of these captions, (N, D_x); not among the training pictures.
        captions: embeddings of the N captions, (N, D_y), all different.
        train_features: features of real training pictures, (M, D_x), M >= 10.
        train_captions: embeddings of their captions, (M, D_y).
        ridges: candidates.
        k: see ``retrieval_recall``.
    """
    if len(train_features) < 10:
        raise ValueError(f"caption retrieval needs 10 or more training pictures, got {len(train_features)}.")
    validation = torch.arange(len(train_features)) % 5 == 0
    x, y = train_features[~validation], train_captions[~validation]
    held_x, held_y = train_features[validation], train_captions[validation]
    best = max(ridges, key=lambda ridge: retrieval_recall(RidgeProbe.fit(x, y, ridge)(held_x), held_y.double()))
    probe = RidgeProbe.fit(train_features, train_captions, best)
    return RetrievalResult(
        recall=retrieval_recall(probe(generated), captions.double(), k=k),
        ceiling=retrieval_recall(probe(real), captions.double(), k=k),
        chance=k / len(captions),
    )
