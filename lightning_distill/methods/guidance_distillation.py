"""Guidance distillation: one pass of the student for the two of a guided teacher (arXiv:2210.03142)."""

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.guidance import RandomGuidance
from lightning_distill.losses.consistency import distance
from lightning_distill.methods.base import Terms
from lightning_distill.methods.teacher_paths import TeacherPaths
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import Capability
from lightning_distill.prediction import PREDICTION_TYPES, Prediction
from lightning_distill.processes import NoiseProcess
from lightning_distill.times import TimeDistribution, bounded

__all__ = ["GuidanceDistillation"]


def pure_noise(process: NoiseProcess) -> bool:
    """Whether nothing of the data is left at t_max, so that a prediction of the noise is no prediction there."""
    return float(process.alpha(torch.tensor(process.t_max, dtype=torch.float64))) < 1e-3


class GuidanceDistillation(TeacherPaths):
    """The student predicts what the guided teacher predicts; as many steps, half of the network calls.

        L = | v_S(x_t, t, c, w) - sg[ v_u + w (v_c - v_u) ](x_t, t) |^2

    A stage before any step distillation, whose teacher is then the student (``RunDenoiser``) without guidance.

    With data, x_t is noised data (the paper). With stored ``guided`` records the states and predictions of guided
    trajectories are used, and no teacher is called (AGD, arXiv:2503.07274: what the student meets when it samples).
    From noise alone, trajectories of the guided teacher are solved and one state of each is used.

    Args:
        teacher: a model with an unconditional branch.
        guidance: w: one scale for a student that is told none; ``RandomGuidance`` for one that embeds it
            (``student=TwoTime(kind=None, guidance=True)`` or ``GuidanceAdapters()``).
        student: with ``Lora()`` or ``GuidanceAdapters()`` student and teacher are one set of weights in memory.
        times: distribution of the times of noised data; None for uniform (Karras' in EDM).
        metric: distance of predictions, see ``losses.consistency.distance``.
        space: prediction type that is compared; the default is the velocity eps - x0.
        huber: constant of pseudo-Huber, None for the default.
        num_steps: those of sampling; the student needs as many as its teacher.
        sampler: ``ode``, ``heun`` or ``dpmpp_2m``.
        **kwargs: see ``TeacherPaths`` and ``TrajectoryMethod``.

    Raises:
        ValueError: no guidance, or a random scale that the student is not told.

    Notes:
        The paper weights x0-predictions by max(SNR, 1); velocities need no weight at either end.
    """

    paper = "2210.03142"
    learns_from = "teacher; data, stored guided records or noise"
    samplers = ("ode", "heun", "dpmpp_2m")
    capability: ClassVar[Capability | None] = None

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        times: TimeDistribution | None = None,
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "mse",
        huber: float | None = None,
        space: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "flow_prediction",
        num_steps: int = 50,
        sampler: Literal["ode", "heun", "dpmpp_2m"] = "ode",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, num_steps=num_steps, sampler=sampler, **kwargs)
        if space not in PREDICTION_TYPES:
            raise ValueError(f"space={space!r} is unknown; choose one of {', '.join(PREDICTION_TYPES)}.")
        self._given_distribution = times
        self.metric, self.huber, self.space = metric, huber, space

    def check_configuration(self) -> None:
        """There must be guidance, and one that the student can know."""
        super().check_configuration()
        if not self.guidance.needs_null:
            raise ValueError(
                "GuidanceDistillation has nothing to distil at guidance scale 1; give guidance=Guidance(w) or "
                "RandomGuidance(low, high)."
            )
        if self.space == "epsilon" and pure_noise(self.process):
            rank_zero_warn(
                "space='epsilon' compares nothing at the first input, which is pure noise and where guidance does "
                "most; use space='flow_prediction'."
            )
        if isinstance(self.guidance, RandomGuidance) and not self._tells_scale:
            raise ValueError(
                "a random guidance scale must be told to the student; give student=TwoTime(kind=None, guidance=True) "
                "or GuidanceAdapters(), or guidance=Guidance(w) with one scale."
            )

    @torch.no_grad()
    def examples(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], Tensor | None]:
        """Inputs x_t (N, ...), their times (N,), the guided velocities, conditions, and scales to tell (N,)."""
        n, stored = batch.size, batch.predictions.get("guided")
        if stored is not None and batch.states is not None and batch.times is not None:
            count = batch.states.shape[1]
            t = batch.times.to(stored.device).double().repeat(n)
            row = torch.arange(n, device=t.device).repeat_interleave(count)
            scale = self.pair_scale(batch, batch.times.to(t)[:1].expand(n))
            cond = batch.cond_of(row)
            told = None if scale is None else scale[row]
            return batch.states.flatten(0, 1), t, stored.flatten(0, 1), cond, told
        if batch.x0 is not None:
            distribution = self._given_distribution or bounded(self.process, 0.0, 1.0)
            x, t, _ = self.renoise(batch.x0, distribution)
        else:
            states, times = self.trajectory(batch)
            row = (self.draws.uniform("state", n) * (len(times) - 1)).long().clamp_max(len(times) - 2)
            x, t = states[row, torch.arange(n, device=row.device)], times[row]
        velocity = self.guided_teacher(batch)(x, t).flow_prediction
        return x, t, velocity, dict(batch.cond), self.told_scale(t)

    def student_loss(self, batch: Batch) -> Terms:
        """Distance of predictions."""
        x, t, velocity, cond, scale = self.examples(batch)
        goal = Prediction(velocity, x, t, self.process, "flow_prediction").as_type(self.space)
        made = self.student(x, t, cond, guidance=scale).as_type(self.space)
        loss = distance(made, goal, self.metric, self.huber).mean()
        return Terms({"guidance": loss}, {"mse": (made.detach() - goal).square().mean()})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update on data; both branches of the teacher are one."""
        return {"student": {"student": 1, "teacher": 1}}
