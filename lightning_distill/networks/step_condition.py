"""Tells a fake score which of the student's steps made a sample.

One fake score for all steps learns the mixture of their outputs, and a student whose steps have that mixture in common
is a fixed point although no single step has the teacher's distribution. A critic that knows the step has no such fixed
point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import ExpertNetwork, single_experts
from lightning_distill.networks.seeding import seeded

__all__ = [
    "CONDITIONS",
    "ExpertStepConditions",
    "StepCondition",
    "build_step_condition",
    "entrance",
    "take_over_steps",
]

CONDITIONS = ("none", "step", "interval")

_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Found(Exception):
    """Raised by the hook on the first layer that reads the sample."""

    def __init__(self, name: str, width: int) -> None:
        self.name, self.width = name, width


def entrance(denoiser: Denoiser, shape: Sequence[int], cond: Mapping[str, Any] | None = None) -> tuple[str, int]:
    """The first linear or convolution layer that reads the noisy sample, found by running the network up to it.

    Args:
        denoiser: the network.
        shape: of one sample, without the batch dimension.
        cond: conditioning of one sample, tensors with a batch dimension of 1.

    Returns:
        name of the layer below ``denoiser.network``, and its number of output features or channels.

    Raises:
        ValueError: there is no such layer.
    """
    x = torch.zeros(1, *shape, device=denoiser.device, requires_grad=True)
    t = torch.tensor(denoiser.process.t_max / 2, dtype=torch.float64, device=denoiser.device)

    def hook(layer: nn.Module, args: tuple[Any, ...], name: str) -> None:
        if args and isinstance(args[0], Tensor) and args[0].requires_grad:
            width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            raise _Found(name, int(width))  # type: ignore[arg-type]

    flags = [(p, p.requires_grad) for p in denoiser.network.parameters()]
    handles = []
    for name, layer in denoiser.network.named_modules():
        if isinstance(layer, _READERS):
            handles.append(layer.register_forward_pre_hook(lambda m, args, name=name: hook(m, args, name)))
    try:
        for parameter, _ in flags:  # else the time embedding would have a graph as well
            parameter.requires_grad_(False)
        with torch.enable_grad():
            denoiser(x, t, cond)
    except _Found as found:
        return found.name, found.width
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    raise ValueError(
        f"{type(denoiser.network).__name__} has no linear or convolution layer that reads its samples, so it cannot be "
        "told the student's step; use critic_condition_on=none."
    )


class StepCondition(nn.Module):
    """A learned vector per student step, added to the output of the layer through which samples enter a network.

        h = W x_t + b + e_k,        e_k = 0 at initialisation

    which is a further input channel that says k. It works on every network whose first layer is linear or a
    convolution, and on adapters; the layer is only touched within ``told``.

    Args:
        layer: name of that layer, see ``entrance``.
        width: its output features or channels.
        kind: ``step`` looks e_k up by the step's index; ``interval`` computes it from the step's two times, so that
            time lists may vary from batch to batch.
        num_steps: number of steps, for ``step``.
        hidden: features of the two-layer network of ``interval``.
    """

    def __init__(
        self, layer: str, width: int, kind: Literal["step", "interval"], num_steps: int, hidden: int = 64
    ) -> None:
        super().__init__()
        self.layer = layer
        self.kind = kind
        self.embedding: nn.Module
        with seeded(0):
            if kind == "step":
                self.embedding = nn.Embedding(num_steps, width)
                nn.init.zeros_(self.embedding.weight)
            else:
                last = nn.Linear(hidden, width)
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
                self.embedding = nn.Sequential(nn.Linear(16, hidden), nn.SiLU(), last)

    def vectors(self, step: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """e_k, (B, width).

        Args:
            step: indices of the steps, (B,).
            start: times at which they begin, as shares of t_max, (B,).
            end: times at which they end, as shares of t_max, (B,).
        """
        if self.kind == "step":
            return self.embedding(step)
        waves = math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0], device=start.device)
        angles = torch.cat([start.float()[:, None] * waves, end.float()[:, None] * waves], dim=1)
        return self.embedding(torch.cat([angles.cos(), angles.sin()], dim=1))

    @contextmanager
    def told(self, denoiser: Denoiser, step: Tensor, start: Tensor, end: Tensor, share: float = 1.0) -> Iterator[None]:
        """Within it, calls of ``denoiser`` know the step of each sample; batches of two branches know it for both.

        Args:
            denoiser: the network that this condition was made for.
            step: see ``vectors``.
            start: see ``vectors``.
            end: see ``vectors``.
            share: factor on e_k, for a network that is only partly the one that learned it.
        """
        with self.hooked(denoiser.network, None, step, start, end, share):
            yield

    @contextmanager
    def hooked(
        self,
        network: nn.Module,
        router: ExpertNetwork | None,
        step: Tensor,
        start: Tensor,
        end: Tensor,
        share: float,
    ) -> Iterator[None]:
        """As ``told``, for a network that may be one of several.

        Args:
            network: the one whose layer is touched.
            router: what sends some of a call's samples to it; None if it gets all.
            step: see ``vectors``; of all samples.
            start: see ``vectors``.
            end: see ``vectors``.
            share: see ``told``.
        """

        def add(_layer: nn.Module, _args: Any, out: Tensor) -> Tensor:
            e = share * self.vectors(step, start, end).to(out.dtype)
            if router is None or router.part is None:
                e = _repeated(e, len(out))
            else:
                rows, calls = router.part
                e = _repeated(_repeated(e, calls)[rows], len(out), only_once=True)
            # channels come second in maps and last in vectors and tokens
            channels_last = isinstance(_layer, nn.Linear)
            middle = [1] * (out.ndim - 2)
            return out + (e.view(len(e), *middle, -1) if channels_last else e.view(len(e), -1, *middle))

        handle = network.get_submodule(self.layer).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


class ExpertStepConditions(nn.Module):
    """A ``StepCondition`` for each of several experts, which get the steps of the samples that they get.

    Args:
        conditions: of the experts, in their order.
    """

    def __init__(self, conditions: Sequence[StepCondition]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(conditions)

    @contextmanager
    def told(self, denoiser: Denoiser, step: Tensor, start: Tensor, end: Tensor, share: float = 1.0) -> Iterator[None]:
        """As ``StepCondition.told``, for a denoiser whose network is an ``ExpertNetwork``."""
        router = denoiser.network
        assert isinstance(router, ExpertNetwork)
        with ExitStack() as stack:
            for condition, expert in zip(self.experts, router.experts, strict=True):
                assert isinstance(condition, StepCondition)
                stack.enter_context(condition.hooked(expert, router, step, start, end, share))
            yield


def _repeated(e: Tensor, rows: int, only_once: bool = False) -> Tensor:
    if rows % len(e) or (only_once and rows != len(e)):
        raise ValueError(
            f"a call with {rows} rows cannot be told the steps of {len(e)} samples; networks that fold frames into the "
            "batch need critic_condition_on=none."
        )
    return e.repeat(rows // len(e), 1)


def build_step_condition(
    denoiser: Denoiser,
    shape: Sequence[int],
    cond: Mapping[str, Any],
    kind: Literal["step", "interval"],
    num_steps: int,
) -> StepCondition | ExpertStepConditions:
    """What tells a network the student's step: one condition, or one for each of its experts.

    Args:
        denoiser: see ``entrance``.
        shape: see ``entrance``.
        cond: see ``entrance``.
        kind: see ``StepCondition``.
        num_steps: see ``StepCondition``.
    """
    if not isinstance(denoiser.network, ExpertNetwork):
        return StepCondition(*entrance(denoiser, shape, cond), kind, num_steps)
    return ExpertStepConditions(
        [StepCondition(*entrance(single, shape, cond), kind, num_steps) for single in single_experts(denoiser)]
    )


def take_over_steps(told: nn.Module | None, learned: Mapping[str, Tensor]) -> None:
    """Begin with what an earlier fake score learned about the student's steps, where it fits.

    Args:
        told: of the new one, see ``build_step_condition``; None where it is told nothing.
        learned: tensors of the earlier one, see ``Role.learned_steps``.
    """
    own = {} if told is None else told.state_dict()
    if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in learned.items()} and told is not None:
        told.load_state_dict(learned)
    elif learned:
        rank_zero_warn(
            "the fake score of the checkpoint was told other steps of its student (critic_condition_on, number of "
            "steps) than this one is; what it learned about them is left out."
        )
