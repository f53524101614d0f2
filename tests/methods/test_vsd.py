"""Variational score distillation and SwiftBrush: updates in noise space, guidance of both networks, one backbone."""

from __future__ import annotations

import copy

import pytest
import torch
from small_problems import distil, gaussian_problem, mlp, posterior, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, RandomGuidance
from lightning_distill.methods import VSD, SwiftBrush
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.roles import Lora
from lightning_distill.randomness import Draws

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def labels(n=12):
    return Batch(cond={"class_labels": torch.arange(n) % 3})


def noise_of(x_t, t, mean, std):
    return (x_t - (1 - t) * posterior(x_t, t, mean, std)) / t


@pytest.mark.parametrize("method", [VSD, SwiftBrush])
def test_a_cycle_is_the_papers_update_in_noise_space(method, ring4_problem):
    """Student along sigma^2 (eps_T - eps_F); critic on |eps_F - eps|^2, SwiftBrush's times alpha^2."""
    n, a, b, lr = 64, 1.3, -0.5, 0.1
    module = gaussian_problem(a, b, method=method, seed=11)
    ring4_problem.fit(module, 1, Batch(size=n), batch_size=n)
    streams = module.streams
    z = streams.normal("slice0/start", 0, 0, (n, 1)).double()
    x = a * z + b
    t = 0.02 + 0.96 * streams.uniform("student0/matching/time", 0, 0, (n,))[:, None]
    x_t = (1 - t) * x + t * streams.normal("student0/matching/noise", 0, 0, (n, 1)).double()
    g = t**2 * (noise_of(x_t, t, 1.0, 0.7) - noise_of(x_t, t, b, a))
    student = module.student.network
    assert float(student.a.detach()) == pytest.approx(a - lr * float((g * z).mean()), rel=1e-4)
    assert float(student.b.detach()) == pytest.approx(b - lr * float(g.mean()), rel=1e-4)
    s = streams.uniform("fake_score0/critic/time", 0, 0, (n,)).clamp_min(1e-4)[:, None]
    eps = streams.normal("fake_score0/critic/noise", 0, 0, (n, 1)).double()
    mean = torch.tensor(b, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(a, dtype=torch.float64).log().requires_grad_()
    error = noise_of((1 - s) * x + s * eps, s, mean, log_std.exp()) - eps
    ((1 - s if method is SwiftBrush else 1.0) * error).square().mean().backward()
    critic = module.fake_score.network
    assert float(critic.mean.detach()) == pytest.approx(b - lr * float(mean.grad), rel=1e-3)
    assert float(critic.log_std.detach()) == pytest.approx(float(log_std.detach()) - lr * float(log_std.grad), rel=1e-3)


def test_the_critic_is_an_adapter_on_the_teachers_backbone_by_default():
    teacher = mlp(classes=3)
    frozen = copy.deepcopy(teacher)
    module = ready(VSD(teacher, student=Lora(rank=2)))
    assert isinstance(module.fake_score, AdapterDenoiser)
    assert module.fake_score.network is module.teacher.network is module.student.network
    shift(module.fake_score)
    x, t = torch.randn(6, 2), torch.full((6,), 0.4)
    cond = {"class_labels": torch.arange(6) % 3}
    want = frozen(x, t, cond).raw
    assert torch.equal(module.teacher(x, t, cond).raw, want)  # adapters off
    assert not torch.equal(module.fake_score(x, t, cond).raw, want)


def test_guidance_of_both_networks_cancels_where_they_agree():
    """A fresh adapter is the teacher: SwiftBrush's direction is zero at any scale, VSD's is the guidance itself."""
    module = ready(SwiftBrush(mlp(classes=3), guidance=Guidance(7.5)))
    terms = module.student_loss(labels())
    assert float(terms.losses["matching"].detach()) == 0.0
    assert module.fake_guidance is module.guidance
    assert module.critic_dropout == 0.1
    alone = ready(VSD(mlp(classes=3), guidance=Guidance(7.5)))
    assert float(alone.student_loss(labels()).diagnostics["score_gap"]) > 0.0
    assert ready(SwiftBrush(mlp(classes=3))).critic_dropout == 0.0  # nothing to keep alive


def test_random_scales_are_common_to_both_networks_and_linear():
    teacher = mlp(classes=3)

    def scores(guidance):
        module = ready(SwiftBrush(copy.deepcopy(teacher), guidance=guidance, student=Lora(rank=2)))
        shift(module.fake_score)
        x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
        return module, module.scores(x, labels())

    _, low = scores(Guidance(2.0))
    _, high = scores(Guidance(6.0))
    module, between = scores(RandomGuidance(2.0, 6.0))
    u = module.draws.uniform("guidance", 12)[:, None]
    assert float(u.std()) > 0.1
    assert not torch.isclose(low.fake, high.fake).all()
    for name in ("real", "fake"):
        a, b = getattr(low, name).double(), getattr(high, name).double()
        torch.testing.assert_close(getattr(between, name).double(), a + u * (b - a), rtol=1e-4, atol=1e-4)


def test_conditions_are_dropped_at_the_given_rate_in_the_critics_training_only():
    module = ready(SwiftBrush(mlp(classes=3), guidance=Guidance(2.0), critic_dropout=0.25))
    seen = []
    module.fake_score.register_forward_pre_hook(lambda _m, args: seen.append(args[2]["class_labels"]))
    n = 3000
    module.student_loss(labels(n))
    torch.testing.assert_close(seen[0], torch.cat([torch.arange(n) % 3, torch.full((n,), 3)]))
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    module.fake_score_loss(labels(n))
    dropped = seen[1] == 3
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(seen[1][~dropped], (torch.arange(n) % 3)[~dropped])


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="guidance scale 3 needs an unconditional branch"):
        VSD(mlp(), fake_guidance=Guidance(3.0)).configure_model()
    with pytest.raises(ValueError, match="critic_dropout=1"):
        VSD(mlp(), critic_dropout=1.0)


@pytest.mark.learn
@pytest.mark.slow
def test_swiftbrush_learns_four_modes_with_an_adapter_as_critic(ring4_problem, trained_teacher):
    teacher = copy.deepcopy(trained_teacher.denoiser)  # it will hold the adapter
    run = distil(ring4_problem, teacher, 300, method=SwiftBrush, fake_score=Lora(rank=32), fake_score_steps=2)
    assert run.distance < 0.17
    assert all(0.18 < share < 0.32 for share in run.shares), run.shares
