"""Students that are the exact maps of a Gaussian, with one parameter that spoils them; the teacher is exact, too."""

from __future__ import annotations

import torch
from small_problems import ready
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser, gaussian_flow_map
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Role
from lightning_distill.processes import FlowMatching

F64 = torch.float64
MEAN = torch.tensor([0.3, -0.5], dtype=F64)
COV = torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=F64)
MIXTURE = GaussianMixture(MEAN[None], covariances=COV[None])
FLOW = FlowMatching()


class ExactEnd(nn.Module):
    """The clean end of the trajectory through x at t, in any process."""

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.fault = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x, t):
        end = gaussian_flow_map(MEAN, COV, x, t, torch.zeros_like(t), self.process)
        # like a boundary condition, a fault that vanishes at t = 0
        return end + self.fault * (self.process.sigma(t)[:, None] * (1.0 + x))


class ExactAverage(nn.Module):
    """The average velocity between t and r of flow matching; the velocity itself for r = t."""

    def __init__(self):
        super().__init__()
        self.fault = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x, t, r=None):
        r = t if r is None else r
        same = (t == r)[:, None]
        gap = torch.where(same, 1.0, (t - r)[:, None])
        apart = (x - gaussian_flow_map(MEAN, COV, x, t, r, FLOW)) / gap
        return torch.where(same, MIXTURE.velocity(x, t, FLOW), apart) + self.fault * (1.0 + x)


class Exact(Role):
    """A finished network as the student."""

    def __init__(self, network, kind):
        self.network, self.kind = network, kind

    def build(self, source, name=None):
        return Denoiser(self.network, source.process, self.kind)


def exact_module(method, two_times=False, process=FLOW, fault=0.0, update=0, teacher=None, **settings):
    """A method whose student is exact up to ``fault``, with the draws of an update."""
    network = ExactAverage() if two_times else ExactEnd(process)
    kind = "flow_prediction" if two_times else "sample"
    module = method(
        teacher or analytic_denoiser(MIXTURE, process),
        student=Exact(network, kind),
        shape=[2],
        ema=[],
        **settings,
    )
    with torch.no_grad():
        network.fault.fill_(fault)
    return ready(module, update=update)


def data(n=64):
    return Batch(x0=MIXTURE.sample(n, torch.Generator().manual_seed(2))[0].double())


def loss_and_slope(module, batch):
    """The weighted loss and its derivative in the fault."""
    terms = module.student_loss(batch)
    loss = module.weighted_sum("student", terms)
    slope = torch.autograd.grad(loss, module.student.network.fault)[0]
    return float(loss.detach()), float(slope), terms
