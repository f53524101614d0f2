"""Samples and measures a student and its teacher; alone, or together with the other processes of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as remember
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_distill.evaluation.conditions import Conditions
from lightning_distill.evaluation.evaluator import Evaluator, Features
from lightning_distill.evaluation.sampling import sample_many
from lightning_distill.evaluation.teacher import TeacherCache, baseline_key, card_note, card_rows
from lightning_distill.guidance import Guidance
from lightning_distill.methods.base import DistillationModule
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.records import EvaluationRow
from lightning_distill.times import few_step_times

__all__ = ["EvaluationRunner", "Ranks"]


#: fewer samples per feature dimension than this make a covariance that is mostly noise
_PER_FEATURE = 10


@remember
def _say_once(text: str) -> None:
    """A line on the terminal, once per process, though a run evaluates many times."""
    rank_zero_info(text)


@dataclass
class Ranks:
    """The processes that share the sampling.

    Attributes:
        rank: this process.
        world_size: number of processes.
        gather: this rank's (n, ...) to all ranks' (world_size, n, ...), in order.
        broadcast: an object of rank 0 to all.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Tensor], Tensor] = field(default=lambda part: part[None])
    broadcast: Callable[[Any], Any] = field(default=lambda value: value)


@dataclass
class EvaluationRunner:
    """Rows of an evaluation.

    Args:
        evaluator: what is measured against what.
        num_samples: samples of a row.
        seed: seed of their noise.
        batch_size: samples per network call.
        bf16: sample under bfloat16 autocast.
        ranks: the processes that share the work.
        conditions: of the samples, None for classes in turn.
    """

    evaluator: Evaluator
    num_samples: int
    seed: int
    batch_size: int = 500
    bf16: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    conditions: Conditions | None = None

    def measure(
        self,
        network: Denoiser,
        times: Sequence[float],
        sampler: str,
        shape: Sequence[int],
        guidance_scale: float | Guidance = 1.0,
        noise_scale: float = 1.0,
        noise_share: float = 0.2,
        lenient: bool = False,
    ) -> tuple[dict[str, float], float]:
        """Figures of a network, equal on every rank, and the seconds they took.

        Args:
            network: student or teacher, in evaluation mode.
            times: descending native times without the final 0.
            sampler: name of the sampler.
            shape: of one sample.
            guidance_scale: w, or a policy.
            noise_scale: factor on the fresh noise of the renoise sampler.
            noise_share: share of fresh noise of the gamma sampler.
            lenient: samples with NaN or inf make all figures NaN, with a warning.

        Raises:
            ValueError: an extractor cannot read samples of this shape, raised before any is made; or samples are not
                finite.
        """
        self.evaluator.probe(shape)
        self._caution()
        ranks, start = self.ranks, time.perf_counter()
        share = -(-self.num_samples // ranks.world_size)  # equal shares: no rank waits in a collective alone
        samples, labels = sample_many(
            network,
            share,
            times,
            sampler,
            self.seed,
            first=ranks.rank * share,
            guidance_scale=guidance_scale,
            batch_size=self.batch_size,
            bf16=self.bf16,
            shape=shape,
            noise_scale=noise_scale,
            noise_share=noise_share,
            conditions=self.conditions,
        )
        sampling = time.perf_counter() - start
        features = self._gather(self.evaluator.features(samples, labels))
        figures: dict[str, float] = {}
        problem: Exception | None = None
        if ranks.rank == 0:
            try:
                figures = self._figures(features, lenient)
            except Exception as error:  # told to the other ranks, which would wait for ever
                problem = error
        figures, problem = ranks.broadcast((figures, problem))
        if problem is not None:
            raise problem
        return figures | {"samples_per_second": self.num_samples / sampling}, time.perf_counter() - start

    def _figures(self, features: Features, lenient: bool) -> dict[str, float]:
        sound = torch.stack([points.isfinite().flatten(1).all(dim=1) for points in features.points.values()]).all(dim=0)
        if bool(sound.all()) or not lenient:
            return self.evaluator.measure(features)
        rank_zero_warn(
            f"{int((~sound).sum())} of {len(sound)} evaluated samples contain NaN or inf, so the figures are NaN."
        )
        # any finite features tell which figures there are
        generator = torch.Generator().manual_seed(0)
        points = {name: torch.rand(part.shape, generator=generator) for name, part in features.points.items()}
        images = None if features.images is None else torch.rand(features.images.shape, generator=generator)
        return dict.fromkeys(self.evaluator.measure(replace(features, points=points, images=images)), math.nan)

    def _caution(self) -> None:
        for name, width in self.evaluator.widths.items():
            if "fd" in self.evaluator.measures and self.num_samples < _PER_FEATURE * width:
                _say_once(
                    f"{self.num_samples} samples are few for the {width} features of {name}: compare its Frechet "
                    f"distance only with others of {self.num_samples} samples, or use {_PER_FEATURE * width} or more."
                )

    def _gather(self, features: Features) -> Features:
        """The features of all ranks in the order of the samples, the surplus of the last share cut off."""

        def whole(part: Tensor) -> Tensor:
            return self.ranks.gather(part).flatten(0, 1)[: self.num_samples]

        points = {name: whole(part) for name, part in features.points.items()}
        labels = None if features.labels is None else whole(features.labels)
        images = None if features.images is None else whole(features.images)
        return Features(points, labels, images)

    def teacher_rows(
        self, module: DistillationModule, steps: Sequence[int], cache: TeacherCache
    ) -> list[EvaluationRow]:
        """The teacher at several numbers of Euler steps: from its card, from the cache, or measured now.

        Args:
            module: in evaluation mode; its guidance is the teacher's.
            steps: numbers of steps.
            cache: where rows are kept between runs.
        """
        if module.teacher is None:
            return []
        teacher, scale = module.teacher, module.teacher_guidance
        wanted = sorted(set(steps))
        if (shipped := card_rows(teacher, self.evaluator, self.num_samples, wanted, scale)) is not None:
            if note := card_note(shipped, self.evaluator, self.num_samples, wanted):
                _say_once(note)
            return shipped
        what, fingerprint = f"{self.evaluator.key}-{self.bf16}", module.teacher_fingerprint()
        keys = {
            nfe: baseline_key(fingerprint, teacher, nfe, scale, self.num_samples, self.seed, what, module.sample_shape)
            for nfe in wanted
        }
        found = {nfe: cache.get(key) for nfe, key in keys.items()} if self.ranks.rank == 0 else None
        known: dict[int, EvaluationRow | None] = self.ranks.broadcast(found)
        if missing := [str(nfe) for nfe in wanted if known[nfe] is None]:
            _say_once(
                f"The teacher is measured with {self.num_samples} samples at {' and '.join(missing)} steps, once; the "
                f"figures are kept in {cache.folder}."
            )
        rows = []
        for nfe, key in keys.items():
            row = known[nfe]
            if row is None:
                times = few_step_times(teacher.process, nfe)
                figures, seconds = self.measure(teacher, times, "ode", module.sample_shape, scale)
                row = self._row("teacher", nfe, figures, seconds)
                if self.ranks.rank == 0:
                    cache.put(key, row)
            rows.append(row)
        return rows

    def student_row(
        self,
        module: DistillationModule,
        nfe: int,
        weights: str,
        teacher: Sequence[EvaluationRow],
        lenient: bool = False,
        **facts: Any,
    ) -> EvaluationRow:
        """The student at one number of steps, with its progress where the teacher's rows allow it.

        Args:
            module: in evaluation mode.
            nfe: number of steps; the student's own list is used when it has as many.
            weights: ``ema`` (the first average), ``student``, or the name of an average.
            teacher: rows of the teacher.
            lenient: see ``measure``.
            **facts: further fields of the row (``step``, ``stage``).

        Raises:
            ValueError: the student is not sampled in so many steps, or not from noise and conditions alone; or its
                samples are not finite.
        """
        network = module.sampling_network(None if weights == "ema" else weights)
        figures, seconds = self.measure(
            network,
            module.evaluation_times(nfe),
            module.sampler,
            module.sample_shape,
            noise_scale=module.noise_scale,
            noise_share=module.noise_share,
            lenient=lenient,
        )
        few = next((row.metrics for row in teacher if row.nfe == nfe), None)
        figures = self.evaluator.with_progress(figures, few, [row.metrics for row in teacher])
        return self._row("student", nfe, figures, seconds, weights=weights, **facts)

    def _row(self, role: Any, nfe: int, figures: dict[str, float], seconds: float, **facts: Any) -> EvaluationRow:
        return EvaluationRow(
            role,
            nfe,
            figures,
            num_samples=self.num_samples,
            seed=self.seed,
            half=self.evaluator.half,
            seconds=seconds,
            **facts,
        )
