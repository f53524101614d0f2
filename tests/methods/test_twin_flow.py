"""TwinFlow and APEX: the branches of one network, zeros at the exact map, what each term trains, messages."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from exact_students import F64, FLOW, MIXTURE, data, exact_module, loss_and_slope
from small_problems import mlp, ready, shift
from test_trajectory_learning import PROCESS, distilled, error, ring_problem, two_times
from tiny_pipelines import MAKERS
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.generation import generate
from lightning_distill.guidance import Guidance
from lightning_distill.losses.flow_maps import rcgm_target
from lightning_distill.losses.rcgm import rectification, robust_loss
from lightning_distill.methods import APEX, FakeBranch, NegativeTime, ShiftedCondition, TwinFlow
from lightning_distill.networks.analytic import analytic_denoiser, ring
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.roles import Explicit, Lora
from lightning_distill.networks.second_time import add_second_time, second_time_of
from lightning_distill.networks.small import ResidualMLP, small_dit, small_text_unet, small_unet
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving
from lightning_distill.times import Uniform

__all__ = ["ring_problem"]  # the fixture


def random(network, seed=0):
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.25)
    return network


def denoisers():
    """By name: a network, its conditions, and how it is called by hand."""
    unet = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    dit = small_dit(8, 1, 3, patch_size=4, num_layers=2, num_attention_heads=1, attention_head_dim=8)
    return {
        "mlp": (mlp(), {}, (2,)),
        "unet": (Denoiser(random(unet), FLOW, "flow_prediction"), {}, (1, 8, 8)),
        "dit": (Denoiser(random(dit), FLOW, "flow_prediction"), {"class_labels": torch.tensor([0, 2, 1])}, (1, 8, 8)),
    }


# ------------------------------------------------------------------------------------------------ branches
@pytest.mark.parametrize("name", ["mlp", "unet", "dit"])
def test_negative_times_are_those_of_the_network_itself(name):
    """The hooks on the embedding give what the network gives when it is called with -t."""
    denoiser, cond, shape = denoisers()[name]
    branch = NegativeTime()
    branch.check(denoiser, False)
    x, t = torch.randn(3, *shape), torch.tensor([0.2, 0.5, 0.9])
    plain = denoiser(x, t, cond).raw
    with branch.chosen(denoiser, cond) as told:
        found = denoiser(x, t, told).raw
    flip = denoiser.network.register_forward_pre_hook(
        lambda _m, args, kwargs: (
            tuple(-a if i == 1 else a for i, a in enumerate(args)),
            {k: -v if k == "timestep" else v for k, v in kwargs.items()},
        ),
        with_kwargs=True,
    )
    want = denoiser(x, t, cond).raw
    flip.remove()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(denoiser(x, t, cond).raw, plain)


@pytest.mark.parametrize("name", ["sd15", "sana_sprint", "flux", "z_image", "wan"])
def test_negative_times_of_stock_networks(name):
    """With one or several time embeddings, and where the same sinusoids serve a guidance scale, too."""
    tiny = MAKERS[name]()
    denoiser, cond = tiny.denoiser(), tiny.cond(2)
    branch, told_time = NegativeTime(), denoiser._cast_time
    branch.check(denoiser, False)
    x, t = torch.randn(2, *tiny.shape), torch.tensor([0.4, 0.7], dtype=F64)
    with torch.no_grad():
        plain = denoiser(x, t, cond).raw
        with branch.chosen(denoiser, cond) as told:
            found = denoiser(x, t, told).raw
        denoiser._cast_time = lambda *args: -told_time(*args)
        want = denoiser(x, t, cond).raw
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert float((found - plain).abs().max()) > 0.01 * float(plain.abs().max())


def test_a_branch_has_a_gradient_of_its_own():
    module = ready(TwinFlow(mlp()))
    shift(module.student)
    x, t = torch.randn(5, 2), torch.full((5,), 0.6, dtype=F64)
    batch = Batch(size=5)
    found = module.fake_velocity(batch, x, t)
    torch.testing.assert_close(found, module.student.network(x, -t.float()), rtol=1e-5, atol=1e-5)
    weight = module.student.network.time_embedding[0].weight
    assert not torch.allclose(
        torch.autograd.grad(found.sum(), weight)[0],
        torch.autograd.grad(module.student(x, t).flow_prediction.sum(), weight)[0],
    )


def test_shifted_classes_are_those_of_a_shifted_table():
    denoiser = mlp(classes=4)
    branch = ShiftedCondition(-0.5, 0.3)
    x, t, cond = torch.randn(4, 2), torch.full((4,), 0.7), {"class_labels": torch.arange(4)}
    plain = denoiser(x, t, cond).raw
    with branch.chosen(denoiser, cond) as told:
        found = denoiser(x, t, told).raw
    other = copy.deepcopy(denoiser)
    with torch.no_grad():
        other.network.class_embedding.weight.mul_(-0.5).add_(0.3)
    torch.testing.assert_close(found, other(x, t, cond).raw)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(denoiser(x, t, cond).raw, plain)


def test_shifted_texts_are_what_the_network_sees():
    network = small_text_unet(8, 1, 4, (8,), 1, norm_num_groups=4, num_heads=1, pooling_heads=1)
    denoiser = Denoiser(random(network), VariancePreserving(zero_terminal_snr=True), "v_prediction")
    tokens = torch.randn(2, 3, 4)
    branch = ShiftedCondition(-1.0, 0.1)
    branch.check(denoiser, True)
    with branch.chosen(denoiser, {"encoder_hidden_states": tokens}) as told:
        torch.testing.assert_close(told["encoder_hidden_states"], 0.1 - tokens)


def test_a_shared_backbone_keeps_its_teacher():
    denoiser, cond, _ = denoisers()["dit"]
    module = ready(TwinFlow(denoiser, student=TwoTime(role=Lora(rank=2), kind="scaled_difference"), from_data=False))
    batch = Batch(x0=torch.randn(3, 1, 8, 8), cond=cond)
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5)
    before = module.teacher(x, t, cond).raw
    terms = module.student_loss(batch)
    assert torch.equal(module.teacher(x, t, cond).raw, before)
    found = torch.autograd.grad(module.weighted_sum("student", terms), module.role_parameters("student"))
    assert any(bool(g.any()) for g in found)


# ------------------------------------------------------------------------------------------------ zeros
class Same(FakeBranch):
    """The student's own velocity: that of its samples if it is exact."""

    def check(self, student, checkpointing):
        pass

    @contextmanager
    def chosen(self, student, cond):
        yield dict(cond)


def twin(fault=0.0, **settings):
    settings = {"from_data": False, "fake_branch": Same(), "robust": None, "clamp": None, "step": 2e-3, **settings}
    return exact_module(TwinFlow, two_times=True, fault=fault, **settings)


def test_the_exact_map_has_hardly_a_loss_and_no_direction():
    _, _, exact = loss_and_slope(twin(), data())
    module = twin(0.1)
    _, _, spoilt = loss_and_slope(module, data())
    assert float(exact.losses["flow_map"].detach()) < 1e-4
    assert float(spoilt.losses["flow_map"].detach()) > 1e-2
    assert float(exact.losses["matching"].detach()) == 0.0
    # the fake branch's targets are single pairs: its loss stays, its slope vanishes at their velocity
    slopes = {}
    for wrong in (0.0, 0.3):
        module = twin()
        own = module.fake_velocity
        module.fake_velocity = lambda batch, x, t, own=own, wrong=wrong: own(batch, x, t) + wrong
        loss = module.student_loss(Batch(x0=MIXTURE.sample(20_000)[0].double())).losses["fake"]
        slopes[wrong] = abs(float(torch.autograd.grad(loss, module.student.network.fault)[0]))
        assert float(loss.detach()) > 0.3
    assert slopes[0.0] < 0.05 * slopes[0.3]


def test_the_flow_map_is_the_recursive_target():
    module = twin(0.2, order=3, step=0.02, clamp=1.0, robust=1e-2)
    batch = data()
    found = torch.autograd.grad(module.flow_map_term(batch), module.student.network.fault)[0]
    t, r = module.pair_times(batch.size)
    x, _ = module.flow_state(batch, t)
    v = MIXTURE.velocity(x, t, FLOW)
    average = module.average(module.student, batch)
    u = average(x, t, r)
    target = rcgm_target(average, u.detach(), x, v, t, r, 0.02, 3, 1.0)
    target = torch.where((t == r)[:, None], v, target)
    want = torch.autograd.grad(robust_loss(u, target, t, r, 1e-2), module.student.network.fault)[0]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_samples_move_by_the_difference_of_the_branches():
    module = ready(TwinFlow(mlp()))
    shift(module.student)
    batch = Batch(x0=torch.randn(16, 2))
    weights = module.role_parameters("student")
    found = torch.autograd.grad(module.student_loss(batch).losses["matching"], weights, allow_unused=True)
    made, u = module.generated(batch)
    start = module.draws.normal("start", (16, 2))
    torch.testing.assert_close(made, start - u)
    s = Uniform(0.02, 0.98).quantile(module.draws.uniform("matching/time", 16), FlowMatching())
    x = FLOW.add_noise(made, module.draws.normal("matching/noise", (16, 2)), s).detach()
    with torch.no_grad():
        own = module.student.network(x, -s.float())
        real = module.student(x, s).flow_prediction
    want = torch.autograd.grad(rectification(u, own, real), weights, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in found)
    for one, other in zip(found, want, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("spacing", "room"), [("near", 0.02), ("even", 0.01)])
def test_times_have_their_shares_and_room_for_the_steps(spacing, room):
    module = twin(order=2, step=0.01, whole_share=0.25, near_share=0.25, spacing=spacing)
    t, r = module.pair_times(4000)
    assert float(((t == 1.0) & (r == 0.0)).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert float((r >= 0.95 * t).double().mean()) == pytest.approx(0.25 + 0.5 * 0.07, abs=0.05)
    gap = t - r
    assert bool(((gap == 0.0) | (gap >= room)).all())
    assert bool(((gap >= room) & (gap < 2 * room)).any())


def test_from_data_the_slope_of_the_flow_map_vanishes_in_the_mean():
    settings = {"from_data": True, "step": 0.01, "near_share": 0.0, "whole_share": 0.0}
    slopes = []
    for fault in (0.0, 0.3):
        module = twin(fault, **settings)
        loss = module.flow_map_term(data(20_000))
        slopes.append(abs(float(torch.autograd.grad(loss, module.student.network.fault)[0])))
    assert slopes[0] < 0.1 * slopes[1]


# ------------------------------------------------------------------------------------------------ settings
def test_students_start_as_the_teacher_and_are_told_the_difference():
    teacher = mlp()
    module = ready(TwinFlow(teacher))
    assert second_time_of(module.student.network).kind == "scaled_difference"
    x, t = torch.randn(5, 2), torch.full((5,), 0.7)
    assert torch.equal(module.student(x, t).raw, teacher(x, t).raw)
    assert module.weighted_sum("student", terms := module.student_loss(Batch(x0=torch.randn(8, 2)))).isfinite()
    assert set(terms.losses) == {"flow_map", "fake", "matching"}
    assert module.loss_weights == {"student/matching": 0.5}
    assert isinstance(APEX(mlp(classes=4)).fake_branch, ShiftedCondition)


class Shuffled(nn.Module):
    """Time features that are no sinusoids."""

    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.tensor([0.3, 0.7]))

    def forward(self, t):
        return torch.cos(t[:, None] + self.phase)


def test_bad_settings_are_named():
    for settings, message in (
        ({"order": 0}, "at least one step"),
        ({"order": 10, "step": 0.1}, "together shorter than .5"),
        ({"whole_share": 0.8, "near_share": 0.4}, "add up to at most 1"),
        ({"spacing": "wide"}, "spacing='wide' is unknown"),
        ({"clamp": 0.0}, "clamp=0.0: give a positive number"),
        ({"robust": -1.0}, "robust=-1.0: give a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            TwinFlow(mlp(), **settings)
    # the fake branch is trained at training_times, and matched at matching_times
    with pytest.raises(ValueError, match=r"Uniform\(low=0.6, high=1.0\) does not cover the matching times"):
        ready(TwinFlow(mlp(), training_times=Uniform(0.6, 1.0)))
    ready(TwinFlow(mlp(), training_times=Uniform(0.6, 1.0), matching_times=Uniform(0.65, 0.9)))
    with pytest.raises(ValueError, match="the condition itself"):
        ShiftedCondition(1.0, 0.0)
    with pytest.raises(ValueError, match=r"has neither; use NegativeTime\(\)"):
        ready(APEX(mlp()))
    with pytest.raises(ValueError, match="the batch has none"):
        ready(APEX(mlp(classes=4))).student_loss(Batch(x0=torch.randn(4, 2)))
    with pytest.raises(ValueError, match="asks no teacher"):
        ready(TwinFlow(mlp(classes=4), guidance=Guidance(2.0)))
    dit = denoisers()["dit"][0]
    add_second_time(dit.network, "scaled_difference")
    for branch in (NegativeTime(), ShiftedCondition()):
        branch.check(dit, False)
        with pytest.raises(ValueError, match="switch activation_checkpointing off"):
            branch.check(dit, True)
    noise_levels = Denoiser(
        small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8), EDM(), "v_prediction"
    )
    with pytest.raises(ValueError, match="whose negative is the time of 1 / sigma"):
        NegativeTime().check(noise_levels, False)
    odd = mlp()
    odd.network.time_proj = Shuffled()
    with pytest.raises(ValueError, match="Shuffled makes no sines and cosines"):
        NegativeTime().check(odd, False)
    with pytest.raises(ValueError, match="it cannot be told -t; use another"):
        NegativeTime().check(Denoiser(nn.Linear(2, 2), FLOW, "sample"), False)


# ------------------------------------------------------------------------------------------------ learning
#: targets free of noise: nothing is limited
FREE = {"from_data": False, "robust": None, "clamp": None}


def errors(module, problem, cond):
    """Of one and of four steps of the student, and of two of the teacher."""
    mixture, _, noise, ends = problem
    own = [error(module.sample(len(noise), cond, noise=noise, num_steps=k), ends) for k in (1, 4)]
    two = generate(analytic_denoiser(mixture, PROCESS), noise, cond or {}, [1.0, 0.5], "ode")
    return [*own, error(two, ends)]


@pytest.mark.learn
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_twins_learn_one_step(ring_problem):
    settings = {"student": two_times(kind="scaled_difference"), **FREE}
    one, four, teacher = errors(distilled(ring_problem, TwinFlow, settings, 2e-3), ring_problem, None)
    print(f"TwinFlow: {one:.3f} in one step, {four:.3f} in four; the teacher in two {teacher:.3f}")
    assert one < 0.5
    assert four < one
    assert one < teacher


@pytest.mark.learn
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*eval mode")
def test_a_shifted_condition_learns_as_a_negative_time_does(ring_problem):
    """On four labelled modes, half of the labels dropped; the measure is the map of all modes."""
    mixture = ring(4, labelled=True)
    x0, labels = mixture.sample(20_000, torch.Generator().manual_seed(0))
    noise, cond = ring_problem[2], {"class_labels": torch.full((1000,), 4)}
    ends = mixture.flow_map(noise, 1.0, 0.0, PROCESS)
    drop = torch.arange(len(labels)) % 2 == 0
    data = Batch(x0=x0, cond={"class_labels": torch.where(drop, 4, labels)})
    spec = NewDenoiser(lambda: ResidualMLP((2,), 128, 3, num_classes=4), PROCESS, "flow_prediction", sigma_data=1.436)
    problem = (mixture, data, noise, ends)
    student = TwoTime(Explicit(spec), kind="scaled_difference")
    module = distilled(problem, APEX, {"student": student, **FREE, "order": 1}, 2e-3, batch_size=256)
    one, four, teacher = errors(module, problem, cond)
    print(f"APEX: {one:.3f} in one step, {four:.3f} in four; the teacher in two {teacher:.3f}")
    assert one < teacher
    assert four < one
