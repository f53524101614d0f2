"""The role of a student with a target time: any other role, with the branch of ``second_time`` installed."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy, FromCheckpoint, Lora, Role
from lightning_distill.networks.second_time import SecondTimeKind, add_guidance, add_second_time, second_time_of

__all__ = ["TwoTime"]


class TwoTime(Role):
    """A role that takes a target time, and a guidance scale if asked; at r = t and initialisation it is its source.

    A copy gets the branch for itself. With ``Lora`` the branch is part of the shared frozen network, where it adds
    exactly zero, and the adapter learns on its layers. A checkpoint of a student with a target time fits a network
    with the same settings.

    Args:
        role: how the student is realised, None for ``Copy()``.
        kind: how the target time enters: ``zero_init``, ``scaled_difference`` or ``gated_copy``; None for none.
        input: what ``zero_init`` sees, ``r`` or the ``difference`` t - r.
        gate: g of ``gated_copy``.
        guidance: also embed a guidance scale.
    """

    def __init__(
        self,
        role: Role | None = None,
        kind: SecondTimeKind | None = "zero_init",
        input: Literal["r", "difference"] = "r",
        gate: float = 0.25,
        guidance: bool = False,
    ) -> None:
        self.role = role or Copy()
        self.kind = kind
        self.input: Literal["r", "difference"] = input
        self.gate = gate
        self.guidance = guidance
        if kind is None and not guidance:
            raise ValueError("TwoTime(kind=None, guidance=False) adds nothing; use the role itself.")

    @property
    def shares_weights(self) -> bool:  # type: ignore[override]
        """Whether the role runs on the source's own parameters."""
        return self.role.shares_weights

    def check(self) -> None:  # noqa: D102
        self.role.check()

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        if isinstance(self.role, Lora):
            self._install(source.network)
            adapter = copy.copy(self.role)
            targets: Sequence[str] = self.role.target_modules or source.family.lora_targets
            # no targets at all means every layer
            adapter.target_modules = [*targets, *self._layers(source.network)] if targets else None
            return adapter.build(source, name)
        if isinstance(self.role, FromCheckpoint) and _holds_branch(self.role):
            self._install(source.network)
        made = self.role.build(source, name)
        self._install(made.network)
        return made

    def _install(self, network: nn.Module) -> None:
        present = second_time_of(network)
        # guidance first: a gated copy of the embedding then has it too
        if self.guidance and (present is None or present.guidance is None):
            add_guidance(network)
        present = second_time_of(network)
        if self.kind is not None and (present is None or present.kind is None):
            add_second_time(network, self.kind, input=self.input, gate=self.gate)

    @staticmethod
    def _layers(network: nn.Module) -> list[str]:
        installed = second_time_of(network)
        native = [path for path, _ in network.named_modules() if path.endswith("time_embedding.cond_proj")]
        return [*([] if installed is None else installed.layers), *native]


def _holds_branch(role: FromCheckpoint) -> bool:
    path = Path(role.path).expanduser()
    return path.is_file() and any("second_time." in key for key in role._role_state(path)[0])
