"""Forward derivatives of layers by the kernels that torch has for them, faster than its own formulas.

    layer                   torch differentiates                              here
    convolution, linear     the weight too, whose tangent is zero             dy = layer(dx), without bias
    matrix product          a constant factor too                             dy = dx W
    SiLU and GELU           f'(x) dx in several operations                    the kernel of the backward pass
    group and layer norm    a dozen elementwise operations                    the kernel of its backward pass
    in-place addition       into a copy, which is copied back                 in place

The normalisation x -> (x - mean) / std has a symmetric Jacobian, (I - 1 1^T / n - y y^T / n) / std, so that the kernel
of its backward pass is that of its forward derivative as well. Results are those of torch up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_distill.attention import attention
from lightning_distill.memory_format import is_dense

__all__ = ["CHECKPOINTS_SEEN", "forward_rules"]

#: whether torch tells of checkpointed layers, which a derivative beside a graph must not meet; torch 2.6 does not
CHECKPOINTS_SEEN = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")

_CHECKPOINTING = (
    "activation checkpointing recomputes values without their tangents, so that both cannot come out of one pass; "
    "leave one_pass=False, or switch checkpointing off."
)
_Dual = tuple[Tensor, Tensor]


class forward_rules(TorchFunctionMode):
    """Context of a forward derivative without graph; where a rule does not fit, torch's own formula is used.

    It goes inside of ``differentiable_attention``, whose answer is the last for attention.

    Args:
        beside_graph: the values have a graph for the backward pass and the tangents still have none; for dual numbers
            of ``torch.autograd.forward_ad`` only, since those of ``torch.func`` hide their graph.

    Raises:
        RuntimeError: activation checkpointing beside a graph.
    """

    def __init__(self, beside_graph: bool = False) -> None:
        super().__init__()
        self.rules = _RULES | {F.scaled_dot_product_attention: _attention} if beside_graph else _RULES
        self.beside_graph = beside_graph
        self.hooks = _hooks() if beside_graph else None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.beside_graph and _hooks() != self.hooks:
            raise RuntimeError(_CHECKPOINTING)
        rule = self.rules.get(func)
        if rule is not None and torch.is_grad_enabled() == self.beside_graph:
            made = rule(func, *args, **kwargs)
            if made is not None:
                return made
        out = func(*args, **kwargs)
        if self.beside_graph:
            for part in out if isinstance(out, (tuple, list)) else (out,):
                _drop_graph(part)
        return out


def _hooks() -> Any:
    """Saved-tensor hooks in force; a checkpointed layer has its own."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _drop_graph(x: object) -> None:
    """Take the tangent of ``x`` out of its graph; that of a view keeps it until the next operation."""
    change = forward_ad.unpack_dual(x).tangent if type(x) is Tensor else None
    if change is not None and change.grad_fn is not None and not change._is_view():
        change.detach_()


def _dual(x: object) -> _Dual | None:
    """Value and tangent of a tensor that has one."""
    if type(x) is not Tensor:
        return None
    value, change = forward_ad.unpack_dual(x)
    return None if change is None or change._is_zerotensor() else (value, change)


def _constant(*values: object) -> bool:
    """Whether none of the values has a tangent; of tensors of other classes it is not known."""
    return all(
        not isinstance(value, Tensor)
        or (type(value) in (Tensor, nn.Parameter) and forward_ad.unpack_dual(value).tangent is None)
        for value in values
    )


def _linear(
    func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    if not _constant(weight, bias) or (dual := _dual(input)) is None:
        return None
    value = func(dual[0], weight, bias, *args, **kwargs)
    with torch.no_grad():
        change = func(dual[1], weight, None, *args, **kwargs)
    return forward_ad.make_dual(value, change)


def _product(func: Callable[..., Tensor], *factors: Any, **named: Any) -> Tensor | None:
    """Products with a constant; torch multiplies with the zeros of the other factor's tangent as well."""
    if named or len(factors) != 2:
        return None
    left, right = factors
    if _constant(right) and (dual := _dual(left)) is not None:
        value = func(dual[0], right)
        with torch.no_grad():
            change = func(dual[1], right)
    elif _constant(left) and (dual := _dual(right)) is not None:
        value = func(left, dual[0])
        with torch.no_grad():
            change = func(left, dual[1])
    else:
        return None
    return forward_ad.make_dual(value, change)


def _silu(func: Callable[..., Tensor], input: Tensor, inplace: bool = False) -> Tensor | None:
    if inplace or (dual := _dual(input)) is None:
        return None
    value = func(dual[0])
    with torch.no_grad():
        change = torch.ops.aten.silu_backward(dual[1], dual[0])
    return forward_ad.make_dual(value, change)


def _gelu(func: Callable[..., Tensor], input: Tensor, *, approximate: str = "none") -> Tensor | None:
    if (dual := _dual(input)) is None:
        return None
    value = func(dual[0], approximate=approximate)
    with torch.no_grad():
        change = torch.ops.aten.gelu_backward(dual[1], dual[0], approximate=approximate)
    return forward_ad.make_dual(value, change)


def _fits(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernels take the arguments, but for the order of their elements, as they are."""
    same = all(part is None or part.dtype == x.dtype for part in (weight, bias))
    return same and x.numel() > 0 and not torch.is_autocast_enabled(x.device.type)


def _format(x: Tensor) -> torch.memory_format | None:
    """The memory format of a tensor if group normalisation has a kernel for it."""
    if x.is_contiguous():
        return torch.contiguous_format
    innermost = x.ndim == 4 and x.is_cpu and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if innermost else None


def _group_norm(
    func: Callable[..., Tensor],
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if not _constant(weight, bias) or not _fits(input, weight, bias) or (dual := _dual(input)) is None:
        return None
    x, change = dual
    if (memory_format := _format(x)) is None:
        return None
    n, channels, places = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    value, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, places, num_groups, eps)
    with torch.no_grad():
        sizes = (n, channels, places, num_groups)
        change = change.contiguous(memory_format=memory_format)
        arguments = (change, x, mean, rstd, None, *sizes, [True, False, False])
        moved = torch.ops.aten.native_group_norm_backward(*arguments)[0]
        if weight is not None:
            moved = moved * weight.reshape(-1, *[1] * (x.ndim - 2))
    return forward_ad.make_dual(value, moved)


def _layer_norm(
    func: Callable[..., Tensor],
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if not _constant(weight, bias) or not _fits(input, weight, bias) or (dual := _dual(input)) is None:
        return None
    x, change = dual
    if not x.is_contiguous():
        return None
    value, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
    with torch.no_grad():
        arguments = (change.contiguous(), x, normalized_shape, mean, rstd, None, None, [True, False, False])
        moved = torch.ops.aten.native_layer_norm_backward(*arguments)[0]
        if weight is not None:
            moved = moved * weight
    return forward_ad.make_dual(value, moved)


def _attention(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
    """Value and tangent apart, so that no chunk of the latter is kept for the backward pass."""
    parts = [*args, *kwargs.values()]
    if all(_dual(part) is None for part in parts):
        return None

    def value_of(x: Any) -> Any:
        return forward_ad.unpack_dual(x).primal if type(x) is Tensor else x

    with torch._C.DisableTorchFunction():  # the kernel's own graph
        value = func(*map(value_of, args), **{name: value_of(part) for name, part in kwargs.items()})
    with torch.no_grad():
        change = forward_ad.unpack_dual(attention(*args, **kwargs)).tangent
    return forward_ad.make_dual(value, change)


def _add_in_place(func: Callable[..., Tensor], input: Tensor, other: Any = None, **named: Any) -> Tensor | None:
    if named or other is None or (dual := _dual(input)) is None:
        return None
    change, added = dual[1], None
    if not _constant(other):
        if (pair := _dual(other)) is None or pair[1].shape != change.shape or not is_dense(change):
            return None
        added = pair[1]
    with forward_ad._set_fwd_grad_enabled(False):
        func(input, other)
    if added is not None:
        with torch.no_grad():
            change.add_(added)
    return input


_RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.linear), _linear),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _linear),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), _product),
    F.silu: _silu,
    F.gelu: _gelu,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_in_place),
}
