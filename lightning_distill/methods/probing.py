"""Looking at a run from outside, as a part of ``DistillationModule``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.methods.cycle import Cycle
from lightning_distill.methods.terms import Terms
from lightning_distill.randomness import Draws

__all__ = ["Probing"]


class Probing(Cycle):
    """What a callback may ask a module in the middle of a run without leaving a trace in it."""

    @contextmanager
    def probing(self, name: str, first: int = 0, update: int | None = None) -> Iterator[None]:
        """Within it rollouts and losses may be evaluated.

        Draws come from streams of their own at the current update; the draws, the samples of the cycle, the buffers of
        the module itself and those of its ``targets`` (not those of its roles) are put back afterwards. Modes and
        global generators are the caller's, see ``callbacks.isolation.undisturbed``.

        Args:
            name: of the streams.
            first: global index of the first sample.
            update: student update whose terms and stages are meant, None for the current one.
        """
        draws, rollouts = self.draws, self._rollouts
        targets = [getattr(self, name) for name in self.targets]
        own = [*self.buffers(recurse=False), *(b for target in targets if target is not None for b in target.buffers())]
        buffers = [(value, value.clone()) for value in own]
        # slice -1: no cycle has it
        update = self.global_step if update is None else update
        self.draws, self._rollouts = Draws(self.streams, update, first, name, -1, self.device), {}
        try:
            yield
        finally:
            self.draws, self._rollouts = draws, rollouts
            with torch.no_grad():
                for value, before in buffers:
                    value.copy_(before)

    def term_gradients(self, batch: Batch, name: str, first: int = 0) -> dict[str, list[Tensor]]:
        """Gradient of each weighted term of the student's loss; ``.grad`` is not touched.

        Args:
            batch: conditions and data.
            name: of the streams, see ``probing``.
            first: global index of the first sample.

        Returns:
            by term, the gradients of the student phase's parameters; nothing for a loss of one term.
        """
        parameters = [p for role in self.phases["student"] for p in self.role_parameters(role)]
        gradients: dict[str, list[Tensor]] = {}
        with self.probing(name, first), self._only("student"), torch.enable_grad():
            losses = self.losses_of("student")(batch).losses
            losses = {term: value for term, value in losses.items() if value.requires_grad}
            for term, value in losses.items() if len(losses) > 1 else ():
                weighted = self.weighted_sum("student", Terms({term: value}))
                found = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
                gradients[term] = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
        return gradients

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds of this process spent in each phase so far; reading them waits for the device."""
        return self.clock.seconds()
