"""The headline of every method: how much of the teacher's gap between few and many steps is closed."""

from __future__ import annotations

__all__ = ["progress"]


def progress(fd_teacher_at_nfe: float, fd_student: float, fd_teacher_best: float) -> float:
    """Share of the gap that the student closes.

        progress = (FD of the teacher at the student's NFE - FD student) / (same - FD of the best teacher)

    Args:
        fd_teacher_at_nfe: teacher's FD with as many function evaluations as the student has, same guidance.
        fd_student: student's FD, same extractor and number of samples.
        fd_teacher_best: lowest FD of the many-step teacher over solver, grid and guidance.

    Returns:
        0 = no better than the undistilled teacher, 1 = as good as the many-step teacher, > 1 = better.

    Raises:
        ValueError: the teacher's FD does not fall with steps, so that the ratio would mean nothing.
    """
    gap = fd_teacher_at_nfe - fd_teacher_best
    if not gap > 0:
        raise ValueError(
            f"the teacher's distance does not fall with steps ({fd_teacher_at_nfe:.4g} few-step, "
            f"{fd_teacher_best:.4g} many-step), so progress means nothing; train the teacher longer."
        )
    return (fd_teacher_at_nfe - fd_student) / gap
