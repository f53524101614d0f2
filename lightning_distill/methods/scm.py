"""sCM: continuous-time consistency in TrigFlow (arXiv:2410.11081)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_distill.batch import Batch
from lightning_distill.losses.continuous import (
    continuous_loss,
    normalise_tangent,
    rcm_tangent,
    scm_directions,
    scm_tangent,
    tangent_warmup,
    training_velocity,
    trig_weight,
)
from lightning_distill.methods.base import Terms
from lightning_distill.methods.derivatives import check_tangent
from lightning_distill.methods.trajectory import TrajectoryMethod
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import _TimeFeatures
from lightning_distill.networks.specs import DenoiserSpec
from lightning_distill.parameterisations import trigflow_input, trigflow_velocity
from lightning_distill.prediction import Prediction
from lightning_distill.processes import TrigFlow
from lightning_distill.tangents import TangentMode, value_and_tangent
from lightning_distill.times import LogNormal, TimeDistribution

PriorWeight = Literal["trig", "one", "unit"]

__all__ = ["SCM", "ContinuousConsistency", "LogVariance", "Points", "PriorWeight"]


class LogVariance(nn.Module):
    """The learned function u(t) that weighs times against each other (arXiv:2312.02696, Section 2.4); 0 at first.

    Args:
        features: number of sinusoids of the time.
    """

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.waves = _TimeFeatures(features)
        self.outer = nn.Linear(features, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, t: Tensor) -> Tensor:
        """U of TrigFlow times (B,), float32."""
        return self.outer(self.waves(t.float()))[:, 0]


@dataclass
class Points:
    """Where the tangent is taken.

    Attributes:
        x: TrigFlow samples of unit standard deviation, (B, ...).
        tau: TrigFlow times, (B,), float64.
        velocity: dx/dtau, (B, ...), without graph.
        cond: conditions of the samples.
        scale: guidance scales that the student is told, (B,) or None.
    """

    x: Tensor
    tau: Tensor
    velocity: Tensor
    cond: Mapping[str, Any]
    scale: Tensor | None


class ContinuousConsistency:
    """The term of continuous-time consistency, for any method with a student.

        x = cos(tau) x0 / sd + sin(tau) eps,     F <- F + g / (|g| + c),     g the tangent of ``losses.continuous``

    Args:
        times: distribution of TrigFlow times, those of data of unit standard deviation.
        from_data: dx/dtau is that of the pair (x0, eps) instead of the teacher's.
        tangent: how the derivative of the student is taken, see ``tangents``.
        tangent_step: step of differences, None for the default.
        warmup_updates: H, student updates in which the tangent's part beyond the teacher's direction grows to 1.
        warmup: which terms it weakens: those of the ``paper``, or of ``rcm`` (see ``losses.continuous.rcm_tangent``).
        constant: c.
        norm: ``full`` or ``rms``, see ``normalise_tangent``.
        weight: prior weight of a time: ``trig``, 1 / tan(tau); ``one``; or ``unit``, with which a normalised tangent
            has a loss of 1 at most, at every time and in every number of dimensions.
        one_pass: take the exact derivative out of the pass of the value, see ``tangents.value_and_tangent``.
    """

    def __init__(
        self,
        times: TimeDistribution | None = None,
        from_data: bool = False,
        tangent: TangentMode = "jvp",
        tangent_step: float | None = None,
        warmup_updates: int = 10_000,
        warmup: Literal["paper", "rcm"] = "paper",
        constant: float = 0.1,
        norm: Literal["full", "rms"] = "full",
        weight: PriorWeight = "trig",
        one_pass: bool = False,
    ) -> None:
        if one_pass and tangent != "jvp":
            raise ValueError(f"one_pass=True is for the exact derivative; leave it out with tangent={tangent!r}.")
        if warmup not in ("paper", "rcm") or weight not in get_args(PriorWeight):
            raise ValueError(f"warmup={warmup!r} must be paper or rcm, and weight={weight!r} trig, one or unit.")
        check_tangent(tangent, tangent_step)
        if norm not in ("full", "rms"):
            raise ValueError(f"norm={norm!r} is unknown; choose full or rms.")
        if not constant > 0.0 or warmup_updates < 0:
            raise ValueError(
                f"constant={constant} and warmup_updates={warmup_updates}: give a positive constant, which keeps small "
                "tangents small, and a number of updates from 0."
            )
        self.times = times or LogNormal(-1.0 + math.log(2.0), 1.4)
        self.from_data = from_data
        self.tangent: TangentMode = tangent
        self.tangent_step = tangent_step
        self.warmup_updates = warmup_updates
        self.warmup = rcm_tangent if warmup == "rcm" else scm_tangent
        self.constant = constant
        self.norm: Literal["full", "rms"] = norm
        self.weight = weight
        self.one_pass = one_pass
        self._ends: tuple[float, float] | None = None

    def draw(self, method: TrajectoryMethod, n: int) -> Tensor:
        """TrigFlow times that the networks know, (n,), float64."""
        return self.inside(method, self.times.quantile(method.draws.uniform("tau", n), TrigFlow()))

    def inside(self, method: TrajectoryMethod, tau: Tensor) -> Tensor:
        """TrigFlow times brought between those of the least and the noisiest time that the networks know."""
        if self._ends is None:
            sd = method.student.sigma_data
            ends = (method._flow_min, method._flow_max)
            self._ends = math.atan2(ends[0], (1.0 - ends[0]) * sd), math.atan2(ends[1], (1.0 - ends[1]) * sd)
        return tau.clamp(*self._ends)

    def largest(self, method: TrajectoryMethod, like: Tensor) -> Tensor:
        """The TrigFlow time of the process' noisiest one, shaped like times."""
        return self.inside(method, torch.full_like(like, TrigFlow.t_max))

    def points(self, method: TrajectoryMethod, batch: Batch) -> Points:
        """Noised data with the teacher's dx/dtau, or with that of the pair.

        Args:
            method: see ``__call__``.
            batch: with data.
        """
        sd = method.student.sigma_data
        x0 = method.data(batch) / sd
        tau, eps = self.draw(method, batch.size), method.draws.normal("noise", x0.shape)
        x = TrigFlow().add_noise(x0, eps, tau)
        seen, t = trigflow_input(x, tau, method.process, sd)
        if self.from_data:
            velocity = training_velocity(x0, eps, tau)
        else:
            velocity = trigflow_velocity(method.guided_teacher(batch)(seen, t), tau, sd)
        return Points(x, tau, velocity, batch.cond, method.told_scale(t))

    def __call__(
        self, method: TrajectoryMethod, batch: Batch, log_variance: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its diagnostics.

        Args:
            method: with the student, its draws and its teacher.
            batch: with data.
            log_variance: u(tau), None for 0.
        """
        student, sd = method.student, method.student.sigma_data
        points = self.points(method, batch)
        x, tau, velocity = points.x, points.tau, points.velocity

        def flow(x: Tensor, tau: Tensor) -> Tensor:
            prediction = student(*trigflow_input(x, tau, method.process, sd), points.cond, guidance=points.scale)
            assert isinstance(prediction, Prediction)
            return trigflow_velocity(prediction, tau, sd)

        directions = scm_directions(velocity, tau)
        made, derivative = value_and_tangent(
            flow, (x, tau), directions, self.tangent, step=self.tangent_step, one_pass=self.one_pass
        )
        share = tangent_warmup(method.draws.update, self.warmup_updates)
        g = self.warmup(x, tau, made.detach(), velocity, derivative, share)
        loss = continuous_loss(
            made,
            normalise_tangent(g, self.constant, self.norm),
            self.prior_weight(tau, x[0].numel()),
            None if log_variance is None else log_variance(tau),
        )
        gap = (made.detach() - velocity).square().mean()
        return loss, {"tangent": g.flatten(1).norm(dim=1).mean(), "velocity_gap": gap}

    def prior_weight(self, tau: Tensor, size: int) -> Tensor | None:
        """Weight of TrigFlow times (B,) for samples of so many elements; None for 1."""
        if self.weight == "trig":
            return trig_weight(tau)
        return torch.full_like(tau, size) if self.weight == "unit" and self.norm == "full" else None

    def forward_counts(self) -> dict[str, int]:
        """Network calls of the term."""
        calls = {"jvp": 2 - self.one_pass, "central": 3, "one_sided": 2, "semi": 4}[self.tangent]
        return {"student": calls, "teacher": 0 if self.from_data else 1}

    def added_counts(self, counts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        """The calls of a method's other terms by phase and network, and those of this one in its student phase."""
        own = {name: counts["student"][name] + calls for name, calls in self.forward_counts().items()}
        return {**counts, "student": {**counts["student"], **own}}


class SCM(TrajectoryMethod):
    """Continuous-time consistency: the end of the trajectory does not change along it.

        f(x, tau) = cos(tau) x - sin(tau) F(x, tau),     df/dtau = 0
        L = e^-u(tau) w(tau) |F - sg F - g / (|g| + c)|^2 + u(tau)                                    (Eq. 8, Alg. 1)

    Distillation (sCD) follows the teacher's dx/dtau, training from data (sCT) that of the pair, which is right in the
    mean. Networks of any process are used: TrigFlow is entered exactly at their edge.

    Args:
        teacher: the pretrained model; with ``from_data`` only where the student's weights come from.
        times: distribution of TrigFlow times, None for the paper's ``LogNormal(-1, 1.4)``, which is of noise on data of
            standard deviation .5; its mean is ln 2 larger here.
        from_data: train from data instead of distilling.
        tangent: ``jvp`` (exact), ``central``, ``one_sided`` or ``semi``.
        tangent_step: step of differences, None for the default.
        warmup_updates: H of the tangent's warm-up.
        constant: c.
        norm: ``full`` or ``rms``, see ``losses.continuous.normalise_tangent``.
        weight: prior weight w of a time: ``unit``, ``one``, or the paper's ``trig``, 1 / (D tan(tau)).
        adaptive: learn u(tau); else it is 0.
        one_pass: take the exact derivative out of the pass of the value: a forward pass less for more memory, see
            ``tangents.value_and_tangent``.
        **kwargs: see ``TrajectoryMethod``. Students of several steps are sampled by ``renoise``.

    Notes:
        Wherever u is learned, e^u ends as the mean of the weighted error, whatever w is: w only says where it begins.
        With the paper's it has to fall to log(1 / D) first, hundreds of updates in which the small times, or another
        term of the loss, are all that counts; with ``unit`` it is there at once.
        u is a linear function of sinusoids of tau instead of a layer on the network's own embedding.
        Samples are divided by sigma_data first: the paper's c = .1 at sigma_data = .5 is .2 here, and the weight
        lacks its constant 1 / sigma_data, which u takes up.
        Networks whose embedding multiplies time by 1000 have large derivatives in it; the paper changes the embedding.
    """

    phases = {"student": ("student", "log_variance")}
    paper = "2410.11081"
    learns_from = "teacher, data; data alone with from_data"
    #: the term, with its source of points
    term: ClassVar[type[ContinuousConsistency]] = ContinuousConsistency

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        times: TimeDistribution | None = None,
        from_data: bool = False,
        tangent: TangentMode = "jvp",
        tangent_step: float | None = None,
        warmup_updates: int = 10_000,
        constant: float = 0.1,
        norm: Literal["full", "rms"] = "full",
        weight: PriorWeight = "unit",
        adaptive: bool = True,
        one_pass: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, **kwargs)
        self.asks_teacher = not from_data
        self.consistency = self.term(
            times, from_data, tangent, tangent_step, warmup_updates, "paper", constant, norm, weight, one_pass
        )
        self.log_variance = LogVariance() if adaptive else None

    def student_loss(self, batch: Batch) -> Terms:
        """Regression onto the student's own output plus the tangent."""
        loss, diagnostics = self.consistency(self, batch, self.log_variance)
        return Terms({"consistency": loss}, diagnostics)

    def forward_counts(self) -> dict[str, dict[str, int]]:  # noqa: D102
        return {"student": self.consistency.forward_counts()}
