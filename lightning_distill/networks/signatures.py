"""Which arguments a network takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

__all__ = ["call_parameters", "called_network"]


def called_network(network: nn.Module) -> nn.Module:
    """The network itself, or for one that calls others (``called``) the first of them.

    Args:
        network: any.
    """
    while (inner := getattr(network, "called", None)) is not None:
        network = inner
    return network


def call_parameters(network: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Arguments of a network's ``forward``, by name; for one that calls others, of theirs.

    Args:
        network: any.
    """
    return inspect.signature(called_network(network).forward).parameters
