"""Derivatives of a network along a direction in sample and time: the one engine of continuous-time methods.

    y = f(x, t, r),        dy = (df/dx) dx + (df/dt) dt + (df/dr) dr

    mode        how                                                        forward passes, the value included
    jvp         forward-mode derivative, exact                             3 (in floating-point operations)
    central     (f(p + h d) - f(p - h d)) / 2h                             3
    one_sided   (f(p) - f(p - h d)) / h                                    2
    semi        jvp in the first argument, central difference in the rest  5

Any function of tensors that returns one tensor can be differentiated; networks stay as they are, since attention is
replaced from outside (``attention.differentiable_attention``). To train, take ``value_and_tangent``: the tangent
without graph, then the value with it.

Precision: autocast is switched off. A difference of two bfloat16 numbers is mostly rounding (relative error .3 to .6
at h = .01), and under CPU autocast convolutions mix dtypes in forward mode. Random numbers (dropout) are the same in
all passes, and the generators are left as one pass leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_distill.attention import differentiable_attention
from lightning_distill.forward_rules import CHECKPOINTS_SEEN, forward_rules
from lightning_distill.networks.compiling import eager_blocks
from lightning_distill.randomness import replayed

__all__ = ["DEFAULT_STEPS", "TangentMode", "discrepancy", "tangent", "value_and_tangent"]

TangentMode = Literal["jvp", "central", "one_sided", "semi"]
_MODES = get_args(TangentMode)

#: h by mode and dtype, for directions of order one: most networks embed 1000 t, so that time curves them at h = 1e-3
#: already, and at h = 1e-5 float32 is mostly rounding (central errors: 2e-3 of the zoo's UNet, .8 at h = 3e-3)
DEFAULT_STEPS: dict[str, dict[torch.dtype, float]] = {
    "central": {torch.float32: 1e-4, torch.float64: 1e-6},
    "one_sided": {torch.float32: 3e-5, torch.float64: 1e-7},
    "semi": {torch.float32: 1e-4, torch.float64: 1e-6},
}

_Function = Callable[..., Tensor]
_Direction = Tensor | float | None

_CHECKPOINTING = (
    "activation checkpointing and saved-tensor hooks do not work in a forward-mode derivative that keeps its graph; "
    "use value_and_tangent (tangent without graph, then the value with checkpointing), or switch them off."
)


def tangent(
    f: _Function,
    primals: Sequence[Tensor],
    tangents: Sequence[_Direction],
    mode: TangentMode = "jvp",
    *,
    step: float | None = None,
    autocast: bool = False,
) -> tuple[Tensor, Tensor]:
    """Value and directional derivative of ``f``.

        tangent(lambda x, t: denoiser(x, t, cond).velocity, (x, t), (dx, 1.0))

    Graphs are kept as the caller's gradient mode says, of the value and of the tangent; under ``torch.no_grad`` neither
    has one. The function may be compiled with what contains it (mode ``jvp``); a compiled ``f`` runs eagerly.

    Args:
        f: function of the primals that returns one tensor.
        primals: arguments, tensors of float32 or float64; the first is the sample, times follow.
        tangents: direction of each argument: a tensor of its shape, a number for all its elements, or None (or 0) for
            an argument that stays.
        mode: see the table of this module.
        step: h of the differences, > 0; None for ``DEFAULT_STEPS``. Points outside the times' range may be evaluated,
            h beyond it.
        autocast: keep the caller's autocast in mode ``jvp``; faster on a GPU, relative error 5e-3 to 4e-2.

    Returns:
        f(primals) and its derivative, both of the shape and dtype of f(primals).

    Raises:
        ValueError: an unknown mode, a bad step, tangents that do not fit, half precision in a difference, or nothing
            that moves.
        RuntimeError: activation checkpointing in a derivative that keeps its graph.
    """
    directions = _directions(primals, tangents)
    h = _step(mode, step, primals, autocast)
    with _precision(primals, autocast):
        if mode == "jvp":
            return _exact(f, primals, directions)
        if mode == "semi":
            return _semi(f, primals, directions, h)
        if mode == "one_sided":
            with replayed(primals):
                before = f(*_shifted(primals, directions, -h))
            value = f(*primals)
            return value, (value - before) / h
        with replayed(primals):
            difference = _central(f, primals, directions, h)
        return f(*primals), difference


def value_and_tangent(
    f: _Function,
    primals: Sequence[Tensor],
    tangents: Sequence[_Direction],
    mode: TangentMode = "jvp",
    *,
    step: float | None = None,
    forward: _Function | None = None,
    one_pass: bool = False,
) -> tuple[Tensor, Tensor]:
    """The two passes of a training step: the tangent without graph, the value with it.

    The passes share their random numbers. Floating-point operations in units of a forward and backward pass: exact
    1.67, and 1.33 in one pass; central 1.67, one-sided 1.33.

    Args:
        f: function of the primals that returns one tensor.
        primals: its arguments, as in ``tangent``.
        tangents: direction of each argument, as in ``tangent``.
        mode: see the table of this module.
        step: h of the differences; None for ``DEFAULT_STEPS``.
        forward: what makes the value; None for ``f``. A strategy's wrapped network goes here, its bare one into ``f``;
            their values are the same.
        one_pass: the exact tangent comes out of the pass of the value, which has a graph and the tangent has none: a
            forward pass less, for a peak of memory 1.3 to 1.7 times as high. Not where the network is checkpointed or
            sharded; under autocast, and with torch 2.6, there are two passes all the same.

    Returns:
        the value, in the caller's precision and with graph where the caller keeps one; the tangent without graph.
    """
    directions = _directions(primals, tangents)
    h = _step(mode, step, primals, autocast=False)
    if one_pass and mode != "jvp":
        raise ValueError(f"one_pass=True is for the exact derivative; leave it out with mode={mode!r}.")
    alone = forward is None and not _autocasting(primals) and not torch.compiler.is_compiling()
    if one_pass and alone and CHECKPOINTS_SEEN:
        return _beside_graph(f, primals, directions)
    forward = forward or f
    # a value under autocast is too coarse to take a difference of
    reuse = not _autocasting(primals)
    base = change = None
    with replayed(primals), torch.no_grad(), _precision(primals, keep=False):
        if mode == "central":
            change = _central(f, primals, directions, h)
        elif mode == "one_sided":
            with replayed(primals):
                before = f(*_shifted(primals, directions, -h))
            base = None if reuse else f(*primals)
        else:
            change = tangent(f, primals, tangents, mode, step=step)[1]
    value = forward(*primals)
    if change is None:
        change = ((value.detach() if base is None else base) - before) / h
    return value, change


@torch.no_grad()
def discrepancy(
    f: _Function, primals: Sequence[Tensor], tangents: Sequence[_Direction], step: float | None = None
) -> Tensor:
    """Relative difference of the exact derivative and central differences, a number to watch during training.

    Args:
        f: function of the primals, float32 or float64.
        primals: its arguments.
        tangents: direction of each argument.
        step: h of the differences; None for ``DEFAULT_STEPS``.

    Returns:
        |central - exact| / |exact|, 0-dim.
    """
    with replayed(primals):
        exact = tangent(f, primals, tangents)[1]
    approximate = tangent(f, primals, tangents, "central", step=step)[1]
    return (approximate - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)


# ------------------------------------------------------------------------------------------------ modes
def _exact(f: _Function, primals: Sequence[Tensor], directions: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    moving = [i for i, d in enumerate(directions) if d is not None]

    def of_moving(*moved: Tensor) -> Tensor:
        arguments = list(primals)
        for i, value in zip(moving, moved):
            arguments[i] = value
        return f(*arguments)

    with ExitStack() as stack:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINTING))
        stack.enter_context(differentiable_attention())
        along = tuple(d for d in directions if d is not None)
        start = tuple(primals[i] for i in moving)
        if torch.compiler.is_compiling():  # which makes no dual numbers of views (torch 2.15)
            start, along = tuple(p.clone() for p in start), tuple(d.clone() for d in along)
        else:
            stack.enter_context(eager_blocks())
            stack.enter_context(_plain_caches())
            stack.enter_context(forward_rules())
        value, change = torch.func.jvp(of_moving, start, along)  # type: ignore[misc]
    return value, change


def _beside_graph(
    f: _Function, primals: Sequence[Tensor], directions: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Value with graph and tangent without one from one pass."""
    with ExitStack() as stack:
        stack.enter_context(eager_blocks())
        stack.enter_context(forward_ad.dual_level())
        duals = [p if d is None else forward_ad.make_dual(p, d) for p, d in zip(primals, directions)]
        stack.enter_context(differentiable_attention())
        stack.enter_context(forward_rules(beside_graph=torch.is_grad_enabled()))
        value, change = forward_ad.unpack_dual(f(*duals))
        return value, torch.zeros_like(value) if change is None else change.detach().clone()


@contextmanager
def _plain_caches() -> Iterator[None]:
    """Makes plain tensors of what networks keep from a pass in forward mode, such as tables of rotary frequencies.

    torch wraps every result of such a pass; a wrapper that outlives it can be used, but neither copied nor saved.
    """
    called: set[nn.Module] = set()
    handle = register_module_forward_pre_hook(lambda module, _: called.add(module))
    try:
        yield
    finally:
        handle.remove()
    for module in called:
        _unwrap(module)
        for held in list(vars(module).values()):  # helpers that are no modules keep tables, too
            if hasattr(held, "__dict__") and not isinstance(held, (nn.Module, Tensor, type)):
                _unwrap(held)


def _unwrap(owner: object) -> None:
    for name, kept in list(vars(owner).items()):
        if isinstance(kept, (Tensor, tuple, list, dict)):
            leaves, structure = tree_flatten(kept)
            if any(isinstance(leaf, Tensor) and is_functorch_wrapped_tensor(leaf) for leaf in leaves):
                plain = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                setattr(owner, name, tree_unflatten(plain, structure))


def _central(f: _Function, primals: Sequence[Tensor], directions: Sequence[Tensor | None], h: float) -> Tensor:
    with replayed(primals):
        after = f(*_shifted(primals, directions, h))
    return (after - f(*_shifted(primals, directions, -h))) / (2.0 * h)


def _semi(
    f: _Function, primals: Sequence[Tensor], directions: Sequence[Tensor | None], h: float
) -> tuple[Tensor, Tensor]:
    rest = [None, *directions[1:]]
    total: Tensor | None = None
    if any(d is not None for d in rest):
        with replayed(primals):
            total = _central(f, primals, rest, h)
    if directions[0] is None:
        assert total is not None
        return f(*primals), total
    value, by_sample = _exact(f, primals, [directions[0], *[None] * (len(primals) - 1)])
    return value, by_sample if total is None else by_sample + total


def _shifted(primals: Sequence[Tensor], directions: Sequence[Tensor | None], h: float) -> list[Tensor]:
    return [p if d is None else p + h * d for p, d in zip(primals, directions)]


# ------------------------------------------------------------------------------------------------ arguments
def _directions(primals: Sequence[Tensor], tangents: Sequence[_Direction]) -> list[Tensor | None]:
    if len(primals) != len(tangents):
        raise ValueError(f"{len(primals)} arguments need {len(primals)} tangents, got {len(tangents)}.")
    made: list[Tensor | None] = []
    for i, (p, d) in enumerate(zip(primals, tangents)):
        if d is None or (isinstance(d, (int, float)) and d == 0):
            made.append(None)
        elif isinstance(d, (int, float)):
            made.append(torch.full_like(p, float(d)))
        elif d.shape != p.shape:
            raise ValueError(
                f"tangent {i} has shape {tuple(d.shape)} and its argument {tuple(p.shape)}; give equal shapes, "
                "or a number for all elements."
            )
        else:
            made.append(d.to(p.dtype))
    if all(d is None for d in made):
        raise ValueError("no argument moves: every tangent is None or 0; give at least one direction.")
    return made


def _step(mode: str, step: float | None, primals: Sequence[Tensor], autocast: bool) -> float:
    if mode not in _MODES:
        raise ValueError(f"tangent mode {mode!r} is unknown; choose one of {', '.join(_MODES)}.")
    if mode == "jvp":
        return 0.0
    if autocast:
        raise ValueError(f"mode={mode!r} takes differences, which autocast drowns in rounding; leave autocast=False.")
    dtype = primals[0].dtype
    if dtype not in DEFAULT_STEPS[mode]:
        raise ValueError(
            f"mode={mode!r} takes differences of {str(dtype).removeprefix('torch.')} numbers, which are mostly "
            "rounding; give float32 samples, or use mode='jvp'."
        )
    h = DEFAULT_STEPS[mode][dtype] if step is None else float(step)
    if not h > 0:
        raise ValueError(f"step={step}: the step of a difference is positive; None chooses it by dtype.")
    return h


# ------------------------------------------------------------------------------------------------ contexts
def _autocasting(primals: Sequence[Tensor]) -> bool:
    return torch.is_autocast_enabled(primals[0].device.type)


@contextmanager
def _precision(primals: Sequence[Tensor], keep: bool) -> Iterator[None]:
    """Autocast off, unless it is kept; weights cast without graph do not stay in its cache."""
    if not _autocasting(primals):
        yield
        return
    torch.clear_autocast_cache()
    with nullcontext() if keep else torch.autocast(primals[0].device.type, enabled=False):
        yield
