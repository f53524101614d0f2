"""RF++: what makes one round of reflow enough (improving the training of rectified flows, arXiv:2405.20320)."""

from typing import Any, Literal

from lightning_distill.methods.perceiving import Perceptual
from lightning_distill.methods.reflow import Reflow
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.times import TimeDistribution, UShaped

__all__ = ["RFPlusPlus"]


class RFPlusPlus(Reflow):
    """Reflow with times at both ends and a robust distance, from a diffusion model as it is.

        L = Huber( v(x_t, t) - (eps - x0) ),     or with LPIPS     (1 - t) Huber( ... ) + LPIPS( x0_t, x0 )

        p(t) ~ e^(4 t) + e^(4 (1 - t))

    Straight pairs make the middle of a trajectory easy, the two ends stay hard. The third change of the paper, a
    velocity network out of an EDM denoiser in closed form, is what every denoiser of this library is.

    Args:
        teacher: the pretrained model.
        times: distribution of flow-matching times, None for ``UShaped(4)``.
        metric: see ``Reflow``.
        time_weight: see ``Reflow``; None for ``data`` with ``perceptual``, whose term takes over at the start, and
            ``one`` without.
        perceptual: see ``Reflow``; for images.
        sampler: see ``Reflow``; the paper's own is ``start_noise``.
        **kwargs: see ``Reflow``.

    Notes:
        The Huber term is that of the whole vector with c = .00054 sqrt(D), and not divided by D as in the released code
        (whose c is .00054 D); with ``perceptual`` choose ``loss_weights: {student/velocity: 1/D}`` to have its ratio.
    """

    paper = "2405.20320"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        times: TimeDistribution | None = None,
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "pseudo_huber",
        time_weight: Literal["one", "data"] | None = None,
        perceptual: Perceptual | None = None,
        sampler: Literal["ode", "heun", "start_noise"] = "start_noise",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            times=times or UShaped(4.0),
            metric=metric,
            time_weight=time_weight or ("one" if perceptual is None else "data"),
            perceptual=perceptual,
            sampler=sampler,
            **kwargs,
        )
