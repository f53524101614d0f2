"""Tiny networks given by a formula, and what replays the recorded losses of released code on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Role
from lightning_distill.parameterisations import edm_boundary
from lightning_distill.processes import expand
from lightning_distill.randomness import Draws

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
F64 = torch.float64
SHAPE = (2, 2, 1)
VIDEO = (2, 1, 2, 1)
#: phases of the sines that the weights of student, teacher and fake score are
STUDENT, TEACHER, FAKE = 0.3, 1.1, 2.3


class Formula(nn.Module):
    """tanh(W (x + shift) + b + a t / (1 + t) + c r / (1 + r)); all weights are sines of their index."""

    def __init__(self, phase, shape=SHAPE):
        super().__init__()
        d = math.prod(shape)
        sines = torch.sin(1.7 * torch.arange(d * d + 3 * d, dtype=F64) + phase)
        weight, bias, slope, second = sines.split([d * d, d, d, d])
        self.weight = nn.Parameter(0.4 * weight.view(d, d))
        self.bias = nn.Parameter(0.3 * bias)
        self.slope = nn.Parameter(0.5 * slope)
        self.second = nn.Parameter(0.5 * second)

    def forward(self, x, t, r=None, shift=None):
        x_in = x if shift is None else x + shift.view(-1, *[1] * (x.ndim - 1))
        h = x_in.flatten(1) @ self.weight.T + self.bias + self.slope * (t / (1 + t))[:, None]
        if r is not None:
            h = h + self.second * (r / (1 + r))[:, None]
        return torch.tanh(h).view_as(x)


class Preconditioned(Formula):
    """The formula within the scalings of EDM, or those of consistency models, which are the identity at sigma_min."""

    def __init__(self, phase, sigma_min=0.0):
        super().__init__(phase)
        self.sigma_min = sigma_min

    def forward(self, x, t):
        skip, out = (expand(c, x) for c in edm_boundary(t, 0.5, self.sigma_min))
        return skip * x + out * super().forward(x / expand((t**2 + 0.25).sqrt(), x), t)


class Head(nn.Module):
    """A linear discriminator on its one feature."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.sin(1.7 * torch.arange(4, dtype=F64) + 0.9))

    def forward(self, features):
        return (features["input"].flatten(1) @ self.weight)[:, None]


class Is(Role):
    """A role that is a denoiser made beforehand."""

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def build(self, source, name=None):
        return self.denoiser


class Given(Draws):
    """Draws whose numbers are given by name; uniform ones that are not are 1/2."""

    slice_index = first = 0

    def __init__(self, update=0, **numbers):
        self.update = update
        self.numbers = {name.replace("__", "/"): value for name, value in numbers.items()}

    def normal(self, name, shape):
        value = self.numbers[name]
        assert value.shape == tuple(shape)
        return value

    def uniform(self, name, n):
        return self.numbers.get(name, torch.full((n,), 0.5, dtype=F64))

    def integer(self, name, high):
        return 0

    def of_slice(self):
        return self


def fixture(name, shape=SHAPE):
    """Inputs, expected values; rows of samples get their shape."""
    found = json.loads((FIXTURES / f"{name}.json").read_text())
    assert found["method"] == name
    assert len(found["commit"]) == 40
    given = {}
    for key, value in found["inputs"].items():
        value = torch.tensor(value, dtype=F64) if isinstance(value, list) else value
        rows = isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == math.prod(shape)
        given[key] = value.view(-1, *shape) if rows else value
    return SimpleNamespace(**given), found["expected"]


def denoiser(phase, process, kind="sample", network=None, sigma_data=0.5, **settings):
    return Denoiser(network or Formula(phase), process, kind, sigma_data=sigma_data, **settings)


def built(method, teacher, student, fake=None, shape=SHAPE, **settings):
    """A method with finished networks."""
    if fake is not None:
        settings["fake_score"] = Is(fake)
    module = method(teacher, student=Is(student), shape=list(shape), **{"ema": [], **settings})
    module.configure_model()
    return module


def scores(method, process, kinds=("sample", "sample", "sample"), shape=SHAPE, sigma_data=0.5, **settings):
    """A method with student, teacher and fake score."""
    networks = [
        denoiser(phase, process, kind, Formula(phase, shape), sigma_data, null_cond={"shift": 0.25})
        for phase, kind in zip((TEACHER, STUDENT, FAKE), kinds)
    ]
    return built(method, *networks, shape=shape, **settings)


def learner(method, process, network=None, other=None, kind="sample", **settings):
    """A method that trains a student on data."""
    teacher = denoiser(TEACHER, process, kind, other, null_cond={"shift": 0.25})
    return built(method, teacher, denoiser(STUDENT, process, kind, network), **settings)


def check(loss, network, expected, factor=1.0, value=True, offset=0.0, rel=1e-9):
    """A loss times ``factor``, plus ``offset``, and its gradients are those recorded."""
    names, parameters = zip(*network.named_parameters())
    found = torch.autograd.grad(factor * loss, parameters, retain_graph=True, allow_unused=True)
    gradients = {n: torch.zeros(1) if g is None else g for n, g in zip(names, found)}
    recorded = expected["student"] if "student" in expected else expected["fake_score"]
    if value:
        assert factor * float(loss.detach()) + offset == pytest.approx(expected["loss"], rel=rel)
    for name, gradient in gradients.items():
        assert float(gradient.norm()) == pytest.approx(recorded[name], rel=rel, abs=1e-12), name
    slack = rel * recorded["bias"]
    assert gradients["bias"].tolist() == pytest.approx(recorded["bias_entries"], rel=0, abs=slack)


@torch.no_grad()
def copied(source, target):
    """The weights of one network in another, in double precision."""
    for own, other in zip(target.parameters(), source.parameters()):
        own.data = other.detach().clone()


def of_normal(x, mean, std):
    """Uniform numbers at which a log-normal distribution has the values x."""
    return torch.special.ndtr((x.log() - mean) / std)
