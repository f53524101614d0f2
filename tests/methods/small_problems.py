"""Gaussians whose distillation can be written down, small networks, and the learning run on four modes."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from lightning_distill.ema import ConstantEMA
from lightning_distill.methods import DMD2, DistillationModule
from lightning_distill.networks.analytic import AnalyticNetwork, GaussianMixture, analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Role
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.processes import FlowMatching
from lightning_distill.randomness import Draws
from lightning_distill.schedules import WarmupDecay


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, exp(log_std)^2) with both as parameters; flow matching."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())

    def forward(self, x, t):
        t = t.to(x)[:, None]
        variance = (2 * self.log_std).exp()
        gain = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)
        return self.mean + gain * (x - (1 - t) * self.mean)


class Affine(nn.Module):
    """x0 = a z + b: from pure noise, samples of N(b, a^2)."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x, t):
        return self.a * x + self.b


class Given(Role):
    """A role with a network of its own."""

    def __init__(self, network):
        self.network = network

    def build(self, source, name=None):
        return Denoiser(self.network, source.process, "sample")


class Exact(Role):
    """The posterior mean of a mixture, the teacher's where none is given, with a parameter that plays no part."""

    def __init__(self, mixture=None):
        self.mixture = mixture

    def build(self, source, name=None):
        network = AnalyticNetwork(self.mixture or source.network.mixture, source.process)
        network.unused = nn.Parameter(torch.zeros(()))
        return Denoiser(network, source.process, "sample")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def gaussian_problem(a=1.3, b=-0.5, fake=None, method=DMD2, **settings):
    """Student N(b, a^2), teacher N(1, .7^2), fake score exact for the student unless given."""
    return method(
        analytic_denoiser(GaussianMixture([[1.0]], std=0.7), FlowMatching()),
        student=Given(Affine(a, b)),
        fake_score=Given(Gaussian(*(fake or (b, a)))),
        shape=[1],
        ema=[],
        gradient_clip_val=None,
        student_optimizer=sgd,
        fake_score_optimizer=sgd,
        **settings,
    )


def posterior(x_t, t, mean, std):
    gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    return mean + gain * (x_t - (1 - t) * mean)


def mlp(classes=0, seed=0):
    torch.manual_seed(seed)
    network = ResidualMLP((2,), width=8, depth=2, num_classes=classes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Denoiser(network, FlowMatching(), "flow_prediction", sigma_data=1.12)


def ready(module, phase="student0", update=0, slice_index=0):
    module.configure_model()
    module.draws = Draws(module.streams, update, 0, phase, slice_index)
    return module


def shift(network, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@dataclass
class Run:
    """A distilled one-step student and what it makes."""

    samples: torch.Tensor
    distance: float
    shares: list[float]
    module: DistillationModule


def trained_steps(module):
    """A trainer's part in what a module does after a phase, for a module on one process."""
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: value, root_device=torch.device("cpu"))
    module._trainer = SimpleNamespace(strategy=strategy, world_size=1)
    module._fabric = None


def distil(problem, teacher, updates, method=DMD2, callbacks=(), **settings):
    def decay(optimizer):
        return WarmupDecay(optimizer, 0, updates, "linear", final=0.1)

    module = method(
        teacher,
        **{
            "student_times": [2.5],
            "fake_score_steps": 1,
            "student_optimizer": problem.adam,
            "fake_score_optimizer": problem.adam,
            "student_scheduler": decay,
            "fake_score_scheduler": decay,
            "matching_times": problem.times,
            "critic_times": problem.times,
            "ema": [ConstantEMA(0.99)],
            **settings,
        },
    )
    problem.fit(module, updates, problem.data, callbacks=list(callbacks))
    samples = module.sample(5000, generator=torch.Generator().manual_seed(1))
    if not bool(samples.isfinite().all()):
        return Run(samples, float("inf"), [], module)
    return Run(samples, problem.distance(samples), problem.shares(samples), module)


def learns_soon(problem, teacher, method=DMD2, updates=70, **settings):
    """The run that ``make test`` has the time for: its average forgets soon enough for so few updates.

    The copy of the teacher that a student of one step begins as is at 0.72, one of two steps ([10, 1]) at 0.44;
    students that go up the divergence end far beyond.
    """
    run = distil(problem, teacher, updates, method, **{"ema": [ConstantEMA(0.95)], **settings})
    print(f"{method.__name__}: {run.distance:.3f} {run.shares}")
    return run


def gradients(module, batch, phase="student", roles=None):
    """Losses of a phase and the gradients of their weighted sum, with the draws of the first update."""
    ready(module, f"{phase}0")
    module._rollouts.clear()
    terms = getattr(module, f"{phase}_loss")(batch)
    parameters = [p for role in roles or module.phases[phase] for p in module.role_parameters(role)]
    found = torch.autograd.grad(module.weighted_sum(phase, terms), parameters, allow_unused=True)
    return terms.losses, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]


def assert_same_cycle(one, other, batch, tolerance=0.0, terms=None):
    """Both methods have the same gradients (bit for bit unless given a tolerance) in both phases.

    Args:
        one: method.
        other: method.
        batch: batch.
        tolerance: relative.
        terms: names of the student's terms of ``one`` that add up to those of ``other``; None for equal names.
    """
    for module in (one, other):
        module.configure_model()
        for name in ("student", "fake_score"):
            shift(getattr(module, name), seed=len(name))
    for phase in ("student", "fake_score"):
        (a_losses, a), (b_losses, b) = (gradients(m, batch, phase) for m in (one, other))
        assert any(bool(g.any()) for g in a)
        if terms is None and not tolerance:
            assert a_losses.keys() == b_losses.keys()
        for g, h in zip(a, b, strict=True):
            scale = float(h.abs().max())
            torch.testing.assert_close(g, h, rtol=0, atol=tolerance * max(scale, 1e-12))
