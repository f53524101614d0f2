"""Noise processes: how a clean sample x0 becomes a noisy sample x_t.

Every process is the linear Gaussian path

    x_t = alpha(t) x0 + sigma(t) eps,        eps ~ N(0, I),

with t growing from data (t = 0) to noise (t = ``t_max``). Four coefficients define it: alpha, sigma and their time
derivatives. Everything else (log-SNR, its inverse, velocity, change of process) follows from them.

Coefficients are computed in float64 whatever dtype ``t`` has; callers cast at the end (see ``expand``).
"""

from lightning_distill.processes.base import NoiseProcess, change_process, expand
from lightning_distill.processes.continuous import EDM, FlowMatching, ResidualShift, TrigFlow
from lightning_distill.processes.variance_preserving import VariancePreserving

__all__ = [
    "EDM",
    "FlowMatching",
    "NoiseProcess",
    "ResidualShift",
    "TrigFlow",
    "VariancePreserving",
    "change_process",
    "expand",
]
