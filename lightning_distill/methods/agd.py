"""AGD: classifier-free guidance in one pass, by adapters on a frozen model (arXiv:2503.07274)."""

from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, RandomGuidance
from lightning_distill.methods.guidance_distillation import GuidanceDistillation, pure_noise
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.guidance_adapters import GuidanceAdapters, GuidedDenoiser
from lightning_distill.networks.roles import Role
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.optim import default_optimizer

__all__ = ["AGD"]


class AGD(GuidanceDistillation):
    """Adapters beside the attention modules learn what guidance does, on the trajectories that guidance makes.

        once:    w ~ U[1, 6] per record;  x_t along the trajectory of  eps_u + w (eps_c - eps_u),  both stored
        train:   L = | eps_A(x_t, t, c, w) - [ eps_u + w (eps_c - eps_u) ](x_t, t) |^2     over the adapters A alone

    The states are those the student meets when it samples; noised data are not. The teacher's weights are shared, stay
    as they are, and are not called in training:

        lightning-distill trajectories --teacher ... --records guided --guidance 1 6 --out store

    Args:
        teacher: a model with an unconditional branch.
        student: None for ``GuidanceAdapters()``.
        guidance: scales of trajectories that are solved in training, and its ``scale`` what a sample is made with;
            stored records have their own. None for ``RandomGuidance(1, 6)``; the paper's text models have 1 to 12.
        space: prediction type that is compared; None for ``epsilon``, the paper's, where it says something of the first
            input, and ``flow_prediction`` where that is pure noise (its noise is known then).
        student_optimizer: None for AdamW with learning rate 1e-4 and no weight decay.
        **kwargs: see ``GuidanceDistillation``.

    Notes:
        Where batches have no stored records, a guided trajectory is solved for each sample and one state of it used:
        the same states, for as many teacher calls as it has steps.
        The paper trains for 5,000 updates of 64 states; here a record gives all of its stored states at once.
        A run is the teacher of a stage for fewer steps (``RunDenoiser``): students made by ``Copy`` or ``Lora`` begin
        with its adapters, are told the scale in one pass, and train adapters and network together. No stock pipeline
        has the adapters, so such students are sampled from their runs.
    """

    paper = "2503.07274"
    learns_from = "teacher's stored guided records, or noise"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        student: Role | None = None,
        guidance: Guidance | None = None,
        space: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] | None = None,
        student_optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            teacher,
            student=student or GuidanceAdapters(),
            guidance=guidance or RandomGuidance(1.0, 6.0),
            space=space or "flow_prediction",
            student_optimizer=student_optimizer or default_optimizer(1e-4, weight_decay=0.0),
            **kwargs,
        )
        self._papers_space = space is None

    def build_roles(self) -> None:
        """The adapters, and the space in which they are compared."""
        super().build_roles()
        if self._papers_space and not pure_noise(self.process):
            self.space = "epsilon"

    def check_configuration(self) -> None:
        """The student is a set of adapters."""
        if not isinstance(self.student, GuidedDenoiser):
            raise ValueError(
                "AGD trains adapters on the teacher's frozen network; give student=GuidanceAdapters(...), or use "
                "GuidanceDistillation for a student of another kind."
            )
        super().check_configuration()

    def examples(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], Tensor | None]:
        """States of guided trajectories, stored or solved now."""
        if batch.x0 is not None and (batch.states is None or "guided" not in batch.predictions):
            raise ValueError(
                "AGD learns on guided trajectories, but the loader yields data without them; give "
                "Trajectories(path=...) of 'lightning-distill trajectories --records guided', or Prior for "
                "trajectories that are solved in training. For noised data use "
                "GuidanceDistillation(student=GuidanceAdapters())."
            )
        return super().examples(batch)

    def forward_counts(self) -> dict[str, dict[str, int]]:
        """Network calls of an update that solves its trajectories; stored records need none of the teacher."""
        return {"student": {"student": 1, "teacher": self.solver_calls + 1}}
