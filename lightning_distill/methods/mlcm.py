"""MLCM: multistep consistency distillation on the teacher's own trajectories (arXiv:2406.05768)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import solver_step
from lightning_distill.methods.consistency_distillation import Pair
from lightning_distill.methods.teacher_paths import pair_scale
from lightning_distill.methods.tscd import TSCD
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["MLCM"]


class MLCM(TSCD):
    """Consistency within merging segments, between neighbours of trajectories that the teacher solves from noise.

        x_N = noise,   x_i = solver step of the teacher from x_{i+1}
        L = | DDIM(x_i, x0(x_i, t_i), t_i -> s) - sg DDIM(x_{i-1}, x0(x_{i-1}, t_{i-1}), t_{i-1} -> s) |^2       (Eq. 7)

    No data are needed, and the states are those that the student meets when it samples.

    Args:
        teacher: the pretrained model.
        segments: number of segments of each stage.
        trajectory_pairs: random pairs of neighbours of each trajectory; all cost one run of the solver.
        **kwargs: see ``TSCD`` (``segment_updates``, ``intervals``, ``solver``).

    Notes:
        Reconstructed: the paper's first version merges segments by progressive training, its later one (TLCM) trains on
        jumps between the milestones of one number of segments; here stages are those of ``TSCD``.
        The paper solves to each pair's time with a number of steps of its own; here the pairs share one trajectory on
        the grid itself, of which batches with stored ``states`` save the cost; students are told their stored scales.
        Latent LPIPS and preference learning are left out.
    """

    paper = "2406.05768"
    learns_from = "teacher alone; or its stored trajectories"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        segments: Sequence[int] = (8, 4, 2),
        trajectory_pairs: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, segments=segments, **kwargs)
        if trajectory_pairs < 1:
            raise ValueError(f"trajectory_pairs={trajectory_pairs}: learn from at least one pair of each trajectory.")
        self.trajectory_pairs = trajectory_pairs
        self._times_known = False

    @torch.no_grad()
    def trajectory(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States (N + 1, B, ...) on the grid, from noise on, and their times (N + 1,), float64."""
        grid = torch.tensor(self.grid(), dtype=torch.float64, device=self.device)
        if batch.states is not None and batch.times is not None:
            self._check_times(batch.times)
            return torch.cat([batch.states.transpose(0, 1), self.data(batch)[None]]), grid
        teacher, process = self.guided_teacher(batch), self.process
        states = [process.prior(self.draws.normal("noise", (batch.size, *self.sample_shape)), self.grid()[0])]
        for t, r in pairwise(grid):
            at, to = t.expand(batch.size), r.expand(batch.size)
            states.append(solver_step(teacher, states[-1], at, to, self.solver, process))
        return torch.stack(states), grid

    def _check_times(self, times: Tensor) -> None:
        if self._times_known:  # looking at them waits for the device
            return
        given, grid = times.tolist(), self.grid()[:-1]
        if len(given) != len(grid) or max(abs(a - b) for a, b in zip(given, grid)) > 1e-6 * grid[0]:
            raise ValueError(
                f"the stored trajectories have states at {given}, and intervals={self.intervals} needs them at {grid}; "
                "store every step of the solver on the trailing grid, and give their number as intervals."
            )
        self._times_known = True

    def pair(self, batch: Batch) -> Pair:
        """Random neighbours of each sample's trajectory, all pairs of a sample in a row."""
        states, times = self.trajectory(batch)
        n = batch.size
        row = torch.arange(n, device=times.device).repeat_interleave(self.trajectory_pairs)
        late = (self.uniform_rows("interval", len(row)) * self.intervals).long().clamp_max(self.intervals - 1)
        cond = batch.cond_of(row)
        of = Batch(cond=cond, x0=None if batch.x0 is None else batch.x0[row], size=len(row))
        first = times[:1].expand(n)
        scale = self.told_scale(first) if batch.states is None else pair_scale(self, batch, first)
        scale = None if scale is None else scale[row]
        return Pair(states[late, row], times[late], states[late + 1, row], times[late + 1], of, scale)

    def normal_rows(self, name: str, like: Tensor) -> Tensor:
        """Noise for each pair, drawn by sample."""
        k = self.trajectory_pairs
        shape = (len(like) // k, *like.shape[1:])
        return torch.stack([self.draws.normal(f"{name}{i}", shape) for i in range(k)], dim=1).flatten(0, 1)

    def uniform_rows(self, name: str, n: int) -> Tensor:
        """A uniform number for each pair, drawn by sample."""
        k = self.trajectory_pairs
        return torch.stack([self.draws.uniform(f"{name}{i}", n // k) for i in range(k)], dim=1).flatten()

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update that solves its trajectories."""
        counts = super().forward_counts()
        counts["student"]["teacher"] += (self.intervals - 1) * (2 if self.solver == "heun" else 1)
        return counts
