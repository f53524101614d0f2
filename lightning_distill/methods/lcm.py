"""Latent consistency models (arXiv:2310.04378)."""

from typing import Any, Literal

from lightning_distill.ema import ConstantEMA, EMAProfile
from lightning_distill.guidance import Guidance, RandomGuidance
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation, target_profile
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Role
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import VariancePreserving

__all__ = ["LCM"]


class LCM(ConsistencyDistillation):
    """Consistency distillation of guided trajectories, with the guidance scale as an input.

        z_r = DDIM step of the teacher guided by w, w ~ U[w_min, w_max],    f(z, w, t) = c_skip z + c_out z0(z, w, t)
        L = mean sqrt((f(z_t, w, t) - sg f'(z_r, w, r))^2 + c^2) - c                                         (Eq. 9, 14)

    Args:
        teacher: a variance-preserving model.
        student: None for a copy that is told w; ``Lora(...)`` alone is the LoRA variant, which is told nothing.
        guidance: distribution of w in the convention uncond + w (cond - uncond); None is ``RandomGuidance(6, 16)``.
        intervals: DDIM steps of the teacher's grid.
        target_ema: profile of f'; ``none`` is the student itself, as adapters use it.
        solver: of a step of the teacher, one of ``euler`` (DDIM's) or ``heun``.
        boundary: ``lcm``, c_skip and c_out of the paper, or ``plain``.
        metric: distance d; elementwise pseudo-Huber, as in the released code.
        **kwargs: see ``ConsistencyDistillation``.

    Notes:
        The paper's w is ours minus 1: its range of 5 to 15 is 6 to 16 here.
        The last interval ends at the scheduler's timestep 0, where f is the identity.
    """

    paper = "2310.04378"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        student: Role | None = None,
        guidance: Guidance | None = None,
        intervals: int = 50,
        solver: Literal["euler", "heun"] = "euler",
        boundary: Literal["plain", "lcm"] = "lcm",
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "pseudo_huber_elementwise",
        target_ema: EMAProfile | Literal["none"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            student=student or TwoTime(kind=None, guidance=True),
            guidance=guidance or RandomGuidance(6.0, 16.0),
            intervals=intervals,
            solver=solver,
            boundary=boundary,
            metric=metric,
            target_ema=target_profile(target_ema, ConstantEMA(0.95)),
            **kwargs,
        )

    def check_configuration(self) -> None:
        """The boundary is written in timesteps."""
        super().check_configuration()
        if not isinstance(self.process, VariancePreserving):
            raise ValueError(
                f"LCM is written for variance-preserving models, and the teacher works with {self.process!r}; use "
                "ConsistencyDistillation, which takes any process."
            )
