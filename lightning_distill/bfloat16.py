"""Does bfloat16 pay on this machine?"""

import time
from functools import cache

import torch

__all__ = ["bfloat16_advice", "bfloat16_pays"]

_SIZE, _REPEATS = 384, 5


@cache
def bfloat16_pays(device_type: str | None = None) -> bool:
    """Whether products of matrices are faster in bfloat16 than in float32.

    Processors without instructions for bfloat16 convert every operand, so that a network under autocast is slower than
    without. Feature flags differ by vendor and release: processors are asked by a measurement of some 20 ms, once in a
    process.

    Args:
        device_type: ``cpu``, ``cuda`` or another; only processors are measured. None is the one that
            ``accelerator: auto`` takes.
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type != "cpu" or _seconds(torch.bfloat16) < _seconds(torch.float32)


def bfloat16_advice(device_type: str, way_out: str) -> str | None:
    """One sentence for those who asked for bfloat16 where it does not pay, None elsewhere.

    Args:
        device_type: of what will compute.
        way_out: what to do instead, an imperative.
    """
    if bfloat16_pays(device_type):
        return None
    return f"This {device_type} has no instructions for bfloat16 and is slower in it than in float32; {way_out}."


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of a few products, in seconds."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        matrix @ matrix
        taken.append(time.perf_counter() - start)
    return min(taken)
