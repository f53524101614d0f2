"""SiD: gradients through both scores, guidance of the fake score, few steps, and learning four modes."""

from __future__ import annotations

import pytest
import torch
from small_problems import Exact, distil, gaussian_problem, learns_soon, mlp, posterior, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.methods import SiD
from lightning_distill.methods.base import Terms
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser, ring4
from lightning_distill.networks.roles import Lora
from lightning_distill.processes import EDM, FlowMatching
from lightning_distill.randomness import Draws
from lightning_distill.times import Uniform

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def labels(n=12):
    return Batch(cond={"class_labels": torch.arange(n) % 3})


def by_hand(module, n, alpha, weight):
    """Gradient in (a, b) of the loss written out, with autograd through x, x_t and both denoisers; float64."""
    streams = module.streams
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.3, -0.5))
    x = a * streams.normal("slice0/start", 0, 0, (n, 1)).double() + b
    t = 0.02 + 0.96 * streams.uniform("student0/matching/time", 0, 0, (n,))[:, None]
    x_t = (1 - t) * x + t * streams.normal("student0/matching/noise", 0, 0, (n, 1)).double()
    real, fake = posterior(x_t, t, 1.0, 0.7), posterior(x_t, t, -0.5, 1.3)
    factors = {"dmd": 1 / (x - real).detach().abs(), "fisher": 2 * (1 - t) ** 2 / t**4, "one": torch.ones_like(t)}
    factor = factors[weight]
    d = real - fake
    loss = (factor * d * ((real - x) - alpha * d)).mean()
    return torch.stack(torch.autograd.grad(loss, (a, b))), loss.detach()


@pytest.mark.parametrize("weight", ["dmd", "fisher", "one"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_loss_and_its_gradient_are_those_written_out(alpha, weight):
    module = ready(gaussian_problem(1.3, -0.5, method=SiD, alpha=alpha, weight=weight))
    loss = module.student_loss(Batch(size=64)).losses["fisher"]
    student = module.student.network
    got = torch.stack(torch.autograd.grad(loss, (student.a, student.b)))
    want, value = by_hand(module, 64, alpha, weight)
    assert float(loss.detach()) == pytest.approx(float(value), rel=1e-3)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.long
def test_one_half_descends_the_fisher_divergence():
    """Expected gradient at one noise level against the closed form of E |score_F - score_T|^2."""
    times = Uniform(0.6, 0.6 + 1e-6)
    settings = {"alpha": 0.5, "weight": "fisher", "matching_times": times, "critic_times": times}
    module = ready(gaussian_problem(1.3, -0.5, method=SiD, **settings))
    student = module.student.network
    loss = module.student_loss(Batch(size=400_000)).losses["fisher"]
    got = torch.stack(torch.autograd.grad(loss, (student.b, student.a)))
    # the card of the same problem: mean and standard deviation, alpha 1/2
    torch.testing.assert_close(got, torch.tensor([-2.49746923, 1.11768006]), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("role", ["copy", "lora"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_where_student_teacher_and_fake_score_agree_nothing_moves(role, alpha):
    roles = {} if role == "copy" else {"student": Lora(rank=2), "fake_score": Lora(rank=2, seed=1)}
    module = ready(SiD(mlp(), alpha=alpha, **roles))
    loss = module.student_loss(Batch(size=12)).losses["fisher"]
    loss.backward()
    assert float(loss.detach()) == 0.0
    # y_T - y_F is zero for every x_t, but the two networks' input gradients cancel only up to rounding
    gradients = [p.grad for _, p in module.student.named_parameters() if p.requires_grad and p.grad is not None]
    assert all(float(g.abs().max()) < 1e-6 for g in gradients)


def test_gradients_need_the_inputs_of_both_networks():
    """Cutting the graph at either score changes the student's gradient."""

    def gradient(cut):
        module = ready(SiD(mlp()))
        shift(module.fake_score)
        if cut:
            getattr(module, cut).register_forward_pre_hook(lambda _m, args: (args[0].detach(), *args[1:]))
        loss = module.student_loss(Batch(size=32)).losses["fisher"]
        parameters = list(module.student.parameters())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    whole = gradient(None)
    for cut in ("teacher", "fake_score"):
        assert float((gradient(cut) - whole).norm() / whole.norm()) > 0.05


# ------------------------------------------------------------------------------------------------ guidance
def test_zero_cfg_compares_the_conditional_teacher_with_the_unconditional_fake_score():
    module = ready(SiD(mlp(classes=3), fake_guidance=Guidance(0.0), critic_guidance=Guidance(0.0)))
    shift(module.fake_score)
    x, batch = torch.randn(12, 2), labels()
    scores = module.scores(x, batch)
    null = {"class_labels": torch.full((12,), 3)}
    torch.testing.assert_close(scores.real, module.teacher(scores.x_t, scores.t, batch.cond).x0)
    torch.testing.assert_close(scores.fake, module.fake_score(scores.x_t, scores.t, null).x0)
    seen = []
    module.fake_score.register_forward_pre_hook(lambda _m, args: seen.append(args[2]["class_labels"]))
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    module.fake_score_loss(batch)
    assert seen[0].tolist() == [3] * 12  # trained as it is used


def test_anti_cfg_pushes_the_fake_score_away_from_the_condition():
    module = ready(SiD(mlp(classes=3), fake_guidance=Guidance(-1.0), critic_dropout=0.1))
    shift(module.fake_score)
    x, batch = torch.randn(12, 2), labels()
    scores = module.scores(x, batch)
    cond = module.fake_score(scores.x_t, scores.t, batch.cond).x0
    null = module.fake_score(scores.x_t, scores.t, {"class_labels": torch.full((12,), 3)}).x0
    torch.testing.assert_close(scores.fake, null - (cond - null), rtol=1e-4, atol=1e-5)


def test_a_guided_critic_denoises_with_its_guided_prediction():
    """Long-short guidance: |y_u + w (y_c - y_u) - x|^2, here in flow space, with gradients in both branches."""
    module = ready(SiD(mlp(classes=3), critic_guidance=Guidance(1.5)))
    shift(module.fake_score)
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    batch = labels()
    loss = module.fake_score_loss(batch).losses["denoising"]
    x = module.rollout(batch, grad=False).x0
    x_t, t, eps = module.renoise(x, module.critic_times, "critic")
    cond = module.fake_score(x_t, t, batch.cond).raw
    null = module.fake_score(x_t, t, {"class_labels": torch.full((12,), 3)}).raw
    want = (null + 1.5 * (cond - null) - (eps - x)).square().mean()
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, module.fake_score.network.class_embedding.weight)
    assert bool((gradient.abs().sum(1) > 0).all())  # all classes and the null class


def test_discriminator_features_are_shared_only_with_a_plain_critic():
    gan = Adversary(taps=("blocks.0",), width=4)
    assert ready(SiD(mlp(classes=3), gan=gan)).shares_forward
    assert not ready(SiD(mlp(classes=3), gan=gan, critic_guidance=Guidance(0.0))).shares_forward
    assert not ready(SiD(mlp(classes=3), gan=gan, critic_dropout=0.1)).shares_forward


# ------------------------------------------------------------------------------------------------ sampling
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_noise_scale_sets_the_variance_of_few_step_samples(gamma):
    """v' = c^2 ((1 - t)^2 v + gamma^2 t^2); gamma 1 gives the .07255 of plain renoising."""
    dim = 256
    teacher = analytic_denoiser(GaussianMixture(torch.zeros(1, dim), std=0.5), FlowMatching())
    module = SiD(teacher, student=Exact(), fake_score=Exact(), num_steps=4, shape=[dim], ema=[], noise_scale=gamma)
    module.configure_model()
    x = module.sample(1000, generator=torch.Generator().manual_seed(0))
    variance = 0.0  # x0 of pure noise is the mean
    for t in (0.75, 0.5, 0.25):
        gain = (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)
        variance = gain**2 * ((1 - t) ** 2 * variance + gamma**2 * t**2)
    assert float(x.var()) == pytest.approx(variance, rel=0.02, abs=1e-12)
    if gamma == 1.0:
        assert variance == pytest.approx(0.07255, abs=1e-5)
    plain = module.sample(1000, generator=torch.Generator().manual_seed(0), noise_scale=1.0)
    assert torch.equal(plain, x) == (gamma == 1.0)


def test_edm_is_matched_on_the_lower_part_of_the_karras_scale():
    settings = {"student": Exact(), "fake_score": Exact(), "student_times": [2.5], "ema": []}
    module = ready(SiD(analytic_denoiser(ring4(), EDM()), **settings))
    ends = module.matching_times.quantile(torch.tensor([0.0, 0.625, 1.0], dtype=torch.float64), module.process)
    assert ends.tolist() == pytest.approx([0.002, 2.515, 24.4], rel=2e-3)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"noise_scale=-0\.1"):
        SiD(mlp(), noise_scale=-0.1)
    with pytest.raises(ValueError, match="needs sampler='renoise'"):
        SiD(mlp(), noise_scale=0.5, sampler="ode")
    with pytest.raises(ValueError, match="guidance scale 0 needs an unconditional branch"):
        SiD(mlp(), fake_guidance=Guidance(0.0)).configure_model()


# ------------------------------------------------------------------------------------------------ learning
class SignFlipped(SiD):
    """Negative control: up the divergence."""

    def student_loss(self, batch):
        terms = super().student_loss(batch)
        return Terms({"fisher": -terms.losses["fisher"]}, terms.diagnostics)


@pytest.mark.learn
def test_it_soon_learns_four_modes(ring4_problem, trained_teacher):
    run = learns_soon(ring4_problem, trained_teacher.denoiser, SiD, alpha=1.0)
    assert run.distance < 0.28
    assert all(0.15 < share < 0.35 for share in run.shares), run.shares


@pytest.mark.slow
@pytest.mark.learn
def test_it_learns_four_modes(ring4_problem, trained_teacher):
    run = distil(ring4_problem, trained_teacher.denoiser, 300, method=SiD, alpha=1.0)
    assert run.distance < 0.18
    assert all(0.18 < share < 0.32 for share in run.shares), run.shares


@pytest.mark.slow
@pytest.mark.learn
def test_the_other_direction_does_not(ring4_problem, trained_teacher):
    assert distil(ring4_problem, trained_teacher.denoiser, 100, method=SignFlipped).distance > 0.7


@pytest.mark.slow
@pytest.mark.learn
@pytest.mark.parametrize("alpha", [0.5, 1.2])
def test_other_alphas_learn_them_too(alpha, ring4_problem, trained_teacher):
    run = distil(ring4_problem, trained_teacher.denoiser, 600, method=SiD, alpha=alpha)
    assert run.distance < 0.2
    assert all(0.18 < share < 0.32 for share in run.shares), run.shares
