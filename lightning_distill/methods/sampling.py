"""Sampling of the student, as a part of ``DistillationModule``."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_distill.batch import as_batch
from lightning_distill.generation import draw_noise, generate, given_cond
from lightning_distill.guidance import Guidance, check_guidance, is_told, telling
from lightning_distill.hybrid import hybrid
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.modes import evaluation_mode
from lightning_distill.networks.negative_prompts import negative_prompts
from lightning_distill.parameterisations import Capability
from lightning_distill.processes import NoiseProcess
from lightning_distill.samplers import check_capability
from lightning_distill.times import few_step_times

__all__ = ["StudentSampling"]


class StudentSampling:
    """What a module with a student, its averages and its time list can do with them."""

    teacher: Denoiser | None
    student: Denoiser
    student_ema: nn.ModuleDict
    #: factor on the fresh noise between the steps of ``sample``
    noise_scale: float = 1.0
    #: share of fresh noise of the sampler ``gamma``
    noise_share: float = 0.2
    #: ``renoise``, ``ode``, or ``flow_map`` where the student takes a target time
    sampler: Any
    #: what students of this method are trained for, see ``parameterisations``; None for any times
    capability: ClassVar[Capability | None] = None
    #: edges of the segments of ``capability`` segments
    edges: list[float] | None = None
    _given_times: list[float] | None
    _given_shape: tuple[int, ...] | None
    _seen_shape: tuple[int, ...] | None  # of the training data
    _num_steps: int

    @property
    def process(self) -> NoiseProcess:
        """Noise process of the student."""
        return self.student.process

    @property
    def student_times(self) -> list[float]:
        """The student's descending time list, without the final 0."""
        return self._given_times or few_step_times(self.process, self._num_steps)

    def times_in(self, num_steps: int) -> list[float]:
        """Descending native times of so many steps, without the final 0: the process' trailing grid.

        Args:
            num_steps: 1 or more.
        """
        return few_step_times(self.process, num_steps)

    def check_times(self, times: Sequence[float]) -> None:
        """Refuse to sample the student at times for which it was not trained.

        Args:
            times: descending native times without the final 0.

        Raises:
            ValueError: they are none of those that ``capability`` allows.
        """
        check_capability(self, self.sampler, times, self.process)

    def evaluation_times(self, num_steps: int | None = None) -> list[float]:
        """Times at which callbacks and commands sample the student, from noise and conditions alone.

        Args:
            num_steps: the student's own list is taken where it has as many, or for None; else the trailing grid.

        Raises:
            ValueError: the student is not sampled in so many steps, or not from noise and conditions alone.
        """
        times = self.own_times_or(num_steps)
        self.check_times(times)
        return times

    def own_times_or(self, num_steps: int | None) -> list[float]:
        """The student's own times for None or as many as it has, else ``times_in``."""
        own = self.student_times
        return own if num_steps is None or num_steps == len(own) else self.times_in(num_steps)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample without the batch dimension: given, the network's own, or that of the training data."""
        shape = self._given_shape or self.student.sample_shape or self._seen_shape
        if shape is None:
            raise ValueError(
                f"{type(self.student.network).__name__} does not know the shape of its samples; give shape=[channels, "
                "height, width] to the method."
            )
        return shape

    def sampling_network(self, weights: str | None = None) -> Denoiser:
        """The network that samples: the first average by default, ``"student"``, or an average by name."""
        if weights is None:
            weights = next(iter(self.student_ema), "student")
        if weights == "student":
            return self.student
        if weights not in self.student_ema:
            raise ValueError(f"weights={weights!r} is unknown; choose student or one of {list(self.student_ema)}.")
        average = self.student_ema[weights]
        assert isinstance(average, Denoiser)
        return average

    @torch.no_grad()
    def sample(
        self,
        n: int,
        cond: Mapping[str, Any] | None = None,
        *,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        weights: str | None = None,
        batch_size: int | None = None,
        noise_scale: float | None = None,
        noise_share: float | None = None,
        guidance_scale: float | None = None,
        negative: Mapping[str, Any] | None = None,
        negative_scale: float = 0.5,
    ) -> Tensor:
        """Samples of the student.

        Args:
            n: number of samples.
            cond: conditions, tensors of n rows; None cycles through the classes (or nothing when there are none).
            num_steps: the student's own time list is taken where it has as many, or for None; else the trailing grid.
            generator: source of the starting noise and of the fresh noise, in that order, as in diffusers.
            noise: starting noise (n, *shape) instead of the generator's.
            weights: which network; see ``sampling_network``.
            batch_size: samples per network call.
            noise_scale: gamma, factor on the fresh noise of the renoise sampler; None for the module's own.
            noise_share: gamma in [0, 1] of the sampler ``gamma``: 0 adds no noise, 1 is ``renoise``; None for the
                module's own.
            guidance_scale: w that a student with an embedded scale is told; others are run twice, with and without
                their condition. None is the student's own.
            negative: conditions of negative prompts, see ``networks.negative_prompts``; None for none. Not together
                with a ``guidance_scale`` for which the student is run twice.
            negative_scale: how strongly to steer away from them.

        Returns:
            x0, (n, *shape), float32.

        Raises:
            ValueError: conditions or a null condition are missing, or the student is not sampled in this way.
        """
        if n < 1:
            raise ValueError(f"sample({n}): give the number of samples, 1 or more.")
        network = self.sampling_network(weights)
        times = self.own_times_or(num_steps)
        self.check_times(times)
        start = draw_noise((n, *self.sample_shape), generator) if noise is None else noise
        conditions = given_cond(network, n, cond)
        options: dict[str, Any] = {"generator": generator, "batch_size": batch_size}
        options["noise_scale"] = self.noise_scale if noise_scale is None else noise_scale
        options["noise_share"] = self.noise_share if noise_share is None else noise_share
        told: AbstractContextManager[None] = nullcontext()
        if guidance_scale is not None:
            check_guidance(network, Guidance(guidance_scale))
            if is_told(network) and network.sampling_guidance is None:
                told = telling(network, float(guidance_scale))
            else:  # as a policy, since the number 1 leaves a network to its own guidance
                options["guidance_scale"] = Guidance(guidance_scale) if guidance_scale == 1.0 else float(guidance_scale)
        own = guidance_scale is None and network.sampling_guidance is not None
        twice = own or ("guidance_scale" in options and guidance_scale != 1.0)
        if negative is not None and twice:
            raise ValueError(
                "negative=... steers the branch without a condition too, so it does not go with guidance that runs "
                "the student twice; leave out guidance_scale, or give the negative prompt as null_cond of the teacher."
            )
        with evaluation_mode(network), told:
            if negative is None:
                return generate(network, start, conditions, times, self.sampler, **options)
            with negative_prompts(network, conditions, negative, negative_scale) as both:
                return generate(network, start, both, times, self.sampler, **options)

    def sample_hybrid(
        self,
        n: int,
        cond: Mapping[str, Any] | None = None,
        *,
        first: int = 1,
        teacher_steps: int = 20,
        guidance_scale: float | Guidance | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        weights: str | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Samples whose first student steps the teacher takes, which restores diversity; see ``hybrid.hybrid``.

        Args:
            n: number of samples.
            cond: conditions, tensors of n rows; None as in ``sample``.
            first: student steps that the teacher replaces.
            teacher_steps: steps of the teacher's whole grid.
            guidance_scale: w of the teacher, or a policy; None for that of the training.
            generator: source of all noise.
            noise: starting noise (n, *shape) instead of the generator's.
            weights: which network; see ``sampling_network``.
            batch_size: samples per network call.
        """
        network = self.sampling_network(weights)
        if self.teacher is None:
            raise ValueError(f"{type(self).__name__} has no teacher, so there is nothing to begin with; use sample().")
        with evaluation_mode(network):
            return hybrid(
                self.teacher,
                network,
                draw_noise((n, *self.sample_shape), generator) if noise is None else noise,
                given_cond(network, n, cond),
                self.student_times,
                first=first,
                teacher_steps=teacher_steps,
                guidance_scale=self.teacher_guidance if guidance_scale is None else guidance_scale,
                sampler=self.sampler,
                generator=generator,
                batch_size=batch_size,
                noise_scale=self.noise_scale,
                noise_share=self.noise_share,
            )

    @property
    def guidance_scale(self) -> float:
        """Guidance scale w of the teacher in this method, 1 where it has none."""
        return float(getattr(getattr(self, "guidance", None), "scale", 1.0))

    @property
    def teacher_guidance(self) -> float | Guidance:
        """How the teacher is sampled beside the student: with the scale w, or with a policy that depends on time."""
        policy = getattr(self, "guidance", None)
        return self.guidance_scale if policy is None or type(policy) is Guidance else policy

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing per batch: callbacks such as ``GenerativeEvaluation`` measure the samples at the end."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing per batch, as ``validation_step``."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Samples for the conditions of a batch."""
        batch = as_batch(batch)
        return self.sample(batch.size, batch.cond)
