"""What losses return."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Terms", "mean_terms"]


@dataclass
class Terms:
    """What a loss returns.

    Attributes:
        losses: scalars by term name; summed with the module's ``loss_weights`` and logged one by one.
        diagnostics: scalars that are only logged.
    """

    losses: dict[str, Tensor]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


def mean_terms(terms: list[Terms]) -> Terms:
    """Micro-batch average, detached."""

    def average(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.stack([p[k].detach() for p in parts]).mean() for k in parts[0]}

    return Terms(average([t.losses for t in terms]), average([t.diagnostics for t in terms]))
