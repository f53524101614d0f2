"""DMD with regression on stored pairs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from small_problems import Given, distil, gaussian_problem, mlp, ready
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.methods import DMD, DMD2, PairRegression
from lightning_distill.metrics.lpips_diversity import PerceptualDistance
from lightning_distill.networks.analytic import ring4
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.processes import FlowMatching

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


@pytest.fixture
def pairs(tmp_path):
    """The probability-flow map of the Gaussian problem's teacher N(1, .7^2): x = .7 z + 1."""
    noise = torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
    save_file({"noise": noise, "x0": 0.7 * noise + 1.0}, tmp_path / "pairs.safetensors")
    return str(tmp_path / "pairs.safetensors")


def test_the_regression_of_the_ode_map_is_zero(pairs):
    exact = ready(gaussian_problem(0.7, 1.0, method=DMD, regression_pairs=pairs))
    assert float(exact.student_loss(Batch(size=64)).losses["regression"].detach()) == pytest.approx(0.0, abs=1e-12)


def test_the_gradient_is_the_sum_of_both_terms(pairs):
    """Regression by hand: mean (a z + b - .7 z - 1)^2 over the rows drawn; a quarter of it is added."""
    module = ready(gaussian_problem(1.3, -0.5, method=DMD, regression_pairs=pairs))
    terms = module.student_loss(Batch(size=64))
    student = module.student.network
    got = torch.autograd.grad(terms.losses["regression"], (student.a, student.b), retain_graph=True)
    rows = (module.streams.uniform("student0/pairs", 0, 0, (64,)) * 512).long()
    z = module.regression.pairs(module).data.noise[rows]
    error = 1.3 * z - 0.5 - (0.7 * z + 1.0)
    assert float(got[0]) == pytest.approx(float((2 * error * z).mean()), rel=1e-4)
    assert float(got[1]) == pytest.approx(float((2 * error).mean()), rel=1e-4)
    total = module.weighted_sum("student", terms)
    want = terms.losses["matching"] + 0.25 * terms.losses["regression"]
    assert float(total.detach()) == pytest.approx(float(want.detach()))


def test_without_regression_it_is_dmd2_with_the_papers_weight(pairs, ring4_problem):
    def trained(method, **settings):
        module = gaussian_problem(method=method, fake_score_steps=1, **settings)
        ring4_problem.fit(module, 3, Batch(size=64), batch_size=16)
        return [p.detach() for p in module.student.parameters()]

    off = trained(DMD, regression_pairs=pairs, loss_weights={"student/regression": 0.0})
    core = trained(DMD2, weight="dmd_v1", fresh_samples=False)
    for p, q in zip(off, core):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert not all(torch.equal(p, q) for p, q in zip(trained(DMD, regression_pairs=pairs), core))


def test_the_perceptual_distance_is_zero_for_equal_images_and_has_a_gradient(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = torchvision.models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{k}": v for k, v in features.items()}, tmp_path / "alex.pth")
    generator = torch.Generator().manual_seed(1)
    noise, x0 = torch.randn(4, 1, 8, 8, generator=generator), torch.rand(4, 1, 8, 8, generator=generator)
    save_file({"noise": noise, "x0": x0}, tmp_path / "images.safetensors")
    distance = PerceptualDistance(trunk_weights=str(tmp_path / "alex.pth"))
    regression = PairRegression(str(tmp_path / "images.safetensors"), distance)

    class Recall(nn.Module):
        """Answers a known noise with its image, plus a parameter."""

        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            nearest = torch.cdist(x.flatten(1), noise.flatten(1)).argmin(1)
            return x0[nearest] + self.offset

    teacher = Denoiser(Recall(), FlowMatching(), "sample")
    module = DMD(
        teacher,
        student=Given(Recall()),
        shape=[1, 8, 8],
        regression_pairs=str(tmp_path / "images.safetensors"),
        regression_distance=distance,
    )
    ready(module)
    loss = module.regression.loss(module, 8)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        module.student.network.offset.add_(0.2)
    loss = regression.loss(module, 8)
    loss.backward()
    assert float(loss.detach()) > 1e-4
    assert module.student.network.offset.grad.abs() > 0
    assert not any("lpips" in key or "regression" in key for key in module.state_dict())


def test_settings_that_cannot_work_are_refused(pairs, tmp_path):
    with pytest.raises(ValueError, match="DMD learns from stored pairs; give regression_pairs"):
        DMD(mlp())
    with pytest.raises(ValueError, match="distils into one step, but the student has 2"):
        DMD(mlp(), regression_pairs=pairs, num_steps=2).configure_model()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DMD(mlp(), regression_pairs="nowhere.safetensors")
    distance = PerceptualDistance(trunk_weights=str(tmp_path / "alex.pth"))
    with pytest.raises(FileNotFoundError, match=r"alex\.pth"):
        DMD(mlp(), regression_pairs=pairs, regression_distance=distance)


@pytest.fixture
def map_of_the_teacher(ring4_problem, trained_teacher, tmp_path):
    """Trains a student whose pairs are the exact map, and says how far from it the student is."""
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(4))
    clean = ring4().flow_map(10.0 * noise, 10.0, 0.0, ring4_problem.process, num_steps=64)
    save_file({"noise": noise, "x0": clean}, tmp_path / "pairs.safetensors")

    def deviation(weight, updates=300, decay=0.99):
        run = distil(
            ring4_problem,
            trained_teacher.denoiser,
            updates,
            method=DMD,
            ema=[ConstantEMA(decay)],
            student_times=[10.0],
            regression_pairs=str(tmp_path / "pairs.safetensors"),
            loss_weights={"student/regression": weight},
        )
        assert run.distance < 0.17
        assert all(0.18 < share < 0.32 for share in run.shares), run.shares
        return float((run.module.sample(1000, noise=noise) - clean).square().mean().sqrt())

    return deviation


@pytest.mark.learn
def test_it_learns_four_modes_and_the_teachers_map(map_of_the_teacher):
    assert map_of_the_teacher(1.0, updates=100, decay=0.95) < 0.2


@pytest.mark.slow
@pytest.mark.learn
def test_without_regression_it_learns_another_map(map_of_the_teacher):
    assert map_of_the_teacher(1.0) < 0.5 * map_of_the_teacher(0.0)
