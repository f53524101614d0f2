"""Hybrid sampling: the teacher takes the first steps, the student the rest (arXiv:2503.10637).

Distilled students lose diversity mostly in their first step, which decides the composition; given that step to the
teacher, the student's remaining steps are as fast as ever. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.generation import generate
from lightning_distill.guidance import Guidance
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.sources import same_path
from lightning_distill.times import few_step_times

__all__ = ["hybrid", "hybrid_times"]


def hybrid_times(teacher: Denoiser, student_times: Sequence[float], first: int, teacher_steps: int) -> list[float]:
    """The teacher's part of a hybrid schedule.

    Args:
        teacher: denoiser.
        student_times: descending native times of the student, without the final 0.
        first: student steps k that the teacher replaces, 1 <= k < N.
        teacher_steps: steps of the teacher's whole grid, of which those above ``student_times[first]`` are taken.

    Returns:
        descending times of the teacher's steps, the first its own start, followed by the time at which the student
        takes over.

    Notes:
        The paper stops at the teacher's grid time nearest to the student's; here the last step ends on it exactly.
    """
    handover = student_times[first]
    grid = [t for t in few_step_times(teacher.process, teacher_steps) if t > handover * (1.0 + 1e-9)]
    return [*grid, handover]


@torch.no_grad()
def hybrid(
    teacher: Denoiser,
    student: Denoiser,
    noise: Tensor,
    cond: Mapping[str, Any],
    student_times: Sequence[float],
    *,
    first: int = 1,
    teacher_steps: int = 20,
    guidance_scale: float | Guidance = 1.0,
    sampler: str = "renoise",
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    noise_scale: float = 1.0,
    noise_share: float = 0.2,
) -> Tensor:
    """Samples whose first student steps the teacher takes, deterministically and with its own guidance.

    Args:
        teacher: guided many-step model.
        student: few-step model of the same process.
        noise: unit Gaussian starting noise, (N, ...).
        cond: conditions, tensors of N rows.
        student_times: the student's descending native times, without the final 0.
        first: number of student steps that the teacher replaces; 0 is the student alone, all of them the teacher alone.
        teacher_steps: steps of the teacher's whole grid.
        guidance_scale: w of the teacher's classifier-free guidance, or a policy.
        sampler: how the student's steps are chained.
        generator: source of the student's fresh noise.
        batch_size: samples per network call; None means all at once.
        noise_scale: factor on the student's fresh noise.
        noise_share: share of fresh noise of the gamma sampler.

    Returns:
        x0, (N, ...), float32, on the student's device.

    Raises:
        ValueError: ``first`` is outside the student's steps, the two models have different processes, or the student's
            sampler cannot go on where another stopped.
    """
    if not 0 <= first <= len(student_times):
        raise ValueError(f"first={first}: the student has {len(student_times)} steps; give 0 to {len(student_times)}.")
    if not same_path(teacher.process, student.process):
        raise ValueError(
            f"the teacher works in {teacher.process!r} and the student in {student.process!r}, so one cannot go on "
            "where the other stops; give the teacher method_process=... of the student."
        )
    common: dict[str, Any] = {"generator": generator, "batch_size": batch_size}
    own = {**common, "noise_scale": noise_scale, "noise_share": noise_share}
    if first == 0:
        return generate(student, noise, cond, student_times, sampler, **own)
    if sampler == "start_noise" and first < len(student_times):
        raise ValueError(
            "sampler='start_noise' adds the noise of the student's own start to every prediction, so it cannot go on "
            "where the teacher stopped; use a student with sampler='ode' or 'renoise'."
        )
    if first == len(student_times):
        times = few_step_times(teacher.process, teacher_steps)
        return generate(teacher, noise, cond, times, "ode", guidance_scale=guidance_scale, **common)
    *grid, handover = hybrid_times(teacher, student_times, first, teacher_steps)
    x = generate(teacher, noise, cond, grid, "ode", guidance_scale=guidance_scale, until=handover, **common)
    return generate(student, x, cond, list(student_times[first:]), sampler, noisy=True, **own)
