"""Parts of a memory plan: networks, phases, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_distill.plan_shards import Processes

__all__ = ["GIB", "RESERVE", "PhasePlan", "Plan", "RolePlan", "larger"]

GIB = 2**30
#: context of the device, workspaces of its libraries, fragmentation
RESERVE = GIB + GIB // 2


@dataclass(frozen=True)
class RolePlan:
    """What one network adds; bytes.

    Attributes:
        name: role.
        parameters: number of parameters that no earlier role holds.
        trained: how many of them are trained.
        weights: bytes of parameters and buffers by dtype; ``int8``, ``fp8`` and ``nf4`` with their scales.
        gradients: of the trained parameters.
        optimizer: state of its optimizer after the first step; of a discriminator, with the network it trains with.
        optimizer_8bit: what ``AdamW8bit`` would need.
        shared: whether it runs on the weights of an earlier role.
        quantisable: bytes of the frozen weights that ``quantize`` could store in fewer bits, and what int8 would take.
    """

    name: str
    parameters: int
    trained: int
    weights: dict[str, int]
    gradients: int = 0
    optimizer: int = 0
    optimizer_8bit: int = 0
    shared: bool = False
    quantisable: tuple[int, int] = (0, 0)

    @property
    def total(self) -> int:
        """Bytes that stay for the whole run."""
        return sum(self.weights.values()) + self.optimizer

    def in_8_bits(self) -> RolePlan:
        """The same with ``quantize: int8``."""
        full, small = self.quantisable
        if not full:
            return self
        kind = max(self.weights, key=self.weights.__getitem__)
        weights = {**self.weights, kind: self.weights[kind] - full}
        weights["int8"] = weights.get("int8", 0) + small
        return replace(self, weights=weights, quantisable=(0, 0))


@dataclass(frozen=True)
class PhasePlan:
    """What one phase adds; bytes.

    Attributes:
        name: phase.
        kept: alive when the backward pass begins: what was saved for it, and inputs.
        peak: largest sum of activations and gradients alive at any time.
        gradients: alive while the optimizer steps.
        flop: floating-point operations of matrix products, convolutions and attention, forward and backward.
    """

    name: str
    kept: int
    peak: int
    gradients: int
    flop: int = 0


def larger(phases: Sequence[PhasePlan]) -> PhasePlan:
    """One phase at several times of a run: the largest of each figure."""
    figures = [field.name for field in fields(PhasePlan) if field.name != "name"]
    return PhasePlan(phases[0].name, *(max(getattr(phase, figure) for phase in phases) for figure in figures))


@dataclass(frozen=True)
class Plan:
    """Memory of one run on one device.

    Attributes:
        roles: networks, in the order in which they are built.
        phases: updates of a cycle.
        batch_size: samples in one forward (a micro-batch).
        precision: of the Trainer.
        checkpointing: whether trained networks recompute their activations.
        step: largest temporary memory of an optimizer's step, bytes.
        optimizers: class names.
        forward_flop: of the student without gradients: what a further step of a rollout adds.
        processes: that train together; None for one.
        gathered: bytes of other processes' shards that a process holds at a time.
    """

    roles: tuple[RolePlan, ...]
    phases: tuple[PhasePlan, ...]
    batch_size: int
    precision: str
    checkpointing: bool
    step: int = 0
    optimizers: tuple[str, ...] = field(default=())
    forward_flop: int = 0
    processes: Processes | None = None
    gathered: int = 0

    @property
    def shards(self) -> int:
        """Processes over which weights and states are divided."""
        return 1 if self.processes is None else self.processes.shards

    @property
    def resident(self) -> int:
        """Bytes of weights, averages and optimizer states on the device of one process."""
        elsewhere = self.processes.offload if self.processes is not None else ()
        held = sum(role.total for role in self.roles if role.name.split(".")[0] not in elsewhere)
        return -(-held // self.shards)

    @property
    def largest_phase(self) -> PhasePlan:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def need(self) -> int:
        """Bytes that the device of a process must have, reserve included; of a sharded run an upper bound.

        Where gradients are divided, a process still counts them whole as they come out of the backward pass, and its
        share of all of them beside it.
        """
        if self.shards == 1:
            moving = max(max(phase.peak, phase.gradients + self.step) for phase in self.phases)
        else:
            share = (sum(role.gradients for role in self.roles) + self.step) // self.shards
            moving = max(phase.peak for phase in self.phases) + share + self.gathered
        return self.resident + moving + RESERVE

    def with_8bit_optimizers(self) -> Plan:
        """The same run with ``AdamW8bit``."""
        roles = (replace(role, optimizer=min(role.optimizer, role.optimizer_8bit)) for role in self.roles)
        return replace(self, roles=tuple(roles), optimizers=("AdamW8bit",))

    def with_8bit_weights(self) -> Plan:
        """The same run with ``quantize: int8`` of the teacher."""
        return replace(self, roles=tuple(role.in_8_bits() for role in self.roles))
