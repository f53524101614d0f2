"""Samples of several parts that are noised together, each at its own pace: video latents and actions, for example.

A sample is one packed tensor (B, N): its streams flattened, in the order of their names. The process has one time t for
all of them, and each stream its own shift of it, so that alpha and sigma differ from element to element:

    x_s = (1 - sigma_s) x0_s + sigma_s eps_s,     sigma_s = k_s t / (1 + (k_s - 1) t)

All else (predictions, samplers, solver steps) is linear in x0 and eps with these coefficients, hence holds for each
stream by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_distill.batch import pack_streams
from lightning_distill.processes import NoiseProcess, expand

__all__ = ["Stream", "StreamProcess"]


def _shifted(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1.0 + (shift - 1.0) * t)


@dataclass(frozen=True)
class Stream:
    """One part of a sample.

    Attributes:
        shape: of one sample of it.
        shift: k > 0 of its time; 1 is none, above 1 there is more noise at the same t (video 5, actions 1 in
            Flash-WAM).
    """

    shape: Sequence[int]
    shift: float = 1.0


class StreamProcess(NoiseProcess):
    """Flow matching of several streams with one time and a shift of it for each.

    Coefficients have one more dimension than the times that they are of: (B, N) for (B,), and (1, N) for ().

    Args:
        streams: the parts of a sample by name; they are packed in the order of their names, however they are given.

    Raises:
        ValueError: no stream, an empty shape, or a shift that is not positive.
    """

    t_max = 1.0

    def __init__(self, streams: dict[str, Stream]) -> None:
        if not streams:
            raise ValueError("StreamProcess(streams={}): give at least one stream, for example video and action.")
        for name, stream in streams.items():
            if not stream.shift > 0 or not stream.shape or min(stream.shape) < 1:
                raise ValueError(
                    f"stream {name!r} has shape {list(stream.shape)} and shift {stream.shift}: sizes are at least 1, "
                    "and the shift is positive (1 means none)."
                )
        self.streams = {
            name: Stream(tuple(streams[name].shape), float(streams[name].shift)) for name in sorted(streams)
        }
        self.sizes = [prod(stream.shape) for stream in self.streams.values()]
        #: the streams in words, for cards of exports
        self.layout = ", ".join(f"{name} {list(s.shape)} shift {s.shift:g}" for name, s in self.streams.items())

    # ------------------------------------------------------------------------------------------------ packing
    @property
    def size(self) -> int:
        """N, elements of a packed sample."""
        return sum(self.sizes)

    def pack(self, samples: Mapping[str, Tensor]) -> Tensor:
        """One tensor (B, N) of the streams (B, *shape) by name.

        Raises:
            ValueError: names or shapes other than those of the process.
        """
        found = {name: tuple(value.shape[1:]) for name, value in samples.items()}
        wanted = {name: stream.shape for name, stream in self.streams.items()}
        if found != wanted:
            raise ValueError(f"the streams of a sample have the shapes {wanted}, and these have {found}.")
        return pack_streams(samples)

    def unpack(self, x: Tensor) -> dict[str, Tensor]:
        """The streams by name, views (B, *shape) of a packed tensor (B, N).

        Raises:
            ValueError: another number of elements.
        """
        if x.ndim != 2 or x.shape[1] != self.size:
            raise ValueError(
                f"packed samples of {list(self.streams)} have shape (B, {self.size}), and these {tuple(x.shape)}."
            )
        parts = x.split(self.sizes, dim=1)
        return {name: part.unflatten(1, s.shape) for (name, s), part in zip(self.streams.items(), parts)}

    def stream_times(self, t: Tensor) -> dict[str, Tensor]:
        """The flow-matching time sigma_s(t) of each stream, float64, shaped like t."""
        return {name: _shifted(t.double(), s.shift) for name, s in self.streams.items()}

    # ------------------------------------------------------------------------------------------------ process
    def _by_element(self, t: Tensor, value: Callable[[Tensor, float], Tensor]) -> Tensor:
        """A function of time and shift for every element, float64, (..., N)."""
        t = t.double().reshape(t.shape or (1,))
        columns = [value(t, s.shift)[..., None].expand(*t.shape, n) for s, n in zip(self.streams.values(), self.sizes)]
        return torch.cat(columns, dim=-1)

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return self._by_element(t, lambda t, k: (1.0 - t) / (1.0 + (k - 1.0) * t))

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return self._by_element(t, _shifted)

    def d_alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return -self.d_sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return self._by_element(t, lambda t, k: k / (1.0 + (k - 1.0) * t).square())

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Not defined: at one time every stream has another ratio of signal to noise.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"the streams {list(self.streams)} have no common noise level; give times in the process' own t from 0 to "
            "1 (Uniform, Shifted, LogitNormal, Beta), not in noise levels."
        )

    def prior(self, eps: Tensor, t_init: float | None = None) -> Tensor:  # noqa: D102
        if t_init is not None and 0.0 < t_init < self.t_max:
            return expand(self.sigma(torch.tensor(t_init, dtype=torch.float64)), eps) * eps
        return super().prior(eps, t_init)

    def prior_std(self, t_init: float) -> float:
        """1 at the noisiest time, where the streams agree.

        Raises:
            ValueError: an earlier time, at which they have different levels; see ``prior``.
        """
        if t_init != self.t_max:
            raise ValueError(
                f"at t={t_init:g} the streams {list(self.streams)} have different noise levels; start at t=1, or make "
                "the starting noise with prior(eps, t)."
            )
        return 1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.layout})"
