"""DCM: dual-expert consistency models for video (arXiv:2506.03123)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA, EMAProfile
from lightning_distill.losses.consistency import phase_edges
from lightning_distill.losses.segments import feature_distance, temporal_coherence
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_distillation import Pair, target_profile
from lightning_distill.methods.end_game import Ends
from lightning_distill.methods.guards import check_schedule
from lightning_distill.methods.pcm import PCM
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import ExpertNetwork, Experts
from lightning_distill.networks.roles import Role
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.randomness import Draws
from lightning_distill.times import few_step_times

__all__ = ["DCM"]


@contextmanager
def led_by(denoiser: Denoiser, expert: int) -> Iterator[None]:
    """Within it all calls are one expert's, so that the device need not be asked which times are whose.

    Args:
        denoiser: one whose network is an ``ExpertNetwork``.
        expert: number of the expert.
    """
    router = denoiser.network
    assert isinstance(router, ExpertNetwork)
    chosen, before = router.experts[expert], router.__dict__.get("forward")  # where it is sharded, one of its own
    router.__dict__["forward"] = lambda *args, **kwargs: chosen(*args, **kwargs)
    try:
        yield
    finally:
        del router.__dict__["forward"]
        if before is not None:
            router.__dict__["forward"] = before


class DCM(PCM):
    """A semantic expert for noisy times and a detail expert for the others, each consistent on its own part.

        semantic, t > t_k:   d( f(x_t, t), sg f'(x_r, r) ) at t_k + | changes between frames of both |^2     (Eq. 6, 8)
        detail, t <= t_k:    d( f(x_t, t), sg f'(x_r, r) ) at 0 + .5 L_GAN + | features of both |^2          (Eq. 7, 10)

    Layout and motion are decided in few noisy steps, whose losses and gradients are much larger than those of details;
    one network would be trained for them at the cost of the rest.

    Args:
        teacher: the pretrained model.
        student: how each expert is made, None for a copy.
        intervals: N, solver steps of the whole grid.
        semantic_intervals: how many of them, from noise on, belong to the semantic expert; N - k of the paper.
        semantic_steps: student steps of the semantic expert.
        detail_steps: student steps of the detail expert.
        semantic_updates: student updates of the semantic expert, after which the detail expert starts from its weights
            and is trained alone; None gives each update to a random one, as often as it has intervals.
        frame_lag: frames whose change is compared, for videos (channels, frames, height, width); None for no such term.
        target_ema: profile of f'; None for ``ConstantEMA(.95)``.
        **kwargs: see ``PCM``; ``gan`` is the detail expert's. Default weights: ``student/coherence`` 1, ``student/gan``
            .5 and ``student/features`` 1.

    Notes:
        Both experts are networks of their own; the paper's detail expert is the semantic one with adapters and new
        embedding layers, which saves memory.
        What is real to the discriminator is the target, noised like the student's point; features are compared under
        equal noise. Student and discriminator share a cycle, and the heads rest, with their schedule, in the turns of
        the semantic expert; the paper alternates.
        Every batch belongs to one expert. The paper's weights 5 and 10 have a common factor of .1 in the released code.
    """

    paper = "2506.03123"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/gan": 0.5, "student/features": 1.0}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        student: Role | None = None,
        intervals: int = 50,
        semantic_intervals: int = 13,
        semantic_steps: int = 1,
        detail_steps: int = 1,
        semantic_updates: int | None = None,
        frame_lag: int | None = 3,
        target_ema: EMAProfile | None = None,
        **kwargs: Any,
    ) -> None:
        average = target_profile(target_ema, ConstantEMA(0.95), needed=True)
        steps = semantic_steps + detail_steps
        super().__init__(teacher, student=student, num_steps=steps, intervals=intervals, target_ema=average, **kwargs)
        if not 1 <= semantic_steps <= semantic_intervals or not 1 <= detail_steps <= intervals - semantic_intervals:
            raise ValueError(
                f"semantic_intervals={semantic_intervals} of {intervals} must hold semantic_steps={semantic_steps}, "
                f"and the other {intervals - semantic_intervals} detail_steps={detail_steps}; each expert has at least "
                "one."
            )
        if semantic_updates is not None and semantic_updates < 1:
            raise ValueError(f"semantic_updates={semantic_updates}: give 1 or more, or None for both in turns.")
        self.semantic_intervals, self.semantic_updates = semantic_intervals, semantic_updates
        self.semantic_steps, self.detail_steps = semantic_steps, detail_steps
        self.frame_lag = frame_lag

    def build_roles(self) -> None:
        """The experts; an edge begins the segment below it, so that they meet just above the edge between them."""
        process, k = self.require_teacher().process, self.semantic_intervals
        grid = few_step_times(process, self.intervals)
        meeting = (grid[k - 1] * grid[k]) ** 0.5
        self._student_role = Experts(boundaries=[meeting / process.t_max], role=self._student_role)
        super().build_roles()
        grid = self.grid()
        noisy, rest = phase_edges(grid[:k], self.semantic_steps), phase_edges(grid[k:-1], self.detail_steps)
        self.edges = self._given_times = [*noisy, *rest]
        #: t_k
        self.boundary_time = grid[k]

    def check_configuration(self) -> None:
        """Frames that far apart must exist."""
        super().check_configuration()
        if self.frame_lag is not None:
            video = torch.zeros(1, *self.sample_shape)
            temporal_coherence(video, video, self.frame_lag)

    def on_fit_start(self) -> None:
        """Say so where the run ends in the semantic expert's part."""
        super().on_fit_start()
        consequence = "the detail expert has not been trained"
        check_schedule(self, "semantic_updates", (self.semantic_updates or 0) + 1, consequence)

    # ------------------------------------------------------------------------------------------------ turns
    def turn(self, update: int | None = None) -> int:
        """Number of the expert that is trained at a student update, the same in all phases and processes.

        Args:
            update: None for that of ``draws``.
        """
        update = self.draws.update if update is None else update
        if self.semantic_updates is not None:
            return int(update >= self.semantic_updates)
        draws = Draws(self.streams, update, 0, "student0").of_slice()
        return int(draws.integer("expert", self.intervals) >= self.semantic_intervals)

    def phase_plan(self) -> list[tuple[str, int]]:
        """The student alone in the semantic expert's turn: momentum would move heads that have no gradient."""
        plan = super().phase_plan()
        return plan if self.turn(0 if self._trainer is None else self.trainer.global_step) else plan[:1]

    def pair_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Neighbours on the expert's part of the grid."""
        first, last = ((0, self.semantic_intervals), (self.semantic_intervals, self.intervals))[self.turn()]
        grid = torch.tensor(self.grid(), dtype=torch.float64, device=self.device)
        later = first + (self.draws.uniform("interval", n) * (last - first)).long().clamp_max(last - first - 1)
        return grid[later], grid[later + 1]

    def ends(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Both points carried to the end of their phase by the one expert."""
        assert self.target_name is not None
        networks = (self.student, self.sampling_network(self.target_name))
        with led_by(networks[0], self.turn()), led_by(networks[1], self.turn()):
            return super().ends(pair)

    def after_phase(self, phase: str) -> None:
        """Hands the semantic expert's weights to the detail expert when its turn comes."""
        super().after_phase(phase)
        if phase != "student" or self.semantic_updates != self.draws.update + 1:
            return
        for denoiser in (self.student, *self.student_ema.values()):
            assert isinstance(denoiser, Denoiser)
            assert isinstance(denoiser.network, ExpertNetwork)
            semantic, detail = denoiser.network.experts
            with torch.no_grad():
                for a, b in zip(semantic.parameters(), detail.parameters()):
                    b.copy_(a)

    # ------------------------------------------------------------------------------------------------ terms
    def compare(self, pair: Pair, online: Tensor, target: Tensor) -> Terms:
        """Consistency, coherence for the semantic expert, the game for the detail expert."""
        terms = super().compare(pair, online, target)
        if self.frame_lag is not None and self.turn() == 0:
            terms.losses["coherence"] = temporal_coherence(online, target.detach(), self.frame_lag).mean()
        return terms

    def play(self, ends: Ends) -> dict[str, Tensor]:
        """Nothing for the semantic expert."""
        return super().play(ends) if self.turn() else {}

    def student_game(self, ends: Ends) -> dict[str, Tensor]:
        """The generator's side, and the distance of features under the same noise."""
        assert self.gan is not None
        t = self.game_levels(ends)
        fake = self.seen(ends.fake, ends, t, "gan/noise")
        with torch.no_grad():
            real = self.seen(ends.real, ends, t, "gan/noise")
        logits = self.heads(real, ends.batch.cond) if self.gan.kind == "relativistic" else None
        game = self.game_loss("student", self.heads(fake, ends.batch.cond), logits)
        return {"gan": game, "features": feature_distance(fake, real).mean()}

    def discriminator_loss(self, batch: Batch) -> Terms:
        """The discriminator's side; zero, with zero gradients, in the semantic expert's turn."""
        if self.turn():
            return super().discriminator_loss(batch)
        return Terms({"gan": self.idle_heads()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of the expert whose turn it is."""
        counts = super().forward_counts()
        if self.gan is not None and self.gan.network_taps:
            paired = self.gan.kind == "relativistic"
            if self.turn():
                counts["student"]["teacher"] += 0 if paired else 1
            else:
                counts["student"]["teacher"] -= 2 if paired else 1
                counts["discriminator"]["teacher"] = 0
        return counts
