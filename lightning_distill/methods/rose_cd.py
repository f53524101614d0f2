"""ROSE-CD: consistency distillation on randomised trajectories with losses of decoded samples (arXiv:2507.05688)."""

from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.audio import DecodedLoss
from lightning_distill.losses.leaps import shifted_pair
from lightning_distill.methods.base import Terms
from lightning_distill.methods.consistency_distillation import ConsistencyDistillation
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["ROSECD"]


class ROSECD(ConsistencyDistillation):
    """Consistency along a trajectory that starts at a random time, and what the ear says about the result.

        t_k = grid(k + o),  o ~ U[0, jitter]:     L = d( f(x_t, t), sg f'(x_r, r) ) + sum_i w_i l_i( f(x_t, t), x0 )

    With a fixed grid the student is made for the grid's own times; a random start makes it robust. The losses l_i look
    at decoded samples beside clean data, by which the student can be better than its teacher.

    Args:
        teacher: the pretrained model; what is to be enhanced is its condition.
        jitter: largest offset of the start, in intervals; 0 is the plain grid, 1 covers all times.
        auxiliary: losses of decoded samples by name, such as ``{"si_sdr": SISDR(decode)}``; the name is that of the
            term (``student/si_sdr``) in ``loss_weights``.
        intervals: N, steps of the grid.
        **kwargs: see ``ConsistencyDistillation`` and ``PairMethod``.

    Notes:
        The paper's two losses are SI-SDR and a differentiable PESQ; the latter is left to a function of the user.
        Its process is that of SGMSE, whose mean drifts to the noisy speech; here it is any of this package's.
        Reconstructed from the abstract and summaries: how the start is randomised, and that the losses look at
        predictions from all times. The former is an offset of the whole grid, so that steps keep their length. The
        released code trains without a teacher, on an even grid, with independent noise at both times of a pair.
    """

    paper = "2507.05688"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        jitter: float = 1.0,
        auxiliary: dict[str, DecodedLoss] | None = None,
        intervals: int = 30,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, intervals=intervals, **kwargs)
        if not 0.0 <= jitter <= 1.0:
            raise ValueError(f"jitter={jitter}: the start moves by 0 to 1 intervals.")
        self.jitter = jitter
        self.auxiliary = dict(auxiliary or {})
        if "consistency" in self.auxiliary:
            raise ValueError("auxiliary has a loss named 'consistency', as the method's own term is; choose another.")

    def pair_times(self, n: int) -> tuple[Tensor, Tensor]:
        """Times t > r of each sample, (n,), float64: neighbours on a grid of its own."""
        grid = torch.tensor(self.grid(), dtype=torch.float64, device=self.device)
        offset = self.jitter * self.draws.uniform("offset", n)
        return shifted_pair(grid, self.draws.uniform("interval", n), offset)

    def student_loss(self, batch: Batch) -> Terms:
        """Consistency, and the losses of the online samples."""
        pair = self.pair(batch)
        online, target = self.ends(pair)
        terms = self.compare(pair, online, target)
        clean = self.data(batch)
        terms.losses |= {name: loss(online, clean).mean() for name, loss in self.auxiliary.items()}
        return terms
