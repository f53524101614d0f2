"""Optimizer steps that clip, survive non-finite gradients and never wait for the device."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_distill.networks.weightless import is_weightless

__all__ = ["AdamW8bit", "default_optimizer", "guard_step", "is_fused", "local_part"]

ParameterGroups = Iterable[nn.Parameter] | Iterable[dict]


def default_optimizer(
    lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.01
) -> Callable[[ParameterGroups], Optimizer]:
    """A factory of fused AdamW, the default of every method."""

    def build(parameters: ParameterGroups) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    return build


class AdamW8bit(Optimizer):
    """AdamW that keeps both moments in 8 bits (arXiv:2110.02861), by torchao: 2 bytes per weight instead of 8.

    Moments of tensors with fewer than 4096 elements, or with a number that 256 does not divide, stay in full. The
    states in a checkpoint are plain tensors, so that it can be read where torchao is missing. torchao compiles the
    update once for every shape of the parameters, which takes a while in the first step.

    Torchao's table of the second moment has a 0, to which it rounds what is below 1.6e-7 of the largest of a block: the
    next update of such a weight is divided by ``eps`` and may be 1e4 times the learning rate. Here the table begins at
    that bound instead, so that these weights move less than with AdamW, and none moves much more.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.

    Raises:
        ImportError: torchao is missing.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> AdamW8bit:
        """An instance that is torchao's optimizer as well; a plan needs none."""
        return super().__new__(cls if is_weightless() else _on_torchao(cls))  # type: ignore[arg-type]

    def __init__(
        self,
        params: ParameterGroups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if type(self) is AdamW8bit:
            super().__init__(params, settings)
            return
        torchaos: Any = super().__init__
        torchaos(params, **settings)

    @staticmethod
    def state_bytes(parameters: Iterable[Tensor]) -> int:
        """Bytes of the state of these parameters after the first step."""
        total = 0
        for parameter in map(local_part, parameters):
            n = parameter.numel()
            # per moment: codes, a float32 scale per block, a table of 256 values
            quantised = n >= 4096 and n % 256 == 0
            total += 4 + 2 * (n + 4 * (n // 256) + 1024 if quantised else n * parameter.element_size())
        return total

    @staticmethod
    def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
        """Torchao asks here for the state of a moment."""
        from torchao.optim.subclass_8bit import OptimState8bit

        state = OptimState8bit.zeros(p.shape, signed, block_size, p.device, dtype=p.dtype)
        state.qmap = _without_zero(state.qmap, signed)
        return state

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, with codes, scales and table of a moment as plain tensors."""
        content = super().state_dict()
        states = {i: {key: _plain_moment(v) for key, v in state.items()} for i, state in content["state"].items()}
        return {**content, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        states = {i: {k: _moment(v) for k, v in state.items()} for i, state in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": states})


@functools.cache
def _on_torchao(cls: type[AdamW8bit]) -> type[AdamW8bit]:
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("AdamW8bit needs torchao; install it with: pip install 'lightning-distill[quant]'")
    from torchao.optim import AdamW8bit as Torchaos

    return cls if issubclass(cls, Torchaos) else type(cls.__name__, (cls, Torchaos), {"__module__": __name__})


def _without_zero(table: Tensor, signed: bool) -> Tensor:
    """A moment's table of values, in which the second moment's 0 is what rounds to 0 at most."""
    return table if signed else torch.cat([table[1:2] / 2, table[1:]])


def _plain_moment(value: Any) -> Any:
    if type(value).__name__ != "OptimState8bit":
        return value
    return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}


def _moment(value: Any) -> Any:
    if not isinstance(value, dict) or "codes" not in value:
        return value
    from torchao.optim.subclass_8bit import OptimState8bit

    table = _without_zero(value["qmap"], value["signed"])
    return OptimState8bit(value["codes"], value["scale"], table, value["signed"], torch.float32)


def is_fused(optimizer: Optimizer) -> bool:
    """Whether every parameter group runs the fused kernel, which can skip a step on the device."""
    return all(group.get("fused") for group in optimizer.param_groups)


def local_part(tensor: Tensor) -> Tensor:
    """This process' shard of a sharded tensor, which it shares memory with; any other tensor itself."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


@torch.no_grad()
def guard_step(
    optimizer: Optimizer,
    loss: Tensor,
    clip_norm: float | None,
    also_finite: Sequence[Tensor] = (),
    scaler: GradScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """Clip the gradients of one optimizer and arrange that its next step is skipped when something is not finite.

    Fused optimizers get ``found_inf``, which their kernel reads on the device. Others lose their gradients instead,
    which makes the step a no-op at the price of one host synchronisation. Where a scaler of float16 losses has not
    unscaled the gradients yet, it does so here and finds NaN in those of a step to be skipped, which also lowers its
    scale.

    Args:
        optimizer: the optimizer about to step.
        loss: detached loss of this step, scalar.
        clip_norm: largest total gradient norm, None for no clipping.
        also_finite: further scalars that must be finite.
        scaler: whose scale the gradients still have; None where they have none.

    Returns:
        total gradient norm before clipping, without scale, and 1.0 where the step is skipped (0-dim float32).
    """
    if scaler is not None and not scaler.is_enabled():
        scaler = None
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True) if gradients else torch.zeros_like(loss)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # over all shards
    if scaler is not None:
        norm = norm / scaler.scale(torch.ones_like(norm))
    finite = torch.isfinite(norm) & torch.isfinite(loss.to(norm.device))
    for value in also_finite:
        finite = finite & torch.isfinite(value.to(norm.device))
    factor = torch.ones_like(norm) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    if scaler is not None:
        factor = factor.masked_fill(~finite, float("nan"))
    if gradients and (clip_norm is not None or scaler is not None):
        torch._foreach_mul_([local_part(gradient) for gradient in gradients], factor)
    skipped = (~finite).float()
    if scaler is not None:
        scaler.unscale_(optimizer)  # what it finds overrides ``found_inf``
    elif is_fused(optimizer):
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
    elif bool(skipped):
        for parameter in parameters:
            parameter.grad = None
    return norm, skipped
