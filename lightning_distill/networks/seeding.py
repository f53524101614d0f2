"""Initial weights that are equal on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights (made on the CPU) from ``seed`` and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        # the CPU generator alone: torch.manual_seed would also reseed devices, which are not restored
        torch.random.default_generator.manual_seed(seed)
        yield
