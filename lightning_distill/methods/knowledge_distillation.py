"""Regression of the teacher's samples from the noise they came from (Luhman and Luhman, arXiv:2101.02388)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.losses.consistency import distance
from lightning_distill.methods.base import Terms
from lightning_distill.methods.perceiving import Perceptual, perceived, perceiving_calls
from lightning_distill.methods.teacher_paths import TeacherPaths
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import Capability

__all__ = ["InstaFlow", "KnowledgeDistillation"]


class KnowledgeDistillation(TeacherPaths):
    """From every state of the student's time list to where the teacher's solver ends from there.

        L = d( x0_S(x_i, t_i), x0 ),     x_i the state of the teacher's trajectory at the student's time t_i

    The simplest distillation, and a good start for others; with one step the pair of noise and sample is all it needs.

    Args:
        teacher: the pretrained model.
        metric: distance, see ``losses.consistency.distance``.
        huber: constant of pseudo-Huber, None for the default.
        perceptual: further distance with the weight ``student/perceptual``: LPIPS, or that of the teacher's own
            features; None for none.
        sampler: ``ode`` or ``renoise``.
        **kwargs: see ``TeacherPaths`` and ``TrajectoryMethod``.

    Raises:
        ValueError: the trajectories have no state at one of the student's times.

    Notes:
        A later step is trained on the teacher's states and sampled from what the student's own steps leave, which lies
        on the line to its prediction: several steps are a start for other methods rather than a better sampler.
        Squared distances blur what the student cannot represent; pseudo-Huber and perceptual ones do so less.
        ``pseudo_huber`` is a norm of the whole sample and grows with sqrt(D), ``perceptual`` does not: set
        ``loss_weights: {student/perceptual: ...}`` by what ``TrainingHealth`` shows of their gradients, or take
        ``pseudo_huber_elementwise``.
    """

    paper = "2101.02388"
    learns_from = "teacher's pairs, stored or made from noise"
    samplers = ("ode", "renoise")
    capability: ClassVar[Capability | None] = "own_times"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "pseudo_huber",
        huber: float | None = None,
        perceptual: Perceptual | None = None,
        sampler: Literal["ode", "renoise"] = "ode",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, sampler=sampler, **kwargs)
        self.metric, self.huber = metric, huber
        self.perceptual = perceptual

    def solver_times(self) -> list[float]:
        """The solver's grid with the student's times in it."""
        return self.grid_with_steps()

    def starts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs of all student steps (K, B, ...) and the teacher's samples (B, ...)."""
        times = self.student_times
        if len(times) == 1 and batch.noise is not None:
            return self.process.prior(batch.noise, times[0])[None], self.data(batch)
        if batch.states is None and (batch.noise is not None or batch.x0 is not None):
            self.pairs(batch)  # says so where the data came from no noise
            raise ValueError(
                f"the pairs have no states at the student's {len(times)} times; store them with 'lightning-distill "
                f"trajectories --records points --points {len(times)}', or distil to one step."
            )
        states, grid = self.trajectory(batch)
        return states[self.rows_of_steps(grid)[:-1]], states[-1]

    def student_loss(self, batch: Batch) -> Terms:
        """Distance of every step's prediction from the end."""
        inputs, x0 = self.starts(batch)
        steps, n = len(inputs), batch.size
        t = torch.tensor(self.student_times, dtype=torch.float64, device=x0.device).repeat_interleave(n)
        row = torch.arange(n, device=t.device).repeat(steps)
        scale = self.pair_scale(batch, t[:n])
        scale = None if scale is None else scale[row]
        cond = batch.cond_of(row)
        made = self.student(inputs.flatten(0, 1), t, cond, guidance=scale).x0
        goal = x0[row]
        return Terms(self.terms_of(made, goal, cond, n), {"mse": (made.detach() - goal).square().mean()})

    def terms_of(self, made: Tensor, goal: Tensor, cond: Mapping[str, Any], n: int) -> dict[str, Tensor]:
        """Loss terms of predictions whose ends are known, by name.

        Args:
            made: predictions of all steps of n samples, (K n, ...).
            goal: their ends.
            cond: their conditions.
            n: number of samples.
        """
        terms = {"regression": distance(made, goal, self.metric, self.huber).mean()}
        if self.perceptual is not None:
            terms["perceptual"] = perceived(self.perceptual, self, made, goal, cond, len(made) // n).mean()
        return terms

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update whose pairs are made in training."""
        return {"student": {"student": 1, "teacher": self.solver_calls + perceiving_calls(self.perceptual)}}


class InstaFlow(KnowledgeDistillation):
    """The second stage of InstaFlow: a straightened flow becomes a one-step generator.

        L = d( x0_S(eps, 1), ODE_T(eps) )

    The teacher is the student of ``Reflow`` (``RunDenoiser(path)``): its coupling of noise and samples is one that a
    single step can follow, where that of the original model is not.

    Args:
        teacher: the straightened flow.
        **kwargs: see ``KnowledgeDistillation``; the paper goes from squared to perceptual distance.
    """

    paper = "2309.06380"

    def check_configuration(self) -> None:
        """One step."""
        super().check_configuration()
        if len(self.student_times) != 1:
            raise ValueError(
                f"InstaFlow distils to one step, and the student has {len(self.student_times)}; use "
                "KnowledgeDistillation for more."
            )
