"""The LightningModule that every distillation method extends.

A method overrides losses; this class owns everything that is not the idea of a paper: building the roles, reproducible
draws and checkpoints, and by its parts the cycle of updates (``methods.cycle``), sampling and measuring.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_distill import checkpoints
from lightning_distill.batch import Batch
from lightning_distill.ema import EMAProfile, PowerEMA
from lightning_distill.memory_format import lay_out_convolutions, suits_channels_last
from lightning_distill.methods.clock import PhaseClock
from lightning_distill.methods.guards import (
    LossWeightWatch,
    check_null_class,
    check_step_settings,
    check_target_time,
)
from lightning_distill.methods.probing import Probing
from lightning_distill.methods.rollout import Rollout, backward_simulation, rollout_key
from lightning_distill.methods.sampling import StudentSampling
from lightning_distill.methods.subclassing import check_hooks, check_phases, check_trained
from lightning_distill.methods.terms import Terms
from lightning_distill.networks.compiling import compile_roles
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import enable_activation_checkpointing
from lightning_distill.networks.roles import Copy, Role, averaged_copy
from lightning_distill.networks.specs import DenoiserSpec, as_denoiser
from lightning_distill.randomness import Draws, RandomStreams
from lightning_distill.times import TimeDistribution, check_times, validate_times
from lightning_distill.trajectories import teacher_fingerprint

__all__ = ["DistillationModule", "Rollout", "Terms"]


class DistillationModule(StudentSampling, Probing):
    """Base of all methods.

    Args:
        teacher: the pretrained model, as a spec (YAML) or a ``Denoiser``; None for methods that have none.
        student: how the student is realised: ``Copy()`` of the teacher, ``Lora(...)`` on its backbone, or another role.
        num_steps: number of student steps (NFE); the time list is then the trailing grid of the process.
        student_times: explicit descending time list in the process' native time, instead of ``num_steps``.
        sampler: how student steps are chained: one of the class's ``samplers``, ``renoise`` or ``ode`` unless a method
            says otherwise.
        shape: shape of one sample without the batch dimension; None to ask the network.
        loss_weights: factors by ``"phase/term"``, for example ``{"student/gan": 0.003}``; unlisted terms have the
            method's default weight, or 1.
        student_optimizer: optimizer of the student, None for fused AdamW with the method's defaults.
        student_scheduler: learning-rate schedule, stepped once per student update.
        gradient_clip_val: largest gradient norm of each optimizer, above 0, None for no clipping.
        accumulate_grad_batches: each phase's batch is split into this many micro-batches.
        activation_checkpointing: trained networks recompute their blocks in the backward pass instead of keeping
            activations, for about a third more time.
        compile_blocks: compile the blocks of all networks with ``torch.compile``, once per block class and role.
        channels_last: lay the weights of convolutions out with channels innermost, which is faster for small UNets on
            the CPU and for half precision on GPUs; None for UNets of diffusers in float32 on the CPU alone. Not with
            ``role_fsdp2``.
        ema: averages of the student, None for one ``PowerEMA()``, an empty list for none; the first is sampled by
            default.
        max_skipped_steps: non-finite steps in a row after which training stops, at least 1.
        seed: seed of every training draw.
        check_data: compare the first batches with the declared data scale, the classes and the shape of the student.
    """

    #: arXiv number, shown by ``lightning-distill methods``.
    paper: ClassVar[str] = ""
    #: what the method learns from, shown beside it.
    learns_from: ClassVar[str] = "teacher"
    #: ways of chaining student steps
    samplers: ClassVar[tuple[str, ...]] = ("renoise", "ode")
    #: whether it trains on flows that begin at a condition instead of noise
    from_sources: ClassVar[bool] = False
    #: what was given as teacher
    teacher_source: DenoiserSpec | Denoiser | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_hooks(cls)

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        student: Role | None = None,
        num_steps: int = 1,
        student_times: list[float] | None = None,
        sampler: Literal["renoise", "ode"] = "renoise",
        shape: list[int] | None = None,
        loss_weights: dict[str, float] | None = None,
        student_optimizer: OptimizerCallable | None = None,
        student_scheduler: LRSchedulerCallable | None = None,
        gradient_clip_val: float | None = 10.0,
        accumulate_grad_batches: int = 1,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        channels_last: bool | None = None,
        ema: list[EMAProfile] | None = None,
        max_skipped_steps: int = 50,
        seed: int = 0,
        check_data: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_phases(self)
        if not num_steps or num_steps < 1:  # YAML may say null
            raise ValueError(
                f"num_steps={num_steps}: a student needs at least one step; leave num_steps out where student_times "
                "are given."
            )
        if student_times is not None and num_steps not in (1, len(student_times), _usual_steps(type(self))):
            raise ValueError(
                f"num_steps={num_steps} and the {len(student_times)} student_times disagree; leave num_steps out, the "
                "times say it."
            )
        if sampler not in self.samplers:
            known = " or ".join(self.samplers)
            raise ValueError(f"sampler={sampler!r} is unknown for students of {type(self).__name__}; choose {known}.")
        check_step_settings(gradient_clip_val, accumulate_grad_batches, max_skipped_steps)
        if isinstance(teacher, DenoiserSpec):
            teacher.check()
        self.__dict__["teacher_source"] = teacher  # past the registration of submodules, where it becomes ``teacher``
        self._student_role = student or Copy()
        self._student_role.check()
        self._num_steps = num_steps
        self._given_times = None if student_times is None else [float(t) for t in student_times]
        self.sampler = sampler
        self._given_shape = None if shape is None else tuple(shape)
        self._seen_shape: tuple[int, ...] | None = None
        self.loss_weights = {**self.default_loss_weights, **(loss_weights or {})}
        self._weight_watch = LossWeightWatch(loss_weights or ())
        self.optimizer_factories: dict[str, OptimizerCallable | None] = {"student": student_optimizer}
        self.scheduler_factories: dict[str, LRSchedulerCallable | None] = {"student": student_scheduler}
        self.gradient_clip_val = gradient_clip_val
        self.accumulate_grad_batches = accumulate_grad_batches
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile_blocks
        self.channels_last = channels_last
        self.ema_profiles: list[EMAProfile] = [PowerEMA()] if ema is None else list(ema)
        names = [profile.name for profile in self.ema_profiles]
        if len(set(names)) < len(names):
            raise ValueError(f"ema has the same profile twice: {names}; give profiles that differ.")
        if wrong := [name for name in names if name == "student" or "." in name]:
            raise ValueError(f"an ema profile is named {wrong[0]!r}; choose one without dots, other than 'student'.")
        self.max_skipped_steps = max_skipped_steps
        self.streams = RandomStreams(seed)
        self.check_data = check_data

        self.teacher: Denoiser | None = None
        self.student_ema = nn.ModuleDict()
        self.register_buffer("skipped_steps", torch.zeros(len(self.phases)))
        self.register_buffer("skipped_in_a_row", torch.zeros(len(self.phases)))
        self.register_state_dict_post_hook(checkpoints.drop_frozen)
        self.draws = Draws(self.streams, 0, 0, "outside")
        self.clock = PhaseClock()
        self._built = self._laid_out = False
        self._rollouts: dict[tuple[str, int, int], Rollout] = {}
        self.running_phase = None
        self._teacher_fingerprint: str | None = None
        self._trained: dict[str, list[nn.Parameter]] = {}
        self._followers = None

    # ------------------------------------------------------------------------------------------------ networks
    def configure_model(self) -> None:
        """Build every network once: teacher, student, the method's own roles, averages."""
        if self._built:
            if self._laid_out and self.channels_last is None and not self._gains_by_layout():
                lay_out_convolutions(self, channels_last=False)  # built before it met a trainer
                self._laid_out = False
            return
        if self.teacher_source is not None:
            self.teacher = as_denoiser(self.teacher_source).requires_grad_(False).eval()
        self.build_roles()
        if self.activation_checkpointing:
            for role in dict.fromkeys(role for roles in self.phases.values() for role in roles):
                if isinstance(network := getattr(self, role, None), Denoiser):
                    enable_activation_checkpointing(network)
        for profile in self.ema_profiles:
            self.student_ema[profile.name] = averaged_copy(self.student, profile.name)
        self._laid_out = self._gains_by_layout() if self.channels_last is None else self.channels_last
        if self._laid_out:
            lay_out_convolutions(self)
        if self.compile_blocks:
            compile_roles(self)
        self._trained.clear()
        self._built = True
        self.check_configuration()

    def _gains_by_layout(self) -> bool:
        strategy = None if self._trainer is None else self.trainer.strategy
        device = self.device if strategy is None else strategy.root_device
        if device.type != "cpu" or isinstance(strategy, ModelParallelStrategy) or not suits_channels_last(self):
            return False
        # kernels of group norm and SiLU in bfloat16 are slower in that order, by more than convolutions gain
        return strategy is None or self.trainer.precision in ("32-true", "64-true")

    def build_roles(self) -> None:
        """Create the trained networks; methods with more roles extend this.

        How the teacher is sampled, if it is a student itself, is not how this student is trained; methods that train
        jumps, a solver or guidance in sampling say so when they extend this.
        """
        self.student = self._student_role.build(self.require_teacher(), "student")
        if self.student is not self.teacher:
            self.student.jumps = False
            self.student.sampling_guidance = self.student.coefficients = None

    def check_configuration(self) -> None:
        """Raise for settings that contradict each other; called when the networks exist, before any step."""
        check_trained(self)
        validate_times(self.student_times, self.process)
        check_target_time(self)
        check_null_class(self.student)
        if self.teacher is not None and self.teacher.family.start is not None and not self.from_sources:
            raise ValueError(
                f"the teacher's samples begin at the condition {self.teacher.family.start[0]!r}, and "
                f"{type(self).__name__} trains from noise; use OFTSR(source={self.teacher.family.start[0]!r})."
            )
        phases = [f"{phase}/" for phase in self.phases]
        for key in self.loss_weights:
            if not key.startswith(tuple(phases)):
                raise ValueError(
                    f"loss_weights has {key!r}; keys are 'phase/term' with a phase of {list(self.phases)}."
                )

    def require_teacher(self) -> Denoiser:
        """The teacher, or a clear error."""
        if self.teacher is None:
            raise ValueError(
                f"{type(self).__name__} needs a teacher: give ZooDenoiser('fashion'), PretrainedDenoiser(path) or a "
                "Denoiser."
            )
        return self.teacher

    def teacher_fingerprint(self) -> str:
        """SHA-256 of the teacher's own weights (roles' adapters on its backbone excluded); computed once."""
        if self._teacher_fingerprint is None:
            self._teacher_fingerprint = teacher_fingerprint(self.require_teacher())
        return self._teacher_fingerprint

    def train(self, mode: bool = True) -> "DistillationModule":
        """As ``nn.Module.train``; teacher and averages stay in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        self.student_ema.eval()
        return self

    # ------------------------------------------------------------------------------------------------ parts of losses
    def times(self, name: str, distribution: TimeDistribution, n: int) -> Tensor:
        """Native times of this phase drawn from a distribution, (n,), float64.

        Args:
            name: of the draw within the loss; every draw of a loss has its own.
            distribution: where the times come from.
            n: how many.

        Raises:
            ValueError: the loss has drawn times of this name already, and would get the same ones again; or the
                distribution gives times that the process does not have.
        """
        self.draws.claim(name)
        t = distribution.quantile(self.draws.uniform(name, n), self.process)
        if self.draws.update == 0:
            check_times(t, distribution, self.process)
        return t

    def renoise(
        self, x0: Tensor, distribution: TimeDistribution, name: str = "renoise"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise a clean sample to a random time.

        Args:
            x0: clean samples, (B, ...).
            distribution: of the times.
            name: of the draw within the loss; a second one in the same loss needs another, or it would be the same.

        Returns:
            x_t (B, ...), t (B,) and eps (B, ...).
        """
        t = self.times(f"{name}/time", distribution, len(x0))
        eps = self.draws.normal(f"{name}/noise", x0.shape)
        return self.process.add_noise(x0, eps, t), t, eps

    def rollout(self, batch: Batch, grad: bool = True, name: str = "") -> Rollout:
        """Student samples by backward simulation (DMD2, arXiv:2405.14867, Section 4.5).

        A random step k of the student's time list is chosen, the same for the batch and on all ranks; the steps before
        it run without graph exactly as at inference, and step k predicts x0, with graph if ``grad``. Within a cycle the
        samples of a slice are made once: critics get, detached, what the student phase made.

        Args:
            batch: conditions and size.
            grad: whether the last step keeps its graph.
            name: of the samples. Those of one name begin at the same noise in all phases, and what ``grad=False``
                returns is what was made first, whatever the conditions: samples for other conditions, or independent
                ones in the same loss, need a name of their own.
        """
        key = rollout_key(self.draws, name)
        if not grad and key in self._rollouts:
            return self._rollouts[key]
        draws, self.draws = self.draws, self.draws.named(name) if name else self.draws
        try:
            made = self.simulate_student(batch, grad)
        finally:
            self.draws = draws
        self._rollouts[key] = made.detached()
        return made

    def simulate_student(self, batch: Batch, grad: bool) -> Rollout:
        """A new rollout, see ``rollout``; methods with other rollouts override it."""
        return backward_simulation(
            self.student,
            batch.cond,
            (batch.size, *self.sample_shape),
            self.student_times,
            self.sampler,
            self.draws.of_slice(),
            grad,
        )

    def sampling_network(self, weights: str | None = None) -> Denoiser:
        """See ``StudentSampling``; networks that no trainer has built yet are built."""
        self.configure_model()
        return super().sampling_network(weights)

    # ------------------------------------------------------------------------------------------------ checkpoints
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint's tensors; frozen networks are not in it and stay as they are."""
        self.configure_model()
        if strict:
            checkpoints.strict_load(self, state_dict)
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        if assign:  # other parameters than before
            self.forget_parameters()
        self.after_weights_loaded()
        return result

    def after_weights_loaded(self) -> None:
        """Called when a checkpoint's tensors are in place, whatever strategy put them there."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the identity of the teacher and the state of the global generators."""
        checkpoint["lightning_distill"] = checkpoints.header(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or teacher; restore the global generators."""
        self.configure_model()
        checkpoints.check_header(self, checkpoint.get("lightning_distill"))
        checkpoints.reopen_epoch(checkpoint)


def _usual_steps(method: type) -> Any:
    """Default of ``num_steps`` where a method, or the first of its bases that names it, has one."""
    signatures = (
        inspect.signature(vars(kind)["__init__"]).parameters for kind in method.__mro__ if "__init__" in vars(kind)
    )
    return next(parameters["num_steps"].default for parameters in signatures if "num_steps" in parameters)
