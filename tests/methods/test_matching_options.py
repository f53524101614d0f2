"""Options of the distribution-matching methods in combination: experts, attention, noise levels, names."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from small_problems import mlp, ready, shift
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.losses.adversarial import r1_penalty
from lightning_distill.methods import (
    ACDMD,
    ADD,
    ADM,
    ASD,
    CDM,
    DMD,
    DMD2,
    GDD,
    LADD,
    MSD,
    RCM,
    TDM,
    VDOT,
    VSD,
    AnyFlowOnPolicy,
    CorrectedFreeFlow,
    DecoupledDMD,
    DiffInstruct,
    DisBack,
    FDistill,
    FlashDMD,
    PhasedDMD,
    SiD,
    SwiftBrush,
    UniInstruct,
)
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import Experts, single_experts
from lightning_distill.networks.frozen_features import FrozenFeatures
from lightning_distill.networks.small import small_unet
from lightning_distill.networks.step_condition import ExpertStepConditions
from lightning_distill.processes import EDM, FlowMatching
from lightning_distill.randomness import Draws
from lightning_distill.times import Karras, LogitNormal

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def at(module, phase, update=0, slice_index=0):
    """The module at another phase, with nothing kept of the last."""
    module.draws = Draws(module.streams, update, 0, phase, slice_index)
    module._rollouts.clear()
    return module


# ------------------------------------------------------------------------------------------------ experts
@pytest.mark.parametrize("kind", ["step", "interval"])
def test_each_expert_is_told_the_steps_of_its_own_samples(kind):
    """One call that is divided gives what each expert gives alone for its rows; also for two branches."""
    role = Experts(boundaries=[0.5])
    module = ready(
        PhasedDMD(mlp(), num_steps=2, fake_score=role, critic_condition_on=kind, rollout_step="sample", ema=[])
    )
    critic = module.fake_score
    assert isinstance(critic.step_condition, ExpertStepConditions)
    shift(critic)  # experts and conditions now differ
    x, t = torch.randn(8, 2), torch.tensor([0.9, 0.1, 0.7, 0.3, 0.6, 0.2, 0.4, 0.8], dtype=torch.float64)
    step = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1])
    told = (step, 1.0 - 0.5 * step, 0.5 - 0.5 * step)
    with critic.step_condition.told(critic, *told):
        together, twice = critic(x, t).x0, critic(torch.cat([x, x]), torch.cat([t, t])).x0
    noisy = t >= 0.5
    for k, single in enumerate(single_experts(critic)):
        rows = noisy if k == 0 else ~noisy
        with critic.step_condition.experts[k].told(single, *(v[rows] for v in told)):
            alone = single(x[rows], t[rows]).x0
        torch.testing.assert_close(together[rows], alone)
        assert not torch.isclose(single(x[rows], t[rows]).x0, alone).all(1).any()
    torch.testing.assert_close(twice, together.repeat(2, 1))
    assert critic.network.part is None
    with critic.step_condition.told(critic, *(v[:3] for v in told)), pytest.raises(ValueError, match="8 rows cannot"):
        critic(x, t)


def test_methods_with_experts_train_the_conditions_of_those_that_run():
    data = Batch(cond={"class_labels": torch.arange(8) % 3})
    for module, batch in (
        (PhasedDMD(mlp(), num_steps=2, fake_score=Experts(boundaries=[0.5]), ema=[]), Batch(size=8)),
        (MSD(mlp(classes=3), classes=[[0], [1, 2]], num_steps=2, critic_condition_on="step", ema=[]), data),
    ):
        ready(module)
        keys = [k for k in module.state_dict() if "step_condition" in k]
        assert keys == [f"fake_score.step_condition.experts.{k}.embedding.weight" for k in range(2)]
        trained = {id(p) for p in module.role_parameters("fake_score")}
        assert all(id(p) in trained for p in module.fake_score.step_condition.parameters())
        shift(module.fake_score)
        module.student_loss(batch).losses["matching"].backward()
        at(module, "fake_score0").fake_score_loss(batch).losses["denoising"].backward()
        step = module.rollout(batch, grad=False).step
        for condition in module.fake_score.step_condition.experts:
            assert bool(condition.embedding.weight.grad[step].any())
            assert not bool(condition.embedding.weight.grad[1 - step].any())


# ------------------------------------------------------------------------------------------------ the game
def test_exact_r1_differentiates_attention_twice():
    torch.manual_seed(0)
    unet = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    shift(unet)
    teacher = Denoiser(unet, FlowMatching(), "flow_prediction")
    gan = Adversary(taps=("mid_block",), features="teacher", width=4)
    module = ready(LADD(teacher, gan=gan, r1="exact", ema=[]), "discriminator0")
    batch = Batch(x0=torch.randn(2, 1, 8, 8))
    losses = module.discriminator_loss(batch).losses
    losses["r1"].backward()
    assert any(bool(p.grad.any()) for p in module.discriminator.parameters() if p.grad is not None)
    s = module.gan_times.quantile(module.draws.uniform("gan/time", 2), module.process)
    real = module.real_noisy(batch, s).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        want = r1_penalty(module.logits(real, s, {}), real)
    torch.testing.assert_close(losses["r1"], want)


def edm_mlp(sigma_min=0.002, sigma_max=80.0):
    return Denoiser(mlp().network, EDM(sigma_min, sigma_max), "sample", sigma_data=0.5)


@pytest.mark.parametrize("method", [LADD, ADD])
def test_default_noise_levels_have_the_same_odds_in_every_process(method):
    """LADD's logit-normal shares of t_max are flow times; on EDM they would be almost pure noise."""
    gan = Adversary(taps=("input",), features="teacher")
    flow, edm = (ready(method(teacher, gan=gan, ema=[])) for teacher in (mlp(), edm_mlp()))
    u = torch.tensor([0.01, 0.2, 0.5, 0.9], dtype=torch.float64)
    t, sigma = (module.gan_times.quantile(u, module.process) for module in (flow, edm))
    torch.testing.assert_close(sigma, t / (1 - t))
    assert float(sigma[0]) < 0.5
    times = LogitNormal(0.0, 0.5)
    given = ready(method(edm_mlp(), gan=Adversary(taps=("input",), features="teacher", times=times), ema=[]))
    assert given.gan_times is times


def test_the_switch_of_flash_dmd_is_a_share_of_the_matching_scale():
    levels = Karras().levels(torch.tensor([1.0, 0.75, 0.5, 0.25])).clamp(max=80.0).tolist()
    gan = Adversary(taps=("input",))
    settings = {"gan": gan, "switch": 0.5, "rollout_step": "sample", "ema": []}
    edm = ready(FlashDMD(edm_mlp(), student_times=levels, **settings))
    flow = ready(FlashDMD(mlp(), student_times=[1.0, 0.75, 0.5, 0.25], **settings))
    for module in (edm, flow):
        batch = Batch(size=32)
        steps = module.rollout(batch).steps
        assert len(steps.unique()) == 4
        assert torch.equal(module.noisy_half(batch), (steps <= 2).float())
    with pytest.raises(ValueError, match=r"lies below switch=0\.5"):
        FlashDMD(edm_mlp(), student_times=levels, switch=0.5).configure_model()
    FlashDMD(edm_mlp(), student_times=levels[:3], switch=0.5).configure_model()
    lowest = [80.0, 0.002]
    assert bool(ready(FlashDMD(edm_mlp(), student_times=lowest, switch=0.0)).noisy_half(Batch(size=4)).all())


# ------------------------------------------------------------------------------------------------ predictions compared
@pytest.mark.parametrize(
    "option", [{"critic_dropout": 0.7}, {"critic_guidance": Guidance(3.0)}], ids=["dropout", "guidance"]
)
def test_consistency_compares_predictions_of_one_kind(option):
    """At equal points the three predictions are one, whatever is dropped or guided."""
    module = ready(ACDMD(mlp(classes=3), num_steps=2, eta=0.0, consistency_span=1e-6, ema=[], **option), "fake_score0")
    shift(module.fake_score)
    losses = module.fake_score_loss(Batch(cond={"class_labels": torch.arange(16) % 3})).losses
    assert float(losses["consistency"].abs()) < 1e-8
    assert float(losses["denoising"]) > 0.1


def test_conditions_without_a_null_are_not_dropped():
    """Found before the first critic update, as it is with guidance."""
    teacher = mlp(classes=3)
    teacher.family, teacher.null_class = replace(teacher.family, null={}), None
    with pytest.raises(ValueError, match=r"critic_dropout=0.5 puts .* of 'class_labels', .* give null_class="):
        ready(DMD2(teacher, critic_dropout=0.5, ema=[]))
    ready(DMD2(teacher, ema=[]))
    ready(DMD2(mlp(classes=3), critic_dropout=0.5, ema=[]))


@pytest.mark.parametrize("kind", ["step", "interval"])
def test_snapshots_are_told_the_step_as_the_fake_score_was(kind):
    settings = {"num_steps": 2, "critic_condition_on": kind, "rollout_step": "sample", "ema": []}
    module = ready(DisBack(mlp(), waypoints=1, degradation_updates=2, **settings), update=2)
    shift(module.fake_score)
    for kept, now in zip(module.waypoints[0].parameters(), module.fake_score.parameters()):
        kept.data.copy_(now.data)
    scores = module.scores(module.rollout(Batch(size=8)).x0, Batch(size=8))
    assert torch.equal(scores.real, scores.fake)
    with torch.no_grad():
        untold = module.real_score()(scores.x_t, scores.t).x0
    assert not torch.isclose(scores.real, untold).all(1).any()


def test_a_blend_is_told_as_much_as_it_has_of_the_fake_score():
    settings = {"num_steps": 2, "critic_condition_on": "step", "rollout_step": "sample", "ema": []}
    module = ready(DisBack(mlp(), blend=0.6, blend_updates=10, **settings), update=5)
    shift(module.fake_score.step_condition)
    rollout = module.rollout(Batch(size=8))
    scores = module.scores(rollout.x0, Batch(size=8))
    assert module.blend_share() == pytest.approx(0.3)
    with torch.no_grad():
        scaled = module.fake_score.step_condition.embedding.weight.mul_(0.3)
    assert bool(scaled.any())
    with module.told_step(), torch.no_grad():  # teacher and fake score differ in nothing else
        want = module.fake_score(scores.x_t, scores.t).x0
    torch.testing.assert_close(scores.real, want)


def test_the_critic_beside_the_trajectory_is_told_the_time_there():
    module = ready(CDM(mlp(), critic_condition_on="interval", num_steps=2, random_steps=0, ema=[]))
    condition, called, told = module.fake_score.step_condition, [], []
    vectors = condition.vectors
    condition.vectors = lambda step, start, end: told.append((start, end)) or vectors(step, start, end)
    batch = Batch(size=16)
    module.student.register_forward_pre_hook(lambda _m, args: called.append(args[1]))
    module.student_loss(batch)
    rollout = module.rollout(batch, grad=False)
    r = called[-1]
    assert len(told) == 2
    torch.testing.assert_close(told[0][0], rollout.prediction.t)
    torch.testing.assert_close(told[0][1], rollout.end)
    torch.testing.assert_close(told[1][0], r)
    torch.testing.assert_close(told[1][1], torch.where(rollout.end < r, rollout.end, 0.0))
    with module.told_step():  # and afterwards the rollout's again
        module.fake_score(rollout.x0, r)
    torch.testing.assert_close(told[2][0], rollout.prediction.t)


def test_self_distillation_samples_the_steps_it_trains():
    def refused(message, **settings):
        with pytest.raises(ValueError, match=message):
            ASD(mlp(), gan=Adversary(taps=("input",)), **settings)

    refused("student_times=.* its own lists", student_times=[1.0, 0.9, 0.2])
    refused("rollout_step='sample'", rollout_step="sample")
    refused("num_steps=5 is above most_steps=4", num_steps=5)
    module = ready(ASD(mlp(), gan=Adversary(taps=("input",)), student_times=[0.6], ema=[]))
    assert [module.times_of(n)[0] for n in (1, 2, 3)] == [0.6] * 3
    for n in (1, 2, 3, 4):
        sampled = ready(ASD(mlp(), gan=Adversary(taps=("input",)), num_steps=n, ema=[]))
        assert sampled.student_times == sampled.times_of(n)


# ------------------------------------------------------------------------------------------------ names and choices
WEIGHTED = [
    (DMD2, "dmd_v1"),
    (DMD, "dmd_v1"),
    (VSD, "kl"),
    (DiffInstruct, "kl"),
    (TDM, "vsd"),
    (PhasedDMD, "one"),
    (FDistill, "kl"),
    (DecoupledDMD, "dmd_clamped"),
    (CDM, "dmd"),
    (VDOT, "one"),
    (RCM, "kl"),
    (CorrectedFreeFlow, "kl"),
    (AnyFlowOnPolicy, "kl"),
    (SiD, "fisher"),
    (UniInstruct, "divergence"),
]


@pytest.mark.parametrize(("method", "other"), WEIGHTED, ids=lambda value: getattr(value, "__name__", None))
def test_unknown_names_are_refused_when_a_method_is_made(method, other):
    needed = {"regression_pairs": SolvedPairs(num=2)} if method is DMD else {}
    with pytest.raises(ValueError, match=r"unknown matching weight 'typo'; choose dmd, dmd_v1, .* or (one|divergence)"):
        method(mlp(), weight="typo", **needed)
    assert method(mlp(), weight=other, **needed).weight == other


@pytest.mark.parametrize("method", [DMD2, SwiftBrush])
def test_unknown_spaces_are_refused_when_a_method_is_made(method):
    with pytest.raises(ValueError, match=r"unknown space of the loss 'typo'; choose epsilon, .* edm or scaled_epsilon"):
        method(mlp(), critic_space="typo")
    for space in ("edm", "scaled_epsilon", "flow_prediction", None):
        assert method(mlp(), critic_space=space).critic_space == space


def test_times_that_adm_would_not_use_are_refused():
    settings = {"taps": ("blocks.0",), "features": "teacher", "kind": "hinge"}
    with pytest.raises(ValueError, match=r"leave out gan\.times, and give matching_times"):
        ADM(mlp(), gan=Adversary(times=LogitNormal(), **settings))
    ADM(mlp(), gan=Adversary(**settings))


def warned(make):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        make().configure_model()
    return [str(w.message) for w in told if issubclass(w.category, UserWarning) and "conditions" in str(w.message)]


def test_sid_tells_of_a_branch_that_nothing_trains():
    def told(**settings):
        return warned(lambda: SiD(mlp(classes=3), ema=[], **settings))

    assert len(told(fake_guidance=Guidance(0.0))) == 1
    assert not told(fake_guidance=Guidance(0.0), critic_guidance=Guidance(0.0))
    assert not told(fake_guidance=Guidance(-1.0), critic_dropout=0.1)
    assert not told()


def test_games_that_see_no_condition_are_told_of():
    def gan(*taps):
        return Adversary(taps=taps, features="teacher")

    for method in (LADD, ADD):
        found = warned(lambda method=method: method(mlp(classes=3), gan=gan("input"), ema=[]))
        assert len(found) == (method is LADD)
    assert not warned(lambda: LADD(mlp(classes=3), gan=gan("input", "blocks.0"), ema=[]))
    assert not warned(lambda: LADD(mlp(), gan=gan("input"), ema=[]))
    picture = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU())
    for classes in (0, 3):
        unet = small_unet(8, 1, classes, (8, 16), norm_num_groups=4, attention_head_dim=8)
        teacher = Denoiser(unet, FlowMatching(), "flow_prediction", null_class=classes or None)
        features = FrozenFeatures(picture, ["1"])
        found = warned(lambda teacher=teacher, features=features: GDD(teacher, features=features, ema=[]))
        assert not found  # the method is such a game, as it says
