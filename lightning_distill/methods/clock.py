"""Seconds spent in each phase of a cycle, without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PhaseClock"]

#: pairs of events kept before finished ones are added up
_PENDING = 256


class PhaseClock:
    """Adds up the time of named phases; on CUDA from events, which only ``seconds`` waits for."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str, device: torch.device) -> Iterator[None]:
        """Count what happens within it as part of ``name``.

        Args:
            name: phase.
            device: where the phase computes.
        """
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        yield
        end.record(stream)
        self._pending.append((name, begin, end))
        if len(self._pending) > _PENDING:
            self._add_finished()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase since the start of this process; on CUDA waits until all phases have ended."""
        if self._pending:
            self._pending[-1][2].synchronize()
            self._add_finished()
        return dict(self._seconds)

    def _add_finished(self) -> None:
        while self._pending and self._pending[0][2].query():
            name, begin, end = self._pending.pop(0)
            self._seconds[name] += begin.elapsed_time(end) / 1000.0
