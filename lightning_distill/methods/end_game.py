"""The adversarial term of consistency methods: a game at the ends of segments."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.adversarial import discriminator_loss, generator_loss
from lightning_distill.losses.subinterval import noise_further
from lightning_distill.methods.base import Terms
from lightning_distill.methods.discriminating import Discriminating
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.time_coverage import restricted
from lightning_distill.times import bounded

__all__ = ["EndGame", "Ends"]


@dataclass
class Ends:
    """What a discriminator compares: where the student leads, ``fake``, and what is ``real`` there, (B, ...) each.

    Attributes:
        end: native times of both, (B,).
        top: latest native times to which they are noised, (B,).
        batch: their conditions.
    """

    fake: Tensor
    real: Tensor
    end: Tensor
    top: Tensor
    batch: Batch


class EndGame(Discriminating):
    """An optional GAN on the points to which a consistency student leads (PCM's adversarial consistency loss).

        x_s = noise further(x_end, end -> s),     s between end and top,     D on the frozen teacher's features

    Args:
        teacher: the pretrained model; its blocks are the features.
        gan: taps, loss and noise levels; ``features`` is ``teacher``. Without times they are the default ones between
            the end and the beginning of the segment. None for no game.
        gan_real: what is real: the ``target`` of consistency, or ``data``, noised to the same time.
        discriminator_optimizer: of the heads; None for fused AdamW.
        discriminator_scheduler: stepped once per student update.
        **kwargs: of the method.
    """

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        gan: Adversary | None = None,
        gan_real: Literal["target", "data"] = "target",
        discriminator_optimizer: OptimizerCallable | None = None,
        discriminator_scheduler: LRSchedulerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        if gan is not None:  # past the registration of attributes, which begins below
            self.__dict__["phases"] = {"student": ("student",), "discriminator": ("discriminator",)}
        super().__init__(teacher, **kwargs)
        if gan is not None and gan.features != "teacher":
            raise ValueError(
                f"{type(self).__name__} has no fake score, so its game reads features of the frozen teacher; give "
                "gan=Adversary(taps=[...], features='teacher')."
            )
        if gan_real not in ("target", "data"):
            raise ValueError(f"gan_real={gan_real!r} is unknown; choose target or data.")
        self.gan, self.gan_real, self.discriminator = gan, gan_real, None
        self.optimizer_factories["discriminator"] = discriminator_optimizer
        self.scheduler_factories["discriminator"] = discriminator_scheduler

    def build_roles(self) -> None:
        """The student and, with ``gan``, discriminator heads."""
        super().build_roles()
        if self.gan is not None:
            self.discriminator = self.gan.build(self.feature_network, self.sample_shape)

    # ------------------------------------------------------------------------------------------------ the game
    def normal_rows(self, name: str, like: Tensor) -> Tensor:
        """Noise for each pair; methods with several pairs per sample override both."""
        return self.draws.normal(name, like.shape)

    def uniform_rows(self, name: str, n: int) -> Tensor:
        """A uniform number for each pair, (n,)."""
        return self.draws.uniform(name, n)

    def real_ends(self, batch: Batch, target: Tensor, end: Tensor) -> Tensor:
        """Real samples at the time ``end``, (B, ...), without graph."""
        if self.gan_real == "target":
            return target
        if batch.x0 is None:
            raise ValueError("gan_real='data' needs batches with x0; use gan_real='target', or a loader of data.")
        return self.process.add_noise(batch.x0, self.normal_rows("gan/real_end", batch.x0), end)

    def seen(self, x: Tensor, ends: Ends, t: Tensor, name: str) -> Mapping[str, Tensor]:
        """The discriminator's features of points at ``ends.end`` noised to t."""
        assert self.gan is not None
        x_s = noise_further(x, ends.end, t, self.normal_rows(name, x), self.process)
        return self.gan.tapped(self.feature_network, x_s, t, ends.batch.cond)

    def game_levels(self, ends: Ends) -> Tensor:
        """Native times to which both sides are noised, (B,)."""
        assert self.gan is not None
        distribution = self.gan.times or bounded(self.process, 0.0, 1.0)
        u = self.uniform_rows("gan/time", len(ends.end))
        return torch.maximum(restricted(distribution, u, ends.end, ends.top, self.process), ends.end)

    def game_loss(self, side: Literal["student", "heads"], fake: Tensor, real: Any) -> Tensor:
        """A side's loss of logits."""
        assert self.gan is not None
        if side == "student":
            return generator_loss(fake, self.gan.kind, real=real)
        return discriminator_loss(real, fake, self.gan.kind)

    def play(self, ends: Ends) -> dict[str, Tensor]:
        """The student's terms, and the ends kept for the discriminator's own phase; nothing without ``gan``."""
        if self.gan is None:
            return {}
        kept: dict[Any, Any] = self._rollouts
        kept[self._game_key] = replace(ends, fake=ends.fake.detach())
        return self.student_game(ends)

    def student_game(self, ends: Ends) -> dict[str, Tensor]:
        """The generator's side."""
        assert self.gan is not None
        t = self.game_levels(ends)
        fake = self.heads(self.seen(ends.fake, ends, t, "gan/noise"), ends.batch.cond)
        real = None
        if self.gan.kind == "relativistic":
            real = self.heads(self.seen(ends.real, ends, t, "gan/real_noise"), ends.batch.cond)
        return {"gan": self.game_loss("student", fake, real)}

    @property
    def _game_key(self) -> tuple[str, int, int]:
        return "game", self.draws.slice_index, self.draws.first

    def discriminator_loss(self, batch: Batch) -> Terms:
        """The discriminator's side, on the ends of the student's update."""
        kept: dict[Any, Any] = self._rollouts
        if self._game_key not in kept:
            with torch.no_grad():
                self.student_loss(batch)  # type: ignore[operator]
        ends = kept[self._game_key]
        t = self.game_levels(ends)
        fake = self.heads(self.seen(ends.fake, ends, t, "gan/noise"), ends.batch.cond)
        real = self.heads(self.seen(ends.real, ends, t, "gan/real_noise"), ends.batch.cond)
        diagnostics = {"logit_real": real.detach().mean(), "logit_fake": fake.detach().mean()}
        return Terms({"gan": self.game_loss("heads", fake, real)}, diagnostics)

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        counts: dict[str, dict[str, int]] = super().forward_counts()  # type: ignore[misc]
        if self.gan is not None:
            seen = 1 if self.gan.network_taps else 0
            counts["student"]["teacher"] += 2 * seen if self.gan.kind == "relativistic" else seen
            counts["discriminator"] = {"student": 0, "teacher": 2 * seen}
        return counts
