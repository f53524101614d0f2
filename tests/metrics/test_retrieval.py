"""Caption retrieval on cases whose recall is known."""

import pytest
import torch
from torch.nn.functional import normalize

from lightning_distill.metrics.retrieval import RidgeProbe, caption_retrieval, retrieval_recall


def test_known_ranks():
    captions = torch.eye(4)
    queries = torch.tensor([[1.0, 0.2, 0, 0], [0.9, 0.5, 0, 0], [0.9, 0.8, 0.7, 0], [0.9, 0.8, 0.7, 0.6]])
    assert [retrieval_recall(queries, captions, k=k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert retrieval_recall(5.0 * queries, 3.0 * captions) == 0.25  # lengths do not matter
    targets = torch.tensor([0, 0, 0, 0])
    assert retrieval_recall(queries, captions, targets) == 1.0
    assert retrieval_recall(queries[:2], captions, torch.tensor([1, 1]), k=2) == 1.0


def test_against_a_sorted_list():
    generator = torch.Generator().manual_seed(0)
    queries, captions = (torch.randn(n, 6, generator=generator) for n in (2100, 50))
    targets = torch.randint(0, 50, (2100,), generator=generator)
    ranked = (normalize(queries, dim=1) @ normalize(captions, dim=1).T).argsort(dim=1, descending=True)
    for k in (1, 5):
        expected = (ranked[:, :k] == targets[:, None]).any(dim=1).float().mean().item()
        assert retrieval_recall(queries, captions, targets, k) == pytest.approx(expected)


def test_constant_queries_have_the_recall_of_chance():
    captions = normalize(torch.randn(20, 8), dim=1)
    assert retrieval_recall(torch.zeros(20, 8), captions, k=3) == pytest.approx(3 / 20)
    assert retrieval_recall(torch.randn(20, 8), torch.ones(20, 8)) == pytest.approx(1 / 20)


def test_ridge_solves_its_normal_equations():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(30, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    probe = RidgeProbe.fit(x, y, ridge=0.3)
    centred = x - x.mean(0)
    strength = 0.3 * centred.square().sum() / 4
    weight = probe.weight.clone().requires_grad_()
    residual = (y - y.mean(0)) - centred @ weight
    (residual.square().sum() + strength * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-9  # the gradient of the penalised squared error vanishes
    exact = RidgeProbe.fit(x, 2.0 * x + 1.0, ridge=1e-9)
    torch.testing.assert_close(exact(x), 2.0 * x + 1.0, rtol=1e-5, atol=1e-5)


def problem(noise=0.3, n=400, d=24, e=12):
    """Pictures whose features are a linear code of their caption, with noise."""
    generator = torch.Generator().manual_seed(0)
    captions = normalize(torch.randn(n + 60, e, generator=generator), dim=1)
    code = torch.randn(e, d, generator=generator)
    features = captions @ code + noise * torch.randn(n + 60, d, generator=generator)
    return features, captions, generator


def test_real_pictures_reach_the_ceiling_and_wrong_ones_chance():
    features, captions, generator = problem()
    real, train, generated = features[:60], features[60:], features[:60]
    result = caption_retrieval(generated, real, captions[:60], train, captions[60:])
    assert result.recall == result.ceiling > 0.9
    assert result.relative == 1.0
    assert result.chance == pytest.approx(1 / 60)
    shuffled = caption_retrieval(
        real[torch.randperm(60, generator=generator)], real, captions[:60], train, captions[60:]
    )
    assert shuffled.recall < 0.1
    blurred = 0.3 * real + 0.7 * torch.randn(60, 24, generator=generator) * real.std()
    between = caption_retrieval(blurred, real, captions[:60], train, captions[60:])
    assert shuffled.recall < between.recall < result.ceiling
    constant = caption_retrieval(real[:1].expand(60, -1), real, captions[:60], train, captions[60:])
    assert constant.recall == pytest.approx(1 / 60)
    assert constant.relative == pytest.approx(0.0)


def test_a_strong_ridge_is_chosen_where_features_are_many():
    features, captions, _ = problem(noise=2.0, n=60, d=100)
    args = (features[:60], features[:60], captions[:60], features[60:], captions[60:])
    chosen = caption_retrieval(*args)
    weak, strong = (caption_retrieval(*args, ridges=(ridge,)).ceiling for ridge in (1e-8, 1.0))
    assert strong > weak
    assert chosen.ceiling >= weak


def test_bad_input():
    e = torch.eye(4)
    with pytest.raises(ValueError, match=r"compares embeddings \(N, D\) and \(M, D\), got \(4, 4\) and \(4, 3\)"):
        retrieval_recall(e, e[:, :3])
    with pytest.raises(ValueError, match="3 queries and 4 captions: say with targets"):
        retrieval_recall(e[:3], e)
    with pytest.raises(ValueError, match="k=5 must be between 1 and the 4 captions"):
        retrieval_recall(e, e, k=5)
    with pytest.raises(ValueError, match="contain NaN or inf"):
        retrieval_recall(e * float("nan"), e)
    with pytest.raises(ValueError, match="ridge=0: give a positive number"):
        RidgeProbe.fit(e, e, 0)
    with pytest.raises(ValueError, match="2 or more pairs"):
        RidgeProbe.fit(e[:1], e[:1])
    with pytest.raises(ValueError, match="10 or more training pictures"):
        caption_retrieval(e, e, e, e, e)
