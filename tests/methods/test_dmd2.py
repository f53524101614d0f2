"""DMD2: known answers on Gaussians, re-derived updates, and learning four modes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sampling_of_cases import long
from small_problems import Exact, distil, gaussian_problem, learns_soon, mlp, posterior, ready, shift
from torch.optim.lr_scheduler import StepLR

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.losses.score_matching import surrogate
from lightning_distill.methods import DMD2, UpdateSchedule
from lightning_distill.methods.base import Terms
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.teacher_features import TeacherFeatures
from lightning_distill.processes import FlowMatching
from lightning_distill.randomness import Draws, RandomStreams
from lightning_distill.times import Uniform

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


# ------------------------------------------------------------------------------------------------ one update
@pytest.mark.parametrize(
    ("weight", "fresh"), [("dmd", None), ("dmd_v1", False), ("kl", True), ("vsd", False), ("one", None)]
)
def test_a_cycle_is_the_hand_written_update(weight, fresh, ring4_problem):
    """One student and one critic update of two Gaussians, from the formulas of the paper alone."""
    n, a, b, lr = 64, 1.3, -0.5, 0.1
    module = gaussian_problem(a, b, fake_score_steps=1, weight=weight, fresh_samples=fresh, seed=11)
    ring4_problem.fit(module, 1, Batch(size=n), batch_size=n)
    streams = RandomStreams(11)
    z = streams.normal("slice0/start", 0, 0, (n, 1)).double()
    x = a * z + b
    # student: the direction at x_t, times dx/da = z and dx/db = 1
    t = 0.02 + 0.96 * streams.uniform("student0/matching/time", 0, 0, (n,))[:, None]
    x_t = (1 - t) * x + t * streams.normal("student0/matching/noise", 0, 0, (n, 1)).double()
    y_t, y_f = posterior(x_t, t, 1.0, 0.7), posterior(x_t, t, b, a)
    factor = {
        "dmd": 1 / (x - y_t).abs(),
        "dmd_v1": (1 - t) / (x - y_t).abs(),
        "kl": ((1 - t) / t) ** 2,
        "vsd": (1 - t) * t,
        "one": torch.ones_like(t),
    }[weight]
    g = factor * (y_f - y_t)
    student = module.student.network
    assert float(student.a.detach()) == pytest.approx(a - lr * float((g * z).mean()), rel=1e-4)
    assert float(student.b.detach()) == pytest.approx(b - lr * float(g.mean()), rel=1e-4)
    # critic: mean (F(x_t) - x)^2 at fresh times on what the student, moved or not, makes of the same noise
    if fresh is not False:
        x = float(student.a.detach()) * z + float(student.b.detach())
    s = streams.uniform("fake_score0/critic/time", 0, 0, (n,)).clamp_min(1e-4)[:, None]
    x_s = (1 - s) * x + s * streams.normal("fake_score0/critic/noise", 0, 0, (n, 1)).double()
    mean = torch.tensor(b, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(a, dtype=torch.float64).log().requires_grad_()
    (posterior(x_s, s, mean, log_std.exp()) - x).square().mean().backward()
    critic = module.fake_score.network
    assert float(critic.mean.detach()) == pytest.approx(b - lr * float(mean.grad), rel=1e-4)
    assert float(critic.log_std.detach()) == pytest.approx(float(log_std.detach()) - lr * float(log_std.grad), rel=1e-4)


def test_the_student_moves_to_the_teacher_and_stays_there(ring4_problem):
    def run(a, b, steps):
        module = gaussian_problem(a, b, fake_score_steps=2, weight="one")
        ring4_problem.fit(module, steps, Batch(size=2048), batch_size=256)
        return float(module.student.network.a.detach()), float(module.student.network.b.detach())

    far, near = run(1.3, -0.5, 150), run(0.7, 1.0, 20)
    assert far == (pytest.approx(0.7, abs=0.08), pytest.approx(1.0, abs=0.08))
    assert near == (pytest.approx(0.7, abs=0.03), pytest.approx(1.0, abs=0.03))


@pytest.mark.parametrize("role", ["copy", "lora"])
def test_at_initialisation_the_direction_is_exactly_zero(role):
    """Student, teacher and fake score are one function; unguided scores agree bit for bit."""
    roles = {} if role == "copy" else {"student": Lora(rank=2), "fake_score": Lora(rank=2, seed=1)}
    module = ready(DMD2(mlp(classes=3), **roles))
    terms = module.student_loss(Batch(cond={"class_labels": torch.arange(12) % 3}))
    terms.losses["matching"].backward()
    assert float(terms.losses["matching"].detach()) == 0.0
    assert float(terms.diagnostics["score_gap"]) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in module.student.parameters())
    guided = ready(DMD2(mlp(classes=3), guidance=Guidance(2.0), **roles))
    gap = guided.student_loss(Batch(cond={"class_labels": torch.arange(12) % 3})).diagnostics["score_gap"]
    assert float(gap) > 0


def test_the_fake_score_is_never_guided():
    module = ready(DMD2(mlp(classes=3), guidance=Guidance(3.0)))
    shift(module.fake_score)
    seen = {}
    for name in ("teacher", "fake_score"):
        getattr(module, name).register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: len(args[0])}))
    module.student_loss(Batch(cond={"class_labels": torch.arange(6) % 3}))
    assert seen == {"teacher": 12, "fake_score": 6}


# ------------------------------------------------------------------------------------------------ gradients
def adversarial(**settings):
    module = DMD2(
        mlp(),
        gan=Adversary(taps=("blocks.0", "input"), width=4, **settings),
        loss_weights={"student/matching": 0.0, "student/gan": 1.0},
    )
    ready(module)
    shift(module.fake_score)
    return module


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_the_gan_gradient_flows_through_the_features_into_the_student(features):
    module = adversarial(features=features)
    batch = Batch(size=16)
    loss = module.weighted_sum("student", module.student_loss(batch))
    student = list(module.student.parameters())
    got = torch.autograd.grad(loss, student, retain_graph=True, allow_unused=True)
    # the same by hand: D reads the first block of the features' network, and x_s itself
    streams, network = module.streams, module.feature_network.network
    z = streams.normal("slice0/start", 0, 0, (16, 2))
    s = streams.uniform("student0/gan/time", 0, 0, (16,)).clamp_min(1e-4)
    x = module.student(z, torch.ones(16, dtype=torch.float64)).x0
    c = s.float()[:, None]
    x_s = (1 - c) * x + c * streams.normal("student0/gan/noise", 0, 0, (16, 2))
    embedding = network.time_embedding(network.time_proj(s.float()))
    feature = network.blocks[0](network.input(x_s), embedding)
    heads = module.discriminator.heads
    logits = torch.cat([heads["blocks/0"](feature), heads["input"](x_s)], dim=1)
    want = torch.autograd.grad(F.softplus(-logits).mean(), student, allow_unused=True)
    assert any(g is not None and bool(g.abs().max() > 1e-6) for g in want)
    for g, w in zip(got, want):
        assert (g is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-7)


def test_the_relativistic_gan_pairs_each_sample_with_data_at_the_same_noise_level():
    module = adversarial(kind="relativistic")
    batch = Batch(x0=torch.randn(8, 2))
    got = module.student_loss(batch).losses["gan"]
    x = module.rollout(batch).x0
    x_s, s, _ = module.renoise(x, module.critic_times, "gan")
    c, eps = s.float()[:, None], module.draws.normal("gan/real_noise", (8, 2))
    real, fake = (module.logits(noisy, s, {}) for noisy in ((1 - c) * batch.x0 + c * eps, x_s))
    torch.testing.assert_close(got, F.softplus(real - fake).mean())
    with pytest.raises(ValueError, match="loader yields batches without x0"):
        module.student_loss(Batch(size=8))


def test_only_the_gan_reaches_the_fake_score_in_the_student_loss():
    """And there the phase freezes it: the optimizer never sees those gradients (see the contract tests)."""
    module = adversarial()
    terms = module.student_loss(Batch(size=8))
    others = [*module.fake_score.parameters(), *module.discriminator.parameters()]
    matching = torch.autograd.grad(terms.losses["matching"], others, retain_graph=True, allow_unused=True)
    assert all(g is None for g in matching)
    gan = torch.autograd.grad(terms.losses["gan"], others, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in gan)


def test_the_critic_loss_does_not_reach_the_student():
    module = adversarial()
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    terms = module.fake_score_loss(Batch(x0=torch.randn(8, 2)))
    total = terms.losses["denoising"] + terms.losses["gan"]
    student = list(module.student.parameters())
    fake = [*module.fake_score.parameters(), *module.discriminator.parameters()]
    assert all(g is None for g in torch.autograd.grad(total, student, allow_unused=True, retain_graph=True))
    grads = torch.autograd.grad(terms.losses["gan"], fake, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in grads[: len(list(module.fake_score.parameters()))])


def test_fake_features_in_passing_are_those_of_a_call_of_their_own(monkeypatch):
    """The shared forward and a separate one at the same times give the same logits and losses."""
    module = adversarial()
    batch = Batch(x0=torch.randn(8, 2))
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    shared = module.fake_score_loss(batch)
    seen = []
    original = module.heads
    monkeypatch.setattr(module, "heads", lambda f, cond: seen.append(original(f, cond)) or seen[-1])
    module._rollouts.clear()
    module.fake_score_loss(batch)
    fake, real = seen
    want = F.softplus(fake).mean() + F.softplus(-real).mean()
    torch.testing.assert_close(shared.losses["gan"], want)
    x = module.rollout(batch, grad=False).x0
    x_t, t, _ = module.renoise(x, module.critic_times, "critic")
    alone = original(module.gan.tapped(module.fake_score, x_t, t, {}), {})
    torch.testing.assert_close(fake, alone)


# ------------------------------------------------------------------------------------------------ rollout
def exact_rollout(sampler, stop, rows=2000, dim=256):
    teacher = analytic_denoiser(GaussianMixture(torch.zeros(1, dim), std=0.5), FlowMatching())
    module = DMD2(teacher, student=Exact(), fake_score=Exact(), num_steps=4, sampler=sampler, shape=[dim], ema=[])
    module.configure_model()
    assert module.student_times == [1.0, 0.75, 0.5, 0.25]
    update = next(u for u in range(1000) if module.streams.integer("slice0/stop", u, 4) == stop)
    module.draws = Draws(module.streams, update, 0, "student0")
    return module, module.rollout(Batch(size=rows))


@pytest.mark.parametrize(("sampler", "variance"), [("renoise", 0.07255), ("ode", 0.11597)])
def test_backward_simulation_of_the_posterior_mean_has_its_known_variance(sampler, variance):
    _, rollout = exact_rollout(sampler, stop=3)
    assert rollout.step == 3
    x0 = rollout.x0.detach()
    n = x0.numel()
    assert float(x0.var()) == pytest.approx(variance, rel=0.01)
    assert abs(float(x0.mean())) < 4 * (variance / n) ** 0.5


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_earlier_stops_have_theirs(stop):
    """Var after k renoise steps: v_0 = 0 (x0 of pure noise is the mean), v_k = c_k^2 ((1 - t_k)^2 v_{k-1} + t_k^2)."""
    _, rollout = exact_rollout("renoise", stop, rows=500)
    variance = 0.0
    for k, t in enumerate([1.0, 0.75, 0.5, 0.25][: stop + 1]):
        gain = (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)
        variance = gain**2 * ((1 - t) ** 2 * (variance if k else 0.0) + t**2)
    assert float(rollout.x0.detach().var()) == pytest.approx(variance, rel=0.02, abs=1e-12)


def test_training_and_sampling_make_the_same_images_from_the_same_noise():
    module = ready(DMD2(mlp(), num_steps=4, sampler="ode", ema=[]))
    update = next(u for u in range(1000) if module.streams.integer("slice0/stop", u, 4) == 3)
    module.draws = Draws(module.streams, update, 0, "student0")
    rolled = module.rollout(Batch(size=10)).x0
    noise = module.streams.normal("slice0/start", update, 0, (10, 2))
    torch.testing.assert_close(rolled.detach(), module.sample(10, noise=noise), rtol=0, atol=1e-6)


def test_a_graph_exists_on_the_last_step_only(monkeypatch):
    module = ready(DMD2(mlp(), num_steps=4))
    update = next(u for u in range(1000) if module.streams.integer("slice0/stop", u, 4) == 3)
    module.draws = Draws(module.streams, update, 0, "student0")
    graphs = []
    module.student.register_forward_hook(lambda _m, _a, out: graphs.append(out.raw.requires_grad))
    assert module.rollout(Batch(size=4)).x0.requires_grad
    assert graphs == [False, False, False, True]
    assert not module.rollout(Batch(size=4), grad=False).x0.requires_grad
    assert len(graphs) == 4  # critics reuse the samples of the slice


def test_the_stop_is_uniform_and_common_to_all_micro_batches():
    module = ready(DMD2(mlp(), num_steps=4))
    stops = []
    for update in range(400):
        found = set()
        for first in (0, 2):
            module.draws = Draws(module.streams, update, first, "student0")
            found.add(module.rollout(Batch(size=2)).step)
        module._rollouts.clear()
        assert len(found) == 1
        stops += found
    counts = torch.tensor(stops).bincount(minlength=4)
    assert float(((counts - 100.0) ** 2 / 100.0).sum()) < 16.3  # chi-squared, 3 degrees of freedom, 99.9 %


# ------------------------------------------------------------------------------------------------ warm-up
def test_regression_warms_up_and_matching_takes_over(tmp_path, ring4_problem):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(512, 1, generator=generator)
    save_file({"noise": noise, "x0": 0.7 * noise + 1.0}, tmp_path / "pairs.safetensors")
    module = gaussian_problem(
        regression_pairs=str(tmp_path / "pairs.safetensors"),
        regression_steps=60,
        fake_score_steps=2,
        weight="one",
        student_scheduler=partial(StepLR, step_size=100),
        fake_score_scheduler=partial(StepLR, step_size=100),
    )
    names, critic, weights = [], [], []
    student_loss, fake_score_loss = module.student_loss, module.fake_score_loss

    def of_student(batch):
        terms = student_loss(batch)
        names.extend(terms.losses)
        weights.append([float(p.detach()) for p in (module.student.network.a, module.student.network.b)])
        return terms

    def of_critic(batch):
        critic.append(module.draws.update)
        return fake_score_loss(batch)

    module.student_loss, module.fake_score_loss = of_student, of_critic
    ring4_problem.fit(module, 61, Batch(size=64), batch_size=64)
    assert names == ["regression"] * 60 + ["matching"]
    assert critic == [60, 60]  # it waits for the end of the warm-up, and its schedule with it
    assert [scheduler.last_epoch for scheduler in module.lr_schedulers()] == [61, 1]
    assert weights[-1] == pytest.approx([0.7, 1.0], abs=0.02)  # as the warm-up leaves them


def test_the_teachers_features_are_added_to_the_squared_error(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise, x0 = torch.randn(6, 2, generator=generator), torch.randn(6, 2, generator=generator)
    save_file({"noise": noise, "x0": x0}, tmp_path / "pairs.safetensors")
    path, distance = str(tmp_path / "pairs.safetensors"), TeacherFeatures(["blocks.0"])
    module = ready(DMD2(mlp(), regression_pairs=path, regression_distance=distance, regression_steps=1))
    loss = module.student_loss(Batch(size=5)).losses["regression"]
    rows = (module.draws.uniform("pairs", 5) * 6).long()
    made = module.student(noise[rows], torch.ones(5), {}).x0
    u, eps = module.draws.uniform("perceptual/t", 5), module.draws.normal("perceptual/noise", (5, 2))
    seen = distance(module.teacher, made, x0[rows], {}, u, eps)
    torch.testing.assert_close(loss, (made - x0[rows]).square().mean() + seen.mean())
    assert float(seen.mean().detach()) > 1e-3


# ------------------------------------------------------------------------------------------------ bad input
def test_settings_that_cannot_work_are_refused_with_the_reason(tmp_path):
    pairs = str(tmp_path / "pairs.safetensors")
    save_file({"noise": torch.zeros(1, 2), "x0": torch.zeros(1, 2)}, pairs)

    def refused(message, teacher=None, **settings):
        with pytest.raises(ValueError, match=message):
            DMD2(teacher or mlp(), **settings).configure_model()

    refused("does not cover the matching times", critic_times=Uniform(0.0, 0.5))
    refused("num_steps=0", num_steps=0)
    refused("must be 1 or more", fake_score_steps=0)
    refused("must be 1 or more", updates_per_sample=0)
    refused("accumulate_grad_batches=0", accumulate_grad_batches=0)
    refused("needs regression_pairs", regression_steps=5)
    for steps in ({}, {"regression_steps": -1}):
        refused("leaves regression_pairs without use; give regression_steps, the", regression_pairs=pairs, **steps)
    with_pairs = {"regression_pairs": pairs, "regression_steps": 5}
    refused("no block 'nowhere'", **with_pairs, regression_distance=TeacherFeatures(["nowhere"]))
    refused("sampler='heun' is unknown", sampler="heun")
    refused("outside", student_times=[2.0])
    refused("must fall strictly", student_times=[0.5, 0.8])
    refused("loss_weights has 'gan'", loss_weights={"gan": 1.0})
    refused("no block 'mid_block'", gan=Adversary(taps=("mid_block",)))
    with pytest.raises(ValueError, match="DMD2 needs a teacher"):
        DMD2().configure_model()
    with pytest.raises(ValueError, match="features='student'"):
        Adversary(features="student")
    with pytest.raises(ValueError, match="kind='wasserstein'"):
        Adversary(kind="wasserstein")


def test_guidance_needs_an_unconditional_branch():
    with pytest.raises(ValueError, match="guidance scale 2 needs an unconditional branch"):
        DMD2(mlp(), guidance=Guidance(2.0)).configure_model()
    DMD2(mlp(classes=3), guidance=Guidance(2.0)).configure_model()


def test_a_gan_needs_data(ring4_problem):
    module = adversarial()
    with pytest.raises(ValueError, match="loader yields batches without x0"):
        module.fake_score_loss(Batch(size=4))


def test_batches_that_do_not_divide_are_refused_with_the_number(ring4_problem):
    module = DMD2(mlp(), fake_score_steps=3, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="give a multiple of 6 samples"):
        ring4_problem.fit(module, 1, Batch(size=63), batch_size=7)


def test_slices_and_plan_follow_the_update_ratio():
    assert DMD2(mlp(), fake_score_steps=5).slices_per_cycle == 5
    module = DMD2(mlp(), fake_score_steps=5, updates_per_sample=2)
    assert module.slices_per_cycle == 3
    assert module.phase_plan() == [
        ("student", 0),
        ("fake_score", 0),
        ("fake_score", 0),
        ("fake_score", 1),
        ("fake_score", 1),
        ("fake_score", 2),
    ]


def test_critics_that_share_samples_draw_new_times_and_noise():
    module = ready(DMD2(mlp(), fake_score_steps=2, updates_per_sample=2))
    inputs = []
    module.fake_score.register_forward_pre_hook(lambda _m, args: inputs.append(args[:2]))
    for repeat in range(2):
        module.draws = Draws(module.streams, 0, 0, f"fake_score{repeat}", 0)
        module.fake_score_loss(Batch(size=8))
    assert not torch.isclose(inputs[0][1], inputs[1][1]).any()
    assert not torch.isclose(inputs[0][0], inputs[1][0]).any()


@pytest.mark.parametrize(
    ("given", "updates", "fresh"),
    [
        (False, 1, False),
        (True, 2, True),
        (None, 1, True),
        (None, 2, False),
        (None, (1, 3), True),
        (False, (1, 3), False),
    ],
    ids=str,
)
def test_fresh_samples_are_those_of_the_moved_student(given, updates, fresh):
    """Of the same noise: the critic sees what the student made of it before its update, or makes of it after."""
    scheduled = isinstance(updates, tuple)  # a schedule that has come down to a single critic update
    critic = {"critic_schedule": UpdateSchedule(*updates)} if scheduled else {"fake_score_steps": updates}
    module = ready(DMD2(mlp(), fresh_samples=given, **critic))
    if scheduled:
        module.critic_levels.fill_(1.0)
    batch, weights = Batch(size=8), list(module.student.parameters())

    def samples(phase, move):
        with torch.no_grad():
            for weight in weights:
                weight.add_(move)
        module.draws = Draws(module.streams, 0, 0, phase, 0)
        return module.rollout(batch, grad=phase == "student0").x0.detach()

    before = samples("student0", 0.0)
    module.after_phase("student")
    after = samples("fake_score0", 0.125)
    assert torch.equal(before, after) is not fresh
    module._rollouts.clear()
    torch.testing.assert_close(samples("student0", -0.125), before)  # it is the noise that they share
    assert module.forward_counts()["fake_score"]["student"] == int(fresh and not scheduled)


# ------------------------------------------------------------------------------------------------ learning
class SignFlipped(DMD2):
    """Negative control: away from the teacher."""

    def student_loss(self, batch):
        terms = super().student_loss(batch)
        return Terms({"matching": -terms.losses["matching"]}, terms.diagnostics)


class WithoutCritic(DMD2):
    """Negative control, score distillation sampling: the sample itself in the place of the fake score."""

    def student_loss(self, batch):
        x = self.rollout(batch).x0
        x_t, t, _ = self.renoise(x, self.matching_times, "matching")
        with torch.no_grad():
            real = self.require_teacher()(x_t, t, batch.cond).x0
        scale = (x - real).abs().mean(1, keepdim=True).clamp_min(1e-6)
        return Terms({"matching": surrogate(x, (x - real).detach() / scale.detach())})


@pytest.mark.learn
def test_it_soon_learns_four_modes(ring4_problem, trained_teacher):
    run = learns_soon(ring4_problem, trained_teacher.denoiser, DMD2)
    assert run.distance < 0.28
    assert all(0.15 < share < 0.35 for share in run.shares), run.shares


@pytest.mark.slow
@pytest.mark.learn
def test_a_one_step_student_beats_two_teacher_steps(ring4_problem, trained_teacher):
    run = distil(ring4_problem, trained_teacher.denoiser, 300)
    assert run.distance < 0.15
    assert run.distance < 0.2 * ring4_problem.distance(trained_teacher.sample(2))
    assert all(0.18 < share < 0.32 for share in run.shares), run.shares


@pytest.mark.learn
@pytest.mark.parametrize(
    ("control", "updates", "limit"),
    [long(SignFlipped, 120, 1.0), pytest.param(WithoutCritic, 150, 0.7, marks=pytest.mark.slow)],
)
def test_controls_do_not_learn_it(control, updates, limit, ring4_problem, trained_teacher):
    assert distil(ring4_problem, trained_teacher.denoiser, updates, method=control).distance > limit


@pytest.mark.slow
@pytest.mark.learn
@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_the_gan_variants_learn_it(features, ring4_problem, trained_teacher):
    gan = Adversary(taps=("blocks.2",), features=features)
    run = distil(ring4_problem, trained_teacher.denoiser, 600, gan=gan, loss_weights={"student/gan": 0.03})
    assert run.distance < 0.15
    assert all(0.15 < share < 0.35 for share in run.shares), run.shares


@pytest.mark.slow
@pytest.mark.learn
def test_five_critic_updates_are_closer_still(ring4_problem, trained_teacher):
    run = distil(ring4_problem, trained_teacher.denoiser, 600, fake_score_steps=5)
    assert run.distance < 0.13
    assert all(0.18 < share < 0.32 for share in run.shares), run.shares
