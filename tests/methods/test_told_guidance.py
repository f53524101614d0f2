"""Teachers that are told a guidance scale: who is told what, in training and when sampled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from frozen import frozen
from small_problems import assert_same_cycle, mlp, ready, shift
from tiny_pipelines import flux, sana, sana_sprint, sd15

from lightning_distill.batch import Batch
from lightning_distill.generation import generate
from lightning_distill.guidance import Guidance, IntervalGuidance, RandomGuidance, check_guidance, guided, is_told
from lightning_distill.methods import (
    ADM,
    ASD,
    CDM,
    DMD2,
    GNDM,
    SCDMD,
    VDOT,
    ConsistencyDistillation,
    DecoupledDMD,
    GuidanceDistillation,
    KnowledgeDistillation,
    LearnedSolver,
    Reflow,
    SiD,
    SwiftBrush,
)
from lightning_distill.methods.discriminating import score_with_features
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.guidance_adapters import GuidanceAdapters
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.second_time import add_guidance
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.randomness import Draws

N = 6


def tellable():
    """A network with classes that embeds a scale, 3 by default."""
    denoiser = mlp(classes=3)
    add_guidance(denoiser.network)
    shift(denoiser.network)
    denoiser.family = replace(denoiser.family, guidance_scale=3.0)
    return denoiser


@pytest.fixture
def told():
    """A network with classes that embeds a scale, 3 by default."""
    return tellable().requires_grad_(False).eval()


@pytest.fixture
def batch():
    return Batch(x0=torch.randn(N, 2), cond={"class_labels": torch.arange(N) % 3})


def point(n=N):
    return torch.randn(n, 2), torch.linspace(0.2, 0.8, n, dtype=torch.float64), {"class_labels": torch.arange(n) % 3}


def test_a_told_network_is_guided_by_telling(told):
    x, t, cond = point()
    default, other = told(x, t, cond).x0, told(x, t, cond, guidance=torch.tensor(5.0)).x0
    assert (default - other).abs().max() > 1e-3
    assert is_told(told)
    assert torch.equal(guided(told, x, t, cond, 1.0).x0, default)
    assert torch.equal(guided(told, x, t, cond, 5.0).x0, other)
    rows = torch.tensor([3.0, 5.0]).repeat(N // 2)
    mixed = guided(told, x, t, cond, rows).x0
    torch.testing.assert_close(mixed, torch.where((rows == 3.0)[:, None], default, other))
    told.null_class = None
    check_guidance(told, Guidance(5.0), RandomGuidance(1.0, 6.0))  # no unconditional branch is needed
    with pytest.raises(ValueError, match="has no null class"):
        check_guidance(replace_class(mlp(classes=3)), Guidance(5.0))
    with_taps, features = score_with_features(Guidance(5.0), told, x, t, cond, torch.rand(N), ["blocks.0"])
    torch.testing.assert_close(with_taps, other)
    assert features["blocks.0"].shape[0] == N


def replace_class(denoiser):
    denoiser.network.num_classes = 0
    denoiser.null_class = None
    return denoiser


@pytest.mark.parametrize("maker", [flux, sana_sprint])
@pytest.mark.parametrize("method", [ConsistencyDistillation, Reflow, KnowledgeDistillation, DMD2])
def test_students_of_told_teachers_are_sampled_as_they(maker, method):
    """What the student is told by default is its teacher's default: at the start they are one function."""
    tiny = maker()
    teacher = tiny.denoiser()
    teacher.family = replace(teacher.family, guidance_scale=3.5)
    module = ready(method(teacher))
    x, t, cond = torch.randn(2, *tiny.shape), torch.tensor([0.5, 0.9], dtype=torch.float64), tiny.cond(2)
    want = teacher(x, t, cond).x0
    with frozen(module.student):
        assert torch.equal(module.student(x, t, cond).x0, want)
    assert (teacher(x, t, cond, guidance=torch.tensor(1.0)).x0 - want).abs().max() > 1e-5
    noise = torch.randn(2, *tiny.shape)
    times = module.student_times
    with frozen(module):
        samples = module.sample(2, cond, noise=noise)
    torch.testing.assert_close(samples, generate(teacher, noise, cond, times, module.sampler), rtol=0, atol=0)


def test_a_scale_that_is_asked_for_is_told_to_both(told, batch):
    module = ready(GuidanceDistillation(told, student=Copy(), guidance=RandomGuidance(1.0, 6.0)))
    x, t, velocity, cond, scale = module.examples(batch)
    assert scale.min() > 1.0
    assert scale.unique().numel() == N
    torch.testing.assert_close(velocity, told(x, t, cond, guidance=scale).flow_prediction)
    assert module.student_loss(batch).losses["guidance"].item() == 0.0  # the student is the teacher
    assert module.student.family.guidance_scale == 3.5
    plain = ready(ConsistencyDistillation(told))
    assert plain.told_scale(t) is None
    assert plain.student.family.guidance_scale == 3.0


def test_a_teacher_on_a_shared_backbone_is_guided_by_two_passes(batch):
    """The branch of the student lies in the teacher's network, and says nothing there."""
    teacher = mlp(classes=3)
    teacher.null_class = 3
    role = TwoTime(Lora(rank=2, target_modules=["inner", "outer"]), kind=None, guidance=True)
    module = ready(GuidanceDistillation(teacher, student=role, guidance=RandomGuidance(1.0, 6.0)))
    assert isinstance(module.student, AdapterDenoiser)
    assert module.student.embeds_guidance
    assert not is_told(module.teacher)
    x, t, velocity, cond, scale = module.examples(batch)
    null = module.teacher.null_cond(cond)
    with_cond, without = (module.teacher(x, t, c).flow_prediction for c in (cond, null))
    want = without + scale.float()[:, None] * (with_cond - without)
    torch.testing.assert_close(velocity, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("student", [TwoTime(kind=None, guidance=True), GuidanceAdapters(width=8, heads=2)])
@pytest.mark.parametrize("policy", [IntervalGuidance(4.0, 0.2, 0.6), RandomGuidance(2.0, 6.0, (0.2, 0.6))])
def test_students_are_told_a_trajectorys_scale_inside_and_outside_of_intervals(batch, student, policy):
    """Sampling tells one scale at all times, so training does."""
    teacher = mlp(classes=3)
    teacher.null_class = 3
    module = ready(GuidanceDistillation(teacher, student=student, guidance=policy))
    x, t, velocity, cond, scale = module.examples(batch)
    outside = (t < 0.2) | (t > 0.6)
    assert outside.any()
    assert not outside.all()
    assert scale.min() >= 2.0
    torch.testing.assert_close(velocity[outside], teacher(x, t, cond).flow_prediction[outside])
    assert (velocity - teacher(x, t, cond).flow_prediction)[~outside].abs().amax(1).min() > 1e-4
    assert module.student.family.guidance_scale == 4.0


def test_a_learned_solver_of_a_told_teacher_needs_no_second_call(told):
    module = ready(LearnedSolver(told, num_steps=3, solver_steps=6, shape=[2], guidance=Guidance(5.0)))
    assert module.student.stands_alone
    assert module.student.sampling_guidance is None
    assert module.student.family.guidance_scale == 5.0
    batch = Batch(cond={"class_labels": torch.arange(N) % 3}, size=N)
    loss = module.student_loss(batch).losses["end"].item()
    noise, x0 = module.pairs(batch)
    made = module.sample(N, batch.cond, noise=noise)
    assert (made - x0).square().mean().item() == pytest.approx(loss, rel=1e-4)


def test_distilled_guidance_is_a_teacher_for_fewer_steps(batch):
    """Both kinds of told students, as the teachers of a second stage at another scale."""
    base = mlp(classes=3)
    base.null_class = 3
    first = ready(GuidanceDistillation(base, student=TwoTime(kind=None, guidance=True), guidance=RandomGuidance(1, 6)))
    shift(first.student.network)
    stage = first.student.requires_grad_(False).eval()
    second = ready(ConsistencyDistillation(stage, guidance=Guidance(5.0), num_steps=2))
    x, t, cond = point()
    torch.testing.assert_close(second.guided_teacher(batch)(x, t).x0, stage(x, t, cond, guidance=torch.tensor(5.0)).x0)
    assert second.student.family.guidance_scale == 5.0
    assert torch.equal(second.student(x, t, cond).x0, stage(x, t, cond, guidance=torch.tensor(5.0)).x0)


def test_decoupled_dmd_of_a_told_teacher_is_dmd2_where_the_schedules_coincide():
    """The engine's push is the distance of two told predictions."""
    settings = {"guidance": Guidance(5.0), "num_steps": 2, "ema": []}
    one, other = DecoupledDMD(tellable(), coincide=True, **settings), DMD2(tellable(), **settings)
    batch = Batch(cond={"class_labels": torch.arange(12) % 3})
    assert_same_cycle(one, other, batch, tolerance=1e-6, terms=("matching", "engine"))
    plain = DMD2(tellable(), **{**settings, "guidance": Guidance(1.0)})
    with pytest.raises(AssertionError):
        assert_same_cycle(one, plain, batch, tolerance=1e-2, terms=("matching", "engine"))


@pytest.mark.parametrize("method", [DMD2, SwiftBrush])
def test_a_told_fake_score_is_trained_at_the_scales_it_is_asked_for(method):
    module = ready(method(tellable(), fake_guidance=Guidance(5.0), ema=[]))
    module.fake_score.null_class = None
    seen = []
    hook = lambda _m, _args, kwargs: seen.append(kwargs.get("guidance"))  # noqa: E731
    module.fake_score.register_forward_pre_hook(hook, with_kwargs=True)
    batch = Batch(cond={"class_labels": torch.arange(N) % 3})
    module.student_loss(batch)
    module.fake_score_loss(batch)
    assert len(seen) == 2
    assert all(torch.equal(scale, torch.full((N,), 5.0)) for scale in seen)


# ------------------------------------------------------------------------------------------------ fake scores
@pytest.fixture
def told_dmd2():
    teacher = mlp(classes=3)
    teacher.null_class = 3
    role = TwoTime(kind=None, guidance=True)
    module = DMD2(
        teacher, student=role, fake_score=role, guidance=RandomGuidance(1.0, 6.0), num_steps=2, ema=[],
        critic_condition_on="step", rollout_step="sample", fake_score_steps=2,
    )  # fmt: skip
    module = ready(module)
    for network in (module.student, module.fake_score):
        shift(network.network)
    return module


def test_student_teacher_and_fake_score_see_one_scale_per_sample(told_dmd2):
    module, seen = told_dmd2, {"student": [], "fake_score": [], "teacher": []}
    for name in ("student", "fake_score"):
        network = getattr(module, name)
        network.register_forward_pre_hook(lambda m, _, name=name: seen[name].append(m.family.guidance_scale))
    scales = module.guidance.scales
    module.guidance.scales = lambda t, u: seen["teacher"].append(scales(t, u)) or seen["teacher"][-1]
    batch = Batch(cond={"class_labels": torch.arange(N) % 3})
    module.student_loss(batch)
    (wanted,) = seen["teacher"]
    assert wanted.unique().numel() == N
    assert len(seen["student"]) == 2
    assert all(torch.equal(found, wanted) for found in seen["student"] + seen["fake_score"])
    # the critic's first samples are the student's, its second ones have scales of their own
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    module.fake_score_loss(batch)
    assert torch.equal(seen["fake_score"][-1], wanted)
    module.draws = Draws(module.streams, 0, 0, "fake_score1", 1)
    module.fake_score_loss(batch)
    assert torch.equal(seen["fake_score"][-1], seen["student"][-1])
    assert not torch.isclose(seen["fake_score"][-1], wanted).any()
    assert module.student.family.guidance_scale == 3.5


@pytest.mark.parametrize("method", [SwiftBrush, SiD])
def test_guiding_a_fake_score_that_is_told_the_samples_scales_is_telling_it_them(method):
    """By default in SwiftBrush, whose fake score is guided as the teacher; as in SiD's LSG."""
    role, policy = TwoTime(kind=None, guidance=True), RandomGuidance(1.0, 6.0)
    lsg = {"fake_guidance": RandomGuidance(1.0, 6.0), "critic_guidance": RandomGuidance(1.0, 6.0)}
    settings = {"guidance": policy, "fake_score_steps": 2, "ema": [], **(lsg if method is SiD else {})}
    module = ready(method(mlp(classes=3), student=role, fake_score=role, **settings))
    told = {"student": [], "fake_score": []}
    for name, found in told.items():
        branch = getattr(module, name)
        own = branch._guidance
        branch.__dict__["_guidance"] = lambda given, x, own=own, branch=branch, found=found: (
            found.append(branch.family.guidance_scale if given is None else given) or own(given, x)
        )
    batch = Batch(cond={"class_labels": torch.arange(N) % 3})
    module.student_loss(batch)
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    module.fake_score_loss(batch)
    wanted = told["student"][0]
    assert wanted.unique().numel() == N
    assert len(told["fake_score"]) == 2
    assert all(torch.equal(found, wanted) for found in told["fake_score"])
    other = {**settings, "fake_guidance": Guidance(2.0)}
    with pytest.raises(ValueError, match=r"fake_guidance=Guidance\(scale=2.0\): the fake score is told the scale at"):
        ready(method(mlp(classes=3), student=role, fake_score=role, **other))


def test_both_branches_of_the_scale_are_trained(told_dmd2):
    module, batch = told_dmd2, Batch(cond={"class_labels": torch.arange(N) % 3})
    for phase in ("student", "fake_score"):
        module.draws = Draws(module.streams, 0, 0, f"{phase}0")
        sum(getattr(module, f"{phase}_loss")(batch).losses.values()).backward()
        branch = {k: p for k, p in getattr(module, phase).network.named_parameters() if "second_time" in k}
        assert branch
        assert all(bool(p.grad.any()) for p in branch.values())


def test_a_fake_score_that_is_not_told_is_refused():
    teacher = mlp(classes=3)
    role = TwoTime(kind=None, guidance=True)
    module = DMD2(teacher, student=role, guidance=RandomGuidance(1.0, 6.0), ema=[])
    with pytest.raises(ValueError, match="give fake_score=TwoTime"):
        ready(module)
    ready(DMD2(teacher, guidance=RandomGuidance(1.0, 6.0), ema=[]))  # nobody is told


def test_random_scales_of_a_told_teacher_are_told_to_its_students():
    module = ready(DMD2(tellable(), guidance=RandomGuidance(1.0, 6.0), ema=[]))
    seen = []
    module.student.register_forward_pre_hook(lambda m, _: seen.append(m.family.guidance_scale))
    module.rollout(Batch(cond={"class_labels": torch.arange(N) % 3}))
    assert seen[0].unique().numel() == N
    fixed = ready(DMD2(tellable(), guidance=Guidance(5.0), ema=[]))
    assert fixed.student.family.guidance_scale == 3.0  # the one that copies of the teacher are told, and sampled with


@pytest.mark.parametrize("method", [CDM, SCDMD])
def test_calls_beside_the_rollout_are_told_its_scales(method):
    role = TwoTime(kind=None, guidance=True)
    module = method(
        mlp(classes=3), student=role, fake_score=role, guidance=RandomGuidance(1.0, 6.0), num_steps=2, ema=[]
    )
    module, seen = ready(module), []
    module.student.register_forward_pre_hook(lambda m, _: seen.append(m.family.guidance_scale))
    module.student_loss(Batch(cond={"class_labels": torch.arange(N) % 3}))
    assert len(seen) > 1
    assert all(torch.equal(scale, seen[0]) for scale in seen)
    module._rollouts.clear()  # the next cycle
    module.rollout(Batch(cond={"class_labels": torch.arange(N) % 3}))
    assert len(module._scales) == 1


def told_game(method, **settings):
    role = TwoTime(kind=None, guidance=True)
    module = ready(method(mlp(classes=3), student=role, fake_score=role, guidance=RandomGuidance(1.0, 6.0), **settings))
    for network in (module.student, module.fake_score):
        shift(network.network)
    return module


def test_real_samples_of_the_student_are_made_at_the_scales_of_the_others(batch):
    module, seen = told_game(ASD, gan=Adversary(taps=("input",)), ema=[]), []
    module.student.register_forward_pre_hook(lambda m, _: seen.append(m.family.guidance_scale))
    module.student_loss(batch)
    module.draws = Draws(module.streams, 0, 0, "fake_score0")
    module.fake_score_loss(batch)
    assert len(seen) > 2
    assert all(isinstance(scale, torch.Tensor) and torch.equal(scale, seen[0]) for scale in seen)


def test_the_teacher_of_the_game_is_guided_by_what_the_samples_were_told(batch):
    """In the critic's updates, too: on the student's samples, on those of another slice, and on the same once more."""
    gan = Adversary(taps=("input",), features="teacher")
    module = told_game(ADM, gan=gan, fake_score_steps=4, updates_per_sample=2, ema=[])
    told, teachers = [], []
    module.fake_score.register_forward_pre_hook(lambda m, _: told.append(m.family.guidance_scale))
    scales = module.guidance.scales
    module.guidance.scales = lambda t, u: teachers.append(scales(t, u)) or teachers[-1]
    module.student_loss(batch)
    for repeat, (_, index) in enumerate(module.phase_plan()[1:]):
        module.draws = Draws(module.streams, 0, 0, f"fake_score{repeat}", index)
        told.clear()
        teachers.clear()
        module.fake_score_loss(batch)
        (teacher,) = teachers
        assert all(torch.equal(scale, teacher) for scale in told)
        assert len(told) == 2


@pytest.mark.parametrize(("policy", "calls"), [(Guidance(8.0), 2), (Guidance(1.0), 1)], ids=["told", "default"])
def test_the_game_at_the_scores_of_a_told_teacher_judges_at_its_default_scale(told, batch, policy, calls):
    gan = Adversary(taps=("blocks.1",), features="teacher")
    module = ready(DMD2(told, guidance=policy, gan=gan, gan_at_scores=True, ema=[]))
    seen = []
    module.teacher.register_forward_pre_hook(lambda *_: seen.append(1))
    scores, logits = module.scores_and_logits(module.rollout(batch).x0, batch)
    assert len(seen) == calls == module.forward_counts()["student"]["teacher"]
    torch.testing.assert_close(logits, module.logits(scores.x_t, scores.t, batch.cond))


@pytest.mark.parametrize("method", [VDOT, GNDM])
def test_groups_share_conditions_that_are_lists(method):
    module = method(mlp(classes=3), group_size=2, ema=[])
    module = ready(module)
    captions = list("abcd")
    common = module.grouped(Batch(cond={"caption": captions, "class_labels": torch.arange(4) % 3}))
    assert common.cond["caption"] == ["a", "a", "c", "c"]
    assert common.cond["class_labels"].tolist() == [0, 0, 2, 2]
    assert common.own["caption"] == captions


@pytest.mark.parametrize("method", [VDOT, GNDM])
def test_groups_have_one_scale(method):
    """Samples of a group are compared with each other, so that the teacher must be guided alike."""
    role = TwoTime(kind=None, guidance=True)
    roles = {"student": role, "fake_score": role}
    module = method(mlp(classes=3), group_size=4, guidance=RandomGuidance(1.0, 8.0), ema=[], **roles)
    module, seen = ready(module), []
    module.student.register_forward_pre_hook(lambda m, _: seen.append(m.family.guidance_scale))
    scales = module.guidance.scales
    module.guidance.scales = lambda t, u: seen.append(scales(t, u)) or seen[-1]
    module.student_loss(Batch(cond={"class_labels": torch.arange(8) % 3}))
    module._rollouts.clear()
    module.draws = Draws(module.streams, 0, 0, "fake_score1", 1)
    module.fake_score_loss(Batch(cond={"class_labels": torch.arange(8) % 3}))
    made, guided_by, later = seen
    assert torch.equal(made, guided_by)
    for found in (made, later):
        groups = found.view(2, 4)
        assert torch.equal(groups, groups[:, :1].expand(2, 4))
        assert not torch.isclose(groups[0, 0], groups[1, 0])
    assert len(module.scale_draw(6)) == 6  # of callbacks, which look at fewer samples


def test_students_are_sampled_at_a_scale_that_is_asked_for(told):
    module, noise, cond = ready(DMD2(told)), torch.randn(N, 2), {"class_labels": torch.arange(N) % 3}
    t, raw = torch.ones(N, dtype=torch.float64), noise
    found = module.sample(N, cond, noise=noise, guidance_scale=5.0)
    torch.testing.assert_close(found, module.sampling_network()(raw, t, cond, guidance=torch.tensor(5.0)).x0)
    assert (found - module.sample(N, cond, noise=noise)).abs().max() > 1e-3
    found = module.sample(N, cond, noise=noise, guidance_scale=1.0)
    torch.testing.assert_close(found, module.sampling_network()(raw, t, cond, guidance=torch.tensor(1.0)).x0)
    two_passes = ready(DMD2(mlp(classes=3)))
    shift(two_passes.student.network)
    found = two_passes.sample(N, cond, noise=noise, guidance_scale=5.0, weights="student")
    torch.testing.assert_close(found, guided(two_passes.student, raw, t, cond, 5.0).x0)
    with pytest.raises(ValueError, match="has no null class"):
        ready(DMD2(replace_class(mlp(classes=3)))).sample(2, {}, noise=noise[:2], guidance_scale=5.0)


@pytest.mark.parametrize("maker", [sd15, sana])
@pytest.mark.parametrize("student", [Copy, Lora])
def test_the_teacher_keeps_its_two_passes_beside_a_told_student(maker, student):
    """Families have a default scale, which a branch on the shared network would be told in the teacher's place."""
    tiny = maker()
    teacher = tiny.denoiser(null_cond=tiny.null())
    cond, x, t = tiny.cond(2), torch.randn(2, *tiny.shape), torch.tensor([0.4, 0.7], dtype=torch.float64)
    plain, guidance = teacher(x, t, cond).x0, guided(teacher, x, t, cond, 5.0).x0
    assert (plain - guidance).abs().max() > 1e-4
    role = TwoTime(student(), kind=None, guidance=True)
    module = ready(ConsistencyDistillation(teacher, student=role, guidance=RandomGuidance(3, 8)))
    assert is_told(module.student)
    assert is_told(module.sampling_network())
    assert not is_told(teacher)
    torch.testing.assert_close(guided(teacher, x, t, cond, 5.0).x0, guidance, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher(x, t, cond).x0, plain)
    torch.testing.assert_close(module.student(x, t, cond, guidance=torch.tensor(5.0)).x0, plain)
    other = ready(DMD2(teacher, fake_score=Lora())) if student is Lora else None
    assert other is None or not is_told(other.fake_score)
