"""Random numbers as a pure function of (seed, stream, update, global sample index).

A run that is interrupted and resumed, or split over several processes, must see the same noise for the same sample.
So no training draw depends on the state of a global generator: a draw names its stream ("student/noise"), the student
update it belongs to and the global indices of its samples. Blocks of 16 consecutive samples share one seeded generator:
few seedings per batch, and a rank computes only the blocks its samples lie in.

Networks with dropout draw from torch's own generators; ``replayed`` gives several passes the same masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["BLOCK", "Draws", "RandomStreams", "derive_seed", "replayed"]

BLOCK = 16


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any integers and strings, stable over processes, platforms and Python versions."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class RandomStreams:
    """Counter-based draws for one run.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)

    def normal(
        self,
        stream: str,
        update: int,
        first: int,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Unit Gaussian noise of the samples ``first .. first + shape[0] - 1``.

        Args:
            stream: name of the draw; different names are independent.
            update: student update the draw belongs to.
            first: global index of the first sample.
            shape: (B, ...), B samples.
            device: where the numbers are drawn (values differ between kinds of device).
            dtype: float32 or float64.
        """
        return self._draw(torch.randn, stream, update, first, shape, device, dtype)

    def uniform(
        self,
        stream: str,
        update: int,
        first: int,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Uniform float64 numbers in (0, 1), arguments as for ``normal``."""
        u = self._draw(torch.rand, stream, update, first, shape, device, torch.float64)
        return u.clamp_(1e-12, 1.0 - 1e-12)

    def integer(self, stream: str, update: int, high: int) -> int:
        """One integer in [0, high), the same for every sample and rank."""
        return derive_seed(self.seed, stream, update, "integer") % high

    def _draw(
        self,
        draw: Callable[..., Tensor],
        stream: str,
        update: int,
        first: int,
        shape: Sequence[int],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Tensor:
        count, rest = shape[0], tuple(shape[1:])
        generator = torch.Generator(device=device)
        blocks = []
        for block in range(first // BLOCK, (first + count - 1) // BLOCK + 1):
            generator.manual_seed(derive_seed(self.seed, stream, update, block))
            blocks.append(draw((BLOCK, *rest), generator=generator, device=device, dtype=dtype))
        offset = first % BLOCK
        return torch.cat(blocks)[offset : offset + count]


class Draws:
    """The draws of one phase on one slice of a cycle's batch.

    Args:
        streams: the run's streams.
        update: student update of the cycle.
        first: global index of the first sample of this (micro-)batch within its slice.
        phase: phase and repetition, for example ``fake_score2``.
        slice_index: slice of the cycle's batch; phases that share a slice share its samples.
        device: where numbers are drawn.
        once: refuse a second draw of a claimed name.
    """

    once = False  # of subclasses that give the numbers themselves

    def __init__(
        self,
        streams: RandomStreams,
        update: int,
        first: int,
        phase: str,
        slice_index: int = 0,
        device: torch.device | str = "cpu",
        once: bool = False,
    ) -> None:
        self.streams = streams
        self.update, self.first = update, first
        self.phase, self.slice_index = phase, slice_index
        self.device = device
        self.once = once
        self._claimed: set[str] = set()

    def claim(self, name: str) -> None:
        """Take a name, of which a loss has one draw.

        Raises:
            ValueError: it is taken, and these draws are made ``once``.
        """
        if not self.once:
            return
        if name in self._claimed:
            raise ValueError(
                f"a loss draws {name!r} twice, and would get the same numbers again; give the second draw a name of "
                "its own (name=...), or use what the first returned."
            )
        self._claimed.add(name)

    def named(self, name: str) -> Draws:
        """Independent draws of the same samples."""
        streams = RandomStreams(derive_seed(self.streams.seed, name))
        return Draws(streams, self.update, self.first, self.phase, self.slice_index, self.device)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Unit Gaussian noise of this phase, (B, ...); the same numbers for the same name."""
        return self.streams.normal(f"{self.phase}/{name}", self.update, self.first, shape, self.device)

    def uniform(self, name: str, n: int) -> Tensor:
        """Uniform float64 numbers in (0, 1) of this phase, (n,); the same for the same name."""
        return self.streams.uniform(f"{self.phase}/{name}", self.update, self.first, (n,), self.device)

    def of_slice(self) -> Draws:
        """Draws that belong to the slice rather than to the phase: equal for every phase that uses it."""
        return Draws(self.streams, self.update, self.first, f"slice{self.slice_index}", self.slice_index, self.device)

    def integer(self, name: str, high: int) -> int:
        """One integer in [0, high), the same for all samples and ranks."""
        return self.streams.integer(f"{self.phase}/{name}", self.update, high)


@contextmanager
def replayed(tensors: Sequence[Tensor]) -> Iterator[None]:
    """What torch's own generators draw within is drawn again behind it: passes of a network that share their dropout.

        with replayed([x]):
            first = network(x, t)
        second = network(y, r)

    The generators are left as the second pass leaves them. Nothing waits for a device, which keeps its generator's
    state on the host; a compiler does not see it.

    Args:
        tensors: arguments of the passes, which say whose generators besides that of the CPU.
    """
    if torch.compiler.is_compiling():
        yield
        return
    devices = {p.device.index or 0 for p in tensors if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
