"""FlashVDM: progressive flow distillation in three stages (arXiv:2503.16302)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import distance
from lightning_distill.methods.base import Terms
from lightning_distill.methods.end_game import Ends
from lightning_distill.methods.guards import check_schedule
from lightning_distill.methods.pcm import PCM
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import segment_end
from lightning_distill.times import bounded

__all__ = ["FlashVDM"]


class FlashVDM(PCM):
    """Guidance first, then phased consistency over steps of several lengths, then a game against data.

        1. updates < guidance_updates     | v_S(x_t, t) - [ v_u + w (v_c - v_u) ](x_t, t) |
        2. updates < gan_from             PCM,  r = s solver steps after t, s of ``skips``
        3. after that                     PCM, and the generator's side of a GAN at the ends of the phases

    Consistency distillation of a student that still needs two passes is unstable; each stage starts near its solution.

    Args:
        teacher: the pretrained model; ``guidance`` is what the first stage takes in.
        num_steps: phases, and the student's steps.
        guidance_updates: updates of the first stage; 0 for none.
        gan_from: first update of the third stage.
        skips: lengths of pairs in solver steps, of which each sample draws one; a pair ends at its phase's end at the
            latest.
        **kwargs: see ``PCM`` (``gan``, without which the third stage is the second; ``target_ema``).

    Notes:
        Reconstructed from the description of the stages, since no trainer is public. One solver step leads over a
        whole skip. Trajectories are the guided teacher's in all stages; the paper's second stage has the student of
        the first as teacher.
        Heads are trained through the second stage already, so that the game begins with a discriminator.
    """

    paper = "2503.16302"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"student/gan": 0.1}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        num_steps: int = 5,
        guidance_updates: int = 5000,
        gan_from: int = 20_000,
        skips: Sequence[int] = (1, 2, 4),
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, num_steps=num_steps, **kwargs)
        if guidance_updates < 0 or gan_from < guidance_updates:
            raise ValueError(
                f"guidance_updates={guidance_updates} and gan_from={gan_from}: stages follow one another, so give "
                "0 <= guidance_updates <= gan_from."
            )
        if not skips or min(skips) < 1 or max(skips) > self.intervals:
            raise ValueError(f"skips={list(skips)}: pairs are 1 to intervals={self.intervals} solver steps long.")
        self.guidance_updates, self.gan_from, self.skips = guidance_updates, gan_from, list(skips)

    def on_fit_start(self) -> None:
        """Say so where the run ends in the first stage, and where that has nothing to teach."""
        super().on_fit_start()
        check_schedule(self, "guidance_updates", self.guidance_updates + 1, "the student has not learned long steps")
        if self.guidance_updates and not self.guidance.needs_null and isinstance(self._student_role, Copy):
            rank_zero_warn(
                f"the first {self.guidance_updates} updates teach a guidance scale, and guidance is 1, which a copy of "
                "the teacher has already; give guidance=Guidance(scale), or guidance_updates=0."
            )

    def stage(self) -> int:
        """Stage of this update, 1 to 3."""
        update = self.draws.update
        return 1 if update < self.guidance_updates else 2 if update < self.gan_from else 3

    def pair_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Times t > r of each sample, (n,), float64: some solver steps apart, within a phase."""
        grid = torch.tensor(self.grid(), dtype=torch.float64, device=self.device)
        skips = torch.tensor(self.skips, device=self.device)
        later = (self.draws.uniform("interval", n) * (len(grid) - 1)).long().clamp_max(len(grid) - 2)
        drawn = (self.draws.uniform("skip", n) * len(skips)).long().clamp_max(len(skips) - 1)
        t, r = grid[later], grid[(later + skips[drawn]).clamp_max(len(grid) - 1)]
        return t, torch.maximum(r, segment_end(t, self.training_edges()))

    def student_loss(self, batch: Batch) -> Terms:
        """The terms of the stage."""
        return self.guidance_loss(batch) if self.stage() == 1 else super().student_loss(batch)

    def guidance_loss(self, batch: Batch) -> Terms:
        """Distance of the student's velocity from the guided teacher's, at noised data."""
        x, t, _ = self.renoise(self.data(batch), bounded(self.process, 0.0, 1.0), "guidance")
        goal = self.guided_teacher(batch)(x, t).flow_prediction
        made = self.student(x, t, batch.cond, guidance=self.told_scale(t)).flow_prediction
        loss = distance(made, goal, self.metric, self.huber).mean()
        return Terms({"guidance": loss}, {"mse": (made.detach() - goal).square().mean()})

    def student_game(self, ends: Ends) -> dict[str, Tensor]:
        """The generator's side, which counts in the third stage."""
        counts = float(self.stage() == 3)
        return {name: counts * value for name, value in super().student_game(ends).items()}

    def discriminator_loss(self, batch: Batch) -> Terms:
        """The discriminator's side; nothing to tell apart in the first stage."""
        if self.stage() > 1:
            return super().discriminator_loss(batch)
        return Terms({"gan": self.idle_heads()})
