"""Fake scores that are told the student's step, and rollouts whose step differs from sample to sample."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small_problems import Exact, Gaussian, Given, distil, mlp, ready, shift
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.callbacks.health import TrainingHealth
from lightning_distill.guidance import Guidance
from lightning_distill.methods import DMD2, TDM, VSD, SiD
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.lora import enable_activation_checkpointing
from lightning_distill.networks.roles import FromCheckpoint
from lightning_distill.networks.small import small_dit, small_unet
from lightning_distill.networks.step_condition import StepCondition, entrance
from lightning_distill.processes import FlowMatching
from lightning_distill.randomness import Draws

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )


NETWORKS = {
    "mlp": (lambda: mlp().network, (2,), {}, "input"),
    "unet": (lambda: small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8), (1, 8, 8), {}, "conv_in"),
    "dit": (
        lambda: small_dit(8, 1, 3, patch_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=8),
        (1, 8, 8),
        {"class_labels": torch.zeros(1, dtype=torch.long)},
        "pos_embed.proj",
    ),
    "sd3": (
        sd3,
        (4, 8, 8),
        {"encoder_hidden_states": torch.randn(1, 3, 8), "pooled_projections": torch.randn(1, 8)},
        "pos_embed.proj",
    ),
}


@pytest.mark.parametrize("kind", ["step", "interval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_can_be_told_and_is_unchanged_at_first(name, kind):
    make, shape, cond, layer = NETWORKS[name]
    torch.manual_seed(0)
    denoiser = Denoiser(make(), FlowMatching(), "flow_prediction").eval()
    for parameter in denoiser.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    found, width = entrance(denoiser, shape, cond)
    assert found == layer
    assert all(p.requires_grad for p in denoiser.parameters())
    condition = StepCondition(found, width, kind, num_steps=2)
    x, t = torch.randn(4, *shape), torch.rand(4).double()
    rows = {k: v.expand(4, *v.shape[1:]) for k, v in cond.items()}
    told = (torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 0.5, 1.0, 0.5]), torch.tensor([0.5, 0.0, 0.5, 0.0]))
    plain = denoiser(x, t, rows).x0
    with condition.told(denoiser, *told):
        assert torch.equal(denoiser(x, t, rows).x0, plain)
    shift(condition)
    with condition.told(denoiser, *told):
        out = denoiser(x, t, rows).x0
    assert not torch.isclose(out, plain).all(dim=tuple(range(1, x.ndim))).any()
    assert torch.equal(denoiser(x, t, rows).x0, plain)  # outside nothing is left
    # each sample has its own step, also in the two branches of guidance
    other = (1 - told[0], told[1].flip(0), told[2].flip(0))
    with condition.told(denoiser, *other):
        swapped = denoiser(x, t, rows).x0
    mixed = tuple(torch.cat([a[:2], b[2:]]) for a, b in zip(told, other))
    with condition.told(denoiser, *mixed):
        both = denoiser(torch.cat([x, x]), torch.cat([t, t]), {k: torch.cat([v, v]) for k, v in rows.items()}).x0
    torch.testing.assert_close(
        both, torch.cat([out[:2], swapped[2:]]).repeat(2, *[1] * (x.ndim - 1)), atol=2e-5, rtol=0
    )
    out.sum().backward()
    assert all(p.grad is not None for p in condition.parameters())


def test_activation_checkpointing_recomputes_the_same(monkeypatch):
    make, shape, cond, _ = NETWORKS["dit"]
    torch.manual_seed(0)
    denoiser = Denoiser(make(), FlowMatching(), "flow_prediction").eval()
    for parameter in denoiser.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    condition = StepCondition(*entrance(denoiser, shape, cond), "step", num_steps=2)
    shift(condition)
    x, t, rows = torch.randn(2, *shape), torch.rand(2).double(), {"class_labels": torch.zeros(2, dtype=torch.long)}
    told = (torch.tensor([0, 1]), torch.ones(2), torch.zeros(2))
    found = []
    for _ in range(2):
        with condition.told(denoiser, *told):
            out = denoiser(x, t, rows).x0
        found.append(torch.autograd.grad(out.square().sum(), condition.embedding.weight)[0])
        enable_activation_checkpointing(denoiser)
    assert bool(found[0].any())
    torch.testing.assert_close(*found)


def test_networks_without_such_a_layer_are_refused():
    teacher = analytic_denoiser(GaussianMixture([[1.0]], std=0.7), FlowMatching())
    module = DMD2(
        teacher,
        student=Given(Gaussian(1.0, 0.7)),
        fake_score=Given(Gaussian(1.0, 0.7)),
        shape=[1],
        num_steps=2,
        critic_condition_on="step",
        ema=[],
    )
    with pytest.raises(ValueError, match="Gaussian has no linear or convolution layer that reads its samples"):
        module.configure_model()
    with pytest.raises(ValueError, match="critic_condition_on='time' must be one of none, step, interval"):
        DMD2(mlp(), critic_condition_on="time")
    with pytest.raises(ValueError, match="rollout_step='token' batch or sample"):
        DMD2(mlp(), rollout_step="token")


# ------------------------------------------------------------------------------------------------ methods
@pytest.mark.parametrize("method", [DMD2, SiD, VSD])
def test_every_method_with_a_fake_score_trains_the_condition(method):
    module = ready(method(mlp(classes=3), num_steps=2, critic_condition_on="step", guidance=Guidance(2.0), ema=[]))
    keys = [k for k in module.state_dict() if "step_condition" in k]
    assert keys == ["fake_score.step_condition.embedding.weight"]
    assert any(p is module.fake_score.step_condition.embedding.weight for p in module.role_parameters("fake_score"))
    batch = Batch(cond={"class_labels": torch.arange(8) % 3})
    before = module.student_loss(batch).diagnostics["score_gap"]
    shift(module.fake_score.step_condition)
    module._rollouts.clear()
    assert module.student_loss(batch).diagnostics["score_gap"] != before
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    module.fake_score_loss(batch).losses["denoising"].backward()
    gradient = module.fake_score.step_condition.embedding.weight.grad
    step = module.rollout(batch, grad=False).step
    assert bool(gradient[step].any())
    assert not bool(gradient[1 - step].any())


def test_both_sides_of_the_gan_know_the_step():
    module = ready(DMD2(mlp(), num_steps=2, critic_condition_on="step", gan=Adversary(taps=("blocks.1",), width=4)))
    shift(module.fake_score.step_condition)
    batch, seen = Batch(x0=torch.randn(8, 2)), []
    told = module.fake_score.step_condition.vectors
    module.fake_score.step_condition.vectors = lambda *steps: seen.append(steps[0]) or told(*steps)
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    module.fake_score_loss(batch)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_health_tells_the_step_that_made_the_samples(features, ring4_problem):
    """Fake score and a discriminator on its features know the step, the teacher and one on its features do not."""
    module = DMD2(
        mlp(),
        num_steps=2,
        rollout_step="sample",
        critic_condition_on="step",
        gan=Adversary(taps=("blocks.1",), width=4, features=features),
        ema=[],
    )
    module.configure_model()
    told, seen, calls = module.fake_score.step_condition.vectors, [], []
    rollout = module.rollout

    def watched(batch, grad=True):
        made = rollout(batch, grad)
        if module.draws.phase == "health":
            calls.append(made.steps)
        return made

    def vectors(step, *times):
        if module.draws.phase == "health":
            seen.append(step)
        return told(step, *times)

    module.rollout, module.fake_score.step_condition.vectors = watched, vectors
    health = TrainingHealth(every_n_steps=2, terms_every_n_steps=0, num_samples=8, levels=(0.2, 0.7))
    data = Batch(x0=ring4_problem.data.x0[:64])
    ring4_problem.fit(module, 2, data, batch_size=16, callbacks=[health])
    assert health.measured_at == 2
    assert len(calls) == 1
    assert len(calls[0].unique()) == 2
    per_level = 3 if features == "fake_score" else 1  # the score, and real and fake samples of the game
    assert len(seen) == per_level * 2
    assert all(torch.equal(step, calls[0]) for step in seen)


def test_without_the_option_nothing_changes():
    """The same gradients bit for bit as a method that never heard of steps."""
    plain, told = (ready(DMD2(mlp(), num_steps=2, critic_condition_on=c, ema=[])) for c in ("none", "step"))
    for module in (plain, told):
        shift(module.fake_score.network)
    losses = [m.student_loss(Batch(size=8)).losses["matching"] for m in (plain, told)]
    assert torch.equal(*losses)
    assert not hasattr(plain.fake_score, "step_condition")


def test_what_was_learned_about_the_steps_is_warm_started(tmp_path, recwarn):
    """Beside the network: with another number of steps, or in a student, the network alone goes on."""

    def warm(**settings):
        role = FromCheckpoint(str(tmp_path / "a.ckpt"), role="fake_score")
        return ready(TDM(mlp(), ema=[], **{"num_steps": 2, "fake_score": role, **settings}))

    first = ready(TDM(mlp(), num_steps=2, ema=[]))
    shift(first.fake_score)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "a.ckpt")
    again = warm()
    assert again.fake_score.step_condition.embedding.weight.any()
    for kept, now in zip(first.fake_score.parameters(), again.fake_score.parameters(), strict=True):
        assert torch.equal(kept, now)
    assert not [w for w in recwarn if "left out" in str(w.message)]
    with pytest.warns(UserWarning, match="was told other steps"):
        longer = warm(num_steps=4)
    assert not longer.fake_score.step_condition.embedding.weight.any()
    with pytest.warns(UserWarning, match="was told other steps"):
        untold = warm(critic_condition_on="none")
    for module in (longer, untold):
        for kept, now in zip(first.fake_score.network.parameters(), module.fake_score.network.parameters()):
            assert torch.equal(kept, now)


def test_a_shared_critic_is_content_with_the_right_mixture_of_wrong_steps():
    """Steps that make one mode each, of a teacher with both: only a critic that is told the step objects."""
    both = GaussianMixture([[-1.0], [1.0]], std=0.3)
    single = [GaussianMixture([[m]], std=0.3) for m in (-1.0, 1.0)]
    process = FlowMatching()
    samples = torch.cat([part.sample(2000, torch.Generator().manual_seed(0))[0] for part in single])
    t = torch.full((4000,), 0.6, dtype=torch.float64)
    x_t = process.add_noise(samples, torch.randn(4000, 1), t)
    real = both.posterior_mean(x_t, t, process)
    assert torch.equal(both.posterior_mean(x_t, t, process) - real, torch.zeros_like(real))
    told = torch.cat([part.posterior_mean(x, t[:2000], process) for part, x in zip(single, x_t.chunk(2))])
    push = (real - told).chunk(2)
    assert float(push[0].mean()) > 0.3
    assert float(push[1].mean()) < -0.3


# ------------------------------------------------------------------------------------------------ per-sample steps
def per_sample(sampler, rows=4000, dim=64):
    teacher = analytic_denoiser(GaussianMixture(torch.zeros(1, dim), std=0.5), FlowMatching())
    module = DMD2(
        teacher,
        student=Exact(),
        fake_score=Exact(),
        num_steps=4,
        sampler=sampler,
        shape=[dim],
        ema=[],
        rollout_step="sample",
    )
    return ready(module).rollout(Batch(size=rows))


@pytest.mark.parametrize("sampler", ["renoise", "ode"])
def test_every_step_of_a_mixed_batch_has_its_known_variance(sampler):
    """Var of x0 after k steps: c_k^2 Var(x_k), with x_k renoised from x0 or carried on by the predicted noise."""
    rollout = per_sample(sampler)
    counts = rollout.steps.bincount(minlength=4)
    assert float(((counts - 1000.0) ** 2 / 1000.0).sum()) < 16.3  # chi-squared, 3 degrees of freedom, 99.9 %
    law = 1.0
    for k, t in enumerate([1.0, 0.75, 0.5, 0.25]):
        gain = (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)
        own = rollout.steps == k
        variance = float(rollout.x0[own].detach().var())
        assert variance == pytest.approx(gain**2 * law, rel=0.03, abs=1e-12)
        assert rollout.prediction.t[own].unique().tolist() == [t]
        assert rollout.end[own].unique().tolist() == [max(t - 0.25, 0.0)]
        r = t - 0.25
        noise = (1 - (1 - t) * gain) / t
        law = (1 - r) ** 2 * gain**2 * law + r**2 if sampler == "renoise" else ((1 - r) * gain + r * noise) ** 2 * law


def test_samples_do_not_depend_on_how_the_batch_is_split():
    module = ready(DMD2(mlp(), num_steps=3, rollout_step="sample", ema=[]))
    whole = module.rollout(Batch(size=8), grad=False)
    parts = []
    for first in (0, 4):
        module.draws = Draws(module.streams, 0, first, "student0")
        module._rollouts.clear()
        parts.append(module.rollout(Batch(size=4), grad=False))
    assert torch.equal(torch.cat([p.steps for p in parts]), whole.steps)
    torch.testing.assert_close(torch.cat([p.x0 for p in parts]), whole.x0)
    assert len(whole.steps.unique()) > 1


def test_only_the_last_call_has_a_graph():
    module = ready(DMD2(mlp(), num_steps=3, rollout_step="sample", ema=[]))
    graphs = []
    module.student.register_forward_hook(lambda _m, _a, out: graphs.append(out.raw.requires_grad))
    module.rollout(Batch(size=8))
    assert graphs == [False, False, True]


# ------------------------------------------------------------------------------------------------ learning
@pytest.mark.slow
@pytest.mark.learn
def test_each_of_four_steps_has_the_teachers_distribution(ring4_problem, trained_teacher):
    run = distil(
        ring4_problem,
        trained_teacher.denoiser,
        300,
        student_times=[10.0, 2.5, 1.0, 0.4],
        fake_score_steps=2,
        critic_condition_on="step",
        rollout_step="sample",
    )
    steps = each_step(run.module)
    assert max(ring4_problem.distance(x) for x in steps) < 0.2
    assert run.distance < 0.16
    assert all(0.15 < share < 0.35 for share in run.shares), run.shares


@torch.no_grad()
def each_step(module):
    """What every step of the student predicts on the way."""
    network, generator, found = module.sampling_network(), torch.Generator().manual_seed(1), []
    x = module.process.prior(torch.randn(5000, 2, generator=generator), module.student_times[0])
    for t, r in zip(module.student_times, [*module.student_times[1:], 0.0]):
        found.append(network(x, torch.tensor(t, dtype=torch.float64)).x0)
        eps = torch.randn(5000, 2, generator=generator)
        x = module.process.add_noise(found[-1], eps, torch.tensor(r, dtype=torch.float64))
    return found
