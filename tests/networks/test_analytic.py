"""Exact teachers against torch.distributions, quadrature and each other."""

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from lightning_distill.networks.analytic import (
    AnalyticNetwork,
    GaussianMixture,
    analytic_denoiser,
    gaussian_flow_map,
    ring,
    ring4,
)
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving

F64 = torch.float64
PROCESSES = [FlowMatching(), VariancePreserving(zero_terminal_snr=True), EDM(), TrigFlow()]
by_process = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "vp-ztsnr", "edm", "trig"])
MEANS = torch.tensor([[1.0, -0.5], [-1.2, 0.4], [0.2, 1.5]], dtype=F64)
ROOTS = torch.tensor([[[0.5, 0.0], [0.2, 0.3]], [[0.4, 0.0], [-0.3, 0.6]], [[0.3, 0.0], [0.0, 0.2]]], dtype=F64)
COVARIANCES = ROOTS @ ROOTS.mT
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=F64)


@by_process
def test_log_density_is_that_of_torch_distributions(process):
    mixture = GaussianMixture(MEANS, covariances=COVARIANCES, weights=WEIGHTS)
    t = torch.tensor(0.3 * process.t_max, dtype=F64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    components = MultivariateNormal(alpha * MEANS, alpha**2 * COVARIANCES + sigma**2 * torch.eye(2, dtype=F64))
    x = torch.randn(20, 2, dtype=F64)
    expected = MixtureSameFamily(Categorical(WEIGHTS), components).log_prob(x)
    torch.testing.assert_close(mixture.log_prob(x, t, process), expected, rtol=1e-10, atol=1e-10)


def test_isotropic_log_density_with_few_and_many_dimensions():
    means = torch.randn(3, 5, dtype=F64)
    std = torch.tensor([0.3, 0.7, 1.1], dtype=F64)
    mixture = GaussianMixture(means, std=std, weights=2 * WEIGHTS)
    components = Independent(Normal(0.6 * means, (0.36 * std**2 + 0.16).sqrt()[:, None].expand(3, 5)), 1)
    x = torch.randn(20, 5, dtype=F64)
    expected = MixtureSameFamily(Categorical(WEIGHTS), components).log_prob(x)
    torch.testing.assert_close(mixture.log_prob(x, torch.tensor(0.4), FlowMatching()), expected, rtol=1e-6, atol=1e-6)


@by_process
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 2])])
def test_posterior_means_match_quadrature(process, labels):
    """E[x0 | x_t] by integrating x0 p(x0) p(x_t | x0) on a grid, in one dimension with two classes."""
    means, stds, weights = torch.tensor([[-1.0, 0.5, 2.0], [0.3, 0.5, 0.2], [0.3, 0.5, 0.2]], dtype=F64)
    classes = torch.tensor([0, 1, 0])
    mixture = GaussianMixture(means[:, None], std=stds, weights=weights, labels=classes)
    t = process.t_from_log_snr(torch.tensor([3.0, 1.0, 0.0, -2.0], dtype=F64))
    x_t = torch.tensor([0.4, -0.8, 1.1, 0.2], dtype=F64)
    grid = torch.linspace(-8, 8, 40001, dtype=F64)
    density = torch.stack([w * Normal(m, s).log_prob(grid).exp() for w, m, s in zip(weights, means, stds)])
    for i in range(4):
        label = 2 if labels is None else int(labels[i])
        prior = density.sum(0) if label == 2 else density[classes == label].sum(0)
        alpha, sigma = process.alpha(t[i]), process.sigma(t[i])
        joint = prior * Normal(alpha * grid, sigma).log_prob(x_t[i]).exp()
        expected_x0 = (grid * joint).sum() / joint.sum()
        expected_eps = (x_t[i] - alpha * expected_x0) / sigma
        given = None if labels is None else labels[i : i + 1]
        x0, eps = mixture.posterior(x_t[i].reshape(1, 1), t[i], process, given)
        torch.testing.assert_close(x0.squeeze(), expected_x0, rtol=0, atol=1e-9)
        torch.testing.assert_close(eps.squeeze(), expected_eps, rtol=0, atol=1e-8)


def test_isotropic_and_full_covariances_agree():
    std = torch.tensor([0.3, 0.5, 0.8], dtype=F64)
    full = std.square()[:, None, None] * torch.eye(2, dtype=F64)
    x, t = torch.randn(6, 2, dtype=F64), torch.rand(6, dtype=F64)
    one, two = GaussianMixture(MEANS, std=std), GaussianMixture(MEANS, covariances=full)
    for name in ("posterior_mean", "score", "velocity", "log_prob"):
        a, b = (getattr(m, name)(x, t, FlowMatching()) for m in (one, two))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_samples_have_the_moments_and_are_reproducible():
    mixture = GaussianMixture(MEANS, covariances=COVARIANCES, weights=WEIGHTS, labels=[0, 1, 0])
    x, labels = mixture.sample(40000, torch.Generator().manual_seed(1))
    again, _ = mixture.sample(40000, torch.Generator().manual_seed(1))
    assert torch.equal(x, again)
    assert x.dtype == torch.float32
    assert labels.dtype == torch.int64
    mean = (WEIGHTS[:, None] * MEANS).sum(0)
    second = torch.einsum("k,kij->ij", WEIGHTS, COVARIANCES + MEANS[:, :, None] * MEANS[:, None])
    torch.testing.assert_close(x.double().mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(x.double().T.cov(), second - mean.outer(mean), rtol=0, atol=0.03)
    assert (labels == 1).float().mean().item() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(x[labels == 1].double().mean(0), MEANS[1], rtol=0, atol=0.02)


def test_samples_can_have_any_shape():
    mixture = GaussianMixture(torch.randn(2, 16), std=0.1, shape=(1, 4, 4))
    x, component = mixture.sample(7)
    assert x.shape == (7, 1, 4, 4)
    assert set(component.tolist()) <= {0, 1}
    network = AnalyticNetwork(mixture, FlowMatching())
    assert network.shape == (1, 4, 4)
    assert network(x, torch.rand(7)).shape == x.shape


def test_labels_can_be_mixed_within_a_batch():
    teacher = analytic_denoiser(ring(3, labelled=True), FlowMatching())
    assert teacher.num_classes == 3
    x, t = torch.randn(5, 2, dtype=F64), torch.tensor(0.6)
    labels = torch.tensor([2, 3, 0, 1, 3])
    out = teacher(x, t, {"class_labels": labels}).x0
    for i, label in enumerate(labels):
        torch.testing.assert_close(out[i : i + 1], teacher(x[i : i + 1], t, {"class_labels": label[None]}).x0)
    marginal = teacher(x, t).x0
    torch.testing.assert_close(out[labels == 3], marginal[labels == 3])
    null = teacher.null_cond({"class_labels": labels})
    torch.testing.assert_close(teacher(x, t, null).x0, marginal)
    # a class of one Gaussian has the linear denoiser of that Gaussian
    single = analytic_denoiser(GaussianMixture([[2.0, 0.0]], std=0.25), FlowMatching())
    torch.testing.assert_close(out[2:3], single(x[2:3], t).x0)


@by_process
def test_gaussian_flow_map_composes_and_transports_the_law(process):
    mean, cov = MEANS[0], COVARIANCES[0]
    x = process.prior(torch.randn(4, 2, dtype=F64))
    t, s, r = (torch.tensor(f * process.t_max, dtype=F64) for f in (1.0, 0.6, 0.0))
    direct = gaussian_flow_map(mean, cov, x, t, r, process)
    halfway = gaussian_flow_map(mean, cov, x, t, s, process)
    torch.testing.assert_close(gaussian_flow_map(mean, cov, halfway, s, r, process), direct, rtol=0, atol=1e-9)
    torch.testing.assert_close(gaussian_flow_map(mean, cov, x, t, t, process), x, rtol=0, atol=1e-9)
    # an affine map whose linear part turns the covariance at t into the one at r
    zero = torch.zeros(1, 2, dtype=F64)
    shift = gaussian_flow_map(mean, cov, zero, t, r, process)
    linear = gaussian_flow_map(mean, cov, torch.eye(2, dtype=F64), t, r, process) - shift
    at_t = process.alpha(t) ** 2 * cov + process.sigma(t) ** 2 * torch.eye(2)
    torch.testing.assert_close(linear.T @ at_t @ linear, cov, rtol=0, atol=1e-9)


def test_gaussian_flow_map_takes_isotropic_variances_and_times_per_sample():
    mean, variance = torch.randn(4, dtype=F64), torch.tensor(0.3, dtype=F64)
    x = torch.randn(3, 1, 2, 2, dtype=F64)
    t, r = torch.tensor([0.9, 0.5, 0.7]), torch.tensor([0.1, 0.0, 0.7])
    iso = gaussian_flow_map(mean, variance, x, t, r, FlowMatching())
    full = gaussian_flow_map(mean, variance * torch.eye(4, dtype=F64), x, t, r, FlowMatching())
    torch.testing.assert_close(iso, full, rtol=0, atol=1e-12)
    assert iso.shape == x.shape


@by_process
def test_numerical_flow_map_agrees_with_the_closed_form(process):
    mixture = GaussianMixture(MEANS[:1], covariances=COVARIANCES[:1])
    x = process.prior(torch.randn(4, 2, dtype=F64))
    for stop in (0.0, 0.5 * process.t_max):
        r = torch.tensor(stop, dtype=F64)
        expected = gaussian_flow_map(MEANS[0], COVARIANCES[0], x, torch.tensor(process.t_max), r, process)
        out = mixture.flow_map(x, process.t_max, stop, process)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_numerical_flow_map_of_a_class_stays_in_its_class():
    mixture = ring4(labelled=True)
    labels = torch.arange(4).repeat(50)
    x0 = mixture.flow_map(torch.randn(200, 2), 1.0, 0.0, FlowMatching(), labels, num_steps=32)
    distance = torch.cdist(x0.double(), mixture.means)
    assert distance.gather(1, labels[:, None]).max() < 5 * 0.35


@pytest.mark.parametrize(("make", "modes", "radius", "std"), [(ring, 8, 2.0, 0.25), (ring4, 4, 1.5, 0.35)])
def test_rings(make, modes, radius, std):
    mixture = make()
    assert mixture.means.shape == (modes, 2)
    torch.testing.assert_close(mixture.means.norm(dim=1), torch.full((modes,), radius, dtype=F64))
    torch.testing.assert_close(mixture.eigenvalues.sqrt(), torch.full((modes, 1), std, dtype=F64))
    gaps = torch.pdist(mixture.means).sort().values[:modes]
    assert gaps.max() - gaps.min() < 1e-12
    assert mixture.num_classes == 0
    assert make(labelled=True).num_classes == modes


def test_the_teacher_is_differentiable_in_samples_and_time():
    teacher = analytic_denoiser(ring(), TrigFlow())
    x, t = torch.randn(3, 2, dtype=F64), torch.tensor([0.3, 0.8, 1.2], dtype=F64)
    tangents = torch.randn(3, 2, dtype=F64), torch.ones(3, dtype=F64)
    _, derivative = torch.func.jvp(lambda x, t: teacher(x, t).x0, (x, t), tangents)
    h = 1e-6
    plus, minus = (teacher(x + s * h * tangents[0], t + s * h).x0 for s in (1, -1))
    torch.testing.assert_close(derivative, (plus - minus) / (2 * h), rtol=1e-6, atol=1e-8)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(teacher(x, t).x0.sum(), x)
    assert bool(gradient.isfinite().all())
    assert gradient.abs().sum() > 0


def test_float32_results_are_those_of_float64():
    teacher = analytic_denoiser(ring(), VariancePreserving(zero_terminal_snr=True))
    x, t = torch.randn(32, 2), torch.linspace(0.01, 1.0, 32, dtype=F64)
    out = teacher(x, t).x0
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), teacher(x.double(), t).x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"means": [1.0, 2.0], "std": 1.0}, r"means must be \(K, D\)"),
        ({"means": [[1.0, 2.0]]}, "either std or covariances"),
        ({"means": [[1.0, 2.0]], "std": 1.0, "covariances": torch.eye(2)[None]}, "either std or covariances"),
        ({"means": [[1.0, 2.0]], "std": 0.0}, "must be positive"),
        ({"means": [[1.0, 2.0]], "covariances": torch.eye(2)}, r"\(1, 2, 2\)"),
        ({"means": [[1.0, 2.0]], "covariances": -torch.eye(2)[None]}, "must be positive"),
        ({"means": [[1.0, 2.0]], "std": 1.0, "weights": [0.5, 0.5]}, "1 positive numbers"),
        ({"means": [[1.0, 2.0]], "std": 1.0, "shape": (3,)}, "does not have the 2 elements"),
        ({"means": [[1.0], [2.0]], "std": 1.0, "labels": [0, 2]}, "classes 0..C-1"),
        ({"means": [[1.0], [2.0]], "std": 1.0, "labels": [-1, 1]}, "classes 0..C-1"),
    ],
)
def test_mixtures_refuse_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**arguments)


def test_bad_batches_give_clear_errors():
    teacher = analytic_denoiser(ring(), FlowMatching())
    with pytest.raises(ValueError, match=r"samples of shape \(2,\), got a batch of shape \(4, 3\)"):
        teacher(torch.randn(4, 3), torch.rand(4))
    with pytest.raises(ValueError, match="no classes"):
        teacher(torch.randn(4, 2), torch.rand(4), {"class_labels": torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(ValueError, match="unconditional value"):
        teacher.null_cond({"class_labels": torch.zeros(4, dtype=torch.int64)})
    assert teacher.num_classes is None


@pytest.mark.parametrize(
    ("class_path", "arguments", "modes"),
    [
        ("lightning_distill.networks.analytic.ring", {"num_modes": 5}, 5),
        ("lightning_distill.networks.analytic.ring4", {}, 4),
        (
            "lightning_distill.networks.analytic.GaussianMixture",
            {"means": [[0.0, 1.0], [2.0, 3.0]], "std": 0.1},
            2,
        ),
    ],
)
def test_mixtures_can_be_written_in_yaml(class_path, arguments, modes):
    parser = ArgumentParser()
    parser.add_argument("--mixture", type=GaussianMixture)
    config = parser.parse_object({"mixture": {"class_path": class_path, "init_args": arguments}})
    mixture = parser.instantiate_classes(config).mixture
    assert isinstance(mixture, GaussianMixture)
    assert len(mixture.means) == modes
