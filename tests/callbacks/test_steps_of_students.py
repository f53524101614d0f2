"""Callbacks and commands sample students only in ways for which they were trained."""

from __future__ import annotations

import pytest
import torch
from small_problems import mlp, ready

from lightning_distill.callbacks.evaluation import GenerativeEvaluation
from lightning_distill.callbacks.samples import SampleGrid
from lightning_distill.evaluation.runner import EvaluationRunner
from lightning_distill.methods import (
    DMD2,
    OFTSR,
    PCM,
    ArcFlow,
    ConsistencyDistillation,
    FreeFlow,
    InstaFlow,
    KnowledgeDistillation,
    LearnedSolver,
    MeanFlow,
    ProgressiveDistillation,
    Reflow,
    Straightening,
)

OWN = r"its own times alone \(own_times\)"
#: method, settings, numbers of steps that are refused, what is said
REFUSED = {
    "segments": (PCM, {"num_steps": 4, "intervals": 8}, (2, 3), r"\(segments\).*\[1.0, 0.75, 0.5, 0.25\]"),
    "one_step": (FreeFlow, {}, (2,), "one_step_only"),
    "halved": (ProgressiveDistillation, {"num_steps": 4, "stages": 1}, (1, 2, 3), f"{OWN}.*train with other num_steps"),
    "pairs": (KnowledgeDistillation, {"num_steps": 2}, (3, 7), rf"{OWN}.*use sampler 'ode' with \[1.0, 0.5\]"),
    "straight_pairs": (InstaFlow, {}, (2,), OWN),
    "chords": (Straightening, {"num_steps": 2}, (1, 4), OWN),
    "gaps": (MeanFlow, {"num_steps": 2, "max_gap": 0.5, "end_share": 0.0}, (1,), "max_gap=0.5"),
    "policies": (ArcFlow, {"num_steps": 2, "components": 2}, (1, 4), r"policies for the 2 segments from \[1.0, 0.5\]"),
    "pictures": (OFTSR, {}, (1,), "the pictures to be restored, which callbacks and commands"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_steps_that_a_student_was_not_trained_for_are_refused_before_training(name):
    method, settings, wrong, message = REFUSED[name]
    module = ready(method(mlp(), shape=[2], ema=[], **settings)).eval()
    for nfe in wrong:
        grid = SampleGrid(steps=[nfe], num_samples=4, teacher_steps=0, strip=0)
        for refuse in (
            lambda: grid.setup(None, module, "fit"),  # noqa: B023
            lambda: grid.panels(module),  # noqa: B023
            lambda: GenerativeEvaluation(steps=[nfe], extractors=[]).setup(None, module, "fit"),  # noqa: B023
            lambda: EvaluationRunner(None, 10, 0).student_row(module, nfe, "student", []),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=message):
                refuse()
    if name == "pictures":
        for callback in (SampleGrid(), GenerativeEvaluation(extractors=[])):
            with pytest.raises(ValueError, match=message):
                callback.setup(None, module, "fit")
    else:
        assert module.evaluation_times() == module.evaluation_times(len(module.student_times)) == module.student_times


ALLOWED = {
    "matched": (DMD2, {"num_steps": 4}, (1, 2, 3, 4)),
    "consistent": (ConsistencyDistillation, {"intervals": 4}, (1, 3)),
    "average": (MeanFlow, {}, (1, 3)),
    "flow": (Reflow, {}, (1, 3)),
    "solver": (LearnedSolver, {"num_steps": 2, "solver_steps": 4}, (1, 3)),
    # every time of its list leads to the end
    "pairs": (KnowledgeDistillation, {"num_steps": 4}, (1, 2, 4)),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_legitimate_is_drawn(name):
    method, settings, steps = ALLOWED[name]
    module = ready(method(mlp(), shape=[2], **settings)).eval()
    panels = SampleGrid(steps=list(steps), num_samples=4, teacher_steps=0).panels(module)
    assert len(panels) == len(steps)
    assert all(samples.isfinite().all() for samples in panels.values())


def test_as_many_steps_as_the_students_own_are_its_own():
    times = [1.0, 0.9, 0.3]
    module = ready(KnowledgeDistillation(mlp(), student_times=times, solver_steps=10, shape=[2]))
    assert module.evaluation_times(3) == times
    noise = torch.randn(2, 2)
    own, as_many = (module.sample(2, num_steps=n, noise=noise) for n in (None, 3))
    assert torch.equal(own, as_many)
    with pytest.raises(ValueError, match=r"use sampler 'ode' with \[1.0, 0.9, 0.3\]"):
        module.sample(2, num_steps=2)
    assert torch.isfinite(module.sample(2, num_steps=1)).all()
