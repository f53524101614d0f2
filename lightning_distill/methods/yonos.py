"""YONOS: scale distillation, whose teacher sees an easier condition (arXiv:2401.17258)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.ema import renew_copy
from lightning_distill.losses.consistency import distance
from lightning_distill.methods.base import Terms
from lightning_distill.methods.guards import check_schedule
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import averaged_copy
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import Capability
from lightning_distill.prediction import PREDICTION_TYPES
from lightning_distill.times import TimeDistribution, bounded

__all__ = ["YONOS"]

Space = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]


class YONOS(TrajectoryMethod):
    """The student predicts from a hard condition what the teacher predicts from an easy one, at the same noisy sample.

        L = | y_S(x_t, t, low_s) - sg y_T(x_t, t, low_s/2) |^2,     stage by stage: s = 2 -> 4 -> 8

    A teacher that is told more is more certain of the clean sample, at every noise level. Where the hard condition
    follows from the easy one, the student's optimum is the posterior mean under its own condition: the mean of the
    teacher's. It is meant for one step, from a network that was a good denoiser already.

    Args:
        teacher: a conditional model for the easiest condition; the student starts as it.
        easier: what the teacher of each stage sees, easiest first: a mapping from the names of conditions to the names
            under which the batch has their easier versions (``{low: low_2}``), or a function from the batch's
            conditions to the teacher's. The student of a stage sees what the next stage's teacher does, that of the
            last the conditions as they are.
        stage_updates: student updates of a stage; the last goes on until the run ends.
        space: in which predictions are compared, a prediction type; None for the student's own, or ``flow_prediction``
            where its network lives in another process.
        times: distribution of t; None for uniform (Karras' in EDM).
        metric: distance of predictions, see ``losses.consistency.distance``.
        huber: constant of pseudo-Huber, None for the default.
        **kwargs: see ``TrajectoryMethod``.

    Raises:
        ValueError: no easier condition, or one that the batch lacks.

    Notes:
        Reconstructed from the abstract and a summary: the space of the loss and the distribution of times are open, as
        is how much of the data's own error is added (none here). The paper then fine-tunes the decoder of the latents
        alone, which is no part of this class.
        The teacher of a later stage is the first average of the student before, or the student itself with ``ema=[]``.
    """

    paper = "2401.17258"
    learns_from = "teacher, data with easier conditions"
    capability: ClassVar[Capability | None] = None
    targets = ("source",)

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        easier: Sequence[dict[str, str] | Callable[[dict[str, Any]], dict[str, Any]]] = (),
        stage_updates: int = 10_000,
        space: Space | None = None,
        times: TimeDistribution | None = None,
        metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = "mse",
        huber: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        if not easier or stage_updates < 1:
            raise ValueError(
                f"easier={list(easier)}, stage_updates={stage_updates}: the teacher of at least one stage has an "
                "easier condition than the student, for example easier=[{low: low_2}] with the data of "
                "SuperResolution(easier=[2]), and a stage has at least one update."
            )
        if space is not None and space not in PREDICTION_TYPES:
            raise ValueError(f"space={space!r} is unknown; choose one of {', '.join(PREDICTION_TYPES)}.")
        self.easier = list(easier)
        self.stage_updates = stage_updates
        self.space = space
        self._given_distribution = times
        self.metric: Literal["l2", "mse", "l1", "pseudo_huber", "pseudo_huber_elementwise"] = metric
        self.huber = huber
        named = [view for view in self.easier if isinstance(view, dict)]
        #: conditions that exist for teachers alone
        self.privileged = {name for view in named for name in view.values()} - {key for view in named for key in view}
        self.source: Denoiser | None = None

    def build_roles(self) -> None:
        """The student, and its predecessor where there are several stages."""
        super().build_roles()
        self.source = averaged_copy(self.student, "source") if len(self.easier) > 1 else None

    def train(self, mode: bool = True) -> "YONOS":
        """As usual; the predecessor stays in eval mode."""
        super().train(mode)
        if self.source is not None:
            self.source.eval()
        return self

    def on_fit_start(self) -> None:
        """Say so where the run ends before the student has seen its own condition."""
        super().on_fit_start()
        before = (len(self.easier) - 1) * self.stage_updates
        check_schedule(self, "stage_updates", before + 1, "the student has not seen the condition of its last stage")

    # ------------------------------------------------------------------------------------------------ stages
    def stage(self) -> int:
        """Stage of this update, from 0."""
        return min(self.draws.update // self.stage_updates, len(self.easier) - 1)

    @torch.no_grad()
    def after_phase(self, phase: str) -> None:
        """At the end of a stage its student becomes the next one's teacher."""
        super().after_phase(phase)
        done, ends = divmod(self.draws.update + 1, self.stage_updates)
        if self.source is not None and ends == 0 and done < len(self.easier):
            renew_copy(self.source, self.sampling_network())

    def conditions(self, batch: Batch, stage: int) -> dict[str, Any]:
        """What the teacher of a stage sees; for the number of stages: what the last student does.

        Args:
            batch: with all versions of its conditions.
            stage: from 0.

        Raises:
            ValueError: the batch lacks a version.
        """
        plain = {key: value for key, value in batch.cond.items() if key not in self.privileged}
        if stage == len(self.easier):
            return self.student.accepted(plain)
        view = self.easier[stage]
        if not isinstance(view, dict):
            return view(dict(batch.cond))
        if missing := [name for name in view.values() if name not in batch.cond]:
            raise ValueError(
                f"the teacher is to see {missing[0]!r}, and the batch has the conditions {sorted(batch.cond)}; let the "
                "data module yield it (SuperResolution(easier=[2]) makes low_2)."
            )
        return {**plain, **{key: batch.cond[name] for key, name in view.items()}}

    # ------------------------------------------------------------------------------------------------ loss
    @torch.no_grad()
    def target(self, batch: Batch, x_t: Tensor, t: Tensor, space: str) -> Tensor:
        """The teacher's prediction at a noisy sample, in a space, (B, ...)."""
        stage = self.stage()
        cond = self.conditions(batch, stage)
        if stage == 0:
            return self.guided_teacher(replace(batch, cond=cond))(x_t, t).as_type(space)
        assert self.source is not None
        return self.source(x_t, t, cond, guidance=self.told_scale(t)).as_type(space)

    def student_loss(self, batch: Batch) -> Terms:
        """Distance of the two predictions."""
        x_t, t, _ = self.renoise(self.data(batch), self._given_distribution or bounded(self.process, 0.0, 1.0))
        inner = self.student.network_process is not None  # whose prediction type has another weight out here
        space = self.space or ("flow_prediction" if inner else self.student.prediction_type)
        goal = self.target(batch, x_t, t, space)
        cond = self.conditions(batch, self.stage() + 1)
        made = self.student(x_t, t, cond, guidance=self.told_scale(t)).as_type(space)
        loss = distance(made, goal, self.metric, self.huber).mean()
        return Terms({"scale": loss}, {"stage": torch.full((), float(self.stage()))})

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update of the first stage."""
        return {"student": {"student": 1, "teacher": 1}}
