"""The game at the noisy samples of the scores, lazy games, and graphs that end at the last tap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_problems import mlp, ready, shift

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance, RandomGuidance
from lightning_distill.methods import DMD2, VDOT
from lightning_distill.methods.discriminating import graph_until, score_with_features
from lightning_distill.networks.adversary import Adversary
from lightning_distill.times import Uniform

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")

LABELS = {"class_labels": torch.arange(12) % 3}


def game(features="fake_score", classes=0, **settings):
    heads = Adversary(taps=("blocks.0", "input"), width=4, features=features, **settings.pop("heads", {}))
    module = ready(DMD2(mlp(classes=classes), gan=heads, **settings))
    shift(module.fake_score)
    return module


def data(n=12):
    return Batch(x0=torch.randn(n, 2, generator=torch.Generator().manual_seed(2)), size=n)


# ------------------------------------------------------------------------------------------------ at the scores
@pytest.mark.parametrize("guidance", [Guidance(1.0), Guidance(2.5), RandomGuidance(1.5, 3.0)])
@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_the_game_at_the_scores_is_that_of_separate_forwards(features, guidance):
    module = game(features, classes=3, guidance=guidance, gan_at_scores=True)
    batch, student = Batch(cond=LABELS, size=12), list(module.student.parameters())
    with module._only("student"):
        got = module.student_loss(batch)
        gradient = torch.autograd.grad(module.weighted_sum("student", got), student, allow_unused=True)
        x = module.rollout(batch).x0
        scores = module.scores(x, batch)  # without taps
        matching = module.matching(x, scores, "dmd").losses["matching"]
        gan = F.softplus(-module.logits(scores.x_t, scores.t, batch.cond)).mean()
        want = torch.autograd.grad(matching + 1e-3 * gan, student, allow_unused=True)
    torch.testing.assert_close(got.losses["matching"], matching)
    torch.testing.assert_close(got.losses["gan"], gan)
    torch.testing.assert_close(gradient, want)
    assert sum(float(g.abs().sum()) for g in gradient if g is not None) > 0


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("at_scores", [False, True])
def test_calls_are_those_declared(features, scale, at_scores):
    module = game(features, classes=3, guidance=Guidance(scale), gan_at_scores=at_scores)
    seen = {"student": 0, "teacher": 0, "fake_score": 0}
    for name in seen:
        count = lambda *_, name=name: seen.update({name: seen[name] + 1})  # noqa: E731
        getattr(module, name).register_forward_pre_hook(count)
    module.student_loss(Batch(cond=LABELS, size=12))
    assert seen == module.forward_counts()["student"]
    separate = 1 if not at_scores else 0
    assert seen["fake_score"] == 1 + separate * (features == "fake_score")
    assert seen["teacher"] == 1 + (features == "teacher") * (separate or scale != 1.0)


def test_relativistic_games_at_the_scores_have_real_samples_at_their_times():
    module, batch = game(heads={"kind": "relativistic"}, gan_at_scores=True), data()
    got = module.student_loss(batch).losses["gan"]
    scores, logits = module.scores_and_logits(module.rollout(batch).x0, batch)
    want = F.softplus(module.real_logits(batch, scores.t) - logits).mean()
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------ graphs
@pytest.mark.parametrize("mode", [True, False])
def test_the_graph_ends_at_the_last_tap(mode):
    denoiser = mlp()
    denoiser.requires_grad_(False)
    x, t = torch.randn(4, 2, requires_grad=True), torch.full((4,), 0.5)
    with torch.set_grad_enabled(mode):
        with graph_until(denoiser.network, ["blocks.0"]):
            prediction = denoiser(x, t, taps=("blocks.0",))
        assert torch.is_grad_enabled() == mode
    feature = prediction.features["blocks.0"]
    assert not prediction.raw.requires_grad
    got = torch.autograd.grad(feature.square().sum(), x)[0]
    want = torch.autograd.grad(denoiser(x, t, taps=("blocks.0",)).features["blocks.0"].square().sum(), x)[0]
    assert torch.equal(got, want)
    assert not denoiser.network.get_submodule("blocks.0")._forward_hooks


def test_grad_mode_and_hooks_survive_a_failure():
    denoiser = mlp()
    with torch.no_grad(), pytest.raises(ValueError, match="no block"), graph_until(denoiser.network, ["blocks.0"]):
        denoiser(torch.randn(4, 2), torch.full((4,), 0.5), taps=("blocks.0", "elsewhere"))
    assert torch.is_grad_enabled()
    assert not denoiser.network.get_submodule("blocks.0")._forward_hooks


def test_a_differentiable_score_keeps_its_graph():
    denoiser = mlp(classes=3)
    x, t, u = torch.randn(12, 2, requires_grad=True), torch.full((12,), 0.5), torch.full((12,), 0.5)
    arguments = (Guidance(2.0), denoiser, x, t, LABELS, u)
    got, features = score_with_features(*arguments, ("blocks.0",), differentiable=True)
    want, none = score_with_features(*arguments, ())
    torch.testing.assert_close(got, want)
    assert set(features) == {"blocks.0"}
    assert none == {}
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))


# ------------------------------------------------------------------------------------------------ lazy games
def test_games_are_due_every_kth_critic_update_over_cycles():
    module = game(fake_score_steps=2, gan_every=3)
    due = []
    for update in range(6):
        for repeat in range(2):
            ready(module, f"fake_score{repeat}", update)
            due.append("gan" in module.fake_score_loss(data()).losses)
    assert due == [index % 3 == 0 for index in range(12)]


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_a_lazy_game_counts_k_times_and_an_idle_one_is_denoising_alone(features):
    lazy, eager = (game(features, fake_score_steps=4, gan_every=every) for every in (4, 1))
    plain = ready(DMD2(mlp(), fake_score_steps=4))
    shift(plain.fake_score)
    for repeat in range(2):
        for module in (lazy, eager, plain):
            ready(module, f"fake_score{repeat}")
            module._rollouts.clear()
        got, every, denoising = (module.fake_score_loss(data()).losses for module in (lazy, eager, plain))
        torch.testing.assert_close(got["denoising"], denoising["denoising"])
        if repeat == 0:
            torch.testing.assert_close(got["gan"], 4 * every["gan"])
        else:
            assert "gan" in every
            assert set(got) == {"denoising"}
    # heads have zero gradients rather than none, as with an average over processes
    got["denoising"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in lazy.discriminator.parameters())
    denoising["denoising"].backward()
    gradients = zip(lazy.fake_score.parameters(), plain.fake_score.parameters(), strict=True)
    assert all((a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad) for a, b in gradients)


def test_a_run_with_both_trains_every_network(ring4_problem):
    module = DMD2(
        mlp(),
        gan=Adversary(taps=("blocks.0",), width=4, features="teacher"),
        fake_score_steps=2,
        updates_per_sample=2,
        gan_at_scores=True,
        gan_every=2,
    )
    module.configure_model()
    before = {name: [p.detach().clone() for p in module.role_parameters(name)] for name in ("student", "discriminator")}
    before["fake_score"] = [p.detach().clone() for p in module.fake_score.parameters()]
    ring4_problem.fit(module, 3, Batch(x0=torch.randn(64, 2), size=64), batch_size=16)
    for name, weights in before.items():
        assert any(not torch.equal(a, b) for a, b in zip(weights, getattr(module, name).parameters()))
        assert all(bool(p.isfinite().all()) for p in getattr(module, name).parameters())
    assert not any(p.requires_grad for p in module.teacher.parameters())


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gan_at_scores": True}, "give gan, and gan_every"),
        ({"gan_every": 2}, "give gan, and gan_every"),
        ({"gan": Adversary(), "gan_every": 0}, "gan_every of 1 or more"),
        ({"gan": Adversary(times=Uniform(0.1, 0.9)), "gan_at_scores": True}, "has times of its own"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DMD2(mlp(), **settings)


def test_grouped_methods_have_a_game_of_their_own():
    module = VDOT(mlp(), group_size=2, gan=Adversary(taps=("blocks.0",), width=4), gan_at_scores=True)
    with pytest.raises(ValueError, match="VDOT compares scores within groups"):
        module.configure_model()
