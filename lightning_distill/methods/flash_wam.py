"""Flash-WAM: consistency distillation of several streams, each with its own consistency function (arXiv:2606.05254)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA, EMAProfile
from lightning_distill.guidance import guided
from lightning_distill.losses.consistency import PairWeight, consistency_loss, pair_weight
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation, Metric, target_profile
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.networks.streams import StreamBoundary, StreamsNetwork, check_boundaries
from lightning_distill.prediction import Prediction
from lightning_distill.streams import StreamProcess
from lightning_distill.times import t_min

__all__ = ["FlashWAM"]


class FlashWAM(ConsistencyDistillation):
    """Video and actions that are denoised together become one step each, by consistency functions that fit their noise.

        f_s = c_skip x_s + c_out F_s,    |df_s/dF_s| = sigma (little noise), or sigma k_out (much noise)
        L = sum_s w_s d( f_s(x_t, t), sg f'_s(x_r, r) ) + .01 sum_s |v_s - (eps_s - x0_s)|^2,     x_r: teacher, t to r

    Samples are packed (``streams``): one time t goes with a noise level for each stream.

    Args:
        teacher: a model of several streams, in ``StreamProcess``.
        boundaries: consistency function of each stream (``networks.streams.stream_boundary``); None for
            ``variance_preserving`` where the process shifts a stream towards noise, and ``linear`` elsewhere.
        boundary_sigma_data: sd of ``variance_preserving``.
        intervals: r is t - 1 / intervals, and the end of the trajectory below that.
        guided: streams that the guidance applies to (the paper: video alone); None for all.
        regularised: streams with the last term, None for those of ``linear``.
        solver: ``euler`` or ``heun``.
        metric: distance d of each stream.
        weight: ``one``, ``inverse_gap`` or ``inverse_sqrt_gap``.
        target_ema: profile of f'; ``none`` is the student itself.
        **kwargs: see ``ConsistencyDistillation``. Terms are ``student/consistency_NAME`` and ``student/flow_NAME`` for
            the streams; ``loss_weights`` weighs them, and those of ``flow`` by ``flow_weight``.
        flow_weight: weight of the last term.

    Notes:
        The released code draws a time for each stream (and frame); here the streams share t, and their shifts part
        them, so that pairs lie on the trajectories that are sampled. Samplers take the x0 that f is. Guidance scales of
        the release are 2 to 10 for video: ``RandomGuidance(2, 10)``. Masks of action channels are left out.
    """

    paper = "2606.05254"
    learns_from = "teacher, data"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        boundaries: dict[str, StreamBoundary] | None = None,
        boundary_sigma_data: float = 0.5,
        intervals: int = 2,
        guided: list[str] | None = None,
        regularised: list[str] | None = None,
        flow_weight: float = 0.01,
        solver: Literal["euler", "heun"] = "euler",
        metric: Metric = "pseudo_huber_elementwise",
        weight: PairWeight = "one",
        target_ema: EMAProfile | Literal["none"] | None = None,
        **kwargs: Any,
    ) -> None:
        average = target_profile(target_ema, ConstantEMA(0.995))
        super().__init__(
            teacher, intervals=intervals, solver=solver, metric=metric, weight=weight, target_ema=average, **kwargs
        )
        if weight not in ("one", "inverse_gap", "inverse_sqrt_gap"):
            raise ValueError(
                f"weight={weight!r} goes with one noise level, and streams have several; choose one, inverse_gap or "
                "inverse_sqrt_gap."
            )
        if flow_weight < 0:
            raise ValueError(f"flow_weight={flow_weight} must not be negative.")
        self.given_boundaries = boundaries
        self.boundary_sigma_data = boundary_sigma_data
        self.guided_streams = guided
        self.given_regularised = regularised
        self.flow_weight = flow_weight

    # ------------------------------------------------------------------------------------------------ networks
    @property
    def layout(self) -> StreamProcess:
        """The process with its streams."""
        process = self.require_teacher().process
        if not isinstance(process, StreamProcess):
            raise ValueError(
                f"{type(self).__name__} distils a model of several streams, and the teacher works with {process!r}; "
                "give a teacher in StreamProcess, or use ConsistencyDistillation."
            )
        return process

    def build_roles(self) -> None:
        """The student, with the consistency functions of its streams."""
        layout = self.layout
        boundaries = self.given_boundaries or {
            name: "variance_preserving" if stream.shift > 1.0 else "linear" for name, stream in layout.streams.items()
        }
        check_boundaries(boundaries, layout)
        own = getattr(getattr(self._student_role, "spec", None), "process", None)
        if own is not None and repr(own) != repr(layout):
            raise ValueError(f"the student works with {own!r} and the teacher with {layout!r}; give both one process.")
        super().build_roles()
        network, shared = self.student.network, self.require_teacher().network
        if not isinstance(network, StreamsNetwork):
            raise ValueError(
                f"the student's network is a {type(network).__name__}; give StreamsDenoiser(...), or a StreamsNetwork "
                "around a module of streams."
            )
        if network is shared and network.boundaries != boundaries:
            raise ValueError(
                f"an adapter shares the teacher's network, whose outputs are {network.boundaries}; give these as "
                "boundaries, or a student of its own (Copy, Explicit)."
            )
        if network is not shared:
            network.set_boundaries(boundaries, self.boundary_sigma_data)
        linear = [name for name, kind in boundaries.items() if kind == "linear"]
        self.regularised = linear if self.given_regularised is None else list(self.given_regularised)

    def check_configuration(self) -> None:
        """Streams that are named must exist."""
        super().check_configuration()
        for setting, names in (("guided", self.guided_streams or []), ("regularised", self.regularised)):
            if unknown := sorted(set(names) - set(self.layout.streams)):
                raise ValueError(f"{setting} names {unknown}, and the streams are {list(self.layout.streams)}.")

    # ------------------------------------------------------------------------------------------------ loss
    def pair_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Uniform times t in (0, 1], and those 1 / ``intervals`` below them."""
        t = self.draws.uniform("interval", n).clamp_min(2.0 * t_min(self.process))
        return t, (t - 1.0 / self.intervals).clamp_min(t_min(self.process))

    def guided_teacher(self, batch: Batch) -> Callable[[Tensor, Tensor], Prediction]:
        """The teacher, guided in some of its streams."""
        names = self.guided_streams
        if names is None or not self.guidance.needs_null:
            return super().guided_teacher(batch)
        teacher, u = self.require_teacher(), self.draws.uniform("guidance", batch.size)
        sizes = zip(self.layout.streams, self.layout.sizes)
        chosen = torch.cat([torch.full((n,), name in names) for name, n in sizes]).to(self.device)

        @torch.no_grad()
        def denoise(x: Tensor, t: Tensor) -> Prediction:
            t = t.expand(len(x)) if t.ndim == 0 else t
            scale = torch.as_tensor(self.guidance.scales(t, u), dtype=torch.float64, device=x.device)
            return guided(teacher, x, t, batch.cond, torch.where(chosen, scale.expand(len(x))[:, None], 1.0))

        return denoise

    def student_loss(self, batch: Batch) -> Terms:
        """Consistency of every stream, and flow matching of some."""
        pair = self.pair(batch)
        with self.shared_dropout(pair.x_t):
            prediction = self.function(self.student, pair.batch, pair.scale)(pair.x_t, pair.t)
        online, unpack = self.layout.unpack(prediction.x0), self.layout.unpack
        target = unpack(self.target(pair.x_r, pair.r, pair.batch, pair.scale))
        weight = pair_weight(self.weight, pair.t, pair.r)
        losses = {
            f"consistency_{name}": consistency_loss(made, target[name], weight, self.metric, self.huber)
            for name, made in online.items()
        }
        if self.flow_weight and self.regularised:
            x0 = self.data(batch)
            velocity, wanted = unpack(prediction.flow_prediction), unpack(self.draws.normal("noise", x0.shape) - x0)
            for name in self.regularised:
                losses[f"flow_{name}"] = self.flow_weight * F.mse_loss(velocity[name], wanted[name])
        gaps = {f"mse_{name}": F.mse_loss(made.detach(), target[name]) for name, made in online.items()}
        return Terms(losses, gaps)
