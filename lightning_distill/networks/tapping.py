"""Outputs of a network's blocks, taken in passing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_distill.networks.compiling import pause_around

if TYPE_CHECKING:
    from lightning_distill.networks.denoiser import Denoiser

__all__ = ["TAPPED", "AllTapsSeen", "tap"]

#: attribute of a network in which the features tapped by the running call are found
TAPPED = "_lightning_distill_tapped"


class AllTapsSeen(Exception):
    """Raised by the hook on the last tapped block so that the blocks behind it are not run."""


def tap(denoiser: Denoiser, taps: Sequence[str], into: dict[str, Tensor], stop: bool, stack: ExitStack) -> None:
    """Collect the outputs of blocks until a stack is left.

    Args:
        denoiser: owner of the network.
        taps: names of its blocks.
        into: where the outputs go, by name.
        stop: raise ``AllTapsSeen`` when all are there.
        stack: removes the hooks.

    Raises:
        ValueError: the network has no such block, or sends the samples of a call to several networks.
    """
    network = denoiser.network
    if taps:
        _check_single(network)
        network.__dict__[TAPPED] = into
        stack.callback(network.__dict__.pop, TAPPED)
    for name in taps:
        try:
            block = network.get_submodule(name)
        except AttributeError:
            known = ", ".join(denoiser.block_names()[:40]) or "(no blocks are declared for this class)"
            raise ValueError(f"{type(network).__name__} has no block {name!r}; blocks to tap: {known}.") from None

        def hook(_module: nn.Module, _args: Any, out: Any, name: str = name) -> None:
            into[name] = out[denoiser.family.block_output] if isinstance(out, tuple) else out
            if stop and len(into) == len(taps):
                raise AllTapsSeen

        stack.callback(block.register_forward_hook(hook).remove)
        pause_around(network, name, stack)


def _check_single(network: nn.Module) -> None:
    """Raise for experts: a block of one of them sees some of a call's samples only."""
    from lightning_distill.networks.experts import ExpertNetwork  # whose base imports this module

    if isinstance(network, ExpertNetwork):
        raise ValueError(
            f"{type(network).__name__} divides the samples of a call between {len(network.experts)} networks, so that "
            "a block has the features of some of them only; tap a role with a single network, for example "
            "gan=Adversary(features='teacher') or 'fake_score', whichever is no Experts."
        )
