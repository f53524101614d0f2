"""Roles whose network gets further parts: any other role, with something installed on it."""

import copy
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightning_distill.networks.adapter_bank import added_parts
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import Experts
from lightning_distill.networks.merging import merged_network
from lightning_distill.networks.roles import Copy, FromCheckpoint, Lora, Role, with_network

__all__ = ["ExtendedRole"]


class ExtendedRole(Role):
    """A role that installs parts on a network and is otherwise another role.

    A copy gets the parts for itself. With ``Lora`` they belong to the shared frozen network, where they change nothing
    for others, and the adapter learns on their layers. A checkpoint of such a student fits a network with the same
    settings.

    Args:
        role: how the student is realised, None for ``Copy()``.
    """

    #: part of the names of the parts' parameters
    marker: str

    def __init__(self, role: Role | None = None) -> None:
        self.role = role or Copy()

    @property
    def shares_weights(self) -> bool:  # type: ignore[override]
        """Whether the role runs on the source's own parameters."""
        return self.role.shares_weights

    def check(self) -> None:  # noqa: D102
        self.role.check()

    def learned_steps(self) -> dict[str, Tensor]:  # noqa: D102
        return self.role.learned_steps()

    @abstractmethod
    def install(self, denoiser: Denoiser) -> None:
        """Add the parts to a network that may have them."""

    @abstractmethod
    def layers(self, denoiser: Denoiser) -> list[str]:
        """Names of the parts' layers, for adapters to attach to."""

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        if isinstance(self.role, Experts):
            own = type(self).__name__
            raise ValueError(f"{own}(role=Experts(...)): each expert takes it itself; give Experts(role={own}(...)).")
        if isinstance(self.role, Lora):
            self._install_on_shared(source)
            adapter = copy.copy(self.role)
            targets: Sequence[str] = self.role.target_modules or source.family.lora_targets
            # no targets at all means every layer
            adapter.target_modules = [*targets, *self.layers(source)] if targets else None
            return adapter.build(source, name)
        if isinstance(self.role, FromCheckpoint) and self.role.holds(self.marker):
            if self.role.merge or not self.role.holds("adapter."):  # not shared: the source stays without the parts
                source = with_network(source, merged_network(source))
            self._install_on_shared(source)
        made = self.role.build(source, name)
        self.install(made)
        return made

    def _install_on_shared(self, source: Denoiser) -> None:
        """Install on a network that others use too, which is known without the parts."""
        before = set(source.network.state_dict())
        self.install(source)
        added_parts(source.network).update(set(source.network.state_dict()) - before)
