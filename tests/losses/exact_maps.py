"""Exact flow maps of a Gaussian (closed form) and of a mixture (RK4 with graph), in flow-matching times."""

import torch

from lightning_distill.networks.analytic import GaussianMixture, gaussian_flow_map
from lightning_distill.processes import FlowMatching

F64 = torch.float64
FLOW = FlowMatching()
MEAN = torch.tensor([0.3, -0.5], dtype=F64)
COV = torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=F64)


class ExactMap:
    """X_{t->r}, u, v of one distribution; times (B,)."""

    def __init__(self, name):
        self.name = name
        if name == "gaussian":
            self.mixture = GaussianMixture(MEAN[None], covariances=COV[None])
            self.tolerance = 1e-10
        else:
            self.mixture = GaussianMixture([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.2]], std=[0.5, 0.7, 0.6])
            self.tolerance = 2e-6

    def velocity(self, x, t):
        return self.mixture.velocity(x, t, FLOW)

    def jump(self, x, t, r):
        if self.name == "gaussian":
            return gaussian_flow_map(MEAN, COV, x, t, r, FLOW)
        steps = 48
        h = (r - t) / steps
        for i in range(steps):
            s, dt = t + i * h, h[:, None]
            k1 = self.velocity(x, s)
            k2 = self.velocity(x + dt / 2 * k1, s + h / 2)
            k3 = self.velocity(x + dt / 2 * k2, s + h / 2)
            k4 = self.velocity(x + dt * k3, s + h)
            x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def average(self, x, t, r):
        """(x - X) / (t - r), and v where the two times are one."""
        same = (t == r).reshape(-1, 1)
        gap = torch.where(same, torch.ones_like(same, dtype=x.dtype), (t - r)[:, None].to(x.dtype))
        return torch.where(same, self.velocity(x, t), (x - self.jump(x, t, r)) / gap)


MAPS = {name: ExactMap(name) for name in ("gaussian", "mixture")}
