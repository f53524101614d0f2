"""Decoupled DMD and CDM: the parts add up to DMD2, guidance alone drifts, points beside the trajectory."""

from __future__ import annotations

import pytest
import torch
from small_problems import Affine, Gaussian, Given, assert_same_cycle, learns_soon, mlp, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, IntervalGuidance
from lightning_distill.methods import CDM, DMD2, DecoupledDMD
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.networks.roles import Lora
from lightning_distill.processes import FlowMatching
from lightning_distill.randomness import Draws
from lightning_distill.times import Uniform

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def labelled(n=16):
    return Batch(cond={"class_labels": torch.arange(n) % 3})


# ------------------------------------------------------------------------------------------------ special cases
@pytest.mark.parametrize("coincide", [False, True])
def test_without_guidance_it_is_dmd2_bit_for_bit(coincide):
    one, other = DecoupledDMD(mlp(3), coincide=coincide, num_steps=2), DMD2(mlp(3), num_steps=2)
    assert_same_cycle(one, other, labelled())


@pytest.mark.parametrize("guidance", [Guidance(3.0), IntervalGuidance(3.0, 0.3, 0.7)], ids=["fixed", "interval"])
@pytest.mark.parametrize("weight", ["dmd", "vsd"])
def test_where_the_schedules_coincide_it_is_dmd2(weight, guidance):
    settings = {"weight": weight, "guidance": guidance, "num_steps": 2}
    one, other = DecoupledDMD(mlp(3), coincide=True, **settings), DMD2(mlp(3), **settings)
    assert_same_cycle(one, other, labelled(), tolerance=1e-6, terms=("matching", "engine"))
    apart = DecoupledDMD(mlp(3), **settings)
    with pytest.raises(AssertionError):
        assert_same_cycle(apart, other, labelled(), tolerance=1e-2, terms=("matching", "engine"))


def test_a_cdm_of_one_step_without_the_point_beside_is_decoupled_dmd():
    settings = {"weight": "dmd_clamped", "guidance": Guidance(3.0), "fake_score_steps": 2}
    one = CDM(mlp(3), random_steps=1, loss_weights={"student/continuous": 0.0}, **settings)
    other = DecoupledDMD(mlp(3), sampler="ode", **settings)
    assert_same_cycle(one, other, labelled(), tolerance=1e-6, terms=())


# ------------------------------------------------------------------------------------------------ the two parts
def test_both_parts_are_the_formulas():
    module = ready(DecoupledDMD(mlp(3), guidance=Guidance(4.0), num_steps=2, weight="one"))
    shift(module.fake_score)
    batch, u = labelled(12), module.draws.uniform
    got = module.student_loss(batch)
    rollout = module.rollout(batch, grad=False)
    x, top = rollout.x0, rollout.prediction.t
    null = {"class_labels": torch.full((12,), 3)}
    with torch.no_grad():
        t = 0.02 + 0.96 * u("matching/time", 12)
        x_t = FlowMatching().add_noise(x, module.draws.normal("matching/noise", x.shape), t)
        gap = module.fake_score(x_t, t, batch.cond).x0 - module.teacher(x_t, t, batch.cond).x0
        high = torch.minimum(top, torch.tensor(0.98).double())
        s = 0.02 + (high - 0.02) * u("engine/time", 12)
        x_s = FlowMatching().add_noise(x, module.draws.normal("engine/noise", x.shape), s)
        push = 3.0 * (module.teacher(x_s, s, batch.cond).x0 - module.teacher(x_s, s, null).x0)
    assert bool((s < top).all())
    torch.testing.assert_close(got.losses["matching"], 0.5 * gap.square().mean())
    torch.testing.assert_close(got.losses["engine"], 0.5 * push.square().mean())
    torch.testing.assert_close(got.diagnostics["score_gap"], gap.square().mean())


def guided_gaussians(**settings):
    """Class 0 is N(1, .25), all classes N(0, 1.25): the student makes N(b, a^2) of class 0."""
    teacher = analytic_denoiser(GaussianMixture([[1.0], [-1.0]], std=0.5, labels=[0, 1]), FlowMatching())

    class OfClass(Affine):
        num_classes = 2

        def forward(self, x, t, class_labels=None):
            return super().forward(x, t)

    class Critic(Gaussian):
        def forward(self, x, t, class_labels=None):
            return super().forward(x, t)

    return DecoupledDMD(
        teacher,
        student=Given(OfClass(0.5, 1.0)),
        fake_score=Given(Critic(1.0, 0.5)),
        shape=[1],
        ema=[],
        weight="one",
        guidance=Guidance(3.0),
        fake_score_steps=2,
        gradient_clip_val=None,
        student_optimizer=lambda p: torch.optim.SGD(p, lr=0.2),
        fake_score_optimizer=lambda p: torch.optim.SGD(p, lr=0.2),
        **settings,
    )


def means_on_the_way(module, problem, rounds=4, updates=12):
    found = []
    for _ in range(rounds):
        problem.fit(module, updates, Batch(cond={"class_labels": torch.zeros(2048, dtype=torch.long)}), batch_size=128)
        found.append(float(module.student.network.b.detach()))
    return found


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:this DecoupledDMD has been trained")
def test_the_engine_alone_moves_on_and_matching_alone_stays(ring4_problem):
    engine = means_on_the_way(guided_gaussians(loss_weights={"student/matching": 0.0}), ring4_problem)
    assert all(b - a > 0.01 for a, b in zip([1.0, *engine], engine)), engine
    still = means_on_the_way(guided_gaussians(loss_weights={"student/engine": 0.0}), ring4_problem, rounds=2)
    assert still == pytest.approx([1.0, 1.0], abs=0.05)
    both = means_on_the_way(guided_gaussians(), ring4_problem)
    assert 1.02 < both[-1] < engine[-1]


# ------------------------------------------------------------------------------------------------ CDM
def test_points_beside_the_trajectory_lie_on_the_students_velocity():
    module = ready(CDM(mlp(), random_steps=4))
    batch = Batch(size=32)
    rollout = module.rollout(batch, grad=False)
    inputs = []
    module.student.register_forward_pre_hook(lambda _m, args: inputs.append(args[:2]))
    module.beside(rollout, batch)
    x_r, r = inputs[-1]
    p = rollout.prediction
    assert bool((r < p.t).all())
    torch.testing.assert_close(x_r, p.x_t + (r - p.t).float()[:, None] * p.velocity, atol=1e-5, rtol=1e-5)


def test_random_lists_start_at_the_top_fall_and_are_common_to_all_ranks(monkeypatch):
    module = ready(CDM(mlp(), random_steps=6))
    seen = []
    import lightning_distill.methods.cdm as cdm

    original = cdm.backward_simulation
    monkeypatch.setattr(cdm, "backward_simulation", lambda *a, **k: seen.append(a[3]) or original(*a, **k))
    for update in range(60):
        for first in (0, 4):
            module.draws = Draws(module.streams, update, first, "student0")
            module._rollouts.clear()
            module.rollout(Batch(size=4), grad=False)
        assert seen[-1] == seen[-2]
    lengths = {len(times) for times in seen}
    assert lengths == {1, 2, 3, 4, 5, 6}
    for times in seen:
        assert times[0] == 1.0
        assert all(0.25 <= t <= 0.95 for t in times[1:])
        assert times == sorted(times, reverse=True)


def test_the_critic_is_pulled_to_the_student_after_its_updates(ring4_problem):
    def run(pull):
        module = CDM(mlp(), random_steps=2, critic_pull=pull, fake_score_steps=1, ema=[])
        module.configure_model()
        shift(module.student)
        for phase in ("student", "fake_score"):
            module.optimizer_factories[phase] = lambda p: torch.optim.SGD(p, lr=0.0)
        before = [p.detach().clone() for p in module.fake_score.parameters()]
        ring4_problem.fit(module, 1, Batch(size=8), batch_size=8)
        return before, list(module.fake_score.parameters()), list(module.student.parameters())

    before, after, student = run(0.25)
    for a, b, s in zip(before, after, student):
        torch.testing.assert_close(b.detach(), 0.75 * a + 0.25 * s.detach())
    before, after, _ = run(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_the_clamped_weight_is_the_plain_one_above_a_tenth():
    module = ready(DecoupledDMD(mlp()))
    x, real, t = torch.zeros(2, 3), torch.tensor([[0.5] * 3, [0.01] * 3]), torch.tensor([0.5, 0.5])
    from lightning_distill.losses.score_matching import matching_weight

    assert matching_weight("dmd_clamped", x, real, t, module.process).flatten().tolist() == pytest.approx([2.0, 10.0])


# ------------------------------------------------------------------------------------------------ bad input
def test_settings_that_cannot_work_are_refused():
    def refused(message, method=CDM, **settings):
        with pytest.raises(ValueError, match=message):
            method(mlp(3), **settings).configure_model()

    guided = {"guidance": Guidance(2.0), "engine_times": Uniform(0.6, 0.9), "num_steps": 2}
    refused(r"engine's times begin at 0.6, above the student's last step at t=0.5", DecoupledDMD, **guided)
    DecoupledDMD(mlp(3), engine_below_step=False, **guided).configure_model()
    refused("random_steps=-1", random_steps=-1)
    refused("random_low=0.9 below", random_low=0.9, random_high=0.5)
    refused("critic_pull=1.0", critic_pull=1.0)
    refused("the two networks differ", fake_score=Lora(rank=2))
    lora = [Lora(rank=2, alpha=alpha, target_modules=["inner", "outer"]) for alpha in (2.0, 4.0)]
    refused("the alpha of their adapters", student=lora[1], fake_score=lora[0])
    CDM(mlp(3), student=lora[1], fake_score=lora[1]).configure_model()
    refused("needs a fixed time list", critic_condition_on="step")
    CDM(mlp(3), fake_score=Lora(rank=2), critic_pull=0.0).configure_model()


# ------------------------------------------------------------------------------------------------ learning
@pytest.mark.learn
def test_cdm_learns_four_modes(ring4_problem, trained_teacher):
    settings = {"random_steps": 3, "student_times": [10.0, 1.0], "critic_condition_on": "interval"}
    run = learns_soon(ring4_problem, trained_teacher.denoiser, CDM, **settings)
    assert run.distance < 0.33
    assert all(0.15 < share < 0.35 for share in run.shares), run.shares
