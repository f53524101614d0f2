"""Networks that see a condition picture as further input channels.

    out = U( [x_t, low], t, ... )

A picture ``low`` of the sample's size (an enlarged low-resolution one, a masked one) is what super-resolution and
restoration are conditioned on (SR3, arXiv:2104.07636). It belongs to both branches of guidance.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.networks import small  # noqa: F401  (registers ResidualMLP)
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import FAMILIES, register
from lightning_distill.networks.families.base import SAME
from lightning_distill.networks.roles import with_network
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.networks.time_embeddings import EMBEDDINGS

__all__ = [
    "Concatenated",
    "ConcatenatedConditionUNet",
    "ConcatenatedDenoiser",
    "ConcatenatedMLP",
    "ConcatenatedUNet",
    "concatenated",
]


class Concatenated(nn.Module):
    """A network whose first layer takes the sample and a picture; other attributes are the network's own.

    Args:
        network: takes C + C_low channels; of the channels that it makes the first C are used.
        channels: C, channels (or coordinates) of the samples.
        residual_shift: show the network x_t + t low in place of x_t: on the path of ``processes.ResidualShift`` the
            sample with its shift towards the picture, which then has C channels too.

    Raises:
        ValueError: the network has no channels left for a picture, or not as many as the shift needs.
    """

    #: the network's time argument at the process' time 1
    time_unit = 1.0

    def __init__(self, network: nn.Module, channels: int, residual_shift: bool = False) -> None:
        super().__init__()
        self.network = network
        self.channels = int(channels)
        self.residual_shift = bool(residual_shift)
        taken = self._input_shape(network)[0]
        if not 0 < self.channels < taken:
            raise ValueError(
                f"{type(network).__name__} takes {taken} channels, of which {channels} are the samples', so that "
                f"{taken - self.channels} are left for the condition 'low'; give a network with in_channels = channels "
                "of the samples + channels of the picture."
            )
        if self.residual_shift and taken != 2 * self.channels:
            raise ValueError(
                f"residual_shift adds the picture to the sample, and of the {taken} channels of this "
                f"{type(network).__name__} {self.channels} are the samples' and {taken - self.channels} the picture's; "
                "give both as many."
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network":  # while the module is being made or unpickled
                raise
            return getattr(self.network, name)

    @staticmethod
    def _input_shape(network: Any) -> tuple[int, ...]:
        """Shape of what a network takes, without the batch dimension."""
        return tuple(network.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.channels, *self._input_shape(self.network)[1:])

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of one picture."""
        taken, *rest = self._input_shape(self.network)
        return (taken - self.channels, *rest)

    def forward(self, x: Tensor, t: Tensor, *args: Any, low: Tensor, **kwargs: Any) -> Any:
        """As the network.

        Args:
            x: noisy samples, (B, C, ...).
            t: the network's times, (B,).
            *args: the network's other arguments.
            low: pictures, (B, C_low, ...), of the samples' size.
            **kwargs: the network's other arguments.

        Raises:
            ValueError: pictures of another size.
        """
        if low.shape[:1] + low.shape[2:] != x.shape[:1] + x.shape[2:] or low.shape[1] != self.low_shape[0]:
            raise ValueError(
                f"the condition 'low' has shape {tuple(low.shape)} and the noisy samples {tuple(x.shape)}; this "
                f"network takes pictures of {self.low_shape[0]} channels of the samples' size: enlarge them in the "
                "data module (SuperResolution does)."
            )
        low = low.to(x.dtype)
        if self.residual_shift:
            eta = (t / self.time_unit).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
            x = x + eta * low
        out = self.network(torch.cat([x, low], dim=1), t, *args, **kwargs)
        return out[:, : self.channels] if isinstance(out, Tensor) else out


class ConcatenatedMLP(Concatenated):
    """``ResidualMLP`` on the joined shape: points (D + D_low,), small pictures (C + C_low, H, W)."""


class _Picture(Concatenated):
    """diffusers' UNets: ``in_channels`` are the samples' and the picture's, ``out_channels`` the samples'."""

    time_unit = 1000.0

    @staticmethod
    def _input_shape(network: Any) -> tuple[int, ...]:
        size = network.config.sample_size
        if size is None:
            return (network.config.in_channels,)
        return (network.config.in_channels, *((size, size) if isinstance(size, int) else size))


class ConcatenatedUNet(_Picture):
    """``UNet2DModel`` with a picture."""


class ConcatenatedConditionUNet(_Picture):
    """``UNet2DConditionModel`` with text and a picture."""


_KINDS: dict[str, type[Concatenated]] = {
    "ResidualMLP": ConcatenatedMLP,
    "UNet2DModel": ConcatenatedUNet,
    "UNet2DConditionModel": ConcatenatedConditionUNet,
}


def _sample_shape(network: Any) -> tuple[int, ...] | None:
    shape: tuple[int, ...] = network.shape
    # diffusers' UNets may be made for any size
    return None if isinstance(network, _Picture) and len(shape) < 3 else shape


def _register(base: str, wrapper: type[Concatenated]) -> None:
    family = FAMILIES[base]
    inner = family.cond_shapes

    def shapes(network: Any) -> Mapping[str, tuple[int | str, ...]]:
        own = inner(network) if callable(inner) else inner
        return {**own, "low": network.low_shape}

    register(
        replace(
            family,
            model_class=wrapper.__name__,
            cond_keys=(*family.cond_keys, "low"),
            required=(*family.required, "low"),
            cond_shapes=shapes,
            null={**family.null, "low": SAME},
            sample_shape=_sample_shape,
        )
    )
    EMBEDDINGS[wrapper.__name__] = EMBEDDINGS[base]


for _base, _wrapper in _KINDS.items():
    _register(_base, _wrapper)


def concatenated(network: nn.Module, channels: int | None = None, residual_shift: bool = False) -> Concatenated:
    """A network with a condition picture as further input channels.

    Args:
        network: ``UNet2DModel``, ``UNet2DConditionModel`` or ``ResidualMLP``.
        channels: of the samples; None for the network's ``out_channels``.
        residual_shift: see ``Concatenated``.

    Raises:
        ValueError: another network, or no channels for a picture.
    """
    for cls in type(network).__mro__:
        if cls.__name__ in _KINDS:
            if channels is None:
                config = getattr(network, "config", None)
                if config is None:
                    raise ValueError(
                        f"{type(network).__name__} does not say how many of its channels are the samples'; give "
                        "channels=..."
                    )
                channels = config.out_channels
            assert channels is not None
            return _KINDS[cls.__name__](network, channels, residual_shift)
    raise ValueError(
        f"{type(network).__name__} with a concatenated picture is not supported; it exists here for "
        f"{', '.join(_KINDS)}. Wrap another network as an nn.Module of your own with an argument low."
    )


class ConcatenatedDenoiser(DenoiserSpec):
    """A model whose batches carry a picture of the samples' size as the condition ``low``.

    No stock pipeline is written for it; its network, ``student.network.network``, is a model of its own with
    ``save_pretrained``.

    Args:
        base: the model, with input channels for sample and picture together.
        channels: of the samples; None for the network's ``out_channels``.
        residual_shift: see ``Concatenated``.
    """

    def __init__(self, base: DenoiserSpec, channels: int | None = None, residual_shift: bool = False) -> None:
        self.base = base
        self.channels = channels
        self.residual_shift = residual_shift

    def check(self) -> None:  # noqa: D102
        self.base.check()

    def build(self) -> Denoiser:  # noqa: D102
        denoiser = self.base.build()
        network = concatenated(denoiser.network, self.channels, self.residual_shift)
        bound = denoiser.family  # with the null embeddings of the folder
        family = FAMILIES[type(network).__name__]
        family = replace(family, null={**bound.null, "low": SAME}, guidance_scale=bound.guidance_scale)
        return with_network(denoiser, network, family)
