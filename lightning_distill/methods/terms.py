"""What losses return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Terms", "checked", "mean_terms"]


@dataclass
class Terms:
    """What a loss returns.

    Attributes:
        losses: scalar tensors by term name; summed with the module's ``loss_weights`` and logged one by one.
        diagnostics: scalars that are only logged, tensors or numbers.
    """

    losses: dict[str, Tensor]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


def checked(terms: Terms, where: str) -> Terms:
    """The terms, with numbers among the diagnostics as tensors.

    Args:
        terms: what a loss returned.
        where: name of the loss, for the error.

    Raises:
        ValueError: something else than ``Terms``, no term at all, or a value that is not one number.
    """
    if not isinstance(terms, Terms):
        raise ValueError(f"{where} returned a {type(terms).__name__}; return Terms({{'name': loss}}).")
    if not terms.losses:
        raise ValueError(f"{where} returned no loss; a phase needs at least one term.")
    for name, value in terms.losses.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: the term {name!r} is a {type(value).__name__}; return a scalar tensor.")
    for name, value in terms.diagnostics.items():
        if isinstance(value, Tensor):
            continue
        try:
            terms.diagnostics[name] = torch.as_tensor(float(value))
        except (TypeError, ValueError):
            raise ValueError(f"{where}: the diagnostic {name!r} is a {type(value).__name__}; give a number.") from None
    for name, value in {**terms.losses, **terms.diagnostics}.items():
        if value.ndim > 0:
            raise ValueError(
                f"{where}: {name!r} has shape {tuple(value.shape)}; return one number, such as its mean over the batch."
            )
    return terms


def mean_terms(terms: list[Terms]) -> Terms:
    """Micro-batch average, detached; a figure that only some micro-batches have is averaged over those."""

    def average(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        names = dict.fromkeys(name for part in parts for name in part)
        return {k: torch.stack([part[k].detach() for part in parts if k in part]).mean() for k in names}

    return Terms(average([t.losses for t in terms]), average([t.diagnostics for t in terms]))
