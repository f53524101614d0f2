"""Diff-Instruct: its update, its times, and learning four modes."""

from __future__ import annotations

import pytest
import torch
from small_problems import Exact, distil, gaussian_problem, learns_soon, mlp, posterior, ready

from lightning_distill.batch import Batch
from lightning_distill.methods import DMD2, DiffInstruct
from lightning_distill.networks.analytic import analytic_denoiser, ring4
from lightning_distill.processes import EDM
from lightning_distill.times import LogNormal, Uniform

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


@pytest.mark.parametrize("weight", ["one", "kl", "vsd"])
def test_the_gradient_is_that_of_the_integrated_kl(weight):
    """E_t[lambda (y_F - y_T) dx/dtheta] = E_t[lambda sigma^2 / alpha^2 dKL_t/dtheta], with closed-form KL_t."""
    module = ready(gaussian_problem(1.3, -0.5, method=DiffInstruct, weight=weight, matching_times=Uniform(0.3, 0.7)))
    n = 200_000
    terms = module.student_loss(Batch(size=n))
    student = module.student.network
    got = torch.stack(torch.autograd.grad(terms.losses["matching"], (student.b, student.a)))
    b, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.5, 1.3))
    t = (0.3 + 0.4 * (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    own, target = (1 - t) ** 2 * a**2 + t**2, (1 - t) ** 2 * 0.49 + t**2
    kl = 0.5 * (own / target + (1 - t) ** 2 * (b - 1.0) ** 2 / target - 1 + (target / own).log())
    factor = {"one": (t / (1 - t)) ** 2, "kl": torch.ones_like(t), "vsd": t**3 / (1 - t)}[weight]
    want = torch.stack(torch.autograd.grad((factor * kl).mean(), (b, a)))
    torch.testing.assert_close(got.double(), want, rtol=0.03, atol=0.0)


def test_it_is_dmd2_with_another_weight_and_ratio(ring4_problem):
    def trained(method, **settings):
        module = gaussian_problem(method=method, matching_times=Uniform(0.2, 0.8), **settings)
        ring4_problem.fit(module, 3, Batch(size=64), batch_size=16)
        return [p.detach() for p in module.student.parameters()]

    own = trained(DiffInstruct)
    assert all(torch.equal(p, q) for p, q in zip(own, trained(DMD2, weight="one", fake_score_steps=1)))
    assert not all(torch.equal(p, q) for p, q in zip(own, trained(DMD2, fake_score_steps=1)))


def test_edm_has_the_papers_noise_levels():
    settings = {"student": Exact(), "fake_score": Exact(), "student_times": [2.5], "ema": []}
    module = ready(DiffInstruct(analytic_denoiser(ring4(), EDM()), **settings))
    for times in (module.matching_times, module.critic_times):
        assert isinstance(times, LogNormal)
        assert (times.mean, times.std) == (-1.2, 1.2)
    assert isinstance(ready(DiffInstruct(mlp())).matching_times, Uniform)
    given = DiffInstruct(analytic_denoiser(ring4(), EDM()), matching_times=LogNormal(-1.0, 1.0), **settings)
    assert ready(given).matching_times.mean == -1.0


def test_equal_networks_have_no_direction():
    module = ready(gaussian_problem(0.7, 1.0, fake=(1.0, 0.7), method=DiffInstruct))
    terms = module.student_loss(Batch(size=64))
    gradient = torch.autograd.grad(terms.losses["matching"], list(module.student.parameters()))
    assert max(float(g.abs()) for g in gradient) < 1e-6
    x = torch.tensor([[0.3]], dtype=torch.float64)
    t = torch.tensor([[0.4]], dtype=torch.float64)
    assert float(posterior(x, t, 1.0, 0.7)) == pytest.approx(float(module.fake_score(x, t.flatten()).x0.detach()))


@pytest.mark.learn
def test_it_soon_learns_four_modes(ring4_problem, trained_teacher):
    run = learns_soon(ring4_problem, trained_teacher.denoiser, DiffInstruct)
    assert run.distance < 0.28
    assert all(0.15 < share < 0.35 for share in run.shares), run.shares


@pytest.mark.slow
@pytest.mark.learn
def test_it_learns_four_modes(ring4_problem, trained_teacher):
    run = distil(ring4_problem, trained_teacher.denoiser, 300, method=DiffInstruct)
    assert run.distance < 0.16
    assert all(0.18 < share < 0.32 for share in run.shares), run.shares
