"""Frechet distance: closed forms, merging, files."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from lightning_distill.metrics import FeatureStatistics, frechet_distance


def statistics(mean, cov, n=0):
    return FeatureStatistics(torch.as_tensor(mean).double(), torch.as_tensor(cov).double(), n)


def spd(d, seed):
    a = np.random.default_rng(seed).normal(size=(d, d))
    return a @ a.T + 0.1 * np.eye(d)


def test_commuting_gaussians_have_the_closed_form():
    """For covariances with common axes FD = |m1 - m2|^2 + sum (s1 - s2)^2."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    s1, s2 = np.array([1.0, 2.0, 0.5, 3.0, 0.1]), np.array([2.0, 1.0, 0.7, 0.2, 0.4])
    m1, m2 = np.arange(5.0), np.array([1.0, 0.0, 2.0, -1.0, 3.0])
    a = statistics(m1, q @ np.diag(s1**2) @ q.T)
    b = statistics(m2, q @ np.diag(s2**2) @ q.T)
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("d", [1, 3, 16])
def test_general_gaussians_agree_with_the_matrix_square_root(d):
    m, s1, s2 = np.random.default_rng(1).normal(size=d), spd(d, 2), spd(d, 3)
    expected = m @ m + np.trace(s1) + np.trace(s2) - 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2).real)
    a, b = statistics(np.zeros(d), s1), statistics(m, s2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)


def test_singular_covariances_need_no_ridge():
    flat = np.diag([1.0, 0.0, 4.0])
    assert frechet_distance(statistics(np.zeros(3), flat), statistics(np.zeros(3), np.eye(3))) == pytest.approx(2.0)
    few = FeatureStatistics.from_features(torch.randn(4, 32))
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-5)


def test_statistics_are_those_of_numpy():
    features = torch.randn(50, 6, dtype=torch.float16)
    found = FeatureStatistics.from_features(features)
    x = features.double().numpy()
    assert np.allclose(found.mean, x.mean(0), atol=1e-12)
    assert np.allclose(found.cov, np.cov(x, rowvar=False), atol=1e-12)
    assert found.n == 50


@pytest.mark.parametrize("split", [2, 17, 98])
def test_merged_parts_equal_the_whole(split):
    x = torch.randn(100, 7, dtype=torch.float64) * 3 + 5
    x[:split] += 4
    whole = FeatureStatistics.from_features(x)
    merged = FeatureStatistics.from_features(x[:split]).merge(FeatureStatistics.from_features(x[split:]))
    assert merged.n == 100
    assert torch.allclose(merged.mean, whole.mean, rtol=0, atol=1e-12)
    assert torch.allclose(merged.cov, whole.cov, rtol=0, atol=1e-11)


def test_files_have_the_keys_of_edm_and_adm(tmp_path):
    saved = FeatureStatistics.from_features(torch.randn(20, 4))
    saved.save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as data:
        assert {"mu", "sigma"} <= set(data.files)
        foreign = {"mu": data["mu"].astype(np.float32), "sigma": data["sigma"].astype(np.float32)}
    loaded = FeatureStatistics.load(tmp_path / "r.npz")
    assert torch.equal(loaded.mean, saved.mean)
    assert torch.equal(loaded.cov, saved.cov)
    assert loaded.n == 20
    np.savez(tmp_path / "foreign.npz", **foreign)
    other = FeatureStatistics.load(tmp_path / "foreign.npz")
    assert (other.n, other.cov.dtype) == (0, torch.float64)
    with pytest.raises(ValueError, match="know their number"):
        other.merge(saved)
    np.savez(tmp_path / "bad.npz", mean=foreign["mu"])
    with pytest.raises(ValueError, match=r"lacks \['mu', 'sigma'\].*has \['mean'\]"):
        FeatureStatistics.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"mu of shape \(3,\) and sigma of \(3, 4\)"):
        FeatureStatistics.load(tmp_path / "shapes.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "text.npz").write_text("PK no archive")
    for name in ("array", "text"):
        with pytest.raises(ValueError, match=rf"{name}.npz cannot be read .* give an .npz with mu and sigma"):
            FeatureStatistics.load(tmp_path / f"{name}.npz")


def test_bad_features_are_refused():
    x = torch.randn(10, 3)
    x[4, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of 10 feature vectors"):
        FeatureStatistics.from_features(x)
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        FeatureStatistics.from_features(x[:1])
    a, b = (
        FeatureStatistics.from_features(torch.randn(9, 3)),
        FeatureStatistics.from_features(torch.randn(9, 4)),
    )
    with pytest.raises(ValueError, match="3 and 4 features"):
        frechet_distance(a, b)
