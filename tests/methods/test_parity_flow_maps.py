"""The losses of released code, reproduced: flow maps, and matching on their samples; see ``test_parity``."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from parity_networks import F64, FAKE, STUDENT, TEACHER, Given, built, check, denoiser, fixture, learner

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.losses.continuous import normalise_tangent
from lightning_distill.losses.velocity_matching import student_velocity, velocity_distillation
from lightning_distill.methods import AnyFlow, AnyFlowOnPolicy, MDTDist, any_flow, mdt_dist
from lightning_distill.processes import FlowMatching
from lightning_distill.times import Shifted, Uniform


@pytest.mark.parametrize(("case", "equal", "end"), [("plain", 0.5, 0.25), ("any", 0.25, 0.0)])
def test_any_flow(case, equal, end, monkeypatch):
    """The mean error at r = t is that of the batch there; kinds of gaps are counted off."""
    given, expected = fixture("AnyFlow")
    monkeypatch.setattr(any_flow, "balance_weight", partial(any_flow.balance_weight, eps=given.balance_constant))
    n = len(given.x0)
    module = learner(
        AnyFlow,
        FlowMatching(),
        kind="flow_prediction",
        training_times=Shifted(given.shift),
        equal_share=equal,
        end_share=end,
    )
    place = (torch.arange(n, dtype=F64) + 0.5) / n
    part = torch.where((place > equal) & (place < equal + end), 1.0, torch.where(place < equal, 0.0, equal))
    module.draws = Given(t=given.first, r=given.second, equal=part, noise=given.noise)
    batch = Batch(x0=given.x0)
    module.student_loss(batch)
    module.diffusion_error_state.copy_(module.diffusion_error_pending)
    loss = module.student_loss(batch).losses["mean_flow"]
    check(loss, module.student.network, expected[case], rel=1e-7)


@pytest.mark.parametrize(("case", "interval"), [("middle", 2), ("first", 0), ("last", 3)])
def test_any_flow_on_policy(case, interval, monkeypatch):
    """Twice as large, without the factor 1/2; the released guidance counts from 0."""
    given, expected = fixture("AnyFlowOnPolicy")
    networks = [
        denoiser(phase, FlowMatching(given.shift), "flow_prediction", null_cond={"shift": given.null_shift})
        for phase in (TEACHER, STUDENT, FAKE)
    ]
    guided = Guidance(given.guidance if case == "middle" else 1.0)
    times = Shifted(given.matching_shift)
    module = built(
        AnyFlowOnPolicy, *networks, guidance=guided, rollout_steps=[4], matching_times=times, critic_times=times
    )
    module.draws = draws = Given(
        start=given.z,
        t=given.matching_u,
        r=given.matching_u,
        noise=given.z,
        matching__time=given.matching_u,
        matching__noise=given.matching_noise,
        critic__time=given.critic_u,
        critic__noise=given.critic_noise,
    )
    monkeypatch.setattr(draws, "integer", lambda name, high: interval if name == "interval" else 0)
    batch = Batch(x0=given.z, cond={"shift": torch.zeros(3, dtype=F64)})
    loss = module.student_loss(batch).losses["matching"]
    check(loss, module.student.network, expected[case]["generator"], factor=2)
    loss = module.fake_score_loss(batch).losses["denoising"]
    check(loss, module.fake_score.network, expected[case]["critic"])


@pytest.mark.parametrize(("case", "tangent"), [("discrete", "one_sided"), ("continuous", "jvp")])
@pytest.mark.parametrize("normed", [False, True])
def test_mdt_dist(case, tangent, normed, monkeypatch):
    """The released distillation lacks the factor 1 - t and 1/2; with ``d_norm`` it normalises its derivative too."""
    given, expected = fixture("MDTDist")
    name = f"{case}_normed" if normed else case
    row = list(expected).index(name)

    def released(x, own, velocity, t):
        return velocity_distillation(x, own, velocity, torch.zeros_like(t))

    def normalised(u, du, t):
        return student_velocity(u, normalise_tangent(du, given.constant), t)

    monkeypatch.setattr(mdt_dist, "velocity_distillation", released)
    if normed:
        monkeypatch.setattr(mdt_dist, "student_velocity", normalised)
    module = learner(
        MDTDist,
        FlowMatching(),
        kind="flow_prediction",
        training_times=Uniform(0.0, 1.0),
        guidance=Guidance(float(given.guidance[row])),
        distillation_guidance=Guidance(float(given.distillation_guidance[row])),
        norm=given.constant if normed else None,
        tangent=tangent,
        tangent_step=given.interval if case == "discrete" else None,
    )
    module.draws = Given(
        t=given.t,
        noise=given.noise,
        start=given.start,
        distillation__time=given.t,
        distillation__noise=given.noise,
    )
    losses = module.student_loss(Batch(x0=given.x0, cond={"shift": torch.zeros(4, dtype=F64)})).losses
    check(losses["matching"], module.student.network, expected[name]["matching"])
    check(losses["distillation"], module.student.network, expected[name]["distillation"], factor=2)
