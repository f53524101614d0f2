"""MSD: several students, each for its own conditions (arXiv:2410.23274)."""

from collections.abc import Sequence
from typing import Any

from lightning_distill.methods.dmd2 import DMD2
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import Experts
from lightning_distill.networks.roles import Role
from lightning_distill.networks.specs import DenoiserSpec

__all__ = ["MSD"]


class MSD(DMD2):
    """Multi-student distillation: DMD2 with a student and a fake score for each group of classes or prompts.

    At generation one student runs, at the cost of one; together they have the capacity of all. Students may be smaller
    than the teacher (``student=Explicit(...)``).

    Args:
        teacher: the pretrained, conditional model.
        classes: the classes of each student, a partition, or the number of students, see ``Experts``; None is one
            student for all, DMD2.
        prompts: for text models, the store of embeddings that are divided into ``count`` groups, or a file of their
            centres, see ``Experts``.
        count: number of groups of prompts.
        student: how each student is made, None for a copy.
        fake_score: how each fake score is made, None for a copy.
        **kwargs: see ``DMD2``; ``gan`` reads the teacher's features.

    Notes:
        Batches hold all classes, and each network learns from its own part of them; the paper trains one after the
        other, each on whole batches.
        With ``critic_dropout`` and ``fake_guidance`` one fake score is the unconditional branch of all classes, as the
        teacher's is: the first, see ``Experts``.
        The paper's score-matching start of smaller students is ``TeacherTraining``'s task, whose result
        ``FromCheckpoint`` reads.
    """

    paper = "2410.23274"
    learns_from = "teacher alone; data for gan"

    def __init__(
        self,
        teacher: DenoiserSpec | Denoiser | None = None,
        *,
        classes: Sequence[Sequence[int]] | int | None = None,
        prompts: str | None = None,
        count: int = 2,
        student: Role | None = None,
        fake_score: Role | None = None,
        **kwargs: Any,
    ) -> None:
        if classes is not None and prompts is not None:
            raise ValueError("MSD divides by classes or by prompts; give one of them.")
        if classes is not None and (classes if isinstance(classes, int) else len(classes)) != 1:
            student, fake_score = (Experts(classes=classes, role=role) for role in (student, fake_score))
        elif prompts is not None:
            student, fake_score = (Experts(prompts=prompts, count=count, role=role) for role in (student, fake_score))
        super().__init__(teacher, student=student, fake_score=fake_score, **kwargs)
        if self.gan is not None and (classes or prompts) and self.gan.features == "fake_score":
            raise ValueError(
                "MSD has several fake scores, whose features cannot be read in one call; give "
                "gan=Adversary(features='teacher')."
            )
