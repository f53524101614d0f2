"""Options of methods that learn from the teacher's paths: who is told what, at which times, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from small_problems import mlp, ready, shift
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.callbacks.samples import trajectory_strips
from lightning_distill.generation import index_noise
from lightning_distill.guidance import IntervalGuidance, RandomGuidance
from lightning_distill.methods import (
    ADD,
    AGD,
    DMD,
    DMD2,
    LADD,
    OFTSR,
    YONOS,
    HiPA,
    KnowledgeDistillation,
    LearnedSolver,
    MeanFlow,
    Reflow,
    RFPlusPlus,
    SlimFlow,
)
from lightning_distill.methods.solved_pairs import SolvedPairs
from lightning_distill.networks.adapter_transfer import adapter_changes
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.guidance_adapters import GuidanceAdapters
from lightning_distill.networks.second_time import add_guidance
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.teacher_features import TeacherFeatures
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import EDM, FlowMatching, VariancePreserving
from lightning_distill.randomness import Draws

N = 6


@pytest.mark.parametrize("method", [DMD2, KnowledgeDistillation, RFPlusPlus])
def test_a_branch_that_a_method_does_not_train_is_refused(method):
    with pytest.raises(ValueError, match=f"branch for target times, which {method.__name__} does not train"):
        ready(method(mlp(), student=TwoTime()))
    ready(method(mlp(classes=3), student=TwoTime(kind=None, guidance=True)))
    ready(MeanFlow(mlp(), student=TwoTime()))


@pytest.mark.parametrize("method", [LADD, ADD])
def test_a_scale_that_nobody_tells_is_refused(method):
    gan = Adversary(["blocks.0"], features="teacher")
    with pytest.raises(ValueError, match=f"embeds a guidance scale, which {method.__name__} tells nobody"):
        ready(method(mlp(classes=3), gan=gan, student=TwoTime(kind=None, guidance=True)))
    ready(method(mlp(classes=3), gan=gan))


def told_in_regression(module, monkeypatch):
    """What the student is told in the regression of a student update."""
    seen, forward = [], Denoiser.forward

    def noted(denoiser, *args, **kwargs):
        if denoiser is module.student:
            seen.append(kwargs.get("guidance"))
        return forward(denoiser, *args, **kwargs)

    monkeypatch.setattr(Denoiser, "forward", noted)
    module.regression.loss(module, 4)
    (told,) = seen
    return told


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_told_student_regresses_with_the_scale_of_the_pairs(scale, monkeypatch):
    pairs = SolvedPairs(num=8, steps=2, guidance_scale=scale)
    tells = {"student": TwoTime(kind=None, guidance=True), "fake_score": TwoTime(kind=None, guidance=True)}
    module = ready(DMD(mlp(classes=3), regression_pairs=pairs, guidance=RandomGuidance(1.0, 4.0), **tells))
    told = told_in_regression(module, monkeypatch)
    assert torch.equal(told, torch.full((4,), scale, dtype=torch.float64))


def test_pairs_of_a_teacher_at_its_default_scale_are_told_nothing(monkeypatch):
    teacher = mlp(classes=3)
    add_guidance(teacher.network)
    shift(teacher.network)
    teacher.family = replace(teacher.family, guidance_scale=3.0)
    module = ready(DMD(teacher, regression_pairs=SolvedPairs(num=8, steps=2)))
    assert told_in_regression(module, monkeypatch) is None


@pytest.mark.parametrize("process", [EDM(), FlowMatching(), VariancePreserving()], ids=["edm", "flow", "vp"])
def test_features_are_those_of_samples_with_a_little_noise(process):
    seen = []

    class Seen(nn.Module):
        """Remembers its times."""

        def __init__(self):
            super().__init__()
            self.block = nn.Linear(2, 2)

        def forward(self, x, t):
            return self.block(x)

    denoiser = Denoiser(Seen(), process, "sample")
    add = process.add_noise
    process.add_noise = lambda x, eps, t: seen.append(t) or add(x, eps, t)
    a, b = torch.randn(2, 200, 2)
    try:
        TeacherFeatures(["block"])(denoiser, a, b, {}, torch.rand(200).double(), torch.randn(200, 2))
    finally:
        del process.add_noise
    levels = process.sigma(seen[0]) / process.alpha(seen[0])
    assert levels.median() < 1.5
    assert levels.max() < 3.0


@pytest.mark.parametrize("process", [EDM(), VariancePreserving()], ids=["edm", "vp"])
def test_times_of_flows_are_times_that_networks_know(process):
    network = mlp().network
    module = ready(Reflow(Denoiser(network, process, "sample", sigma_data=1.0), shape=[2]))
    times = []
    module.student.network.register_forward_pre_hook(lambda _module, args: times.append(args[1]))
    module.student_loss(Batch(x0=torch.randn(4000, 2), noise=torch.randn(4000, 2), size=4000))
    least = process.sigma_min if isinstance(process, EDM) else 1.0 / process.num_train_timesteps
    assert times[0].min() >= process.network_time(torch.tensor(least, dtype=torch.float64)) - 1e-6


def test_interval_guidance_is_that_of_the_teacher_beside_the_student():
    policy = IntervalGuidance(4.0, 0.2, 0.6)
    module = ready(DMD2(mlp(classes=3), guidance=policy))
    z, cond = torch.randn(N, 2), {"class_labels": torch.arange(N) % 3}
    made = module.sample_hybrid(N, cond, first=1, noise=z)
    assert torch.equal(made, module.sample_hybrid(N, cond, first=1, noise=z, guidance_scale=policy))
    for scale in (1.0, 4.0):
        assert (made - module.sample_hybrid(N, cond, first=1, noise=z, guidance_scale=scale)).abs().max() > 1e-3


def test_strips_of_flow_maps_show_the_jump_to_clean_data():
    teacher = Denoiser(ResidualMLP((1, 8, 8), 8, 2), FlowMatching(), "flow_prediction")
    module = ready(MeanFlow(teacher, shape=[1, 8, 8], ema=[]))
    shift(module.student.network)
    strips = trajectory_strips(module, 3, 2, seed=0)
    x, t = index_noise(2, (1, 8, 8), 0), torch.ones(2, dtype=torch.float64)
    with torch.no_grad():
        want = module.student(x, t, r=torch.zeros_like(t)).x0.clamp(-1, 1)
        other = module.student(x, t, r=t).x0.clamp(-1, 1)
    torch.testing.assert_close(strips["student"][:, 0], want)
    assert (want - other).abs().max() > 1e-3


def test_steps_of_one_sample_share_the_noise_of_their_features():
    module = ready(KnowledgeDistillation(mlp(), perceptual=TeacherFeatures(["blocks.0"]), num_steps=2, solver_steps=2))
    shift(module.student.network)
    noise = []

    def noted(teacher, made, goal, cond, u, eps):
        noise.append((u, eps))
        return (made - goal).square().mean(1)

    module.perceptual.__class__ = type("Noted", (TeacherFeatures,), {"__call__": lambda self, *args: noted(*args)})
    module.student_loss(Batch(size=N))
    ((u, eps),) = noise
    assert len(u) == 2 * N
    assert torch.equal(u[:N], u[N:])
    assert torch.equal(eps[:N], eps[N:])
    module.draws = replace_first(module.draws, 3)
    module.student_loss(Batch(size=3))  # the second micro-batch of two
    assert torch.equal(noise[1][1][:3], eps[3:N])


def replace_first(draws, first):
    return Draws(draws.streams, draws.update, first, draws.phase, draws.slice_index)


@pytest.mark.parametrize(
    ("process", "space"), [(FlowMatching(), "flow_prediction"), (EDM(), "epsilon"), (VariancePreserving(), "epsilon")]
)
def test_guidance_is_compared_where_there_is_something_to_compare(process, space):
    teacher = Denoiser(ResidualMLP((1, 8, 8), 8, 2, num_classes=3), process, "sample", sigma_data=1.0)
    adapters = GuidanceAdapters(target_modules=["blocks.0"])
    module = ready(AGD(teacher, student=adapters, shape=[1, 8, 8]))
    assert module.space == space
    assert len(module.student_times) == 50
    given = AGD(teacher, student=adapters, space="epsilon", shape=[1, 8, 8])
    if space == "epsilon":
        ready(given)
    else:
        with pytest.warns(UserWarning, match="compares nothing at the first input"):
            ready(given)


def test_a_restored_picture_begins_as_perturbed_as_in_training():
    module = ready(OFTSR(mlp(), perturbation=0.5, ema=[]))
    begun = []
    module.student.network.register_forward_pre_hook(lambda _module, args: begun.append(args[0]))
    source = torch.zeros(2000, 2)
    module.sample(2000, noise=source, generator=torch.Generator().manual_seed(0))
    module.student_loss(Batch(x0=source, noise=source, size=2000))
    stds = [float(x.std()) for x in begun[:2]]
    assert stds[0] == pytest.approx(stds[1], rel=0.05)
    assert stds[0] > 0.1
    with pytest.raises(ValueError, match="adds noise to a source that is noise"):
        OFTSR(mlp(), source="gaussian", perturbation=0.5)


def test_a_scale_student_sees_what_it_takes():
    teacher = mlp(classes=3)
    easier = [lambda cond: {"class_labels": cond["class_labels_2"]}]
    module = ready(YONOS(teacher, easier=easier, stage_updates=1))
    module.student.family = replace(module.student.family, cond_keys=("class_labels",))
    labels = torch.arange(N) % 3
    module.student_loss(Batch(x0=torch.randn(N, 2), cond={"class_labels": labels, "class_labels_2": labels}))


@pytest.mark.parametrize(("inner", "space"), [(None, "sample"), (FlowMatching(), "flow_prediction")])
def test_scale_distillation_compares_what_weighs_noise_levels_alike(inner, space, monkeypatch):
    network = ResidualMLP((2,), 8, 1)
    teacher = Denoiser(network, EDM(), "sample", network_process=inner, sigma_data=1.0)
    module = ready(YONOS(teacher, easier=[lambda cond: cond], shape=[2]))
    seen, target = [], YONOS.target
    monkeypatch.setattr(YONOS, "target", lambda self, *args: seen.append(args[-1]) or target(self, *args))
    module.student_loss(Batch(x0=torch.randn(N, 2)))
    assert seen == [space]


def test_a_learned_solver_learns_from_where_it_is_sampled():
    process = VariancePreserving()
    teacher = Denoiser(mlp().network, process, "epsilon", sigma_data=1.0)
    module = ready(LearnedSolver(teacher, num_steps=2, solver_steps=4, shape=[2]))
    begun = []
    module.student.network.register_forward_pre_hook(lambda _module, args: begun.append(args[0]))
    noise = torch.randn(N, 2)
    module.student_loss(Batch(noise=noise, x0=torch.randn(N, 2), size=N))
    first = begun[0]
    begun.clear()
    module.sample(N, noise=noise)
    torch.testing.assert_close(first, begun[0])


def test_slim_flow_says_what_cannot_be_or_comes_too_late():
    with pytest.raises(ValueError, match=r"flip=0\.5 mirrors images"):
        ready(SlimFlow(mlp(), flip=0.5))
    module = ready(SlimFlow(mlp()))
    module._trainer = Trainer(max_steps=10, logger=False, enable_checkpointing=False, barebones=True)
    with pytest.warns(UserWarning, match="annealing_updates asks for 50000 student updates, and the run ends after 10"):
        module.on_fit_start()


def test_defaults_of_weights():
    assert RFPlusPlus(mlp()).time_weight == "one"
    assert RFPlusPlus(mlp(), perceptual=TeacherFeatures(["blocks.0"])).time_weight == "data"
    assert HiPA(mlp()).metric == "mse"


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 16}, 4.0),
        ({"unet.lora_alpha": 16, "unet.r": 4}, 4.0),
        ({"lora_alpha": 16, "use_rslora": True}, 8.0),
        ({"lora_alpha": 16, "alpha_pattern": {"layer": 2}}, 0.5),
    ],
)
def test_the_header_of_a_lora_file_has_its_scale(header, scale, tmp_path):
    down, up = torch.randn(4, 3), torch.randn(5, 4)
    tensors = {"unet.some.layer.lora_A.weight": down, "unet.some.layer.lora_B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(header)} if header else None)
    (change,) = adapter_changes(tmp_path / "lora.safetensors").values()
    torch.testing.assert_close(change, scale * up @ down)
