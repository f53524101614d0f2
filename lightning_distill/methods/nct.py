"""NCT: a control for a one-step generator, learned in its noise space (arXiv:2506.19741)."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import distance
from lightning_distill.losses.noise_consistency import noise_levels, partly_fresh
from lightning_distill.methods.base import DistillationModule, Terms
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Role
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["NCT"]


class NCT(DistillationModule):
    """A frozen one-step generator learns to follow a control, from its own samples and without a diffusion model.

        x = f(z),   c = C(x),   z_s, z_t: noises that remember z a little more and a little less
        L = d( f_phi(z_t, c), sg f_phi(z_s, c) ) + w_b d( f_phi(z, c), x )

    The boundary term ties the noise that belongs to c to its picture; consistency carries this from level to level to
    noise that is independent of c, which is what is sampled. Without the boundary nothing ties the adapter to c, and
    its output diverges.

    Args:
        teacher: the one-step generator.
        control: C, a frozen module or a function of pictures (B, ...) -> (B, ...): edges, depth, or
            ``data.super_resolution.Degradation``.
        student: the adapter, ``Beside(...)``; any role whose network takes the condition.
        condition: name of the condition.
        intervals: N, of the noise levels of ``losses.noise_consistency.noise_levels``.
        metric: distance d, see ``losses.consistency.distance``.
        huber: constant of pseudo-Huber, None for the default.
        **kwargs: see ``DistillationModule``; weight of ``student/boundary``: w_b, 1.

    Raises:
        ValueError: no control, no role with an adapter, or a student of several steps.

    Notes:
        Reconstructed from the abstract and a summary: levels, their number and w_b are open there.
        Averaging over the noises that fit a control shrinks what the control leaves free: with a squared distance the
        samples obey the control, but vary less than the generator's own with that control.
    """

    paper = "2506.19741"
    learns_from = "one-step generator alone"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/boundary": 1.0}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        control: nn.Module | Callable[[Tensor], Tensor] | None = None,
        student: Role | None = None,
        condition: str = "control",
        intervals: int = 8,
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "mse",
        huber: float | None = None,
        **kwargs: Any,
    ) -> None:
        if control is None or student is None:
            raise ValueError(
                "NCT needs control, which makes the condition of a picture, and a student that takes it; give "
                "control=Degradation(4), for example, and student=Beside(adapter)."
            )
        super().__init__(teacher, student=student, **kwargs)
        if intervals < 1:
            raise ValueError(f"intervals={intervals}: there is at least one step from the picture's own noise.")
        self.control = control.requires_grad_(False).eval() if isinstance(control, nn.Module) else control
        self.condition = condition
        self.intervals = intervals
        self.metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = metric
        self.huber = huber

    def check_configuration(self) -> None:
        """One step."""
        super().check_configuration()
        if len(self.student_times) != 1:
            raise ValueError(
                f"NCT adds a control to a one-step generator, and student_times has {len(self.student_times)} times."
            )

    def train(self, mode: bool = True) -> "NCT":
        """As usual; the control's module stays in eval mode."""
        super().train(mode)
        if isinstance(self.control, nn.Module):
            self.control.eval()
        return self

    # ------------------------------------------------------------------------------------------------ loss
    def generated(self, network: Denoiser, noise: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """What a generator makes of unit noise in its one step, (B, ...)."""
        start = self.student_times[0]
        t = torch.full((len(noise),), start, dtype=torch.float64, device=noise.device)
        return network(self.process.prior(noise, start), t, cond).x0

    @torch.no_grad()
    def example(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Noise z, its picture f(z), and the conditions with the control of that picture."""
        noise = self.draws.normal("noise", (batch.size, *self.sample_shape))
        picture = self.generated(self.require_teacher(), noise, batch.cond)
        control = self.control(picture)
        if not isinstance(control, Tensor) or control.shape[:1] != picture.shape[:1]:
            found = tuple(control.shape) if isinstance(control, Tensor) else type(control).__name__
            raise ValueError(f"control returned {found} for pictures {tuple(picture.shape)}; return one row for each.")
        return noise, picture, {**batch.cond, self.condition: control}

    def student_loss(self, batch: Batch) -> Terms:
        """Consistency between neighbouring levels, and the boundary."""
        noise, picture, cond = self.example(batch)
        fresh = self.draws.normal("fresh", noise.shape)
        levels = noise_levels(self.intervals).to(noise.device)
        index = (self.draws.uniform("level", batch.size) * self.intervals).long().clamp_max(self.intervals - 1)
        online = self.generated(self.student, partly_fresh(noise, fresh, levels[index + 1]), cond)
        with torch.no_grad():
            target = self.generated(self.student, partly_fresh(noise, fresh, levels[index]), cond)
        own = self.generated(self.student, noise, cond)
        terms = {
            "consistency": distance(online, target, self.metric, self.huber).mean(),
            "boundary": distance(own, picture, self.metric, self.huber).mean(),
        }
        return Terms(terms, {"sample_std": online.detach().std()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        return {"student": {"student": 3, "teacher": 1}}
