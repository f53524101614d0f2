"""How one network holds two velocity fields: that of the data and that of its own samples.

    negative_time        the time embedding of -t in the place of t              TwinFlow (arXiv:2512.05150)
    shifted_condition    the condition a c + b in the place of c                 APEX (arXiv:2604.12322)

A branch is chosen per call, never as lasting state, and adds no weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.second_time import time_embedders
from lightning_distill.processes import EDM

__all__ = ["FakeBranch", "NegativeTime", "ShiftedCondition"]

#: conditions that are embeddings
_EMBEDDED = ("encoder_hidden_states", "pooled_projections", "text_embeds")


class FakeBranch(ABC):
    """A second set of functions of (x, t) on the weights of a network."""

    @abstractmethod
    def check(self, student: Denoiser, checkpointing: bool) -> None:
        """Raise for a network that cannot be told the branches apart.

        Args:
            student: the network.
            checkpointing: whether its blocks are recomputed in the backward pass.
        """

    @abstractmethod
    def chosen(self, student: Denoiser, cond: Mapping[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        """Within it a call of the student with the conditions that it yields is one of the branch.

        Args:
            student: the network.
            cond: conditions of the batch.
        """


def _inside_blocks(network: nn.Module, module: nn.Module) -> bool:
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    return any(module is part for blocks in lists for part in blocks.modules())


def _recomputed(network: nn.Module) -> ValueError:
    return ValueError(
        f"{type(network).__name__} embeds what tells the branches apart inside its blocks, which activation "
        "checkpointing would recompute without it; switch activation_checkpointing off."
    )


class NegativeTime(FakeBranch):
    """The network sees -t: cosines of its time features stay, sines change their sign.

    The sample, the noise process and the target time stay what they are; only the embedding is told.
    """

    def check(self, student: Denoiser, checkpointing: bool) -> None:  # noqa: D102
        try:
            found = time_embedders(student.network)
        except ValueError:
            raise ValueError(
                f"where {type(student.network).__name__} embeds its time is not known, so it cannot be told -t; use "
                "another fake branch, such as ShiftedCondition()."
            ) from None
        if isinstance(student.network_process or student.process, EDM) and student.family.time == "network":
            raise ValueError(
                f"{type(student.network).__name__} is told ln sigma, whose negative is the time of 1 / sigma; use "
                "another fake branch, such as ShiftedCondition()."
            )
        if checkpointing and any(_inside_blocks(student.network, embedder) for embedder, _ in found):
            raise _recomputed(student.network)
        for _, projection in found:
            if projection is None:
                continue
            parity = _parity(projection, student.device)
            if not parity.is_meta and not bool((parity.abs() == 1.0).all()):
                raise ValueError(
                    f"{type(projection).__name__} makes no sines and cosines of the time, so the features of -t are "
                    "not known; use another fake branch, such as ShiftedCondition()."
                )

    @contextmanager
    def chosen(self, student: Denoiser, cond: Mapping[str, Any]) -> Iterator[dict[str, Any]]:  # noqa: D102
        with ExitStack() as stack:
            for embedder, projection in time_embedders(student.network):
                sign = None if projection is None else _parity(projection, student.device)

                def mirror(_module: nn.Module, args: Any, sign: Tensor | None = sign) -> Any:
                    return (-args[0] if sign is None else args[0] * sign.to(args[0]), *args[1:])

                stack.callback(embedder.register_forward_pre_hook(mirror).remove)
            yield dict(cond)


@torch.no_grad()
def _parity(projection: nn.Module, device: torch.device) -> Tensor:
    """1 for features that are even in time and -1 for odd ones: of sinusoids, what is 1 or 0 at t = 0."""
    return 2.0 * projection(torch.zeros(1, device=device)) - 1.0


class ShiftedCondition(FakeBranch):
    """The network sees a c + b: text embeddings as they are given, classes by the network's own embedding of them.

    A negative a turns the condition round, which keeps the branches apart; a between -1 and -.5 with b from .1 to 1 is
    best in the paper (Table 7).

    Args:
        scale: a.
        offset: b.
    """

    def __init__(self, scale: float = -0.5, offset: float = 1.0) -> None:
        if scale == 1.0 and offset == 0.0:
            raise ValueError("ShiftedCondition(scale=1, offset=0) is the condition itself; give another of the two.")
        self.scale, self.offset = float(scale), float(offset)

    def check(self, student: Denoiser, checkpointing: bool) -> None:  # noqa: D102
        tables = self._tables(student)
        if not tables and not set(_EMBEDDED) & set(student.family.cond_keys):
            raise ValueError(
                "ShiftedCondition needs text embeddings or an embedding of classes, and "
                f"{type(student.network).__name__} has neither; use NegativeTime()."
            )
        if checkpointing and any(_inside_blocks(student.network, table) for table in tables):
            raise _recomputed(student.network)

    def _tables(self, student: Denoiser) -> list[nn.Embedding]:
        """Embeddings of the classes, with or without a row for "no class"."""
        sizes = (student.num_classes or 0, (student.num_classes or 0) + 1)
        tables = [m for m in student.network.modules() if isinstance(m, nn.Embedding)]
        return [m for m in tables if student.num_classes and m.num_embeddings in sizes]

    def shifted(self, embedding: Tensor) -> Tensor:
        """A c + b."""
        return self.scale * embedding + self.offset

    @contextmanager
    def chosen(self, student: Denoiser, cond: Mapping[str, Any]) -> Iterator[dict[str, Any]]:  # noqa: D102
        with ExitStack() as stack:
            for table in self._tables(student) if "class_labels" in cond else ():
                hook = table.register_forward_hook(lambda _module, _args, out: self.shifted(out))
                stack.callback(hook.remove)
            changed = {key: self.shifted(cond[key]) for key in _EMBEDDED if key in cond}
            if not changed and "class_labels" not in cond:
                raise ValueError(
                    "ShiftedCondition needs conditions (class labels, text embeddings), but the batch has none; use "
                    "NegativeTime() for unconditional models."
                )
            yield {**cond, **changed}
