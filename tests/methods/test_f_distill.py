"""f-distill: weights from the discriminator's ratio, running means, and learning four modes."""

from __future__ import annotations

import math

import pytest
import torch
from small_problems import distil, gaussian_problem, learns_soon, mlp, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.losses.f_divergences import DIVERGENCES, divergence
from lightning_distill.methods import DMD2, FDistill
from lightning_distill.methods.base import Terms
from lightning_distill.networks.adversary import Adversary
from lightning_distill.times import Uniform

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def heads(**settings):
    return Adversary(**{"taps": ("input",), "width": 8, **settings})


def log_normal(x, mean, variance):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * variance.log()


def weighted_problem(name, time):
    return gaussian_problem(
        1.1,
        0.3,
        method=FDistill,
        divergence=name,
        gan=heads(),
        weight="kl",
        ratio_bins=0,
        ratio_min=1e-4,
        ratio_max=1e4,
        matching_times=Uniform(time, time + 1e-6),
        critic_times=Uniform(time, time + 1e-6),
    )


@pytest.mark.sparse(3, test=2)
@pytest.mark.parametrize("name", ["rkl", "kl", "js", "hellinger", "jeffreys"])
def test_with_the_exact_ratio_the_gradient_is_that_of_the_divergence(name, monkeypatch):
    """Student N(.3, 1.1^2), teacher N(1, .7^2), flow time .6; the discriminator answers with the exact log ratio."""
    time = 0.6
    module = ready(weighted_problem(name, time))
    own, target = (torch.tensor((1 - time) ** 2 * s**2 + time**2) for s in (1.1, 0.7))

    def exact(features, cond):
        x_t = features["input"]
        return log_normal(x_t, (1 - time) * 1.0, target) - log_normal(x_t, (1 - time) * 0.3, own)

    monkeypatch.setattr(module, "heads", exact)
    student = module.student.network
    loss = module.student_loss(Batch(size=400_000)).losses["matching"]
    got = torch.stack(torch.autograd.grad(loss, (student.b, student.a))).double()
    # D_f by quadrature, differentiated
    b, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 1.1))
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    variance = (1 - time) ** 2 * a**2 + time**2
    x_t = (1 - time) * b + variance.sqrt() * z
    u = log_normal(x_t, (1 - time) * 1.0, target.double()) - log_normal(x_t, (1 - time) * b, variance)
    value = (torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * divergence(name).f(u)).sum() * (z[1] - z[0])
    want = torch.stack(torch.autograd.grad(value, (b, a)))
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.003)


def small(**settings):
    module = ready(FDistill(mlp(), gan=Adversary(taps=("blocks.0",), width=4), **settings))
    shift(module.fake_score)
    return module


def test_the_reverse_kl_is_dmd2():
    """h = 1: the same direction from the same draws; the generator's term is read at the scores' own times."""
    module, plain = small(divergence="rkl"), ready(DMD2(mlp()))
    shift(plain.fake_score)
    got, want = (m.student_loss(Batch(size=32)).losses["matching"] for m in (module, plain))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_scores_and_logits_are_those_of_separate_forwards(features):
    module = ready(FDistill(mlp(), gan=Adversary(taps=("blocks.0", "input"), width=4, features=features)))
    shift(module.fake_score)
    batch = Batch(size=16)
    x = module.rollout(batch).x0
    scores, logits = module.scores_and_logits(x, batch)
    torch.testing.assert_close(logits, module.logits(scores.x_t, scores.t, {}))
    alone = module.scores(x, batch)
    torch.testing.assert_close(scores.fake, alone.fake)
    torch.testing.assert_close(scores.real, alone.real)
    assert logits.requires_grad
    assert not scores.real.requires_grad
    assert torch.autograd.grad(logits.sum(), x)[0].abs().sum() > 0


def test_the_ratio_has_no_gradient_into_the_discriminator():
    module = small()
    terms = module.student_loss(Batch(size=16))
    others = [*module.fake_score.parameters(), *module.discriminator.parameters()]
    found = torch.autograd.grad(terms.losses["matching"], others, retain_graph=True, allow_unused=True)
    assert all(g is None for g in found)
    assert any(g is not None for g in torch.autograd.grad(terms.losses["gan"], others, allow_unused=True))


# ------------------------------------------------------------------------------------------------ running means
def update(module):
    """What the end of a student phase does, without a trainer."""
    module.ratio_state.copy_(module.ratio_decay * module.ratio_state + module.ratio_pending)
    module.ratio_pending.zero_()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_ratio_that_depends_on_the_noise_alone_gives_equal_weights(name):
    """Bins of constant ratios 5, .2, 1: after some updates r / mean is 1 in each, and h / mean is 1."""
    module = ready(FDistill(mlp(), gan=heads(), divergence=name, ratio_bins=3, matching_times=Uniform(0.1, 0.7)))
    t = 0.1 + 0.6 * (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    u = torch.tensor([5.0, 0.2, 1.0]).log().repeat_interleave(20)
    first = module.ratio_weight(u, t)
    assert float(first.std()) > 0.01 or name == "rkl"
    for _ in range(200):
        update(module)
        weights = module.ratio_weight(u, t)
    torch.testing.assert_close(weights, torch.ones(60), rtol=1e-4, atol=1e-4)
    means = module.ratio_state[0] / module.ratio_state[1]
    torch.testing.assert_close(means[:3], torch.tensor([5.0, 0.2, 1.0]), rtol=1e-4, atol=1e-4)


def test_running_means_by_hand():
    module = ready(FDistill(mlp(), gan=heads(), divergence="kl", ratio_bins=2, ratio_decay=0.5))
    t = torch.tensor([0.1, 0.9, 0.9], dtype=torch.float64)
    h = module.ratio_weight(torch.tensor([4.0, 2.0, 100.0]).log(), t)
    assert h.tolist() == pytest.approx([4.0, 2.0, 20.0])  # ratios are limited to 20; both means still 1
    update(module)
    means = (module.ratio_state[0] / module.ratio_state[1]).tolist()
    assert means == pytest.approx([(0.5 + 4) / 1.5, (0.5 + 22) / 2.5, (0.5 + 26) / 3.5])
    h = module.ratio_weight(torch.tensor([3.0, 9.0, 0.001]).log(), t)
    assert h.tolist() == pytest.approx([3.0 / 3.0 / (26.5 / 3.5), 1.0 / (26.5 / 3.5), 0.1 / 9.0 / (26.5 / 3.5)])


def run(ring4_problem, steps=3, batch_size=16, **settings):
    module = small(ratio_bins=4, fake_score_steps=1, **settings)
    trainer = ring4_problem.fit(module, steps, ring4_problem.data, batch_size=batch_size)
    return module, trainer


def test_means_do_not_depend_on_micro_batches(ring4_problem):
    whole, _ = run(ring4_problem)
    split, _ = run(ring4_problem, accumulate_grad_batches=4)
    assert float(whole.ratio_state[1].sum()) > 16.0
    torch.testing.assert_close(split.ratio_state, whole.ratio_state, rtol=1e-4, atol=1e-5)
    assert not whole.ratio_pending.any()


def test_means_count_the_students_samples_once_per_update(ring4_problem):
    """Counts: 1 made-up sample decays, 16 of each update are added; the critic's phases add none."""
    module, _ = run(ring4_problem, ratio_decay=0.5)
    want = 0.5**3 + 16 * (0.25 + 0.5 + 1.0)
    assert float(module.ratio_state[1, -1]) == pytest.approx(want)
    bins = float(module.ratio_state[1, :-1].sum())
    assert bins == pytest.approx(4 * 0.5**3 + 16 * 1.75)


def test_means_are_in_checkpoints_and_skipped_steps_leave_them_alone(ring4_problem, tmp_path):
    module, trainer = run(ring4_problem)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["ratio_state"], module.ratio_state)
    assert "ratio_pending" not in saved
    poisoned = small(ratio_bins=4, fake_score_steps=1)
    original = poisoned.student_loss

    def student_loss(batch):
        terms = original(batch)
        return Terms({k: v * float("nan") for k, v in terms.losses.items()})

    poisoned.student_loss = student_loss
    ring4_problem.fit(poisoned, 2, ring4_problem.data, batch_size=16)
    assert torch.equal(poisoned.ratio_state, torch.ones(2, 5))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_bins_without_samples_keep_their_means(ring4_problem, decay):
    """Two samples per update leave at least two of four bins empty."""
    module, _ = run(ring4_problem, 12, 2, ratio_decay=decay)
    assert not module.skipped_steps.any()
    assert bool((module.ratio_state[1] > 0).all())
    assert float((module.running_means("ratio")[:-1] - 1.0).abs().min()) > 1e-3
    weight = module.ratio_weight(torch.zeros(8), torch.linspace(0.05, 0.95, 8, dtype=torch.float64))
    assert bool(weight.isfinite().all())


def test_means_that_were_lost_in_a_checkpoint_are_one():
    module = small(ratio_bins=2, divergence="kl")
    module.ratio_state[:, 0] = 0.0
    h = module.ratio_weight(torch.tensor([3.0, 2.0]).log(), torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert h.tolist() == pytest.approx([3.0, 2.0])


def test_probing_leaves_the_means_alone(ring4_problem):
    module, _ = run(ring4_problem)
    before = module.ratio_state.clone()
    with module.probing("look"):
        module.student_loss(Batch(size=8))
        assert bool(module.ratio_pending.any())
    assert not module.ratio_pending.any()
    assert torch.equal(module.ratio_state, before)


# ------------------------------------------------------------------------------------------------ bad input
def test_settings_that_cannot_work_are_refused():
    def refused(message, **settings):
        with pytest.raises(ValueError, match=message):
            FDistill(mlp(), **settings).configure_model()

    refused("FDistill reads density ratios from a discriminator; give gan")
    refused("hinge loss has no such reading", gan=heads(kind="hinge"))
    refused("does not cover the matching times", gan=heads(times=Uniform(0.0, 0.5)))
    refused("divergence 'fkl' is unknown", divergence="fkl")
    refused("ratio_bins=-1", ratio_bins=-1)
    refused("ratio_decay=1", ratio_decay=1.0)
    refused("must enclose 1", ratio_min=2.0)


# ------------------------------------------------------------------------------------------------ learning
class SignFlipped(FDistill):
    """Negative control: away from the teacher."""

    def student_loss(self, batch):
        terms = super().student_loss(batch)
        return Terms({"matching": -terms.losses["matching"]}, terms.diagnostics)


@pytest.mark.learn
def test_it_soon_learns_four_modes(ring4_problem, trained_teacher):
    gan = Adversary(taps=("blocks.2",))
    run = learns_soon(ring4_problem, trained_teacher.denoiser, FDistill, gan=gan)
    assert run.distance < 0.28
    assert all(0.15 < share < 0.35 for share in run.shares), run.shares


@pytest.mark.slow
@pytest.mark.learn
def test_it_learns_four_modes(ring4_problem, trained_teacher):
    gan = Adversary(taps=("blocks.2",))
    run = distil(ring4_problem, trained_teacher.denoiser, 300, method=FDistill, gan=gan)
    assert run.distance < 0.16
    assert all(0.18 < share < 0.32 for share in run.shares), run.shares
    means = run.module.ratio_state[0] / run.module.ratio_state[1]
    assert bool(((means > 0.3) & (means < 3.0)).all())  # ratios of matched distributions are about 1


@pytest.mark.slow
@pytest.mark.learn
def test_the_other_direction_does_not(ring4_problem, trained_teacher):
    gan = Adversary(taps=("blocks.2",))
    assert distil(ring4_problem, trained_teacher.denoiser, 100, method=SignFlipped, gan=gan).distance > 0.7


@pytest.mark.slow
@pytest.mark.learn
@pytest.mark.parametrize("name", ["kl", "jeffreys", "softened_rkl"])
def test_other_divergences_learn_them_too(name, ring4_problem, trained_teacher):
    gan = Adversary(taps=("blocks.2",))
    run = distil(ring4_problem, trained_teacher.denoiser, 600, method=FDistill, gan=gan, divergence=name)
    assert run.distance < 0.16
    assert all(0.18 < share < 0.32 for share in run.shares), run.shares
