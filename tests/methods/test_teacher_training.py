"""Teachers: what their loss is, and that they learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.methods import TeacherTraining
from lightning_distill.networks.analytic import GaussianMixture
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving
from lightning_distill.randomness import Draws, RandomStreams
from lightning_distill.times import Uniform

pytestmark = pytest.mark.filterwarnings("ignore:.*val_dataloader", "ignore:.*eval mode")


def mlp(process=None, kind="flow_prediction", classes=0, **kwargs):
    network = ResidualMLP((2,), width=8, depth=1, num_classes=classes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Denoiser(network, process or FlowMatching(), kind, **kwargs)


def ready(denoiser, **settings):
    module = TeacherTraining(denoiser, **settings)
    module.configure_model()
    module.draws = Draws(module.streams, 0, 0, "student0")
    return module


@pytest.mark.parametrize("name", ["flow", "vp", "edm"])
def test_the_loss_is_the_one_of_the_paper(name):
    """Re-derived from the draws: ||v - (eps - x0)||^2, ||v - (a eps - s x0)||^2, lambda(sigma) ||D - x0||^2."""
    x0 = torch.randn(32, 2)
    denoiser = {
        "flow": lambda: mlp(),
        "vp": lambda: mlp(VariancePreserving(zero_terminal_snr=True), "v_prediction"),
        "edm": lambda: mlp(EDM(), "v_prediction", network_process=TrigFlow(), sigma_data=0.5),
    }[name]()
    module = ready(denoiser, training_times=Uniform(0.05, 0.9), seed=4)
    got = module.student_loss(Batch(x0=x0)).losses["denoising"]
    streams = RandomStreams(4)
    u = streams.uniform("student0/renoise/time", 0, 0, (32,))
    eps = streams.normal("student0/renoise/noise", 0, 0, (32, 2))
    t = denoiser.process.t_max * (0.05 + 0.85 * u)
    if name == "flow":
        s = t.float()[:, None]
        out = denoiser.network((1 - s) * x0 + s * eps, t)
        want = (out - (eps - x0)).square().mean()
    elif name == "vp":
        a, s = denoiser.process.alpha(t).float()[:, None], denoiser.process.sigma(t).float()[:, None]
        out = denoiser.network(a * x0 + s * eps, t)
        want = (out - (a * eps - s * x0)).square().mean()
    else:
        sd, sigma = 0.5, t.float()[:, None]
        x = x0 + sigma * eps
        c_skip = sd**2 / (sigma**2 + sd**2)
        c_out = -sigma * sd / (sigma**2 + sd**2).sqrt()  # the network predicts minus EDM's F
        c_in = 1 / (sigma**2 + sd**2).sqrt()
        denoised = c_skip * x + c_out * denoiser.network(c_in * x, torch.atan(t / sd))
        want = ((sigma**2 + sd**2) / (sigma * sd) ** 2 * (denoised - x0) ** 2).mean()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=2e-4)


def test_labels_are_dropped_at_the_given_rate():
    module = ready(mlp(classes=3), label_dropout=0.25)
    n = 20_000
    batch = Batch(x0=torch.randn(n, 2), cond={"class_labels": torch.arange(n) % 3})
    seen = []
    module.student.register_forward_pre_hook(lambda _m, args: seen.append(args[2]["class_labels"]))
    module.student_loss(batch)
    labels = seen[0]
    dropped = labels == 3
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.015)
    assert torch.equal(labels[~dropped], batch.cond["class_labels"][~dropped])
    for c in range(3):
        share = dropped[batch.cond["class_labels"] == c].float().mean()
        assert float(share) == pytest.approx(0.25, abs=0.025)


def test_nothing_is_dropped_without_a_null_class_or_at_rate_zero():
    labels = {"class_labels": torch.arange(64) % 3}
    for module in (ready(mlp(classes=3), label_dropout=0.0), ready(mlp(), label_dropout=0.5)):
        cond = labels if module.student.num_classes else {}
        seen = []
        module.student.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[2]))
        module.student_loss(Batch(x0=torch.randn(64, 2), cond=cond))
        assert all(torch.equal(seen[0][key], cond[key]) for key in cond)


def test_validation_measures_the_same_draws_every_time(ring4_problem):
    module = TeacherTraining(mlp(sigma_data=1.12), label_dropout=0.0)
    held_out = [Batch(x0=ring4_problem.reference[:64])]

    class Loader:
        def __iter__(self):
            return iter(held_out)

        def __len__(self):
            return 1

    trainer = ring4_problem.fit(module, 1, ring4_problem.data, batch_size=64)
    first = trainer.validate(module, Loader(), verbose=False)[0]["val/denoising"]
    assert trainer.validate(module, Loader(), verbose=False)[0]["val/denoising"] == first
    assert first > 0


def test_data_and_settings_that_cannot_work_are_refused(ring4_problem):
    with pytest.raises(ValueError, match="TeacherTraining needs data"):
        ready(mlp()).student_loss(Batch(size=4))
    with pytest.raises(ValueError, match=r"label_dropout=1\.0"):
        TeacherTraining(mlp(), label_dropout=1.0)
    with pytest.raises(ValueError, match="sampler='heun' is unknown"):
        ready(mlp(), sampler="heun")
    scaled = Batch(x0=3.0 * ring4_problem.data.x0)
    with pytest.raises(ValueError, match=r"standard deviation of 3\.\d+.*sigma_data=1.12"):
        ring4_problem.fit(TeacherTraining(mlp(sigma_data=1.12)), 2, scaled)
    ring4_problem.fit(TeacherTraining(mlp(sigma_data=1.12), check_data=False), 1, scaled)


def test_training_starts_from_the_given_weights_and_every_weight_is_trained():
    denoiser = mlp()
    module = ready(denoiser)
    assert module.student is denoiser
    assert all(p.requires_grad for p in denoiser.parameters())
    assert module.teacher is None


# ------------------------------------------------------------------------------------------------ learning
@pytest.mark.learn
def test_a_linear_network_learns_the_posterior_mean(ring4_problem):
    """The best affine x0-prediction at each time is known for one Gaussian; SGD on the loss must find it."""
    law = GaussianMixture([[1.0, -0.5]], std=0.5)
    data = Batch(x0=law.sample(20_000, torch.Generator().manual_seed(0))[0])

    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.offset = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(2))

        def forward(self, x, t):
            return self.gain * x + self.offset

    process = FlowMatching()
    low = 0.5 - 1e-6
    module = TeacherTraining(
        Denoiser(Affine(), process, "sample", sigma_data=0.5),
        label_dropout=0.0,
        training_times=Uniform(low, low + 2e-6),
        student_optimizer=lambda p: torch.optim.Adam(p, lr=2e-2, fused=True),
        seed=1,
    )
    ring4_problem.fit(module, 400, data)
    found = module.sampling_network().network
    gain = 0.5 * 0.25 / (0.25 * 0.25 + 0.25)  # alpha s^2 / (alpha^2 s^2 + sigma^2)
    assert float(found.gain) == pytest.approx(gain, abs=0.02)
    torch.testing.assert_close(found.offset.detach(), (1 - 0.5 * gain) * torch.tensor([1.0, -0.5]), rtol=0, atol=0.02)


@pytest.mark.learn
def test_the_teacher_learns_four_modes(ring4_problem, trained_teacher):
    samples = trained_teacher.sample(50)
    assert ring4_problem.distance(samples) < 0.15
    assert all(0.18 < share < 0.32 for share in ring4_problem.shares(samples))
    # few steps are far off, which is what distillation is for
    assert ring4_problem.distance(trained_teacher.sample(1)) > 0.7
    assert ring4_problem.distance(trained_teacher.sample(2)) > 0.7
    # its average is better than, or equal to, chance: the exact denoiser is close at every noise level
    x0 = ring4_problem.reference[:1000]
    for sigma in (0.1, 0.5, 2.0):
        t = torch.full((1000,), sigma, dtype=torch.float64)
        x_t = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
        exact = GaussianMixture(ring4_problem.means, std=0.35).posterior_mean(x_t, t, ring4_problem.process)
        error = (trained_teacher.denoiser(x_t, t).x0 - exact).square().mean()
        assert float(error.detach()) < 0.05 * float(exact.var())
