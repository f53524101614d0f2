"""Networks of several experts: each sample meets its own, students of every method can be one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.methods import DMD2
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import ConditionExperts, Experts, TimeExperts
from lightning_distill.networks.families import FAMILIES, Family, register
from lightning_distill.networks.roles import Lora, averaged_copy
from lightning_distill.networks.small import ResidualMLP, small_unet
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
