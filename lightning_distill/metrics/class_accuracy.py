"""How often a conditional sample shows the class that was asked for."""

from __future__ import annotations

from torch import Tensor

__all__ = ["class_accuracy"]


def class_accuracy(logits: Tensor, class_labels: Tensor) -> float:
    """Share of samples whose most likely class is the requested one.

    Args:
        logits: class scores of a classifier, (N, K).
        class_labels: requested classes, (N,), integers in [0, K).

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: the shapes do not match.
    """
    if logits.ndim != 2 or logits.shape[:1] != class_labels.shape or len(logits) == 0:
        raise ValueError(
            f"class accuracy needs logits (N, K) and labels (N,), got {tuple(logits.shape)} and "
            f"{tuple(class_labels.shape)}."
        )
    return (logits.argmax(dim=1) == class_labels.to(logits.device)).double().mean().item()
