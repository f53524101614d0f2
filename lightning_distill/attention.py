"""Scaled dot-product attention with a forward derivative, for networks whose code stays as it is.

The fused attention kernels have no forward-mode derivative, and the explicit formula that has one keeps several
matrices of queries x keys. Within ``differentiable_attention()`` every call of ``F.scaled_dot_product_attention`` is
answered by

    S = s q k^T + mask,    P = softmax S,    o = P v                            (primal: the native kernel)
    dS = s (dq k^T + q dk^T) + dmask,    H = P * dS
    do = P dv + H v - rowsum(H) o                                               (tangent: in chunks of queries)

so that no matrix of queries x keys exists as a whole. The backward pass of the primal recomputes the native kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["CHUNK_ELEMENTS", "attention", "differentiable_attention", "few_chunks"]

#: elements of one chunk of the matrix S over all batch rows and heads: 16 MiB in float32, a few such buffers live
CHUNK_ELEMENTS = 2**22
#: rows of a chunk are never fewer: then its buffers are no larger than the queries themselves
_MIN_ROWS = 64
_passing_over = False


def _rows(q: Tensor, k: Tensor) -> int:
    per_row = math.prod(q.shape[:-2]) * k.shape[-2]
    return max(_MIN_ROWS, CHUNK_ELEMENTS // max(per_row, 1))


@contextmanager
def few_chunks() -> Iterator[None]:
    """Compute the last three chunks of tangents alone, where only the memory of a call is asked for.

    Two of them have the full size, one made while the other is still there, and earlier ones need no more.
    """
    global _passing_over
    before, _passing_over = _passing_over, True
    try:
        yield
    finally:
        _passing_over = before


def _mask_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., rows, :]


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, rows: slice, causal: bool, scale: float) -> Tensor:
    """P of some rows of the queries, float32 or wider; zero where a mask hides every key."""
    logits = q[..., rows, :] @ k.mT
    logits = scale * (logits if logits.dtype == torch.float64 else logits.float())
    part = _mask_rows(mask, rows)
    if part is not None:
        logits = logits.masked_fill(~part, -math.inf) if part.dtype == torch.bool else logits + part
    if causal:
        query = torch.arange(rows.start, rows.start + logits.shape[-2], device=q.device)
        later = torch.arange(k.shape[-2], device=q.device) > query[:, None]
        logits = logits.masked_fill(later, -math.inf)
    if part is None:
        return logits.softmax(-1)
    top = logits.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weights = (logits - top).exp()
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)


def _grouped(q: Tensor, k: Tensor | None) -> Tensor | None:
    """Keys or values repeated for every query head that shares them."""
    if k is None or k.ndim < 3 or k.shape[-3] == q.shape[-3]:
        return k
    return k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)


class _Attention(Function):
    """The native kernel with forward and backward derivatives."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, gqa: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, mask, ctx.causal, ctx.scale, ctx.gqa = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask)
        ctx.save_for_forward(q, k, v, mask, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        none = (None,) * 7
        if grad is None:
            return none
        needed = [i for i in range(4) if ctx.needs_input_grad[i]]
        with torch.enable_grad():
            inputs: list[Any] = [t if t is None else t.detach() for t in ctx.saved_tensors]
            for i in needed:
                inputs[i] = inputs[i].requires_grad_()
            q, k, v, mask = inputs
            out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, ctx.causal, scale=ctx.scale, enable_gqa=ctx.gqa)
        grads = torch.autograd.grad(out, [inputs[i] for i in needed], grad.to(out.dtype))
        found = dict(zip(needed, grads))
        return tuple(found.get(i) for i in range(7))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dq, dk, dv, d_mask = tangents[:4]
        q, k, v, mask, out = ctx.saved_tensors
        if ctx.gqa:
            k, v, dk, dv = (_grouped(q, part) for part in (k, v, dk, dv))
        parts = []
        step = _rows(q, k)
        starts = range(0, q.shape[-2], step)
        for start in starts:
            rows = slice(start, start + step)
            if _passing_over and start < starts[-3:][0]:
                parts.append(torch.empty_like(out[..., rows, :]))
                continue
            p = _softmax(q, k, mask, rows, ctx.causal, ctx.scale)
            o = out[..., rows, :]
            part = None if dv is None else p.to(dv.dtype) @ dv
            change: Any = None
            if dq is not None:
                change = ctx.scale * (dq[..., rows, :] @ k.mT)
            if dk is not None:
                by_keys = ctx.scale * (q[..., rows, :] @ dk.mT)
                change = by_keys if change is None else change + by_keys
            if d_mask is not None:
                by_mask = _mask_rows(d_mask, rows)
                change = by_mask if change is None else change + by_mask
            if change is not None:
                h = p * change
                moved = h.to(v.dtype) @ v - h.sum(-1, keepdim=True).to(o.dtype) * o
                part = moved if part is None else part + moved
            parts.append(torch.zeros_like(o) if part is None else part.to(out.dtype))
        return torch.cat(parts, dim=-2)


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, gqa: bool
) -> Tensor:
    """The same in ordinary operations, in chunks of queries: what a compiler can differentiate forwards."""
    if gqa:
        k, v = _grouped(q, k), _grouped(q, v)  # type: ignore[assignment]
    step = _rows(q, k)
    parts = []
    for start in range(0, q.shape[-2], step):
        p = _softmax(q, k, mask, slice(start, start + step), causal, scale)
        parts.append(p.to(v.dtype) @ v)
    return torch.cat(parts, dim=-2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with a forward derivative; arguments and result are those of torch.

    Args:
        query: (..., L, E).
        key: (..., S, E).
        value: (..., S, Ev).
        attn_mask: broadcastable to (..., L, S); True (or 0) where a key is seen.
        dropout_p: must be 0.
        is_causal: hide keys behind the query's position.
        scale: factor on q k^T, None for 1 / sqrt(E).
        enable_gqa: query heads share key heads.

    Returns:
        (..., L, Ev).

    Raises:
        ValueError: dropout, whose mask the native kernel keeps to itself.
    """
    if dropout_p > 0.0:
        raise ValueError(
            f"attention with dropout_p={dropout_p:g} has no tangent: primal and tangent would drop different weights; "
            "put the network in eval mode, or set its attention dropout to 0."
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if torch.compiler.is_compiling():
        return _plain_attention(*arguments)
    return _Attention.apply(*arguments)


class differentiable_attention(TorchFunctionMode):
    """Context in which every ``F.scaled_dot_product_attention`` has a forward derivative (see ``attention``)."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        # nn.MultiheadAttention calls the kernel from within, where this mode is off
        inside = sdpa_kernel(SDPBackend.MATH) if func is F.multi_head_attention_forward else nullcontext()
        with inside:
            return func(*args, **kwargs)
