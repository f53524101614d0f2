"""Compiled blocks: ``torch.compile`` of the parts that a network repeats.

Whole networks take minutes to compile and are compiled again for every phase of a method, adapter and mode. Blocks of
one class share their code, so each class is compiled once per variant; hooks on blocks, sharding and taps stay outside.
Blocks with hooks on modules inside of them run as they were written while they have them: torch does not look at such
hooks when it decides whether compiled code still fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from lightning_distill.networks.denoiser import Denoiser

__all__ = ["CompiledForward", "compile_blocks", "compile_roles", "eager_blocks", "pause_around"]

#: variants of one block class (roles, adapters, with and without graph) that are kept before torch gives up on it
_VARIANTS = 64
_BACKEND = "inductor"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
_eager = 0


@contextmanager
def eager_blocks() -> Iterator[None]:
    """Run compiled blocks as they were written, where a transform looks into them (forward-mode derivatives)."""
    global _eager
    _eager += 1
    try:
        yield
    finally:
        _eager -= 1


class CompiledForward:
    """The forward of one block, compiled with those of its class.

    It refers to its block as an attribute, which a deep copy of the block turns to the copy.

    Args:
        block: has a forward of its class.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.paused = 0
        self._unhooked = -1  # handles that existed when the block was last seen without hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's forward."""
        plain = type(self.block).forward
        if _eager or self.paused or self._hooked():
            return plain(self.block, *args, **kwargs)
        from torch._dynamo.exc import BackendCompilerFailed  # a second of imports

        if plain not in _compiled:
            _compiled[plain] = torch.compile(plain, backend=_BACKEND)
        try:
            return _compiled[plain](self.block, *args, **kwargs)
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(
                f"compile_blocks: torch cannot compile {type(self.block).__name__}; it needs a C++ compiler on "
                f"CPU and Triton on a GPU: install it, or set compile_blocks: false (the compiler says: {reason})."
            ) from error

    def _hooked(self) -> bool:
        """Whether a module inside of the block has hooks; they are looked for when new ones exist anywhere."""
        handles = RemovableHandle.next_id
        if self._unhooked == handles:
            return False
        inside = (part for part in self.block.modules() if part is not self.block)
        if any(part.__dict__[kind] for part in inside for kind in _HOOKS):
            return True
        self._unhooked = handles
        return False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Run this block as it was written, where something is hooked into it for one call."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1


def pause_around(network: nn.Module, name: str, stack: ExitStack) -> None:
    """Run the compiled blocks that contain a submodule as they were written until a stack is left.

    Args:
        network: owner.
        name: of the submodule; a block itself has its hooks outside of what is compiled.
        stack: ends it.
    """
    above = name.split(".")[:-1]
    for depth in range(1, len(above) + 1):
        forward = network.get_submodule(".".join(above[:depth])).__dict__.get("forward")
        if isinstance(forward, CompiledForward):
            stack.enter_context(forward.pause())


def compile_blocks(denoiser: Denoiser) -> int:
    """Compile the blocks of a network in place; blocks that other roles share are compiled once.

    State dicts, hooks and names stay as they are.

    Args:
        denoiser: its family names the blocks.

    Returns:
        number of blocks that are compiled now and were not before.

    Raises:
        ValueError: the family names no blocks.
    """
    names = denoiser.block_names()
    if not names:
        raise ValueError(
            f"compile_blocks: no blocks are known of {type(denoiser.network).__name__}; give the Denoiser "
            "family=dataclasses.replace(family, blocks=('NAME_OF_A_MODULE_LIST',)), or leave compile_blocks out."
        )
    limits = torch._dynamo.config
    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    setattr(limits, name, max(getattr(limits, name), _VARIANTS))
    new = 0
    for name in names:
        block = denoiser.network.get_submodule(name)
        if "forward" not in block.__dict__:  # compiled already, or replaced by somebody
            block.forward = CompiledForward(block)
            new += 1
    return new


def compile_roles(module: nn.Module) -> None:
    """Compile the blocks of all networks of a method; averages, which are only sampled, stay as they are.

    Raises:
        ValueError: no blocks are known of a network.
    """
    from lightning_distill.networks.denoiser import Denoiser

    averages = {id(part) for part in getattr(module, "student_ema", nn.ModuleDict()).modules()}
    for part in module.modules():
        if isinstance(part, Denoiser) and id(part) not in averages:
            compile_blocks(part)
