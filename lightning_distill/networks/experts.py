"""A network of several experts, each for its own noise levels or its own conditions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.roles import Copy, Role, with_network

__all__ = ["ConditionExperts", "ExpertNetwork", "Experts", "TimeExperts", "single_experts"]


class ExpertNetwork(nn.Module):
    """Sends each sample to one of K networks of one class.

    Attributes of the network (configuration, shape, number of classes) are those of the first expert.

    Args:
        experts: networks with the same calling convention.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "experts":  # while the module is being made or unpickled
                raise
            return getattr(self.experts[0], name)

    def route(self, x: Tensor, time: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Number of the expert of each sample, (B,).

        Args:
            x: packed samples.
            time: second positional argument of the networks.
            kwargs: everything else.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, time: Tensor, **kwargs: Any) -> Any:
        """Run every expert on its own samples, and only those experts that have some.

        Args:
            x: packed samples, (B, ...).
            time: times, (B, ...), as the networks take them.
            **kwargs: conditions; tensors of B rows are divided like the samples.
        """
        index = self.route(x, time, kwargs)
        present = index.unique().tolist()  # waits for the device once
        if len(present) == 1:
            return self.experts[present[0]](x, time, **kwargs)
        out: Tensor | None = None
        for k in present:
            rows = (index == k).nonzero().squeeze(1)
            own = {key: v[rows] if isinstance(v, Tensor) and len(v) == len(x) else v for key, v in kwargs.items()}
            part = self.experts[k](x[rows], time[rows], **own)
            part = part[0] if isinstance(part, tuple) else getattr(part, "sample", part)
            if out is None:
                out = part.new_zeros(len(x), *part.shape[1:])
            out = out.index_copy(0, rows, part)
        return out


class TimeExperts(ExpertNetwork):
    """Experts for intervals of noise levels.

    Args:
        experts: networks, noise first.
        boundaries: times between them as the networks are told them, K - 1, from noise to data.
        rising: whether the networks' time grows with noise.
    """

    boundaries: Tensor

    def __init__(self, experts: Sequence[nn.Module], boundaries: Tensor, rising: bool) -> None:
        super().__init__(experts)
        self.register_buffer("boundaries", boundaries.double(), persistent=False)
        self.rising = rising

    def route(self, x: Tensor, time: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A boundary belongs to the noisier side."""
        t = time.double().reshape(len(time), -1)[:, :1]
        passed = t < self.boundaries - 1e-6 if self.rising else t > self.boundaries + 1e-6
        return passed.sum(1)


class ConditionExperts(ExpertNetwork):
    """Experts for groups of classes.

    Args:
        experts: networks.
        groups: number of the expert of each class, and of the null class last, (C + 1,).
    """

    groups: Tensor

    def __init__(self, experts: Sequence[nn.Module], groups: Tensor) -> None:
        super().__init__(experts)
        self.register_buffer("groups", groups.long(), persistent=False)

    def route(self, x: Tensor, time: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """By class label."""
        return self.groups[kwargs["class_labels"]]


def single_experts(denoiser: Denoiser) -> list[Denoiser]:
    """The experts as denoisers of their own, which share the weights.

    Args:
        denoiser: one whose network is an ``ExpertNetwork``.
    """
    network = denoiser.network
    assert isinstance(network, ExpertNetwork)
    return [with_network(denoiser, expert) for expert in network.experts]


class Experts(Role):
    """A student, or fake score, of several networks that all begin as the source.

    Either ``boundaries`` (Phased DMD, arXiv:2510.27684) or ``classes`` (multi-student distillation,
    arXiv:2410.23274) says who is responsible.

    Args:
        boundaries: times between the experts as shares of t_max, falling; K - 1 for K experts.
        classes: the classes of each expert; together all of them.
        role: how each expert is made; None for a copy.

    Notes:
        A call whose samples belong to several experts, or whose times are on the device, waits for the device once.
        Blocks are tapped, and adapters attached, in single networks only.
    """

    def __init__(
        self,
        boundaries: Sequence[float] | None = None,
        classes: Sequence[Sequence[int]] | None = None,
        role: Role | None = None,
    ) -> None:
        self.boundaries = None if boundaries is None else [float(b) for b in boundaries]
        self.classes = None if classes is None else [list(group) for group in classes]
        self.role = role or Copy()

    def check(self) -> None:  # noqa: D102
        self.role.check()
        if (self.boundaries is None) == (self.classes is None):
            raise ValueError("Experts needs either boundaries (times between experts) or classes (of each expert).")
        if self.boundaries is not None:
            b = self.boundaries
            if any(y >= x for x, y in zip([1.0, *b], [*b, 0.0])):
                raise ValueError(f"Experts(boundaries={b}): give shares of t_max that fall strictly between 1 and 0.")
        if self.classes is not None:
            listed = sorted(c for group in self.classes for c in group)
            if listed != list(range(len(listed))) or not all(self.classes):
                raise ValueError(
                    f"Experts(classes={self.classes}): each class 0, 1, ... belongs to exactly one expert, and each "
                    "expert has one."
                )

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        self.check()
        count = len(self.boundaries or self.classes or []) + (self.boundaries is not None)
        made = [self.role.build(source, f"{name}_{k}") for k in range(count)]
        if any(isinstance(part, AdapterDenoiser) for part in made):
            raise ValueError("experts are networks of their own; give Experts(role=Copy()) or another one than Lora.")
        first = made[0]
        networks = [part.network for part in made]
        router: ExpertNetwork
        if self.boundaries is not None:
            shares = torch.tensor([1.0, *self.boundaries], dtype=torch.float64)
            # where Denoiser would send them
            times = first._time(shares * first.process.t_max).double()
            router = TimeExperts(networks, times[1:], bool(times[0] > times[1]))
        else:
            router = ConditionExperts(networks, self._groups(first))
        first.network = router.to(first.device)
        return first

    def _groups(self, denoiser: Denoiser) -> Tensor:
        assert self.classes is not None
        known, listed = denoiser.num_classes, sum(map(len, self.classes))
        if known != listed:
            raise ValueError(
                f"Experts(classes=...) names {listed} classes, but {type(denoiser.network).__name__} has {known or 0}."
            )
        owner = {c: k for k, group in enumerate(self.classes) for c in group}
        return torch.tensor([*(owner[c] for c in range(listed)), 0])
