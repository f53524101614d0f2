"""LADD and ADD: both sides of the game by hand, penalties, and learning."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from small_problems import mlp, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.guidance import Guidance
from lightning_distill.methods import ADD, LADD
from lightning_distill.methods.base import Terms
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.small import small_unet
from lightning_distill.processes import FlowMatching
from lightning_distill.randomness import Draws
from lightning_distill.schedules import WarmupDecay
from lightning_distill.times import Karras, LogitNormal, Uniform

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def heads(**settings):
    return Adversary(**{"taps": ("blocks.0", "input"), "features": "teacher", "width": 4, **settings})


def noisy(module, x, s, name):
    return FlowMatching().add_noise(x, module.draws.normal(name, x.shape), s)


@pytest.mark.parametrize("kind", ["logistic", "hinge", "relativistic"])
def test_both_sides_are_the_formulas(kind):
    module = ready(LADD(mlp(), gan=heads(kind=kind, times=Uniform(0.2, 0.8))))
    shift(module.student)
    batch = Batch(x0=torch.randn(16, 2))
    for phase in ("student", "discriminator"):
        module.draws = Draws(module.streams, 0, 0, f"{phase}0")
        losses = getattr(module, f"{phase}_loss")(batch).losses
        s = 0.2 + 0.6 * module.draws.uniform("gan/time", 16)
        x = module.rollout(batch, grad=False).x0
        fake, real = (
            module.discriminator(module.gan.tapped(module.teacher, x_s, s, {}))
            for x_s in (noisy(module, x, s, "gan/noise"), noisy(module, batch.x0, s, "gan/real_noise"))
        )
        want = {
            "logistic": (F.softplus(-fake).mean(), (F.softplus(-real) + F.softplus(fake)).mean()),
            "hinge": (-fake.mean(), (F.relu(1 - real) + F.relu(1 + fake)).mean()),
            "relativistic": (F.softplus(real - fake).mean(), F.softplus(fake - real).mean()),
        }[kind][phase == "discriminator"]
        torch.testing.assert_close(losses["gan"], want)
        assert set(losses) == {"gan"}


def test_gradients_reach_the_student_through_the_frozen_teacher_and_nothing_else():
    module = ready(LADD(mlp(), gan=heads()))
    loss = module.student_loss(Batch(size=8)).losses["gan"]
    loss.backward(retain_graph=True)
    assert any(bool(p.grad.any()) for p in module.student.parameters() if p.grad is not None)
    assert all(p.grad is None for p in module.teacher.parameters())
    module.draws = Draws(module.streams, 0, 0, "discriminator0")
    loss = module.discriminator_loss(Batch(x0=torch.randn(8, 2))).losses["gan"]
    found = torch.autograd.grad(loss, list(module.student.parameters()), allow_unused=True)
    assert all(g is None for g in found)


def test_penalties_are_the_slope_on_real_samples():
    batch = Batch(x0=torch.randn(4096, 2))
    found = {}
    for r1 in ("exact", "approximate"):
        module = ready(LADD(mlp(), gan=heads(taps=("input",)), r1=r1, r1_std=1e-3), "discriminator0")
        found[r1] = float(module.discriminator_loss(batch).losses["r1"].detach())
        s = module.gan_times.quantile(module.draws.uniform("gan/time", 4096), module.process)
        x_s = noisy(module, batch.x0, s, "gan/real_noise").requires_grad_()
        (slope,) = torch.autograd.grad(module.discriminator({"input": x_s}).sum(), x_s)
    want = float(slope.square().sum(1).mean())
    assert want > 1e-4
    assert found["exact"] == pytest.approx(want, rel=1e-4)
    assert found["approximate"] == pytest.approx(want, rel=0.1)


def test_noise_below_the_rounding_of_logits_is_told_of():
    assert LADD(mlp(), gan=heads()).r1_std == 0.1
    batch = Batch(x0=torch.randn(8, 2))

    def warnings_of(r1_std, narrow, **settings):
        module = ready(LADD(mlp(), gan=heads(), r1_std=r1_std, **{"r1": "approximate", **settings}), "discriminator0")
        with warnings.catch_warnings(record=True) as found, torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            warnings.simplefilter("always")
            module.discriminator_loss(batch)
        return [str(w.message) for w in found if "r1_std" in str(w.message)]

    assert "mostly rounding; give .1" in warnings_of(0.01, True)[0]
    assert not warnings_of(0.1, True) + warnings_of(0.01, False) + warnings_of(0.01, True, r1="exact")


@pytest.mark.parametrize(
    ("r1", "student", "refused"),
    [("exact", Lora(rank=2), True), ("exact", Copy(), False), ("approximate", Lora(rank=2), False)],
    ids=["exact_lora", "exact_copy", "approximate_lora"],
)
def test_recomputed_blocks_have_one_derivative(r1, student, refused):
    teacher = Denoiser(
        small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8), FlowMatching(), "flow_prediction"
    )
    shift(teacher.network)
    settings = {"gan": heads(taps=("mid_block",)), "activation_checkpointing": True, "ema": []}
    module = LADD(teacher, student=student, r1=r1, **settings)
    if refused:
        with pytest.raises(ValueError, match="differentiates the teacher's blocks twice"):
            module.configure_model()
        return
    ready(module, "discriminator0")
    with module._only("discriminator"):
        losses = module.discriminator_loss(Batch(x0=torch.randn(2, 1, 8, 8)))
        module.weighted_sum("discriminator", losses).backward()
    assert all(p.grad is not None for p in module.discriminator.parameters())


def test_the_distance_of_add_is_to_the_guided_teacher():
    module = ready(ADD(mlp(3), gan=heads(), guidance=Guidance(3.0)))
    shift(module.student)
    cond = {"class_labels": torch.arange(12) % 3}
    batch = Batch(cond=cond)
    got = module.student_loss(batch).losses["distillation"]
    x = module.rollout(batch, grad=False).x0
    t = 0.02 + 0.96 * module.draws.uniform("distillation/time", 12)
    x_t = noisy(module, x, t, "distillation/noise")
    with torch.no_grad():
        null = module.teacher(x_t, t, {"class_labels": torch.full((12,), 3)}).x0
        real = null + 3.0 * (module.teacher(x_t, t, cond).x0 - null)
    torch.testing.assert_close(got, ((1 - t)[:, None] * (x - real).square()).mean().float(), rtol=1e-4, atol=1e-6)
    assert module.loss_weights["student/distillation"] == 2.5
    assert "distillation" not in ready(LADD(mlp(), gan=heads())).student_loss(Batch(size=4)).losses


def test_ladd_is_add_without_the_distance():
    one = ready(ADD(mlp(), gan=heads(), loss_weights={"student/distillation": 0.0}))
    other = ready(LADD(mlp(), gan=heads()))
    losses = [m.student_loss(Batch(size=8)).losses for m in (one, other)]
    assert losses[0].keys() == losses[1].keys()
    assert torch.equal(losses[0]["gan"], losses[1]["gan"])


def test_noise_levels_are_logit_normal_unless_given():
    module = ready(LADD(mlp(), gan=heads()))
    assert isinstance(module.gan_times, LogitNormal)
    assert (module.gan_times.mean, module.gan_times.std) == (1.0, 1.0)
    assert module.phase_plan() == [("student", 0), ("discriminator", 0)]
    assert LADD(mlp(), gan=heads(), discriminator_steps=3).slices_per_cycle == 3


def test_settings_that_cannot_work_are_refused():
    def refused(message, **settings):
        with pytest.raises(ValueError, match=message):
            LADD(mlp(), **settings).configure_model()

    refused("LADD reads features of the frozen teacher")
    refused("LADD reads features of the frozen teacher", gan=Adversary(taps=("blocks.0",)))
    refused("r1='two' is unknown", gan=heads(), r1="two")
    refused("discriminator_steps=0", gan=heads(), discriminator_steps=0)
    refused("guidance scale 2 needs an unconditional branch", gan=heads(), guidance=Guidance(2.0))
    module = ready(LADD(mlp(), gan=heads()), "discriminator0")
    with pytest.raises(ValueError, match="loader yields batches without x0"):
        module.discriminator_loss(Batch(size=4))


# ------------------------------------------------------------------------------------------------ learning
class SignFlipped(LADD):
    """Negative control: a student that wants to be found out."""

    def student_loss(self, batch):
        terms = super().student_loss(batch)
        return Terms({"gan": -terms.losses["gan"]}, terms.diagnostics)


def play(problem, teacher, updates, method=LADD, **settings):
    def decay(optimizer):
        return WarmupDecay(optimizer, 0, updates, "linear", final=0.1)

    gan = heads(taps=("blocks.2", "input"), width=64, times=Karras(0.02, 10.0))
    module = method(
        teacher,
        student_times=[2.5],
        gan=gan,
        student_optimizer=problem.adam,
        discriminator_optimizer=problem.adam,
        student_scheduler=decay,
        discriminator_scheduler=decay,
        ema=[ConstantEMA(0.95)],
        **settings,
    )
    problem.fit(module, updates, problem.data)
    samples = module.sample(5000, generator=torch.Generator().manual_seed(1))
    return problem.distance(samples), problem.shares(samples)


@pytest.mark.learn
def test_it_learns_four_modes(ring4_problem, trained_teacher):
    distance, shares = play(ring4_problem, trained_teacher.denoiser, 100)
    assert distance < 0.17
    assert all(0.12 < share < 0.4 for share in shares), shares


@pytest.mark.long
@pytest.mark.learn
def test_the_distance_to_the_teacher_helps_the_game(ring4_problem, trained_teacher):
    """ADD, with a weight for two dimensions; the distance alone draws every sample to the teacher's mean."""
    weights = {"student/distillation": 0.05}
    distance, shares = play(ring4_problem, trained_teacher.denoiser, 80, ADD, loss_weights=weights)
    print(distance, shares)
    assert distance < 0.22
    assert all(0.12 < share < 0.4 for share in shares), shares
    alone = {"student/distillation": 1.0, "student/gan": 0.0}
    assert play(ring4_problem, trained_teacher.denoiser, 40, ADD, loss_weights=alone)[0] > 0.7


@pytest.mark.slow
@pytest.mark.learn
def test_the_other_direction_does_not(ring4_problem, trained_teacher):
    assert play(ring4_problem, trained_teacher.denoiser, 60, SignFlipped)[0] > 0.7
