"""Networks that denoise several streams together, and the consistency function of each stream.

f = c_skip x_s + c_out F,     c_skip = 1 and c_out = 0 without noise,     df/dF = c_out

The network's outputs F become one ``flow_prediction`` whose x0 is f, so that everything above the network, samplers
included, sees consistency functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import register
from lightning_distill.networks.families.base import PLAIN
from lightning_distill.networks.seeding import seeded
from lightning_distill.networks.small import ConditionedMLP, ResidualBlock, null_class
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import edm_boundary
from lightning_distill.processes import expand
from lightning_distill.streams import StreamProcess

__all__ = [
    "StreamBoundary",
    "StreamDenoiser",
    "StreamMLP",
    "StreamsDenoiser",
    "StreamsNetwork",
    "check_boundaries",
    "stream_boundary",
    "stream_velocity",
]

StreamBoundary = Literal["linear", "variance_preserving"]


# ------------------------------------------------------------------------------------------------ boundaries
def stream_velocity(kind: StreamBoundary, sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Coefficients of the velocity (x - f) / sigma = a x + b F of a consistency function f, finite at sigma = 0.

        linear                a = 0,                          b = 1
        variance_preserving   a = (1 - k_skip - k_out) / sigma,  b = k_out      with EDM's k_skip, k_out (sigma_min = 0)

    Args:
        kind: see ``stream_boundary``.
        sigma: flow-matching times in [0, 1], any shape.
        sigma_data: sd of ``variance_preserving``.

    Returns:
        a and b, float64.
    """
    sigma = sigma.double()
    if kind == "linear":
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    if kind != "variance_preserving":
        raise ValueError(f"boundary {kind!r} is unknown; choose one of {', '.join(get_args(StreamBoundary))}.")
    k_skip, k_out = edm_boundary(sigma, sigma_data, 0.0)
    # 1 - k_skip = sigma^2 k_skip / sd^2 and k_out = sigma sqrt(k_skip)
    return sigma * k_skip / sigma_data**2 - k_skip.sqrt(), k_out


def stream_boundary(kind: StreamBoundary, sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Coefficients of f = c_skip x + c_out F for a network F that was a flow-matching velocity (arXiv:2606.05254).

        linear                f = x - sigma F                              |df/dF| = sigma: for little noise
        variance_preserving   f = k_skip x + k_out (x - sigma F)           |df/dF| = sigma k_out, of order sigma^2 at
                                                                           small sigma: for much noise
        k_skip = sd^2 / (sigma^2 + sd^2),     k_out = sd sigma / sqrt(sigma^2 + sd^2)

    Args:
        kind: one of the rows.
        sigma: flow-matching times of the stream in [0, 1], any shape.
        sigma_data: sd.

    Returns:
        c_skip and c_out, float64: 1 and 0 at sigma = 0.
    """
    a, b = stream_velocity(kind, sigma, sigma_data)
    return 1.0 - sigma.double() * a, -sigma.double() * b


def check_boundaries(boundaries: Mapping[str, str], process: StreamProcess) -> None:
    """Refuse boundaries of unknown streams, streams without one, and unknown kinds."""
    kinds = get_args(StreamBoundary)
    if set(boundaries) != set(process.streams) or not set(boundaries.values()) <= set(kinds):
        raise ValueError(
            f"boundaries={dict(boundaries)}: give each of the streams {list(process.streams)} one of "
            f"{', '.join(kinds)}."
        )


# ------------------------------------------------------------------------------------------------ networks
class StreamsNetwork(nn.Module):
    """A network of several streams as one of packed samples.

    Args:
        module: called as ``module(samples, times, **cond)`` with the streams (B, *shape) and their flow-matching times
            (B,) by name; returns their velocities by name.
        process: names, shapes and shifts.
        boundaries: consistency function of each stream, see ``stream_boundary``; None for ``linear``, which leaves the
            velocities as they are.
        sigma_data: sd of the boundaries.
    """

    def __init__(
        self,
        module: nn.Module,
        process: StreamProcess,
        boundaries: Mapping[str, StreamBoundary] | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        self.module = module
        self.process = process
        self.boundaries: dict[str, StreamBoundary] = dict.fromkeys(process.streams, "linear")
        self.set_boundaries(boundaries or self.boundaries, sigma_data)

    def set_boundaries(self, boundaries: Mapping[str, StreamBoundary], sigma_data: float = 0.5) -> None:
        """Make the same weights other consistency functions.

        Raises:
            ValueError: see ``check_boundaries``, or ``sigma_data`` is not positive.
        """
        check_boundaries(boundaries, self.process)
        if not sigma_data > 0:
            raise ValueError(f"sigma_data={sigma_data} of the boundaries must be positive.")
        self.boundaries, self.sigma_data = dict(boundaries), float(sigma_data)

    @property
    def shape(self) -> tuple[int]:
        """Shape of one packed sample."""
        return (self.process.size,)

    @property
    def num_classes(self) -> int:
        """Number of classes of the module, 0 for none; this number is also the label that means "no class"."""
        return int(getattr(self.module, "num_classes", 0))

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """The flow prediction of packed samples.

        Args:
            x: noisy samples, (B, N).
            t: native times of the process, (B,).
            cond: conditions of the module.
        """
        samples, times = self.process.unpack(x), self.process.stream_times(t)
        made = self.module(samples, {name: time.to(x.dtype) for name, time in times.items()}, **cond)
        velocities = {}
        for name, sample in samples.items():
            velocities[name] = made[name]
            if self.boundaries[name] != "linear":
                a, b = stream_velocity(self.boundaries[name], times[name], self.sigma_data)
                velocities[name] = expand(a, sample) * sample + expand(b, sample) * made[name]
        return self.process.pack(velocities)


register(replace(PLAIN, model_class="StreamsNetwork", null={"class_labels": null_class}))


class StreamMLP(ConditionedMLP):
    """A residual MLP that sees all streams and their times, for small problems.

    Args:
        shapes: shape of each stream by name.
        width: features of the hidden layers.
        depth: number of residual blocks, at least 1.
        num_classes: number of classes, 0 for none; the label ``num_classes`` means "no class".
        time_features: number of time features of each stream, even.
    """

    def __init__(
        self,
        shapes: dict[str, list[int]],
        width: int = 128,
        depth: int = 3,
        num_classes: int = 0,
        time_features: int = 64,
    ) -> None:
        super().__init__(width, depth, num_classes, time_features, times=len(shapes))
        self.shapes = {name: tuple(shape) for name, shape in sorted(shapes.items())}
        self.inputs = nn.ModuleDict({name: nn.Linear(prod(shape), width) for name, shape in self.shapes.items()})
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.outputs = nn.ModuleDict({name: nn.Linear(width, prod(shape)) for name, shape in self.shapes.items()})
        with torch.no_grad():
            for parameter in self.outputs.parameters():
                parameter.mul_(0.01)

    def forward(
        self, samples: Mapping[str, Tensor], times: Mapping[str, Tensor], class_labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Outputs by name, (B, *shape).

        Args:
            samples: noisy streams, (B, *shape) each.
            times: of each stream, (B,).
            class_labels: classes, (B,) integers; None means "no class".
        """
        embedding = self.embed([times[name] for name in self.shapes], class_labels)
        h = torch.stack([layer(samples[name].flatten(1)) for name, layer in self.inputs.items()]).sum(0)
        for block in self.blocks:
            h = block(h, embedding)
        return {name: layer(h).reshape(samples[name].shape) for name, layer in self.outputs.items()}


# ------------------------------------------------------------------------------------------------ denoisers
class StreamDenoiser(Denoiser):
    """A denoiser of packed samples; no stock pipeline takes samples apart."""

    stands_alone = False


class StreamsDenoiser(DenoiserSpec):
    """A network of several streams with fresh random weights, equal on every rank.

    Args:
        network: makes the module, see ``StreamsNetwork``; in YAML ``class_path`` and ``init_args``.
        process: names, shapes and shifts of the streams.
        sigma_data: standard deviation of packed samples, per element.
        boundaries: consistency function of each stream, None for those that a method gives.
        seed: of the initial weights.
    """

    plannable = True

    def __init__(
        self,
        network: Callable[[], nn.Module],
        process: StreamProcess,
        sigma_data: float = 1.0,
        boundaries: dict[str, StreamBoundary] | None = None,
        seed: int = 0,
    ) -> None:
        self.network = network
        self.process = process
        self.sigma_data = sigma_data
        self.boundaries = boundaries
        self.seed = seed

    def check(self) -> None:  # noqa: D102
        if isinstance(self.network, nn.Module):  # jsonargparse calls a function named in YAML at once
            raise ValueError(
                "StreamsDenoiser(network=...) got a finished module; give a class, or a function making one."
            )
        if self.boundaries is not None:
            check_boundaries(self.boundaries, self.process)

    def build(self) -> Denoiser:  # noqa: D102
        with seeded(self.seed):
            network = StreamsNetwork(self.network(), self.process, self.boundaries)
        return StreamDenoiser(network, self.process, "flow_prediction", sigma_data=self.sigma_data)
