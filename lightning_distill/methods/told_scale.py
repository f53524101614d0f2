"""Students and fake scores that are told a guidance scale, as a part of ``FakeScoreMethod``."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, RandomGuidance, is_told, telling
from lightning_distill.methods.rollout import Rollout, rollout_key

if TYPE_CHECKING:
    from lightning_distill.methods.base import DistillationModule
    from lightning_distill.methods.step_aware import StepAware

    class _Base(StepAware, DistillationModule):
        """Where the mixin stands."""
else:
    _Base = object

__all__ = ["ToldScale"]


class ToldScale(_Base):
    """The scale by which the teacher is guided at a sample is told to the student that makes it and to the fake score.

    A fake score that is told nothing learns the mixture over scales, as one that is told no step learns that of all
    steps. One that is told the samples' scales is told no others: guiding it is telling it.
    """

    guidance: Guidance
    fake_guidance: Guidance
    critic_guidance: Guidance
    _tells_scale: bool
    _scales: dict[tuple[str, int, int], float | Tensor]
    _scale_draws: dict[tuple[str, int, int], Tensor]

    def find_told(self) -> None:
        """Find who embeds a scale, once the roles are there; they are sampled with that of ``guidance``."""
        self._scales, self._scale_draws = {}, {}
        # copies of a teacher that embeds a scale are told its default, unless the scale is one of each sample
        fixed = is_told(self.require_teacher()) and not isinstance(self.guidance, RandomGuidance)
        self._tells_scale = self.student.embeds_guidance and not fixed
        if not self._tells_scale:
            return
        for network in (self.student, self.fake_score):
            if network.embeds_guidance:
                network.family = replace(network.family, guidance_scale=self.guidance.scale)
        if not self.tells_fake_score:
            return
        for name in ("fake_guidance", "critic_guidance"):
            given: Guidance = getattr(self, name)
            if given.needs_null and (type(given), vars(given)) != (type(self.guidance), vars(self.guidance)):
                raise ValueError(
                    f"{name}={given!r}: the fake score is told the scale at which each sample was made, by guidance, "
                    f"and no other one; leave {name} out, or give it a network that is told no scale."
                )
            setattr(self, name, Guidance(1.0))  # it is told, see told_step

    @property
    def tells_fake_score(self) -> bool:
        """Whether the fake score is told the scales at which samples are made."""
        return self._tells_scale and self.fake_score.embeds_guidance

    def check_told(self) -> None:
        """Raise where the student is told scales that the fake score is not."""
        if self._tells_scale and isinstance(self.guidance, RandomGuidance) and not self.fake_score.embeds_guidance:
            raise ValueError(
                "the student is told guidance scales and the fake score is not, which would learn the mixture over all "
                "scales; give fake_score=TwoTime(kind=None, guidance=True), too."
            )

    def rollout(self, batch: Batch, grad: bool = True, name: str = "") -> Rollout:
        """As usual; a student that embeds a scale is told that of each sample."""
        if not self._tells_scale:
            return super().rollout(batch, grad, name)
        key = rollout_key(self.draws, name)
        if not self._rollouts:
            self._scales.clear()  # of an earlier cycle
            self._scale_draws.clear()
        if grad or key not in self._rollouts:
            # the draw with which scores guide the teacher
            self._scale_draws[key] = self.scale_draw(batch.size)
            self._scales[key] = self.guidance.label(self._scale_draws[key])
        with telling(self.student, self._scales[key]):
            return super().rollout(batch, grad, name)

    def scale_draw(self, n: int) -> Tensor:
        """One uniform number per sample, (n,), from which the phase's random scales of the teacher are made."""
        return self.draws.uniform("guidance", n)

    def told_student(self) -> AbstractContextManager[None]:
        """Within it the student knows the scales of the current slice, if it is to know: for calls beside a rollout."""
        if not self._tells_scale:
            return nullcontext()
        return telling(self.student, self._scales[rollout_key(self.draws)])

    def guidance_draw(self, n: int) -> Tensor:
        """The draw of the scales that the slice's samples were made with; one of the phase where nobody is told, (n,).

        For phases that guide the teacher at samples of another phase.
        """
        if not self._tells_scale:
            return self.scale_draw(n)
        return self._scale_draws[rollout_key(self.draws)]

    @contextmanager
    def told_step(self) -> Iterator[None]:
        """Within it the fake score knows steps and scales of the current slice, those that it is to know."""
        with ExitStack() as stack:
            stack.enter_context(super().told_step())
            if self.tells_fake_score:
                stack.enter_context(telling(self.fake_score, self._scales[rollout_key(self.draws)]))
            yield
