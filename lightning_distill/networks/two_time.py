"""The role of a student with a target time: any other role, with the branch of ``second_time`` installed."""

from typing import Literal

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.extended_role import ExtendedRole
from lightning_distill.networks.roles import Role
from lightning_distill.networks.second_time import SecondTimeKind, add_guidance, add_second_time, second_time_of

__all__ = ["TwoTime"]


class TwoTime(ExtendedRole):
    """A role that takes a target time, and a guidance scale if asked; at r = t and initialisation it is its source.

    In the shared frozen network of ``Lora`` the branch adds exactly zero.

    Args:
        role: how the student is realised, None for ``Copy()``.
        kind: how the target time enters: ``zero_init``, ``scaled_difference`` or ``gated_copy``; None for none.
        input: what ``zero_init`` sees, ``r`` or the ``difference`` t - r.
        gate: g of ``gated_copy``.
        guidance: also embed a guidance scale.
    """

    marker = "second_time."

    def __init__(
        self,
        role: Role | None = None,
        kind: SecondTimeKind | None = "zero_init",
        input: Literal["r", "difference"] = "r",
        gate: float = 0.25,
        guidance: bool = False,
    ) -> None:
        super().__init__(role)
        self.kind = kind
        self.input: Literal["r", "difference"] = input
        self.gate = gate
        self.guidance = guidance
        if kind is None and not guidance:
            raise ValueError("TwoTime(kind=None, guidance=False) adds nothing; use the role itself.")

    def install(self, denoiser: Denoiser) -> None:
        """Add the branch, the part of it that is missing."""
        network = denoiser.network
        present = second_time_of(network)
        # guidance first: a gated copy of the embedding then has it too
        if self.guidance and (present is None or present.guidance is None):
            add_guidance(network)
        present = second_time_of(network)
        if self.kind is not None and (present is None or present.kind is None):
            add_second_time(network, self.kind, input=self.input, gate=self.gate)

    def layers(self, denoiser: Denoiser) -> list[str]:
        """The branch's own, and diffusers' projection of an embedded guidance scale."""
        installed = second_time_of(denoiser.network)
        native = [path for path, _ in denoiser.network.named_modules() if path.endswith("time_embedding.cond_proj")]
        return [*([] if installed is None else installed.layers), *native]
