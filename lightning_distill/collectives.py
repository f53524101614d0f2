"""Small sums over processes that do not wait for each other first.

Lightning's ``strategy.reduce`` meets at a barrier before it adds up. On a GPU that barrier stops the host until the
device has done all its work; a collective alone is only queued.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["max_over_processes", "mean_over_processes", "sum_over_processes"]


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, written into it; unchanged where there is one process.

    Args:
        value: floating point, of the same shape everywhere, on the device of the process group.
    """
    if _several():
        if dist.get_backend() == "gloo":  # which has no mean
            sum_over_processes(value).div_(dist.get_world_size())
        else:
            dist.all_reduce(value, op=dist.ReduceOp.AVG)
    return value


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, written into it; unchanged where there is one process."""
    if _several():
        dist.all_reduce(value)
    return value


def max_over_processes(value: Tensor) -> Tensor:
    """The largest value over all processes, written into the tensor; unchanged where there is one process."""
    if _several():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
