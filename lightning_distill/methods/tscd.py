"""TSCD: trajectory-segmented consistency distillation, the first stage of Hyper-SD (arXiv:2404.13686)."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_distill.losses.consistency import phase_edges
from lightning_distill.losses.segments import (
    check_segments,
    least_squares_discriminator,
    least_squares_generator,
    segment_stage,
)
from lightning_distill.methods.consistency_distillation import Metric
from lightning_distill.methods.end_game import Ends
from lightning_distill.methods.guards import check_schedule
from lightning_distill.methods.pcm import PCM
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["TSCD"]


class TSCD(PCM):
    """Consistency within segments that merge in the course of training, 8 -> 4 -> 2 -> 1.

        for k in segments:   L = d( f_k(x_t, t), sg f_k(x_r, r) ),     f_k(x, t) = DDIM(x, x0(x, t), t -> s_k(t))

    s_k(t) is the end of the one of k segments that holds t. Short segments are learnt first, from the teacher's own
    steps, and long ones begin as a chain of short ones. Where targets are near, d does; where they are far, a
    discriminator helps.

    Args:
        teacher: the pretrained model.
        segments: number of segments of each stage; the last is the number of the student's steps.
        segment_updates: student updates of each stage but the last, which has the rest; one number for all of them.
        intervals: solver steps of all segments together.
        metric: distance d.
        least_squares: the game's loss is that of LSGAN, the paper's, instead of ``gan.kind``.
        gan_from: first stage, from 0, in which the student plays; the heads are trained from the beginning.
        **kwargs: see ``PCM`` (``gan``).

    Notes:
        Reconstructed from the paper's description of the stages: equal numbers of updates, which of them plays, the
        weight .1 of the game and what is real to the discriminator (PCM's choice, the target) are ours.
        A student of one final segment is a consistency function, and may be sampled in several steps by renoising.
        The paper's later stages, human feedback and score distillation, are other methods' on a checkpoint of this one.
    """

    paper = "2404.13686"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        segments: Sequence[int] = (8, 4, 2, 1),
        segment_updates: Sequence[int] | int = 2000,
        intervals: int = 40,
        metric: Metric = "mse",
        least_squares: bool = True,
        gan_from: int = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(segment_updates, int):
            segment_updates = [segment_updates] * (len(segments) - 1)
        check_segments(segments, segment_updates)
        super().__init__(teacher, num_steps=segments[-1], intervals=intervals, metric=metric, **kwargs)
        if not 0 <= gan_from < len(segments):
            last = len(segments) - 1
            raise ValueError(f"gan_from={gan_from} is none of the {last + 1} stages of segments; give 0 to {last}.")
        if self.gan is not None and least_squares and self.gan.kind != "logistic":
            raise ValueError(
                f"least_squares=True takes the place of gan's loss, which asks for {self.gan.kind!r}; leave its kind "
                "out, or give least_squares=False."
            )
        self.segments, self.segment_updates = list(segments), list(segment_updates)
        self.least_squares, self.gan_from = least_squares, gan_from

    def build_roles(self) -> None:
        """The student; of one final segment it is a consistency function."""
        super().build_roles()
        self._stage_edges = [phase_edges(self.grid()[:-1], k) for k in self.segments]
        if self.segments[-1] == 1:
            self.__dict__["capability"], self.edges, self.sampler = "any_step", None, "renoise"

    def on_fit_start(self) -> None:
        """Say so where the run ends before the segments are those of sampling."""
        super().on_fit_start()
        consequence = f"the student is sampled with {self.segments[-1]} segments, on which it has not been trained"
        check_schedule(self, "segment_updates", sum(self.segment_updates) + 1, consequence)

    def stage(self) -> int:
        """Number of the stage of this update, from 0."""
        return segment_stage(self.draws.update, self.segment_updates)

    def training_edges(self) -> list[float]:
        """Edges of the segments of this stage."""
        return self._stage_edges[self.stage()]

    def student_game(self, ends: Ends) -> dict[str, Tensor]:
        """The generator's side, from stage ``gan_from`` on."""
        return super().student_game(ends) if self.stage() >= self.gan_from else {}

    def game_loss(self, side: Literal["student", "heads"], fake: Tensor, real: Any) -> Tensor:
        """A side's loss of logits."""
        if not self.least_squares:
            return super().game_loss(side, fake, real)
        return least_squares_generator(fake) if side == "student" else least_squares_discriminator(real, fake)

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts = super().forward_counts()
        if self.gan is not None and self.gan.network_taps and self.stage() < self.gan_from:
            counts["student"]["teacher"] -= 2 if self.gan.kind == "relativistic" else 1
        return counts
