"""The teacher's features as a perceptual distance."""

import pytest
import torch

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.teacher_features import TeacherFeatures, feature_distance
from lightning_distill.processes import FlowMatching, VariancePreserving
from lightning_distill.times import Uniform

SHAPES = [(3, 5), (3, 4, 5), (3, 5, 2, 2), (3, 5, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=["vectors", "tokens", "maps", "videos"])
def test_only_directions_count_and_opposite_ones_are_four_apart(shape):
    a = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert feature_distance(a, a).tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(feature_distance(a, 3.0 * a), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(feature_distance(a, -a), torch.full((3,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=["vectors", "tokens", "maps", "videos"])
def test_it_is_twice_one_minus_the_mean_cosine(shape):
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, dtype=torch.float64, generator=g) for _ in range(2))
    channels = 1 if len(shape) > 3 else -1
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=channels)
    torch.testing.assert_close(feature_distance(a, b), 2.0 - 2.0 * cosine.reshape(3, -1).mean(1))


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    network = ResidualMLP(shape=[3], width=16, depth=2, num_classes=2).double().eval().requires_grad_(False)
    for p in network.parameters():  # outputs of blocks begin at zero
        p.add_(0.1 * torch.randn_like(p))
    return Denoiser(network, VariancePreserving(), "v_prediction", sigma_data=1.0)


def test_both_samples_are_seen_with_the_same_noise_at_the_same_time(teacher):
    g = torch.Generator().manual_seed(2)
    made, goal, noise = (torch.randn(4, 3, dtype=torch.float64, generator=g) for _ in range(3))
    u, cond = torch.rand(4, dtype=torch.float64, generator=g), {"class_labels": torch.tensor([0, 1, 0, 1])}
    taps = ("blocks.0", "blocks.1")
    found = TeacherFeatures(taps, Uniform(0.1, 0.3))(teacher, made, goal, cond, u, noise)
    t = Uniform(0.1, 0.3).quantile(u, teacher.process)
    alpha, sigma = teacher.process.alpha(t)[:, None], teacher.process.sigma(t)[:, None]
    seen, wanted = (teacher.feature_maps(alpha * x + sigma * noise, t, cond, taps) for x in (made, goal))
    expected = sum(2 - 2 * torch.nn.functional.cosine_similarity(seen[k], wanted[k], dim=-1) for k in taps)
    torch.testing.assert_close(found, expected)
    assert (found > 1e-3).all()
    other = TeacherFeatures(taps, Uniform(0.1, 0.3))(teacher, made, goal, cond, u, -noise)
    assert (found - other).abs().max() > 1e-3


def test_gradients_reach_what_was_made_and_nothing_else(teacher):
    made, goal = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    made.requires_grad_()
    goal.requires_grad_()
    cond, u, noise = {"class_labels": torch.zeros(4, dtype=torch.long)}, torch.full((4,), 0.5), torch.zeros(4, 3)
    distance = TeacherFeatures(["blocks.1"])

    def total(x):
        return distance(teacher, x, goal, cond, u, noise.double()).sum()

    total(made).backward()
    assert goal.grad is None
    assert all(p.grad is None for p in teacher.parameters())
    step = torch.zeros_like(made)
    step[1, 2] = 1e-5
    with torch.no_grad():
        slope = (total(made + step) - total(made - step)) / 2e-5
    torch.testing.assert_close(made.grad[1, 2], slope, rtol=1e-5, atol=1e-8)
    with torch.no_grad():
        descended = total(made - 0.05 * made.grad)
    assert descended < total(made)


@pytest.mark.parametrize("taps", [[], ["input"], ["blocks.0", "input"]])
def test_it_wants_blocks(taps):
    with pytest.raises(ValueError, match="name blocks of the teacher"):
        TeacherFeatures(taps)


def test_unknown_blocks_are_named_before_training():
    from lightning_distill.methods import InstaFlow

    teacher = Denoiser(ResidualMLP(shape=[2], width=8, depth=1), FlowMatching(), "flow_prediction", sigma_data=1.0)
    module = InstaFlow(teacher, perceptual=TeacherFeatures(["nowhere"]), shape=[2])
    with pytest.raises(ValueError, match="nowhere"):
        module.configure_model()
