"""Methods that change one part of DMD2: each is DMD2 where that part is off, and does what it says where it is on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_problems import assert_same_cycle, gradients, mlp, ready, shift
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.losses.reward_weights import MeanValue, exponential_weight, saliency_map
from lightning_distill.methods import ASD, DMD2, GNDM, MSD, SCDMD, VDOT, FlashDMD, RewardedDMD, SiD
from lightning_distill.methods.fake_score import Scores
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import ConditionExperts
from lightning_distill.networks.roles import Explicit, Lora
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving
from lightning_distill.randomness import Draws
from lightning_distill.samplers import ode
from lightning_distill.times import few_step_times

pytestmark = pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")


def heads(**settings):
    return Adversary(**{"taps": ("blocks.0", "input"), "width": 4, **settings})


class Itself(torch.nn.Module):
    """No reward: as many numbers as a sample has."""

    def forward(self, x, cond):
        return x


def labelled(n=16):
    return Batch(cond={"class_labels": torch.arange(n) % 3}, x0=torch.randn(n, 2))


# ------------------------------------------------------------------------------------------------ nothing changed
OFF = {
    "rewarded": (RewardedDMD, {"reward": MeanValue(), "beta": 0.0}),
    "flash": (FlashDMD, {"switch": 0.0}),
    "flash_all_gan": (FlashDMD, {"switch": 1.0}),
    "groups": (GNDM, {"group_size": 1}),
    "msd": (MSD, {"classes": [[0, 1, 2]]}),
    "consistency": (SCDMD, {"loss_weights": {"student/consistency": 0.0}}),
    "transport": (VDOT, {"group_size": 1, "loss_weights": {"student/transport": 0.0}}),
}


@pytest.mark.parametrize("name", OFF)
def test_switched_off_it_is_dmd2(name):
    """Bit for bit, where no term is multiplied by 0."""
    method, settings = OFF[name]
    common = {"num_steps": 2, "guidance": Guidance(2.0), "ema": []}
    if name == "flash_all_gan":  # the first step alone is at the switch
        common |= {"num_steps": 1, "student_times": [0.5], "gan": heads()}
        settings = settings | {"loss_weights": {"student/gan": 1.0}}
        other = DMD2(
            mlp(3), **common, loss_weights={"student/gan": 1.0, "fake_score/gan": 1.0, "student/matching": 0.0}
        )
    else:
        other = DMD2(mlp(3), **common)
    terms = () if "loss_weights" in settings else None
    assert_same_cycle(method(mlp(3), **common, **settings), other, labelled(), 1e-6 if terms == () else 0.0, terms)


#: losses, and the sum of all absolute gradients, before any of these methods existed
RECORDED = {
    (DMD2, "student"): [1.334598183631897, 0.6947188377380371, 104.891026672626],
    (DMD2, "fake_score"): [1.1975655555725098, 1.41708505153656, 95.61351457906608],
    (SiD, "student"): [-1.6952439546585083, 0.6947188377380371, 30.30710422959053],
    (SiD, "fake_score"): [1.1975655555725098, 1.41708505153656, 95.61351457906608],
}


@pytest.mark.parametrize(("method", "phase"), RECORDED)
def test_the_parent_methods_are_what_they_were(method, phase):
    module = method(mlp(3), num_steps=2, gan=heads(), guidance=Guidance(2.0), ema=[], loss_weights={"student/gan": 0.5})
    module.configure_model()
    for name in ("student", "fake_score"):
        shift(getattr(module, name), seed=len(name))
    x0 = torch.randn(16, 2, generator=torch.Generator().manual_seed(5))
    losses, grads = gradients(module, Batch(cond={"class_labels": torch.arange(16) % 3}, x0=x0), phase)
    found = [*(float(v.detach()) for v in losses.values()), float(sum(g.double().abs().sum() for g in grads))]
    assert found == pytest.approx(RECORDED[method, phase], rel=1e-5)


# ------------------------------------------------------------------------------------------------ rewards
def test_weights_grow_with_the_reward_and_have_mean_one_in_the_end():
    rewards = torch.tensor([0.0, 1.0, -1.0])
    torch.testing.assert_close(exponential_weight(rewards, 2.0), (2 * rewards).exp())
    assert torch.equal(exponential_weight(rewards, 0.0), torch.ones(3))
    assert float(exponential_weight(torch.tensor([100.0]), 2.0)) == pytest.approx(22026.47, rel=1e-4)
    module = ready(RewardedDMD(mlp(), reward=MeanValue(), beta=1.5))
    x = torch.randn(4096, 2)

    def factor():
        found = module.sample_factor(x, Batch(size=4096))
        module.reward_state += module.get_buffer("reward_pending")
        module.get_buffer("reward_pending").zero_()
        return found

    # the first update sees the mean reward, the second the mean weight
    assert all(torch.equal(factor(), torch.ones(4096, 1)) for _ in range(2))
    third = factor()
    wanted = (1.5 * (x.mean(1) - x.mean())).exp()
    torch.testing.assert_close(third[:, 0], wanted / wanted.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [-8.0, 20.0])
def test_a_constant_added_to_all_rewards_changes_nothing(offset):
    """Rewards of trained models have any origin; the limit of the exponent must not cut them off."""

    class Shifted(MeanValue):
        def forward(self, x, cond):
            return super().forward(x, cond) + offset

    def factors(reward):
        module = ready(RewardedDMD(mlp(), reward=reward, beta=2.0))
        for update in range(3):
            x = torch.randn(64, 2, generator=torch.Generator().manual_seed(update))
            found = module.sample_factor(x, Batch(size=64))
            module.reward_state += module.get_buffer("reward_pending")
        return found

    plain = factors(MeanValue())
    assert float(plain.std()) > 0.3
    torch.testing.assert_close(factors(Shifted()), plain, rtol=1e-4, atol=1e-5)


def test_a_saliency_map_has_mean_one_and_shows_where_the_reward_looks():
    x = torch.randn(3, 2, 4, 4)
    mask = torch.zeros(4, 4)
    mask[1, 2], mask[3, 0] = 3.0, 1.0

    def reward(images, cond):
        return (images * mask).sum((1, 2, 3))

    found = saliency_map(reward, x, {})
    assert found.shape == (3, 1, 4, 4)
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(found[0, 0], mask / mask.mean())
    flat = saliency_map(lambda v, cond: v.sum((1, 2, 3)) * 0.0, x, {})
    assert torch.equal(flat, torch.ones_like(flat))


def test_the_fixed_point_does_not_move():
    """Where both scores agree the gradient is zero, whatever the reward."""
    module = ready(RewardedDMD(mlp(), reward=MeanValue(), beta=3.0))
    assert float(module.student_loss(Batch(size=32)).losses["matching"].detach()) == 0.0


def test_rewards_that_are_no_rewards_are_refused():
    with pytest.raises(ValueError, match="RewardedDMD needs reward"):
        RewardedDMD(mlp())
    with pytest.raises(ValueError, match="saliency=2"):
        RewardedDMD(mlp(), reward=MeanValue(), saliency=2.0)

    class Pairs(nn.Module):
        def forward(self, x, cond):
            return x

    module = ready(RewardedDMD(mlp(), reward=Pairs()))
    with pytest.raises(ValueError, match=r"gave shape \(8, 2\) for 8 samples"):
        module.student_loss(Batch(size=8))


# ------------------------------------------------------------------------------------------------ groups
@pytest.mark.parametrize("method", [GNDM, VDOT])
def test_the_discriminator_sees_data_with_their_own_conditions(method):
    """Groups share conditions among the student's samples; the data keep theirs."""
    module = ready(method(mlp(3), group_size=4, gan=heads(kind="relativistic"), ema=[]))
    batch, seen = labelled(8), []
    own = module.logits
    module.logits = lambda x, t, cond: (seen.append(cond["class_labels"].tolist()), own(x, t, cond))[1]
    labels, shared = batch.cond["class_labels"].tolist(), [0, 0, 0, 0, 1, 1, 1, 1]
    for phase in ("student", "fake_score"):
        seen.clear()
        gradients(module, batch, phase)
        assert labels in seen
        assert all(told in (labels, shared) for told in seen)


def test_transport_moves_samples_from_the_fake_towards_the_real_score():
    """One group by hand: the gradient in a sample is its own pull, weighted as the matching is."""
    module = ready(VDOT(mlp(), group_size=4, sinkhorn_steps=200, weight="kl", ema=[]))
    rollout = module.rollout(Batch(size=4))
    x = rollout.x0
    x_t, t = module.group_noisy(x, "matching")
    fake = torch.randn(4, 2)
    scores = Scores(x_t, t, fake - torch.tensor([0.5, -0.25]), fake, {})
    module.scores = lambda *_args, **_kwargs: scores
    loss = module.rollout_terms(rollout, Batch(size=4)).losses["transport"]
    (slope,) = torch.autograd.grad(loss, x)
    # all real predictions lie to the left and above: descent goes there
    assert bool((slope[:, 0].sum() > 0) & (slope[:, 1].sum() < 0))


# ------------------------------------------------------------------------------------------------ halves
def test_each_sample_has_one_of_the_two_terms():
    module = ready(FlashDMD(mlp(), num_steps=4, switch=0.6, gan=heads(), rollout_step="sample"))
    batch = Batch(size=64, x0=torch.randn(64, 2))
    x = module.rollout(batch).x0
    noisy, clean = module.sample_factor(x, batch)[:, 0], module.gan_weight(batch)
    assert torch.equal(noisy + clean, torch.ones(64))
    t = module.rollout(batch, grad=False).prediction.t
    assert torch.equal(noisy == 1, t >= 0.6)
    assert 0 < float(noisy.sum()) < 64
    losses = module.student_loss(batch).losses
    (of_matching,) = torch.autograd.grad(losses["matching"], module.student.network.output.bias, retain_graph=True)
    assert bool(of_matching.isfinite().all())
    # the game is that of the clean half, over all samples
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    game = module.fake_score_loss(batch).losses["gan"]
    seen = []
    original = module.heads
    module.heads = lambda f, cond: seen.append(original(f, cond)) or seen[-1]
    module.fake_score_loss(batch)
    fake, real = seen
    want = ((F.softplus(fake) + F.softplus(-real)).mean(1) * clean).mean()
    torch.testing.assert_close(game, want)


def test_a_step_without_a_term_is_refused():
    with pytest.raises(ValueError, match=r"step at t=0.5 lies below switch=0.6 and would learn nothing"):
        FlashDMD(mlp(), num_steps=2, switch=0.6).configure_model()
    with pytest.raises(ValueError, match="switch=2"):
        FlashDMD(mlp(), switch=2.0)


# ------------------------------------------------------------------------------------------------ groups
def test_groups_share_conditions_times_and_normalisers():
    module = ready(GNDM(mlp(3), group_size=4, guidance=Guidance(2.0)))
    shift(module.fake_score)
    batch = labelled(16)
    assert module.grouped(batch).cond["class_labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4
    x_t, t = module.group_noisy(torch.randn(16, 2), "matching")
    assert torch.equal(t.view(4, 4), t[::4, None].expand(4, 4))
    assert len(t.unique()) == 4
    x, real, fake = torch.randn(16, 2), torch.randn(16, 2), torch.randn(16, 2)
    found = module.normaliser(x, Scores(x_t, t, real, fake)).view(4, 4)
    torch.testing.assert_close(found[1], (x - real)[4:8].abs().mean().expand(4))
    # order within a group does not matter
    order = torch.tensor([2, 0, 3, 1, *range(4, 16)])
    again = module.normaliser(x[order], Scores(x_t, t, real[order], fake[order])).view(4, 4)
    torch.testing.assert_close(again, found)


def test_the_direction_statistic_forgets_the_scale_of_the_direction():
    module = ready(GNDM(mlp(), group_size=4, statistic="direction"))
    x, real, d, t = torch.randn(8, 2), torch.randn(8, 2), torch.randn(8, 2), torch.rand(8)
    moves = [c * d / module.normaliser(x, Scores(x, t, real, real + c * d)) for c in (1.0, 7.0)]
    torch.testing.assert_close(*moves)
    torch.testing.assert_close(moves[0].view(2, 8).abs().mean(1), torch.ones(2))


def test_rewards_count_by_their_rank_in_the_group():
    module = ready(GNDM(mlp(), group_size=4, reward=MeanValue(channel=0), beta=0.7))
    x = torch.randn(8, 2)
    weight = module.reward_weight(x, Batch(size=8)).flatten()
    rewards = x[:, 0].view(2, 4)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, correction=0, keepdim=True)
    want = (0.7 * advantage).softmax(1) * 4
    torch.testing.assert_close(weight, want.flatten())
    moved = torch.cat([3.0 * x[:4] + 5.0, 0.1 * x[4:] - 2.0])  # each prompt has a scale of its own
    torch.testing.assert_close(module.reward_weight(moved, Batch(size=8)).flatten(), weight)
    assert torch.equal(module.reward_weight(torch.ones(8, 2), Batch(size=8)), torch.ones(8, 1))
    # it is what the samples' gradients are multiplied by
    plain, weighted = (ready(GNDM(mlp(), group_size=4, **s)) for s in ({}, {"reward": MeanValue(channel=0)}))
    rows = []
    for m in (plain, weighted):
        shift(m.fake_score)
        made = m.rollout(Batch(size=8))
        made.x0.retain_grad()
        m.rollout = lambda batch, made=made: made
        m.student_loss(Batch(size=8)).losses["matching"].backward()
        rows.append(made.x0.grad)
    weight = weighted.reward_weight(made.x0, Batch(size=8))
    torch.testing.assert_close(rows[1], weight * rows[0])
    with pytest.raises(ValueError, match=r"the reward gave shape \(8, 2\) for 8 samples"):
        ready(GNDM(mlp(), group_size=4, reward=Itself())).student_loss(Batch(size=8))


def test_groups_must_be_whole():
    for method in (GNDM, VDOT):
        module = ready(method(mlp(), group_size=4))
        with pytest.raises(ValueError, match="6 samples do not make whole groups of 4"):
            module.student_loss(Batch(size=6))
        with pytest.raises(ValueError, match="group_size=0"):
            method(mlp(), group_size=0)
    with pytest.raises(ValueError, match="statistic='mean'"):
        GNDM(mlp(), statistic="mean")


def test_transport_pulls_to_the_assigned_predictions():
    module = ready(VDOT(mlp(), group_size=3, epsilon=0.002, sinkhorn_steps=3000))
    real = torch.tensor([[10.0, 0.0], [20.0, 0.0], [30.0, 0.0]]).repeat(2, 1)
    fake = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]]).repeat(2, 1)
    x, t = torch.zeros(6, 2), torch.full((6,), 0.5)
    want = fake - torch.tensor([[30.0, 0.0], [10.0, 0.0], [20.0, 0.0]]).repeat(2, 1)
    torch.testing.assert_close(module.pull(Scores(x, t, real, fake)), want, atol=0.05, rtol=0)
    # equal sets, in any order: nothing to move
    same = module.pull(Scores(x, t, real, real[[2, 0, 1, 5, 4, 3]]))
    assert float(same.abs().max()) < 0.05
    with pytest.raises(ValueError, match="epsilon=0"):
        VDOT(mlp(), epsilon=0.0)


def test_transport_is_that_of_full_precision_under_autocast():
    module = ready(VDOT(mlp(), group_size=8))
    common, small = torch.randn(1, 512), torch.randn(2, 8, 512)
    fake = common + 0.03 * small[0]
    scores = Scores(fake, torch.full((8,), 0.5), fake + 0.01 * small[1], fake)
    want = module.pull(scores)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.pull(scores), want)


# ------------------------------------------------------------------------------------------------ endpoints
def test_the_defect_of_a_linear_velocity_is_the_closed_form():
    """v = k x: one Euler step of -h against two of -h1, -h2: (1 + h1 k)(1 + h2 k) - (1 + h k) with signs of time."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.tensor(0.7))

        def forward(self, x, t):
            return self.k * x

    linear = Denoiser(Linear(), FlowMatching(), "flow_prediction")
    module = SCDMD(linear, num_steps=3, shape=[2], sampler="ode", ema=[])
    module.configure_model()
    times = [*module.student_times, 0.0]
    seen = set()
    for update in range(12):
        module.draws = Draws(module.streams, update, 0, "student0")
        module._rollouts.clear()
        rollout = module.rollout(Batch(size=32))
        got = module.defect(rollout, Batch(size=32))
        k, x = rollout.step, rollout.prediction.x_t
        t, middle, end = times[k], *((times[k + 1], times[k + 2]) if k < 2 else (times[k], 0.0))
        factor = (1 - (t - end) * 0.7) - (1 - (t - middle) * 0.7) * (1 - (middle - end) * 0.7)
        assert float(got.detach()) == pytest.approx(factor**2 * float(x.square().mean()), rel=1e-4, abs=1e-9)
        seen.add(k)
        if k < 2:
            (gradient,) = torch.autograd.grad(got, module.student.network.k)
            # the composed side is a target
            want = 2 * factor * (-(t - end)) * float(x.square().mean())
            assert float(gradient) == pytest.approx(want, rel=1e-3)
    assert seen == {0, 1, 2}


def test_dropout_is_no_defect_of_the_last_step():
    student = Lora(rank=2, target_modules=["inner"], dropout=0.5)
    module = ready(SCDMD(mlp(), student=student, num_steps=1, ema=[]))
    shift(module.student)
    module.student.train()
    rollout = module.rollout(Batch(size=8))
    assert not torch.equal(rollout.x0, module.rollout(Batch(size=8)).x0), "dropout is on"
    assert float(module.defect(rollout, Batch(size=8))) == 0.0
    assert module.student.training


def test_a_student_whose_steps_compose_has_no_defect():
    """x0 = x - t c: constant velocity, the exact flow between a point and its shift."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Parameter(torch.tensor(0.4))

        def forward(self, x, t):
            return self.c.expand_as(x)

    constant = Denoiser(Constant(), FlowMatching(), "flow_prediction")
    module = SCDMD(constant, num_steps=3, shape=[2], ema=[], rollout_step="sample")
    ready(module)
    batch = Batch(size=64)
    assert float(module.defect(module.rollout(batch), batch).detach()) == pytest.approx(0.0, abs=1e-12)


# ------------------------------------------------------------------------------------------------ self-distillation
def asd(teacher=None, **settings):
    settings = {"gan": heads(), "most_steps": 4, "num_steps": 4, "sampler": "ode", **settings}
    return ready(ASD(teacher or mlp(), **settings))


def test_the_students_sample_is_that_of_n_steps_and_the_better_one_of_one_more():
    module, lengths = asd(), set()
    for update in range(30):
        module.draws = Draws(module.streams, update, 0, "fake_score0")
        module._rollouts.clear()
        n = module.length()
        lengths.add(n)
        batch = Batch(size=4)
        noise = module.streams.normal("slice0/start", update, 0, (4, 2))
        t = torch.full((4,), 1e-9, dtype=torch.float64)

        def denoise(x, time):
            return module.student(x, time)

        with torch.no_grad():
            fake, real = (ode(denoise, noise, module.times_of(k), module.process) for k in (n, n + 1))
        torch.testing.assert_close(module.rollout(batch, grad=False).x0, fake)
        torch.testing.assert_close(module.real_noisy(batch, t), real, atol=1e-5, rtol=1e-5)
    assert lengths == {1, 2, 3}
    assert module.times_of(3) == pytest.approx([1.0, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("process", "first"),
    [(FlowMatching(), 0.3), (FlowMatching(5.0), 0.6), (VariancePreserving(), 0.4), (EDM(), 2.5)],
    ids=["flow", "shifted", "vp", "edm"],
)
def test_more_steps_have_more_times_wherever_they_start(process, first):
    teacher = Denoiser(mlp().network, process, "sample", sigma_data=1.12)
    module = asd(teacher=teacher, num_steps=1, student_times=[first])
    for n in range(1, 5):
        times = module.times_of(n)
        assert len(times) == n
        assert times[0] == pytest.approx(first)
        assert times == sorted(set(times), reverse=True)
        assert times[-1] > 0.0
    whole = asd(teacher=teacher)
    assert [whole.times_of(n) for n in range(1, 5)] == [few_step_times(process, n) for n in range(1, 5)]


def test_self_distillation_needs_no_data_but_a_game():
    module = asd()
    assert set(module.student_loss(Batch(size=4)).losses) == {"matching", "gan"}
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    losses = module.fake_score_loss(Batch(size=4)).losses
    student = list(module.student.parameters())
    assert all(g is None for g in torch.autograd.grad(losses["gan"], student, allow_unused=True))
    with pytest.raises(ValueError, match="game between its student's samples"):
        ASD(mlp())
    with pytest.raises(ValueError, match="most_steps=1"):
        ASD(mlp(), gan=heads(), most_steps=1)
    with pytest.raises(ValueError, match="use interval"):
        ASD(mlp(), gan=heads(), critic_condition_on="step")


# ------------------------------------------------------------------------------------------------ several students
def test_each_class_trains_its_own_student():
    module = ready(MSD(mlp(3), classes=[[0, 2], [1]]))
    assert isinstance(module.student.network, ConditionExperts)
    assert isinstance(module.fake_score.network, ConditionExperts)
    shift(module.fake_score)
    module.student_loss(Batch(cond={"class_labels": torch.full((8,), 1)})).losses["matching"].backward()
    learned = [any(p.grad is not None for p in e.parameters()) for e in module.student.network.experts]
    assert learned == [False, True]
    smaller = Explicit(
        NewDenoiser(lambda: ResidualMLP((2,), 4, 1, num_classes=3), FlowMatching(), "flow_prediction", sigma_data=1.12)
    )
    module = ready(MSD(mlp(3), classes=[[0, 2], [1]], student=smaller))
    assert [e.input.out_features for e in module.student.network.experts] == [4, 4]
    module = ready(MSD(mlp(3), classes=2))
    assert [len(role.network.experts) for role in (module.student, module.fake_score)] == [2, 2]
    with pytest.raises(ValueError, match="features cannot be read in one call"):
        MSD(mlp(3), classes=[[0, 2], [1]], gan=heads())
    with pytest.raises(ValueError, match="has 3 classes, fewer than experts"):
        ready(MSD(mlp(3), classes=4))
    with pytest.raises(ValueError, match="give a number of experts, 1 or more"):
        ready(MSD(mlp(3), classes=0))


def test_one_fake_score_is_the_unconditional_branch_of_all_classes():
    """Samples of every class whose label is dropped train it, and every class is guided by it."""
    settings = {"critic_dropout": 0.999, "fake_guidance": Guidance(3.0)}
    module = ready(MSD(mlp(4), classes=[[0, 1], [2, 3]], ema=[], **settings), "fake_score0")
    rows = []
    for k, expert in enumerate(module.fake_score.network.experts):
        expert.register_forward_hook(lambda _m, args, _out, k=k: rows.append((k, len(args[0]))))
    batch = Batch(cond={"class_labels": torch.tensor([2, 3] * 4)})
    module.fake_score_loss(batch)
    assert rows == [(0, 8)]
    rows.clear()
    module.draws = Draws(module.streams, 0, 0, "student0")
    module.student_loss(batch)
    assert sorted(rows) == [(0, 8), (1, 8)]  # without the label, and with it
