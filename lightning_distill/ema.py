"""Exponential moving averages of the student: profiles (how much to keep at each update) and the update itself.

The averages are registered frozen submodules of the LightningModule, in float32, so they are checkpointed and sharded
like the student, while the teacher is never copied. Evaluation chooses which network it samples from instead of
swapping weights.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from lightning_distill.optim import local_part

__all__ = ["ConstantEMA", "EMAProfile", "HalfLifeEMA", "PowerEMA", "check_horizon", "paired_buffers", "update_average"]

#: bytes of the average that are updated at once
_PORTION = 128 * 2**20


class EMAProfile(ABC):
    """How much of the old average survives an update: ema <- beta ema + (1 - beta) student."""

    name: str

    @abstractmethod
    def beta(self, update: int, samples_per_update: int) -> float:
        """Decay of the ``update``-th student update (counted from 1)."""

    def memory(self, updates: int, samples_per_update: int) -> float:
        """Share of the initial weights left in the average after ``updates`` updates."""
        return math.exp(sum(math.log(max(self.beta(k, samples_per_update), 1e-300)) for k in range(1, updates + 1)))


class ConstantEMA(EMAProfile):
    """Fixed decay.

    Args:
        decay: beta in (0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ConstantEMA(decay={decay}): the decay lies between 0 and 1.")
        self.decay = float(decay)
        self.name = f"constant_{decay:g}".replace(".", "_")

    def beta(self, update: int, samples_per_update: int) -> float:  # noqa: D102
        return self.decay


class HalfLifeEMA(EMAProfile):
    """Half-life in samples with a ramp-up, beta = 0.5^(batch / min(half_life, ramp_up * seen)) (EDM, arXiv:2206.00364).

    Args:
        half_life: samples after which a weight has lost half its influence.
        ramp_up: the half-life never exceeds this share of the samples seen so far; None for no ramp.
    """

    def __init__(self, half_life: float = 500_000, ramp_up: float | None = 0.05) -> None:
        if half_life <= 0:
            raise ValueError(f"HalfLifeEMA(half_life={half_life}): give a positive number of samples.")
        self.half_life = float(half_life)
        self.ramp_up = ramp_up
        self.name = f"half_life_{half_life:g}".replace(".", "_").replace("+", "")

    def beta(self, update: int, samples_per_update: int) -> float:  # noqa: D102
        half_life = self.half_life
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * update * samples_per_update)
        return 0.5 ** (samples_per_update / max(half_life, 1e-8))


class PowerEMA(EMAProfile):
    """Power-function average of EDM2 (arXiv:2312.02696, Eq. 121-127): beta_k = (1 - 1/k)^(gamma + 1).

    Its width is a fixed share of the training so far, so it needs no tuning to the length of a run.

    Args:
        sigma_rel: relative width of the averaging profile, 0 < sigma_rel < 0.28; 0.05 gives gamma 16.97, 0.10 gives
            6.94.
    """

    def __init__(self, sigma_rel: float = 0.10) -> None:
        if not 0.0 < sigma_rel < 0.28:
            raise ValueError(f"PowerEMA(sigma_rel={sigma_rel}): the relative width lies between 0 and 0.28.")
        self.sigma_rel = float(sigma_rel)
        # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for the largest real root
        s = self.sigma_rel**-2
        roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
        self.gamma = float(roots[np.isreal(roots)].real.max())
        self.name = f"power_{sigma_rel:g}".replace(".", "_")

    def beta(self, update: int, samples_per_update: int) -> float:  # noqa: D102
        return (1.0 - 1.0 / update) ** (self.gamma + 1.0)


def check_horizon(profiles: Iterable[EMAProfile], max_steps: int) -> None:
    """Warn about fixed decays whose horizon 1 / (1 - decay) exceeds 10 % of a run.

    Args:
        profiles: the run's averages.
        max_steps: student updates of the run; -1 (unknown) is not checked.
    """
    for profile in profiles:
        if isinstance(profile, ConstantEMA) and 0 < max_steps < 10.0 / (1.0 - profile.decay):
            horizon, left = 1 / (1 - profile.decay), 100 * profile.memory(max_steps, 1)
            effect = (
                f"{left:.0f} % of the average will still be the teacher's weights"
                if left >= 1
                else f"the average will lag {horizon:.0f} updates behind the student"
            )
            warnings.warn(
                f"ConstantEMA(decay={profile.decay:g}) averages over {horizon:.0f} updates, but the run has "
                f"{max_steps}: {effect}. Use PowerEMA(0.1), or a smaller decay.",
                stacklevel=2,
            )


@torch.no_grad()
def update_average(
    average: Iterable[Tensor], current: Iterable[Tensor], beta: float, skipped: Tensor | None = None
) -> None:
    """In place: average <- beta average + (1 - beta) current, or nothing where the step was skipped.

    Args:
        average: float32 tensors of the average.
        current: the student's tensors in the same order, any floating dtype. Sharded tensors are averaged shard by
            shard, without communication; both sides are sharded alike.
        beta: share of the old average.
        skipped: 0-dim tensor, 1 when the optimizer skipped this step; decides on the device, without a synchronisation.
    """
    old = [local_part(o) for o in average]
    new = [local_part(c.detach()) for c in current]
    if len(old) != len(new):
        raise ValueError(f"an average of {len(old)} tensors cannot follow a network of {len(new)}.")
    for part in _portions(old):
        _update([old[i] for i in part], [new[i].to(old[i]) for i in part], beta, skipped)


def paired_buffers(average: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Buffers that an average takes over from the student as they are, such as the statistics of batch norm.

    Args:
        average: a copy of the student.
        student: the trained network.

    Returns:
        persistent buffers of the average, and the student's of the same names; those that both share are left out.
    """
    theirs, kept = dict(student.named_buffers()), average.state_dict().keys()
    pairs = [
        (own, theirs[name])
        for name, own in average.named_buffers()
        if name in kept and name in theirs and theirs[name] is not own and theirs[name].shape == own.shape
    ]
    return [own for own, _ in pairs], [other for _, other in pairs]


@torch.no_grad()
def renew_copy(kept: nn.Module, now: nn.Module) -> None:
    """Give a frozen copy the parameters, and the statistics, that a network has now.

    Args:
        kept: a copy of the network, of the same parameters in the same order.
        now: the network.
    """
    for old, new in zip(kept.parameters(), now.parameters()):
        old.copy_(new)
    for own, theirs in zip(*paired_buffers(kept, now)):
        own.copy_(theirs)


def _update(old: list[Tensor], new: list[Tensor], beta: float, skipped: Tensor | None) -> None:
    if skipped is None:
        torch._foreach_lerp_(old, new, 1.0 - beta)
        return
    difference = list(torch._foreach_sub(new, old))
    torch._foreach_mul_(difference, (1.0 - skipped.to(old[0].device)) * (1.0 - beta))
    torch._foreach_add_(old, difference)


def _portions(tensors: list[Tensor]) -> Iterator[list[int]]:
    """Indices of neighbours that have ``_PORTION`` bytes together, or one: the update needs as much again."""
    part: list[int] = []
    size = 0
    for i, tensor in enumerate(tensors):
        if part and size + tensor.nbytes > _PORTION:
            yield part
            part, size = [], 0
        part.append(i)
        size += tensor.nbytes
    if part:
        yield part
