"""Frozen weights in 8 or 4 bits, by torchao: for the backbone that teacher, student and fake score share.

Only the weights of linear layers inside of the network's blocks are stored in few bits; they are multiplied in the
dtype of the activations, so a layer is  y = x W^T + b  with  W = dequantise(codes), nothing else is rounded. torchao's
own layers would keep the dequantised weight of every layer for the backward pass; here the backward pass dequantises
again, and adapters cost what they cost on a backbone that is stored in full.

    kind   bytes per weight    stored as
    int8   1 + 5 / columns     integers, one float32 scale per row
    fp8    1 + 4 / columns     float8_e4m3fn, one float32 scale per row
    nf4    0.516               4-bit normal floats in blocks of 64 (arXiv:2305.14314), scales in 8 bits
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.networks.weightless import is_weightless

__all__ = [
    "KINDS",
    "QuantisedLinear",
    "check_quantisation",
    "dequantise",
    "holds_quantised",
    "plain_tensors",
    "quantisable",
    "quantise",
    "quantised_bytes",
    "require_torchao",
]

KINDS = ("int8", "fp8", "nf4")

#: a matrix with fewer weights stays as it is
SMALLEST = 4096
_NF4_BLOCK, _NF4_SCALES = 64, 256


def require_torchao(what: str) -> None:
    """Raise a sentence that names the extra where torchao is missing."""
    if importlib.util.find_spec("torchao") is None:
        raise ImportError(f"{what} needs torchao; install it with: pip install 'lightning-distill[quant]'")


def check_quantisation(kind: str | None) -> None:
    """Raise unless weights can be stored as ``kind`` here.

    Raises:
        ValueError: no such kind.
        ImportError: torchao is missing (it is not needed for a plan).
    """
    if kind is None:
        return
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r} is unknown; choose one of {', '.join(KINDS)}, or None for full weights.")
    if not is_weightless():
        require_torchao(f"quantize={kind!r}")


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is a quantised tensor of torchao.

    Args:
        linear: layer that is replaced; its bias is taken over.
        kind: one of ``KINDS``.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind = kind
        self.weight = nn.Parameter(_quantised(linear.weight.detach(), kind), requires_grad=False)
        self.bias = linear.bias

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in ``dtype`` (None: that of the layer it was made from), (out, in)."""
        weight: Any = self.weight
        full = weight.get_original_weight() if self.kind == "nf4" else weight.dequantize()
        return full.detach().to(full.dtype if dtype is None else dtype)

    @property
    def W_q(self) -> Tensor:
        """By this name peft (DoRA) recognises layers that have ``dequantize``."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``; the full weight lives for the length of the product only."""
        device = input.device.type
        mixed = torch.is_autocast_enabled(device)
        weight = self.dequantize(torch.get_autocast_dtype(device) if mixed else input.dtype)
        if not (torch.is_grad_enabled() and input.requires_grad):
            return F.linear(input, weight, self.bias)
        storage = weight.untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> Any:
            if tensor.untyped_storage().data_ptr() != storage:
                return tensor
            return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            dtype, *geometry = packed
            return self.dequantize(dtype).as_strided(*geometry)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, kind={self.kind}"


def _quantised(weight: Tensor, kind: str) -> Tensor:
    if kind == "nf4":
        return _nf4(weight)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(holder, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    return holder.weight.detach()


def _nf4(weight: Tensor) -> Tensor:
    try:
        from torchao.quantization import to_nf4
    except ImportError:  # torchao < 0.18
        from torchao.dtypes import to_nf4
    return to_nf4(weight, block_size=_NF4_BLOCK, scaler_block_size=_NF4_SCALES)


def _fits(linear: nn.Linear, kind: str) -> bool:
    numel = linear.weight.numel()
    return numel >= SMALLEST and (kind != "nf4" or numel % (_NF4_BLOCK * _NF4_SCALES) == 0)


def quantisable(network: nn.Module, kind: str, blocks: Iterable[str] = ()) -> dict[str, nn.Linear]:
    """The layers that ``quantise`` replaces, by name: below the given paths (everywhere without any), large enough."""
    prefixes = tuple(f"{block}." for block in blocks)
    return {
        name: module
        for name, module in network.named_modules()
        if type(module) is nn.Linear and _fits(module, kind) and (not prefixes or name.startswith(prefixes))
    }


def quantise(network: nn.Module, kind: str, blocks: Iterable[str] = ()) -> int:
    """Store the weights of linear layers in few bits, in place.

    Args:
        network: frozen network, float weights.
        kind: one of ``KINDS``.
        blocks: paths of the blocks whose layers are meant (embeddings and the last layer, which matter most and weigh
            least, stay as they are); empty for the whole network.

    Returns:
        number of layers.

    Raises:
        ValueError: unknown kind, or no layer is large enough.
        ImportError: torchao is missing.
    """
    check_quantisation(kind)
    targets = quantisable(network, kind, blocks)
    if not targets:
        raise ValueError(
            f"quantize={kind!r}: {type(network).__name__} has no linear layer in its blocks of {SMALLEST} weights or "
            "more (nf4: of a multiple of 16384 weights); leave quantize out."
        )
    for name, linear in targets.items():
        parent, _, child = name.rpartition(".")
        if is_weightless():
            linear.__dict__["planned_kind"] = kind
        else:
            network.get_submodule(parent)._modules[child] = QuantisedLinear(linear, kind)
    return len(targets)


def holds_quantised(network: nn.Module) -> bool:
    """Whether any layer of a network has quantised weights."""
    return any(isinstance(layer, QuantisedLinear) for layer in network.modules())


def dequantise(network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace quantised layers by ordinary ones with the weights they compute with, in place.

    Args:
        network: any network.
        dtype: of these weights, None for that of the layers they were made from.
    """
    for module in list(network.modules()):
        module.__dict__.pop("planned_kind", None)
        for name, child in module.named_children():
            if isinstance(child, QuantisedLinear):
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                plain.weight = nn.Parameter(child.dequantize(dtype), requires_grad=False)
                if child.bias is not None:
                    plain.bias = child.bias
                module._modules[name] = plain.train(child.training)


def plain_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """The ordinary tensors that a tensor consists of: codes and scales by name, or itself under the empty name."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return {"": tensor}
    parts = {}
    for name in flatten()[0]:
        for inner, value in plain_tensors(getattr(tensor, name)).items():
            value = value.reshape(()).clone() if value.numel() == 1 else value  # a view with any stride
            parts[f"{name}.{inner}" if inner else name] = value
    return parts


def quantised_bytes(kind: str, rows: int, columns: int, itemsize: int = 4) -> int:
    """Bytes of a weight (rows, columns) stored as ``kind``, as ``plain_tensors`` of it count.

    Args:
        kind: one of ``KINDS``.
        rows: output features.
        columns: input features.
        itemsize: bytes per element of the dtype it is stored from.
    """
    numel = rows * columns
    if kind != "nf4":  # a scale per row; int8 also has a zero point
        return numel + (5 if kind == "int8" else 4) * rows
    scales = numel // _NF4_BLOCK
    # 4-bit codes, 8-bit scales; the scales' own factors, their mean and the table of 16 values in the weight's dtype
    return numel // 2 + scales + itemsize * (scales // _NF4_SCALES + 1 + 16)
