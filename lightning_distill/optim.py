"""Optimizer steps that clip, survive non-finite gradients and never wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["default_optimizer", "guard_step", "is_fused", "local_part"]

ParameterGroups = Iterable[nn.Parameter] | Iterable[dict]


def default_optimizer(
    lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.01
) -> Callable[[ParameterGroups], Optimizer]:
    """A factory of fused AdamW, the default of every method."""

    def build(parameters: ParameterGroups) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    return build


def is_fused(optimizer: Optimizer) -> bool:
    """Whether every parameter group runs the fused kernel, which can skip a step on the device."""
    return all(group.get("fused") for group in optimizer.param_groups)


def local_part(tensor: Tensor) -> Tensor:
    """This process' shard of a sharded tensor, which it shares memory with; any other tensor itself."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


@torch.no_grad()
def guard_step(
    optimizer: Optimizer, loss: Tensor, clip_norm: float | None, also_finite: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Clip the gradients of one optimizer and arrange that its next step is skipped when something is not finite.

    Fused optimizers get ``found_inf``, which their kernel reads on the device. Others lose their gradients instead,
    which makes the step a no-op at the price of one host synchronisation.

    Args:
        optimizer: the optimizer about to step.
        loss: detached loss of this step, scalar.
        clip_norm: largest total gradient norm, None for no clipping.
        also_finite: further scalars that must be finite.

    Returns:
        total gradient norm before clipping, and 1.0 where the step is skipped (0-dim float32).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True) if gradients else torch.zeros_like(loss)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # over all shards
    if clip_norm is not None and gradients:
        scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local_part(gradient) for gradient in gradients], scale)
    finite = torch.isfinite(norm) & torch.isfinite(loss.to(norm.device))
    for value in also_finite:
        finite = finite & torch.isfinite(value.to(norm.device))
    skipped = (~finite).float()
    if is_fused(optimizer):
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
    elif bool(skipped):
        for parameter in parameters:
            parameter.grad = None
    return norm, skipped
