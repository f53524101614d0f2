"""Frechet distance between two sets of features, and the statistics it needs.

    FD(a, b) = |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^{1/2})      (arXiv:1706.08500, Eq. 6)

This is the *square* of the Frechet distance; as everywhere in this field, it is what FD (and FID) stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "frechet_distance"]


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of a set of feature vectors.

    Attributes:
        mean: (d,), float64.
        cov: unbiased covariance, (d, d), float64.
        n: number of samples; 0 where it is unknown (statistics read from other people's files).
    """

    mean: Tensor
    cov: Tensor
    n: int

    @classmethod
    def from_features(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of feature vectors.

        Args:
            features: (n, d) with n >= 2, any floating dtype.

        Raises:
            ValueError: wrong shape, too few samples, or NaN/inf features.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"features of shape {tuple(features.shape)}: expected (samples, dimensions), 2 samples or more."
            )
        features = features.detach().double()
        if not bool(features.isfinite().all()):
            bad = int((~features.isfinite().all(dim=1)).sum())
            raise ValueError(f"{bad} of {len(features)} feature vectors contain NaN or inf; check the samples.")
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of the union of both sets, exact (pairwise update of Chan et al., 1979).

        Raises:
            ValueError: the number of samples of one side is unknown.
        """
        if self.n < 1 or other.n < 1:
            raise ValueError("statistics can be merged only if both know their number of samples (n).")
        n = self.n + other.n
        gap = other.mean - self.mean
        scatter = (self.n - 1) * self.cov + (other.n - 1) * other.cov
        scatter = scatter + torch.outer(gap, gap) * (self.n * other.n / n)
        return FeatureStatistics(self.mean + gap * (other.n / n), scatter / (n - 1), n)

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` with the keys ``mu`` and ``sigma``, as EDM's and ADM's tools read, and ``n``."""
        np.savez(Path(path), mu=self.mean.cpu().numpy(), sigma=self.cov.cpu().numpy(), n=np.int64(self.n))

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read an ``.npz`` with ``mu`` and ``sigma``.

        Raises:
            ValueError: the file lacks one of the two keys, their shapes are not (d,) and (d, d), or it is no ``.npz``.
        """
        try:
            with np.load(path) as data:
                kept = {name: data[name] for name in {"mu", "sigma", "n"} & set(data.files)}
                names = sorted(data.files)
        except (ValueError, EOFError, AttributeError, TypeError, BadZipFile) as error:
            raise ValueError(f"{path} cannot be read ({error}); give an .npz with mu and sigma.") from None
        if missing := {"mu", "sigma"} - set(kept):
            raise ValueError(
                f"{path} lacks {sorted(missing)}; reference statistics need the keys mu and sigma, "
                f"this file has {names}."
            )
        mean, cov = (torch.from_numpy(kept[k].astype(np.float64)) for k in ("mu", "sigma"))
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path} has mu of shape {tuple(mean.shape)} and sigma of {tuple(cov.shape)}; reference statistics "
                "need (d,) and (d, d)."
            )
        return cls(mean, cov, int(kept["n"]) if "n" in kept else 0)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance between the Gaussians of two feature sets.

    tr((S_a S_b)^{1/2}) is the sum of the square roots of the eigenvalues of the symmetric matrix
    S_a^{1/2} S_b S_a^{1/2}, which has those of S_a S_b. It stays real for singular covariances, so neither
    complex parts nor an added ridge need care.

    Args:
        a: statistics of one set.
        b: statistics of the other, same dimension.

    Returns:
        FD >= 0, computed in float64.

    Raises:
        ValueError: different feature dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {len(a.mean)} and {len(b.mean)} features cannot be compared; use one extractor for both."
        )
    mean_a, cov_a, mean_b, cov_b = (v.double().cpu() for v in (a.mean, a.cov, b.mean, b.cov))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ cov_b @ root_a
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * cross
    return max(0.0, distance.item())
