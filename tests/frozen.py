"""Networks of a student and of its teacher, made comparable to the last digit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["frozen"]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient in here.

    Torch's ``matmul`` looks at that, with gradients enabled or not, when it chooses between one product of matrices and
    several, and on some processors the two round differently.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
