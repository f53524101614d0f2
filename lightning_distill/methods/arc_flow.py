"""ArcFlow: policies of momentum modes, integrated in closed form (arXiv:2602.09014)."""

from typing import Any, Literal

from lightning_distill.methods.pi_flow import PiFlow
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["ArcFlow"]


class ArcFlow(PiFlow):
    """A step along a curve: the velocity of a segment is a mixture of modes that grow or decay at constant rates.

        v(t) = sum_k w_k u_k gamma_k^(s - t),     phi(z) = (e^z - 1) / z
        x_r = x_t - (t - r) sum_k w_k u_k gamma_k^(s - t) phi(ln gamma_k (t - r))

    Weights, velocities and rates are outputs of one call at the segment's start; training is that of pi-Flow, and
    sampling needs no substeps.

    Args:
        teacher: the pretrained model.
        num_steps: number of segments.
        components: K, modes; the first neither grows nor decays.
        dropout: share of the modes that are left out of a rollout.
        policy: ``momentum``, the only one of this student.
        **kwargs: see ``PiFlow``; the paper trains adapters, ``student=Lora(...)``, beside the new outputs.

    Notes:
        Rates are bounded to 8 per unit of time and have a value for each element; weights are shared by its channels.
        At initialisation no mode grows, so that the step is the network's own straight one; velocities start a little
        apart. Released modes begin at growths from .2 to 4, evenly in their logarithms, and have no bound.
    """

    paper = "2602.09014"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        num_steps: int = 2,
        components: int = 16,
        dropout: float = 0.0,
        policy: Literal["momentum"] = "momentum",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, num_steps=num_steps, policy=policy, components=components, dropout=dropout, **kwargs)
