"""OFTSR: one-step restoration with a knob between fidelity and realism (arXiv:2412.09465)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch, as_batch
from lightning_distill.generation import beginning, draw_noise
from lightning_distill.losses.flow_maps import flow_jump
from lightning_distill.losses.oftsr import alignment_loss, perturbed_source, runge_kutta_velocity, trajectory_target
from lightning_distill.methods.base import Terms
from lightning_distill.methods.trajectory import TwoTimeMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.modes import evaluation_mode
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.processes import FlowMatching
from lightning_distill.times import t_min

__all__ = ["OFTSR"]


class OFTSR(TwoTimeMethod):
    """A flow from pictures to be restored: the student's points lie on the teacher's trajectory from the same source.

        x_t = (1 - t) x0 + t x_src,     X(r) = x_src - (1 - r) u(x_src, r)
        L = | u(x_src, r - h) - sg [ u + h / (1 - r + h) (v_T(X(r), r) - u) ] |^2                              (r > 0)
          + .1 | u(x_src, 1) - v_T(x_src, 1) |^2 + .01 r^2 | u(x_src, r) - v_T(X(r), r) |^2

    ``restore`` makes x_src - u(x_src, r) in one step: for r near 1 what the teacher expects on average (small error),
    for r = 0 the end of its trajectory (a plausible picture).

    Args:
        teacher: a flow between data and source, told the condition if it was trained so.
        source: name of the condition that is the source (a picture of the samples' shape, which the networks then see
            as well); None for ``noise`` of the batch, ``gaussian`` for unit noise, with which it is a generator.
        perturbation: p of ``perturbed_source``, as in the teacher's training.
        time_step: h.
        ratio: of the teacher's second-order step; 1/2 is the mid-point rule.
        margin: r is drawn between this and 1 minus it.
        sampler: ``flow_map``, the only one of this student.
        **kwargs: see ``TwoTimeMethod``. Default weights: ``student/boundary`` .1, ``student/alignment`` .01.

    Notes:
        Weights are those of the released configurations. The trainer of students is not public: terms are derived.
        Its last step ends at the margin; here it may be shorter than h.
    """

    paper = "2412.09465"
    learns_from = "teacher, sources"
    samplers = ("flow_map",)
    from_sources = True
    capability = "one_step_only"
    default_loss_weights = {"student/boundary": 0.1, "student/alignment": 0.01}

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        source: str | None = None,
        perturbation: float = 0.0,
        time_step: float = 0.05,
        ratio: float = 0.5,
        margin: float = 0.01,
        sampler: Literal["flow_map"] = "flow_map",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, sampler=sampler, tangent="jvp", tangent_step=None, **kwargs)
        if not 0.0 <= perturbation <= 1.0:
            raise ValueError(f"perturbation={perturbation}: give the share of noise in the source, from 0 to 1.")
        if not 0.0 < margin < 0.5 or not 0.0 < time_step < 1.0 - 2.0 * margin:
            raise ValueError(
                f"time_step={time_step} and margin={margin}: a step has to fit between the margins of [0, 1], which "
                "are above 0 and below .5."
            )
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio={ratio}: the second point lies within the step, in (0, 1]; 1/2 is the mid-point.")
        if source == "gaussian" and perturbation:
            raise ValueError(f"perturbation={perturbation:g} adds noise to a source that is noise; leave it out.")
        self.source, self.perturbation = source, perturbation
        self.time_step, self.ratio, self.margin = time_step, ratio, margin

    def check_configuration(self) -> None:
        """The path from a source is straight."""
        super().check_configuration()
        if not isinstance(self.process, FlowMatching):
            raise ValueError(
                f"OFTSR distils a flow between pictures and their sources, and the teacher works with "
                f"{self.process!r}; use a teacher trained with FlowMatching, or BOOT for one that starts from noise."
            )

    def build_roles(self) -> None:
        """The student, which begins where the teacher's trajectories do."""
        super().build_roles()
        begins = self.require_teacher().family.start
        named = None if self.source in (None, "gaussian") else (str(self.source), self.perturbation)
        if begins is None and named is not None:  # a teacher that was not told where its samples begin
            teacher = self.require_teacher()
            teacher.family = replace(teacher.family, start=named)
        if begins is not None and self.source is not None and begins != named:
            raise ValueError(
                f"the teacher's samples begin at {begins[0]!r} with a share of noise of {begins[1]:g}; give "
                f"OFTSR(source={begins[0]!r}, perturbation={begins[1]:g})."
            )
        self.student.family = replace(self.student.family, start=named)

    # ------------------------------------------------------------------------------------------------ the source
    def sources(self, batch: Batch) -> Tensor:
        """x_src of a batch, (B, ...)."""
        if self.source == "gaussian":
            return self.draws.normal("source", (batch.size, *self.sample_shape))
        noise = self.draws.normal("perturbation", (batch.size, *self.sample_shape))
        if self.source is not None:
            return beginning(self.student, noise, batch.cond)
        if batch.noise is None or batch.noise.shape != noise.shape:
            seen = "no Batch(noise=...)" if batch.noise is None else f"noise of shape {tuple(batch.noise.shape)}"
            raise ValueError(
                f"OFTSR starts from the picture to be restored, and the batch has {seen}; use a data module that "
                f"yields it, enlarged to the shape of the samples, {tuple(noise.shape)}."
            )
        return perturbed_source(batch.noise, noise, self.perturbation)

    @torch.no_grad()
    def sample(
        self, n: int, cond: Mapping[str, Any] | None = None, *, noise: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Restored samples from the sources of ``cond``, or ``noise`` as the sources; see ``StudentSampling.sample``.

        Args:
            n: number of samples.
            cond: conditions, tensors of n rows, the source among them where it is one.
            noise: with ``source=None`` the sources themselves, without the noise of the perturbation; else that of the
                perturbation or the start.
            **options: as there.

        Raises:
            ValueError: neither is given.
        """
        if self.source is None and noise is None:
            raise ValueError(
                "this OFTSR was trained from the noise field of batches, the pictures to be restored; give "
                "sample(noise=...) these pictures."
            )
        if self.source is None and noise is not None and self.perturbation:
            fresh = draw_noise(noise.shape, options.get("generator")).to(noise)
            noise = perturbed_source(noise, fresh, self.perturbation)
        return super().sample(n, cond, noise=noise, **options)

    def evaluation_times(self, num_steps: int | None = None) -> list[float]:
        """As ``StudentSampling.evaluation_times``; where batches bring the pictures, there are none to begin at."""
        if self.source is None:
            raise ValueError(
                "this OFTSR was trained from the noise field of batches, the pictures to be restored, which callbacks "
                "and commands that make samples have not; let the data give them as a condition, OFTSR(source=name), "
                "or leave SampleGrid and GenerativeEvaluation out and look at sample(noise=pictures)."
            )
        return super().evaluation_times(num_steps)

    @torch.no_grad()
    def restore(
        self,
        source: Tensor,
        cond: Mapping[str, Any] | None = None,
        realism: float = 1.0,
        weights: str | None = None,
    ) -> Tensor:
        """Restored samples, by one network call.

        Args:
            source: x_src, perturbed as in training, (n, *shape).
            cond: conditions, n rows.
            realism: 1 - r, from 0 (the mean of what is plausible) to 1 (one plausible sample).
            weights: which network; see ``sampling_network``.

        Returns:
            (n, *shape).
        """
        if not 0.0 <= realism <= 1.0:
            raise ValueError(f"realism={realism}: give a number from 0 (fidelity) to 1 (realism).")
        network = self.sampling_network(weights)
        start = torch.full((len(source),), self.process.t_max, dtype=torch.float64, device=source.device)
        with evaluation_mode(network):
            u = network(source, start, cond, r=(1.0 - realism) * start)
        assert not isinstance(u, dict)
        return source - u.flow_prediction

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Restored samples of a batch's sources."""
        batch = as_batch(batch)
        noise = batch.noise if self.source is None else None
        return self.sample(batch.size, batch.cond, noise=noise)

    # ------------------------------------------------------------------------------------------------ loss
    def student_loss(self, batch: Batch) -> Terms:
        """Trajectory, boundary and alignment."""
        n, x = batch.size, self.sources(batch)
        one = torch.ones(n, dtype=torch.float64, device=x.device)
        r = self.margin + (1.0 - 2.0 * self.margin) * self.flow_times("r", n)
        later = (r - self.time_step).clamp_min(0.0)
        average = self.average(self.student, batch, self.told_scale(one))
        u = average(x, one, r)
        teacher = self.guided_teacher(batch)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return teacher(x, t.clamp_min(t_min(self.process))).flow_prediction  # at 0 no x0 says which noise it was

        step, first = runge_kutta_velocity(velocity, flow_jump(x, u.detach(), one, r), r, later, self.ratio)
        target = trajectory_target(u, step, r, later)
        return Terms(
            {
                "trajectory": (average(x, one, later) - target).square().mean(),
                "boundary": (average(x, one, one) - velocity(x, one)).square().mean(),
                "alignment": alignment_loss(u, first, r),
            }
        )

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update."""
        return {"student": {"student": 3, "teacher": 3}}
