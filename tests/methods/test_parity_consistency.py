"""The losses of released code, reproduced: consistency on solver states and in segments; see ``test_parity``."""

from __future__ import annotations

import pytest
import torch
from parity_networks import (
    F64,
    FAKE,
    SHAPE,
    STUDENT,
    TEACHER,
    Formula,
    Given,
    Head,
    Preconditioned,
    built,
    check,
    copied,
    denoiser,
    fixture,
    learner,
)

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.methods import CMT, DCM
from lightning_distill.networks.adversary import Adversary
from lightning_distill.processes import EDM, FlowMatching
from lightning_distill.trajectories import run_solver


# ------------------------------------------------------------------------------------------------ mid-training
@pytest.mark.parametrize(("metric", "factor"), [("mse", 4), ("pseudo_huber", 1)])
def test_cmt(metric, factor):
    """A mean over elements in the place of a sum."""
    given, expected = fixture("CMT")
    student, teacher = Preconditioned(STUDENT), Preconditioned(TEACHER)
    module = learner(CMT, EDM(), student, teacher, metric=metric, huber=0.0)
    states = given.states.view(2, 6, 2, 2, 1)
    module.draws = Given()
    loss = module.student_loss(Batch(x0=given.end, states=states, times=given.levels)).losses["regression"]
    check(loss, student, expected["mse" if metric == "mse" else "l2"], factor=factor)


def test_the_states_of_cmt():
    """The library's solver has order two."""
    given, expected = fixture("CMT")
    teacher = denoiser(TEACHER, EDM(), network=Preconditioned(TEACHER))
    levels = given.levels.tolist()
    found = run_solver(teacher, given.noise, {}, levels, "dpmpp_2m", keep=range(len(levels))).states
    states = torch.tensor(expected["states_of_order_2"], dtype=torch.float64).view_as(found)
    torch.testing.assert_close(found, states, rtol=1e-9, atol=1e-9)


def test_cmt_of_flow_maps():
    """Each state has one end here; the released code draws some of all pairs."""
    given, expected = fixture("CMT")
    steps = int(given.solver_steps)
    module = learner(
        CMT,
        FlowMatching(),
        Formula(STUDENT),
        kind="flow_prediction",
        form="flow_map",
        sampler="flow_map",
        metric="mse",
        solver="euler",
        solver_steps=steps,
    )
    start = torch.arange(steps)
    u = (given.ends - start - 0.5) / (steps - start)
    module.draws = Given(noise=given.noise, **{f"end{i}": u[:, i] for i in range(steps)})
    loss = module.student_loss(Batch(size=2)).losses["regression"]
    check(loss, module.student.network, expected["flow_map"])


# ------------------------------------------------------------------------------------------------ two experts
FRAMES = (1, 4, 1, 1)


def experts(given, update, guidance=1.0, shape=FRAMES, **settings):
    """DCM, the first of whose updates is the semantic expert's."""
    process = FlowMatching(given.shift)
    networks = [
        denoiser(phase, process, "flow_prediction", Formula(phase, shape), null_cond={"shift": given.null_shift})
        for phase in (TEACHER, STUDENT)
    ]
    module = built(
        DCM,
        *networks,
        shape=shape,
        intervals=int(given.intervals),
        semantic_intervals=int(given.semantic_intervals),
        semantic_updates=1,
        guidance=Guidance(guidance),
        **settings,
    )
    first, count = (0, given.semantic_intervals) if update == 0 else (given.semantic_intervals, None)
    return module, first, count or given.intervals - given.semantic_intervals


@pytest.mark.parametrize(("case", "guidance"), [("semantic", 1.0), ("edge", 1.0), ("semantic_guided", 3.0)])
def test_the_semantic_expert_of_dcm(case, guidance):
    """Indices ascend with noise there, positions descend here."""
    given, expected = fixture("DCM", FRAMES)
    module, first, count = experts(given, 0, guidance)
    copied(Formula(FAKE, FRAMES), module.sampling_network(module.target_name).network.experts[0])
    position = given.intervals - 1 - getattr(given, case.split("_")[0])
    module.draws = Given(interval=(position - first + 0.5) / count, noise=given.noise)
    terms = module.student_loss(Batch(x0=given.x0, cond={"shift": torch.zeros(3, dtype=F64)}))
    check(module.weighted_sum("student", terms), module.student.network.experts[0], expected[case])


def test_the_detail_expert_of_dcm(monkeypatch):
    """The target is the student itself there, and the generator's loss relu(1 - D), D < 1 here."""
    given, expected = fixture("DCM")
    gan = Adversary(taps=("input",), features="teacher", kind="hinge")
    weights = {"student/gan": 5.0, "student/features": 10.0}  # the paper's, without the released common factor
    module, first, count = experts(given, 1, shape=SHAPE, frame_lag=None, gan=gan, loss_weights=weights)
    copied(module.student.network.experts[1], module.sampling_network(module.target_name).network.experts[1])
    module.discriminator = head = Head()
    head.weight.data *= 0.2
    monkeypatch.setattr(module, "game_levels", lambda ends: given.adversarial_sigma)
    position = given.intervals - 1 - given.detail
    module.draws = Given(
        1,
        interval=(position - first + 0.5) / count,
        noise=given.noise,
        gan__noise=given.adversarial_noise,
        gan__real_noise=given.adversarial_noise,
    )
    batch = Batch(x0=given.x0, cond={"shift": torch.zeros(3, dtype=F64)})
    loss = module.weighted_sum("student", module.student_loss(batch))
    check(loss, module.student.network.experts[1], expected["detail"], offset=module.loss_weights["student/gan"])
    loss = module.discriminator_loss(batch).losses["gan"]
    assert float(loss.detach()) == pytest.approx(expected["discriminator"]["loss"], rel=1e-9)
    (slope,) = torch.autograd.grad(loss, head.weight)
    assert slope.tolist() == pytest.approx(expected["discriminator"]["head"], rel=1e-9)
