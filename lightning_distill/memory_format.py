"""In which order the weights of convolutions lie in memory, and what has to lie in the same one."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["is_dense", "lay_out_convolutions", "match_states", "suits_channels_last"]


def is_dense(tensor: Tensor) -> bool:
    """Whether the values fill one piece of memory, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def suits_channels_last(module: nn.Module) -> bool:
    """Whether a UNet of diffusers is among the parts: in float32 small ones gain by it on the CPU, others lose nothing.

    Other networks may change the order of their values between layers and lose more by copies than they gain.
    """
    return any(
        cls.__module__.startswith("diffusers.") and cls.__name__.startswith("UNet") and cls.__name__.endswith("Model")
        for cls in {base for part in module.modules() for base in type(part).__mro__}
    )


@torch.no_grad()
def lay_out_convolutions(module: nn.Module, channels_last: bool = True) -> None:
    """Change the memory format of the weights of two-dimensional convolutions in place; values stay what they are.

    A convolution whose weight has its channels innermost computes, and returns, that format whatever it is given. As in
    ``nn.Module.to(memory_format=...)`` every parameter of four dimensions counts, those of adapters among them, but for
    DoRA's, which peft takes views of.

    Args:
        module: whose parameters are changed.
        channels_last: channels innermost, or PyTorch's own order.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    viewed = {
        id(weight)
        for layer in module.modules()
        if isinstance(layer, LoraLayer)
        for name in layer.lora_magnitude_vector
        for weight in (*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters())
    }
    for weight in module.parameters():
        if weight.ndim == 4 and id(weight) not in viewed:
            # not contiguous(), which leaves the strides of a single channel as they are
            weight.data = torch.empty_like(weight.data, memory_format=memory_format).copy_(weight.data)


@torch.no_grad()
def match_states(optimizer: Optimizer) -> None:
    """Lay the states of an optimizer out as its parameters.

    Fused kernels walk through memory: beside a parameter in another memory format they would take the moments of other
    elements, without an error.

    Args:
        optimizer: with states, such as those of a checkpoint.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if _lies_otherwise(value, parameter):
                state[key] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _lies_otherwise(value: Any, parameter: Tensor) -> bool:
    plain = type(value) is Tensor and value.shape == parameter.shape
    return plain and value.stride() != parameter.stride()
