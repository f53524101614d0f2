"""EDM's preconditioning as diffusers' schedulers state it: a network F that sees rescaled samples and ln sigma.

    D(x, sigma) = c_skip x + c_out F(c_in x, k ln sigma),          c_in = 1 / sqrt(sigma^2 + sd^2)
    c_skip = sd^2 / (sigma^2 + sd^2),                              c_out = sigma sd / sqrt(sigma^2 + sd^2)

(arXiv:2206.00364, Table 1.) Consistency models put the same F into other coefficients, the identity at sigma_min
(``parameterisations.edm_boundary``). A folder holds F and does not say for which of both it was trained: it is read as
D here, and what a method of consistency wants of it is the method's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_distill.processes import EDM

__all__ = ["PreconditionedEDM", "Preconditioning", "read_preconditioning"]

#: factors on ln sigma: OpenAI's consistency models and their EDM teachers (1000 / 4), and EDM itself (1 / 4)
_TIMES = {"CMStochasticIterativeScheduler": 250.0, "EDM": 0.25, "EulerDiscreteScheduler": 0.25}


class PreconditionedEDM(EDM):
    """EDM as its network sees it: x' = c_in x of data of unit variance, at the same sigma.

        x' = a (x0 / sd) + s eps,     a = sd / sqrt(sigma^2 + sd^2),     s = sigma / sqrt(sigma^2 + sd^2)

    Native time is sigma, as in EDM. A network with EDM's output F is a ``v_prediction`` of the other sign, -F = a eps -
    s x0 / sd, so that a teacher is

        Denoiser(net, EDM(), "v_prediction", network_process=PreconditionedEDM(0.5), sigma_data=0.5,
                 family=replace(family_of(net), sign=-1.0))

    Args:
        sigma_data: standard deviation sd of the data, per element.
        sigma_min: smallest noise level used by grids and samplers.
        sigma_max: largest noise level.
        time_factor: k, the network is told k ln sigma.

    References:
        arXiv:2206.00364, Table 1; arXiv:2303.01469, Appendix C.
    """

    def __init__(
        self, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0, time_factor: float = 250.0
    ) -> None:
        super().__init__(sigma_min, sigma_max)
        if not sigma_data > 0:
            raise ValueError(f"PreconditionedEDM(sigma_data={sigma_data}): the data's standard deviation is positive.")
        self.sigma_data = float(sigma_data)
        self.time_factor = float(time_factor)

    def _length(self, t: Tensor) -> Tensor:
        return torch.hypot(t.double(), torch.full_like(t, self.sigma_data, dtype=torch.float64))

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return self.sigma_data / self._length(t)

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t.double() / self._length(t)

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return -self.sigma_data * t.double() / self._length(t).pow(3)

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return self.sigma_data**2 / self._length(t).pow(3)

    def t_from_coefficients(self, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: D102
        return self.sigma_data * sigma / alpha

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:  # noqa: D102
        return self.sigma_data * torch.exp(-0.5 * log_snr.double())

    def network_time(self, t: Tensor) -> Tensor:  # noqa: D102
        return self.time_factor * t.double().log()

    def prior_std(self, t_init: float) -> float:  # noqa: D102
        return float(self.sigma(torch.tensor(t_init, dtype=torch.float64)))


@dataclass(frozen=True)
class Preconditioning:
    """What a scheduler says of the network behind EDM's preconditioning.

    Attributes:
        network_process: the network's own process.
        sigma_data: standard deviation of the data.
        sign: of the network's output as a ``v_prediction``: -1 for EDM's F.
    """

    network_process: PreconditionedEDM
    sigma_data: float
    sign: float

    @property
    def process(self) -> EDM:
        """The process of the samples."""
        return EDM(self.network_process.sigma_min, self.network_process.sigma_max)


def read_preconditioning(scheduler: Any) -> Preconditioning | None:
    """The preconditioning that a scheduler of diffusers applies; None for schedulers of other networks.

    Args:
        scheduler: ``CMStochasticIterativeScheduler``, ``EDMEulerScheduler``, ``EDMDPMSolverMultistepScheduler``, or
            ``EulerDiscreteScheduler`` with the timestep type ``continuous`` and v-prediction (CosXL), which is EDM's
            preconditioning for data of unit variance; with any other prediction it counts its steps all the same.

    Returns:
        time is 250 ln sigma for the first, as in OpenAI's consistency models and the EDM networks published with them,
        and ln(sigma) / 4 for the others.
    """
    name = type(scheduler).__name__
    factor = next((factor for start, factor in _TIMES.items() if name.startswith(start)), None)
    if factor is None:
        return None
    config = scheduler.config
    if name.startswith("Euler"):
        if (config.timestep_type, config.prediction_type) != ("continuous", "v_prediction"):
            return None
        *_, least, _ = scheduler.sigmas.tolist()  # those of its betas, and 0
        highest = scheduler.sigmas.max().item() if config.sigma_max is None else config.sigma_max
        own = PreconditionedEDM(1.0, least if config.sigma_min is None else config.sigma_min, highest, factor)
        return Preconditioning(own, own.sigma_data, 1.0)
    lowest = config.sigma_min or EDM().sigma_min  # exported students have 0 there, for coefficients without a boundary
    process = PreconditionedEDM(config.sigma_data, lowest, config.sigma_max, factor)
    return Preconditioning(
        process, process.sigma_data, 1.0 if config.get("prediction_type") == "v_prediction" else -1.0
    )
