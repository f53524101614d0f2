"""Networks of several experts: each sample meets its own, students of every method can be one."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import tiny_pipelines
import torch
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.generation import default_cond, needed_conditions
from lightning_distill.methods import DMD2
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import ConditionExperts, Experts, PromptExperts, TimeExperts, experts_at
from lightning_distill.networks.families import FAMILIES, Family, register
from lightning_distill.networks.prompt_groups import prompt_features
from lightning_distill.networks.roles import Copy, Lora, averaged_copy
from lightning_distill.networks.small import ResidualMLP, small_unet
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.parameterisations import takes_target
from lightning_distill.processes import EDM, FlowMatching, TrigFlow
from lightning_distill.randomness import Draws


class Flipped(ResidualMLP):
    """Is told a time that grows towards data."""


@pytest.fixture(autouse=True)
def _family():
    register(Family("Flipped", time="network", time_flip=True, cond_keys=("class_labels",)))
    yield
    FAMILIES.pop("Flipped")


def mlp(kind=ResidualMLP, classes=0, process=None, network_process=None, prediction="flow_prediction"):
    torch.manual_seed(0)
    network = kind((2,), width=8, depth=2, num_classes=classes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Denoiser(network, process or FlowMatching(), prediction, network_process=network_process, sigma_data=1.1)


def different(denoiser):
    """Experts that differ, and single denoisers of each."""
    singles = []
    with torch.no_grad():
        for k, expert in enumerate(denoiser.network.experts):
            for parameter in expert.parameters():
                parameter.add_(0.2 * (k + 1))
    for expert in denoiser.network.experts:
        single = mlp(
            type(expert),
            getattr(expert, "num_classes", 0),
            denoiser.process,
            denoiser.network_process,
            denoiser.prediction_type,
        )
        single.network.load_state_dict(expert.state_dict())
        singles.append(single)
    return singles


TEACHERS = {
    "flow": lambda: mlp(),
    "flipped": lambda: mlp(Flipped),
    "edm": lambda: mlp(process=EDM(0.02, 10.0), network_process=TrigFlow(), prediction="v_prediction"),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_each_time_meets_its_expert(name):
    teacher = TEACHERS[name]()
    student = Experts(boundaries=[0.6, 0.2]).build(teacher, "student")
    assert isinstance(student.network, TimeExperts)
    top = teacher.process.t_max
    t = torch.tensor([1.0, 0.61, 0.6, 0.59, 0.21, 0.2, 0.19, 0.05], dtype=torch.float64) * top
    x = torch.randn(8, 2)
    torch.testing.assert_close(student(x, t).x0, teacher(x, t).x0, atol=1e-6, rtol=0)
    singles = different(student)
    got = student(x, t).x0
    for row, k in enumerate([0, 0, 0, 1, 1, 1, 2, 2]):
        torch.testing.assert_close(got[row : row + 1], singles[k](x[row : row + 1], t[row : row + 1]).x0)
    calls = []
    for k, expert in enumerate(student.network.experts):
        expert.register_forward_hook(lambda *_args, k=k: calls.append(k))
    student(x, torch.tensor(0.4 * top, dtype=torch.float64))
    assert calls == [1]


@pytest.mark.parametrize("t", [15 / 16, 5 / 6, 5 / 8])
def test_a_boundary_belongs_to_the_noisier_side_however_times_are_rounded(t):
    """Pipelines send t >= boundary there, and networks are told t in float32, here from 0 to 1000."""
    teacher = mlp(process=FlowMatching(5.0))
    teacher.family = replace(teacher.family, time="network")
    student = Experts(boundaries=[t]).build(teacher, "student")
    at = torch.tensor([t, t - 1e-4], dtype=torch.float64)
    told = student._cast_time(at, torch.zeros(2, 2), torch.float32)
    assert float(told[0]) == pytest.approx(1000 * t)
    assert student.network.route(torch.zeros(2, 2), told, {}).tolist() == [0, 1]
    assert experts_at(student, at.tolist()) == [0, 1]


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_blocks_of_experts_are_not_tapped(features):
    """A block of one expert has the features of its own samples only."""
    role = Experts(boundaries=[0.5])
    experts = {"fake_score": role} if features == "fake_score" else {"teacher": role.build(mlp(), "teacher")}
    settings = {"teacher": mlp(), "ema": [], **experts}
    with pytest.raises(ValueError, match="divides the samples of a call between 2 networks"):
        DMD2(gan=Adversary(taps=["blocks.0"], features=features), **settings).configure_model()
    DMD2(gan=Adversary(taps=["input"], features=features), **settings).configure_model()


def test_each_class_meets_its_expert():
    teacher = mlp(classes=4)
    student = Experts(classes=[[0, 3], [1, 2]]).build(teacher, "student")
    assert isinstance(student.network, ConditionExperts)
    assert student.num_classes == 4
    singles, x, t = different(student), torch.randn(5, 2), torch.rand(5).double()
    labels = torch.tensor([0, 1, 2, 3, 4])
    got = student(x, t, {"class_labels": labels}).x0
    for row, k in enumerate([0, 1, 1, 0, 0]):
        want = singles[k](x[row : row + 1], t[row : row + 1], {"class_labels": labels[row : row + 1]}).x0
        torch.testing.assert_close(got[row : row + 1], want)


@pytest.mark.parametrize(("count", "owners"), [(1, [0, 0, 0, 0, 0]), (2, [0, 0, 1, 1, 0]), (3, [0, 1, 2, 2, 0])])
def test_a_number_of_experts_shares_out_the_classes(count, owners):
    network = Experts(classes=count).build(mlp(classes=4), "student").network
    assert len(network.experts) == count
    assert network.groups.tolist() == owners


def test_only_the_expert_in_charge_learns():
    module = DMD2(mlp(), student=Experts(boundaries=[0.7]), num_steps=2, ema=[])
    module.configure_model()
    for update in range(8):
        module.draws = Draws(module.streams, update, 0, "student0")
        module._rollouts.clear()
        module.student.zero_grad()
        x = module.rollout(Batch(size=4))
        x.x0.sum().backward()
        learned = [any(p.grad is not None for p in e.parameters()) for e in module.student.network.experts]
        assert learned == [x.step == 0, x.step == 1]


def test_averages_and_state_hold_all_experts():
    student = Experts(boundaries=[0.5]).build(mlp(), "student")
    average = averaged_copy(student, "ema")
    assert isinstance(average.network, TimeExperts)
    assert average.network is not student.network
    names = [n for n, _ in student.named_parameters()]
    assert names == [n for n, _ in average.named_parameters()]
    assert {n.split(".")[2] for n in names} == {"0", "1"}
    x, t = torch.randn(3, 2), torch.tensor([0.9, 0.5, 0.1]).double()
    torch.testing.assert_close(average(x, t).x0, student(x, t).x0)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize("name", ["flux", "flux2", "z_image", "qwen_image", "cogvideox"])
def test_what_all_samples_share_is_not_divided(name):
    tiny = getattr(tiny_pipelines, name)()
    teacher = tiny.denoiser()
    student = Experts(boundaries=[0.5]).build(teacher, "student").eval()
    # as many samples as tokens of the picture, whose position ids are then as many
    for n in (math.prod(tiny.shape[-2:]) // (1 if name == "flux2" else 4), 5):
        x, t, cond = torch.randn(n, *tiny.shape), torch.linspace(0.9, 0.2, n, dtype=torch.float64), tiny.cond(n)
        with torch.no_grad():
            torch.testing.assert_close(student(x, t, cond).x0, teacher(x, t, cond).x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "sd3"])
def test_prompts_are_grouped_in_a_call_as_they_are_in_the_store(name):
    tiny = getattr(tiny_pipelines, name)()
    teacher, cond = tiny.denoiser(), tiny.cond(4)
    tokens = torch.randn_like(cond["encoder_hidden_states"])
    cond["encoder_hidden_states"] = tokens
    if "encoder_attention_mask" in cond:  # padding has embeddings too, and counts for nothing
        cond["encoder_attention_mask"] = (
            torch.arange(tokens.shape[1]).expand(4, -1) < torch.tensor([2, 1, 2, 1])[:, None]
        )
    features = prompt_features(cond)
    experts = [teacher.network, *(copy.deepcopy(teacher.network) for _ in range(3))]
    teacher.network, calls = PromptExperts(experts, features), []
    for k, expert in enumerate(experts):
        expert.register_forward_pre_hook(lambda *_, k=k: calls.append(k))
    chosen = torch.tensor([2, 0])
    part = {key: value[chosen] for key, value in cond.items()}
    with torch.no_grad():
        teacher(torch.randn(2, *tiny.shape), torch.tensor([0.9, 0.2]).double(), part)
    assert calls == [0, 2]


def test_conditions_are_divided_by_their_rows_alone():
    experts = Experts(boundaries=[0.5]).build(mlp(), "student").network
    seen = []
    for expert in experts.experts:
        expert.forward = lambda x, t, **given: seen.append(given) or x
    x, t = torch.arange(3.0)[:, None].expand(3, 2), torch.tensor([0.9, 0.1, 0.8])
    labels, scalar = torch.arange(3), torch.tensor(2.0)
    given = {"labels": labels, "scale": scalar, "rows": [x[i] for i in range(3)], "other": [1, 2]}
    assert torch.equal(experts(x, t, **given, nested={"labels": labels}), x)
    first, second = seen
    assert first["labels"].tolist() == first["nested"]["labels"].tolist() == [0, 2]
    assert second["labels"].tolist() == [1]
    assert all(call["scale"] is scalar and call["other"] == [1, 2] for call in seen)
    assert [len(call["rows"]) for call in seen] == [2, 1]
    assert torch.equal(second["rows"][0], x[1])


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_experts_are_told_a_guidance_scale_as_their_networks_are(name):
    tiny = getattr(tiny_pipelines, name)()
    role = Copy() if name == "flux" else TwoTime(kind=None, guidance=True)
    single, student = role.build(tiny.denoiser(), "one"), Experts(boundaries=[0.5], role=role).build(tiny.denoiser())
    assert single.embeds_guidance
    assert student.embeds_guidance
    assert not takes_target(student)
    if name == "sd15":  # as training could leave them
        with torch.no_grad():
            for network in (single.network, *student.network.experts):
                network.time_embedding.cond_proj.weight.fill_(0.05)
    x, t, cond = torch.randn(2, *tiny.shape), torch.tensor([0.9, 0.2]).double(), tiny.cond(2)
    with torch.no_grad():
        told = [student(x, t, cond, guidance=torch.tensor([w, w])).x0 for w in (2.0, 7.0)]
        alone = single(x, t, cond, guidance=torch.tensor([7.0, 7.0])).x0
    assert not torch.allclose(*told)
    torch.testing.assert_close(told[1], alone, atol=1e-4, rtol=1e-4)


def test_experts_know_the_times_and_conditions_of_their_networks():
    class Asking(nn.Linear):
        def forward(self, x, t, low, r=None):
            return super().forward(x) + low

    teacher = Denoiser(Asking(2, 2), FlowMatching(), "flow_prediction")
    student = Experts(boundaries=[0.5]).build(teacher, "student")
    assert takes_target(student)
    assert needed_conditions(student) == needed_conditions(teacher) == ["low"]
    assert not student.embeds_guidance


def test_an_expert_may_have_an_attribute_of_the_name():
    class Named(nn.Linear):
        boundaries = groups = "its own"

        def forward(self, x, t):
            return super().forward(x)

    student = Experts(boundaries=[0.5]).build(Denoiser(Named(2, 2), FlowMatching(), "flow_prediction"), "student")
    assert experts_at(student, [0.9, 0.2]) == [0, 1]
    assert student.network.groups == "its own"


def test_models_of_diffusers_are_experts_too():
    network = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    teacher = Denoiser(network, FlowMatching(), "flow_prediction").eval()
    student = Experts(boundaries=[0.5]).build(teacher, "student")
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.9, 0.5, 0.1]).double()
    torch.testing.assert_close(student(x, t).x0, teacher(x, t).x0, atol=1e-5, rtol=0)
    assert student.sample_shape == teacher.sample_shape
    assert student.network.config.sample_size == 8


def test_bad_input():
    def refused(message, teacher=None, **settings):
        with pytest.raises(ValueError, match=message):
            Experts(**settings).build(teacher or mlp(), "student")

    refused("needs one of boundaries")
    refused("needs one of boundaries", boundaries=[0.5], classes=[[0]])
    refused("fall strictly between 1 and 0", boundaries=[0.2, 0.5])
    refused("fall strictly between 1 and 0", boundaries=[1.0])
    refused("belongs to exactly one expert", classes=[[0, 1], [1]])
    refused("names 3 classes, but ResidualMLP has 4", mlp(classes=4), classes=[[0, 1], [2]])
    refused("networks of their own", boundaries=[0.5], role=Lora(rank=2))


def test_experts_are_given_the_conditions_of_their_networks():
    """Planning and shapes ask for them without data."""
    teacher = tiny_pipelines.MAKERS["wan"]().denoiser()
    student = Experts(boundaries=[0.9]).build(teacher, "student")
    made, own = default_cond(teacher, 2), default_cond(student, 2)
    assert set(own) == set(made)
    assert all(own[key].shape == made[key].shape for key in made)
    with pytest.raises(ValueError, match=r"give Experts\(role=TwoTime"):
        TwoTime(Experts(boundaries=[0.5])).build(mlp(), "student")
