"""What consistency and flow-map methods share: data on the teacher's trajectories, its guidance, the student's maps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, check_guidance, is_told
from lightning_distill.methods.base import DistillationModule
from lightning_distill.methods.derivatives import check_differences, check_tangent
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy, Role
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.parameterisations import Capability, takes_target
from lightning_distill.prediction import Prediction
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving, change_process, expand
from lightning_distill.samplers import check_capability
from lightning_distill.tangents import TangentMode
from lightning_distill.times import TimeDistribution, Uniform, few_step_times, t_min

__all__ = ["FlowMethod", "TrajectoryMethod", "TwoTimeMethod"]


class TrajectoryMethod(DistillationModule):
    """Base of methods whose student jumps along the trajectories of the teacher's probability-flow ODE.

    Args:
        teacher: the pretrained model.
        guidance: guidance of the teacher, whose trajectories are then the guided ones; a teacher that embeds a scale is
            told it. Where the student embeds one (``student=TwoTime(kind=None, guidance=True)``), it is told that of
            each sample, in and outside of intervals, and ``guidance.scale`` when it is sampled.
        **kwargs: see ``DistillationModule``.
    """

    capability: ClassVar[Capability | None] = "any_step"
    #: whether the loss uses the teacher's predictions; else only the student's weights come from it
    asks_teacher: bool = True

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        guidance: Guidance | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        self.guidance = guidance or Guidance(1.0)
        self._tells_scale = False
        #: flow-matching times of the process' noisiest one and of the least that its networks know
        self._flow_max, self._flow_min = 1.0, 0.0
        #: standard deviation, in flow-matching coordinates, of the noise at which samples begin
        self._flow_start = 1.0

    def build_roles(self) -> None:
        """The student; one that embeds a guidance scale is sampled with that of ``guidance``."""
        super().build_roles()
        end = torch.tensor(self.process.t_max, dtype=torch.float64)
        top, scale = change_process(end, self.process, FlowMatching())
        self._flow_max = float(top.max())
        # without zero terminal SNR more than the noise at that time: what was left of the data is missing
        self._flow_start = float(scale.max()) * self.process.prior_std(self.process.t_max)
        if isinstance(self.process, (VariancePreserving, EDM)):
            # a hair above, on the side of the schedule that the networks know: derivatives differ there
            least = torch.tensor(t_min(self.process), dtype=torch.float64) * (1.0 + 1e-9)
            self._flow_min = float(change_process(least, self.process, FlowMatching())[0])
        # a teacher that embeds a scale tells its default where nothing else is asked for, and so does its student
        told = is_told(self.require_teacher()) and not self.guidance.needs_null
        self._tells_scale = self.student.embeds_guidance and not told
        if self._tells_scale:
            self.student.family = replace(self.student.family, guidance_scale=self.guidance.scale)

    def check_configuration(self) -> None:
        """Guidance must be possible, and the student be sampled as it is trained."""
        super().check_configuration()
        if not self.asks_teacher and self.guidance.needs_null:
            raise ValueError(
                f"this {type(self).__name__} learns from data and asks no teacher, so guidance has no effect; leave "
                "it out."
            )
        check_guidance(self.require_teacher(), self.guidance)
        # of the method, or of its continuous-time term
        modes = (getattr(part, "tangent", "jvp") for part in (self, getattr(self, "consistency", None)))
        for mode in modes:
            check_differences(self.student, mode)
        check_capability(self, self.sampler, self.student_times, self.process)

    # ------------------------------------------------------------------------------------------------ parts of losses
    def data(self, batch: Batch) -> Tensor:
        """Clean samples of the batch, (B, ...)."""
        if batch.x0 is None:
            raise ValueError(
                f"{type(self).__name__} starts from noised data, but the loader yields batches without x0; use a data "
                "module with samples (or stored samples of the teacher), or a method that starts from noise alone: "
                "FreeFlow, BOOT, CMT."
            )
        return batch.x0

    def told_scale(self, t: Tensor) -> Tensor | None:
        """Guidance scales that the student is told, (B,); None where it embeds none.

        Args:
            t: native times, (B,).
        """
        if not self._tells_scale:
            return None
        scale = self.guidance.label(self.draws.uniform("guidance", len(t)))
        return torch.as_tensor(scale, dtype=torch.float64, device=t.device).expand(len(t))

    def guided_teacher(self, batch: Batch) -> Callable[[Tensor, Tensor], Prediction]:
        """The teacher with the batch's conditions and guidance, in native times and without graph."""
        teacher, u = self.require_teacher(), self.draws.uniform("guidance", batch.size)

        @torch.no_grad()
        def denoise(x: Tensor, t: Tensor) -> Prediction:
            t = t.expand(len(x)) if t.ndim == 0 else t
            return self.guidance(teacher, x, t, batch.cond, u)

        return denoise

    def native(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """A flow-matching sample and time as the networks' process has them."""
        if isinstance(self.process, FlowMatching):
            return x, t
        time, scale = change_process(t, FlowMatching(), self.process, beyond=True)
        return expand(scale, x) * x, time

    def solver_grid(self, intervals: int) -> list[float]:
        """Descending native times from t_max to ``t_min``: the trailing grid, Karras' in EDM.

        Args:
            intervals: number of steps.

        Returns:
            ``intervals`` + 1 times.
        """
        return [*few_step_times(self.process, intervals), t_min(self.process)]


class FlowMethod(TrajectoryMethod):
    """Base of methods whose loss is written in flow-matching coordinates, x = (1 - t) x0 + t eps.

    Whatever the process of the networks is: samples are rescaled and times converted at their edge, exactly.

    Args:
        teacher: the pretrained model.
        training_times: distribution of flow-matching times.
        tangent: how derivatives of the student are taken, see ``tangents``.
        tangent_step: step of differences, None for the default.
        **kwargs: see ``TrajectoryMethod``.
    """

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        training_times: TimeDistribution | None = None,
        tangent: TangentMode = "jvp",
        tangent_step: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        check_tangent(tangent, tangent_step)
        self.training_times = training_times or self.default_times()
        self.tangent = tangent
        self.tangent_step = tangent_step

    def default_times(self) -> TimeDistribution:
        """Distribution of flow-matching times where none is given."""
        return Uniform(0.0, 1.0)

    # ------------------------------------------------------------------------------------------------ parts of losses
    def flow_times(self, name: str, n: int) -> Tensor:
        """Flow-matching times that the networks know, drawn from ``training_times``, (n,), float64."""
        u = self.draws.uniform(name, n)
        return self.training_times.quantile(u, FlowMatching()).clamp(self._flow_min, self._flow_max)

    def flow_state(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noised data and the velocity eps - x0 of the pair, (B, ...) each.

        Args:
            batch: with data.
            t: flow-matching times, (B,).
        """
        x0 = self.data(batch)
        eps = self.draws.normal("noise", x0.shape)
        return FlowMatching().add_noise(x0, eps, t), eps - x0

    def teacher_velocity(self, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
        """The guided teacher's velocity at a flow-matching sample and a time, the least it knows if below; no graph."""
        return self.guided_teacher(batch)(*self.native(x, t.clamp_min(self._flow_min))).flow_prediction


class TwoTimeMethod(FlowMethod):
    """Base of methods whose student is an average velocity u(x, t, r) between two times.

    Args:
        teacher: the pretrained model.
        student: ``TwoTime(...)``, which gives a network its target time; None for one around a copy.
        sampler: how student steps are chained: ``flow_map``, ``renoise`` (each a jump to 0), or ``ode``, which follows
            u(x, t, t).
        **kwargs: see ``FlowMethod`` and ``TrajectoryMethod``.
    """

    samplers: ClassVar[tuple[str, ...]] = ("flow_map", "renoise", "ode")
    capability: ClassVar[Capability | None] = "two_time"
    takes_target: ClassVar[bool] = True

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        student: Role | None = None,
        sampler: Literal["flow_map", "renoise", "ode"] = "flow_map",
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, student=student, sampler=sampler, **kwargs)
        self._default_role = student is None

    def default_role(self) -> Role:
        """The student where none is given, for a teacher of one time."""
        return TwoTime()

    def build_roles(self) -> None:
        """The student, with a target time."""
        if self._default_role:
            self._student_role = Copy() if takes_target(self.require_teacher()) else self.default_role()
        super().build_roles()
        if not takes_target(self.student):
            raise ValueError(
                f"{type(self).__name__} trains a network with a target time, and the student "
                f"({type(self.student.network).__name__}) takes one time; give student=TwoTime(role=...)."
            )
        self.student.jumps = True

    def average(self, network: Denoiser, batch: Batch, scale: Tensor | None = None) -> Callable[..., Tensor]:
        """u(x, t, r) in flow-matching coordinates.

        Args:
            network: the student or an average.
            batch: its conditions.
            scale: guidance scales it is told, see ``told_scale``.
        """

        def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            r = self.native(x, r)[1]
            prediction = network(*self.native(x, t), batch.cond, r=r, guidance=scale)
            return prediction.flow_prediction

        return u
