"""f-distill: distribution matching with any f-divergence (arXiv:2502.15681)."""

from typing import Any

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.adversarial import generator_loss
from lightning_distill.losses.f_divergences import divergence as find_divergence
from lightning_distill.losses.f_divergences import log_ratio
from lightning_distill.losses.score_matching import checked_weight
from lightning_distill.methods.adversarial import RatioMethod
from lightning_distill.methods.base import Terms
from lightning_distill.methods.running import RunningMeans
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import expand

__all__ = ["FDistill"]


class FDistill(RunningMeans, RatioMethod):
    """DMD2 whose direction is weighted by the density ratio: any f-divergence instead of the reverse KL.

        grad_theta = E_t[ h(r) lambda_t (y_F(x_t) - y_T(x_t)) dx/dtheta ],     r = p_T,t / p_S,t = exp D(x_t)

    and h = r^2 f''. With h growing in r (kl, js, jeffreys, ...) samples in regions that the student neglects count
    more, and the student covers the teacher's modes. D is the discriminator of the GAN term, read at the x_t of the
    scores.

    Estimated ratios are off by a factor that depends on the noise level, and h by an overall one. Both are divided out
    by running means over the samples of past updates, per bin of noise levels for r (its exact mean is 1 at each), over
    all samples for h. They are part of checkpoints; a bin without new samples keeps its mean.

    Args:
        teacher: the pretrained model.
        divergence: one of rkl, kl, js, softened_rkl, neyman, hellinger, jeffreys, pearson.
        weight: lambda, see ``matching_weight``.
        ratio_bins: bins of equal probability of the matching times; 0 leaves ratios as they are.
        ratio_decay: factor on the weight of past samples per update, in [0, 1).
        ratio_min: smallest ratio used.
        ratio_max: largest ratio used.
        **kwargs: see ``AdversarialMethod`` (``gan``, needed here), ``FakeScoreMethod`` and ``DistillationModule``.

    Notes:
        The released code normalises h by the mean of the batch; here the means are those of the samples before the
        update, so that a sample's gradient does not depend on how its batch is split over processes or micro-batches.
        The forward KL has a large variance; let the discriminator learn first (a lower student rate, more
        ``fake_score_steps``).
    """

    paper = "2502.15681"
    learns_from = "teacher, data"

    ratio_state: Tensor
    ratio_pending: Tensor
    ratio_edges: Tensor

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        divergence: str = "js",
        weight: str = "dmd",
        ratio_bins: int = 10,
        ratio_decay: float = 0.9,
        ratio_min: float = 0.1,
        ratio_max: float = 20.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        find_divergence(divergence)
        if ratio_bins < 0 or not 0.0 <= ratio_decay < 1.0:
            raise ValueError(f"ratio_bins={ratio_bins} must be 0 or more, and ratio_decay={ratio_decay} in [0, 1).")
        if not 0.0 < ratio_min < 1.0 < ratio_max:
            raise ValueError(f"ratio_min={ratio_min} and ratio_max={ratio_max} must enclose 1 and be positive.")
        self.divergence = divergence
        self.weight = checked_weight(weight)
        self.ratio_bins = ratio_bins
        self.ratio_decay = ratio_decay
        self.ratio_min, self.ratio_max = ratio_min, ratio_max
        # sums and counts of r by bin and, in the last column, of h; one made-up sample of 1 each to begin with
        self.add_running("ratio", max(1, ratio_bins) + 1, ratio_decay)
        self.register_buffer("ratio_edges", torch.empty(0, dtype=torch.float64), persistent=False)

    def build_roles(self) -> None:
        """As usual, and the edges of the bins."""
        super().build_roles()
        inner = torch.arange(1, max(1, self.ratio_bins), dtype=torch.float64) / max(1, self.ratio_bins)
        self.ratio_edges = self.matching_times.quantile(inner, self.process).to(self.ratio_state.device)

    def student_loss(self, batch: Batch) -> Terms:
        """Weighted score difference and the generator's side of the GAN, at the same noisy samples."""
        assert self.gan is not None
        x = self.rollout(batch).x0
        scores, logits = self.scores_and_logits(x, batch)
        h = self.ratio_weight(log_ratio(logits), scores.t)
        terms = self.matching(x, scores, self.weight, expand(h, x))
        terms.losses["gan"] = generator_loss(logits, self.gan.kind)
        terms.diagnostics |= {"ratio_weight_std": h.std(correction=0), "logit": logits.detach().mean()}
        return terms

    @torch.no_grad()
    def ratio_weight(self, u: Tensor, t: Tensor) -> Tensor:
        """Normalised h of estimated log ratios; the samples are noted for the running means.

        Args:
            u: ln r, (B,).
            t: their times, (B,).

        Returns:
            (B,), float32, of mean 1 up to the drift since the last updates.
        """
        r = u.float().exp().clamp(self.ratio_min, self.ratio_max)
        bins = torch.bucketize(t, self.ratio_edges)
        member = (bins[:, None] == torch.arange(self.ratio_state.shape[1] - 1, device=t.device)).to(r)
        means = self.running_means("ratio").nan_to_num(1.0)
        normalised = r / means[bins] if self.ratio_bins else r
        h = find_divergence(self.divergence).weight(normalised.log())
        sums, counts = (member * r[:, None]).sum(0), member.sum(0)
        self.note("ratio", torch.cat([sums, h.sum()[None]]), torch.cat([counts, torch.full_like(h[:1], len(h))]))
        return h / means[-1]
