"""SCott: stochastic consistency distillation (arXiv:2403.01505)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA, EMAProfile
from lightning_distill.losses.segments import stochastic_step
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation, Metric, Pair, target_profile
from lightning_distill.methods.end_game import EndGame, Ends
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["SCott"]


class SCott(EndGame, ConsistencyDistillation):
    """Consistency with a point that the teacher's stochastic solver reaches in several small steps.

        x_r ~ solver of dx = [f x - (1 + eta^2) g^2 / 2 score] dt + eta g dw, from x_t, in h steps
        L = d( f(x_t, t), sg f'(x_r, r) ) + lambda L_GAN( f(x_t, t), x0 )

    All these equations have the teacher's marginal laws, whatever eta is; noise corrects what earlier steps did wrong.

    Args:
        teacher: the pretrained model.
        intervals: pairs of the grid.
        strength: eta in [0, 1]: 0 is the deterministic solver, 1 the reverse SDE.
        sub_steps: h, steps of the solver within a pair.
        metric: distance d.
        target_ema: profile of f'; None for ``ConstantEMA(.95)``, ``none`` for the student itself.
        gan_real: what is real to the discriminator, the ``data`` or the ``target``.
        **kwargs: see ``EndGame`` (``gan``, of weight .4) and ``ConsistencyDistillation``; there is no ``solver``.

    Notes:
        Reconstructed: the solver's step is DDIM's with eta, of first order in the paper's equation, and the paper's
        discriminator, adapters in a pretrained network, is here heads on the teacher's features.
        The paper trains with eta = 1. But x_r then has the law of the reverse process, in which the teacher's own
        prediction y is a martingale, E[y(x_r, r) | x_t] = y(x_t, t): with a squared d it is the fixed point of the
        term, and one step is no better than the teacher's (tested). So the default is smaller, and near eta = 1
        ``gan`` has to make the samples sharp.
    """

    paper = "2403.01505"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/gan": 0.4}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        intervals: int = 40,
        strength: float = 0.3,
        sub_steps: int = 3,
        metric: Metric = "pseudo_huber_elementwise",
        target_ema: EMAProfile | Literal["none"] | None = None,
        gan_real: Literal["target", "data"] = "data",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            intervals=intervals,
            solver="euler",
            metric=metric,
            target_ema=target_profile(target_ema, ConstantEMA(0.95)),
            gan_real=gan_real,
            **kwargs,
        )
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength={strength}: the strength of the solver's noise lies in [0, 1].")
        if sub_steps < 1:
            raise ValueError(f"sub_steps={sub_steps}: the solver takes at least one step.")
        self.strength, self.sub_steps = strength, sub_steps

    @torch.no_grad()
    def earlier(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch, eps: Tensor) -> Tensor:
        """A sample of the stochastic solver, with noise of its own in every step."""
        teacher, x = self.guided_teacher(batch), x_t
        for step in range(self.sub_steps):
            start, end = (t + (r - t) * (k / self.sub_steps) for k in (step, step + 1))
            end = r if step + 1 == self.sub_steps else end
            fresh = self.draws.normal(f"solver{step}", x.shape)
            x = stochastic_step(teacher(x, start), end, self.strength, fresh)
        return x

    def compare(self, pair: Pair, online: Tensor, target: Tensor) -> Terms:
        """Distance of the two ends, and the game on clean samples."""
        terms = super().compare(pair, online, target)
        if self.gan is not None:
            clean, top = torch.zeros_like(pair.t), torch.full_like(pair.t, self.process.t_max)
            terms.losses |= self.play(Ends(online, self.real_ends(pair.batch, target, clean), clean, top, pair.batch))
        return terms

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        counts["student"]["teacher"] += self.sub_steps - 1
        return counts
