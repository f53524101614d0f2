"""Two-time students where students are sampled: one path for samples, evaluation and export."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact_students import F64, FLOW, MIXTURE, Exact, ExactAverage
from small_problems import mlp, ready, shift

from lightning_distill.evaluation.sampling import sample_many
from lightning_distill.export.cards import student_config
from lightning_distill.export.stock import stock_parts
from lightning_distill.generation import bound, generate
from lightning_distill.methods import CMT, DMD2, FlowMapDistillation, MeanFlow, SnapFlow
from lightning_distill.networks.analytic import analytic_denoiser
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families.base import PLAIN
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.second_time import add_second_time
from lightning_distill.networks.small import small_unet
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.parameterisations import TrajectoryMap, takes_target
from lightning_distill.samplers import flow_map


def exact_student():
    student = Exact(ExactAverage(), "flow_prediction").build(analytic_denoiser(MIXTURE, FLOW))
    student.jumps = True
    return student


def test_a_target_time_is_found_wherever_it_comes_from():
    assert takes_target(exact_student())  # an argument of the network
    plain, two = mlp(), mlp()
    assert not takes_target(plain)
    add_second_time(two.network)
    assert takes_target(two)
    assert not two.embeds_guidance
    told = TwoTime(Copy(), kind=None, guidance=True).build(plain)
    assert not takes_target(told)
    assert told.embeds_guidance
    assert not exact_student().embeds_guidance


@pytest.mark.parametrize("sampler", ["flow_map", "renoise"])
def test_all_paths_make_the_same_jumps(sampler):
    student = exact_student()
    noise = torch.randn(5, 2, dtype=F64)
    end = MIXTURE.flow_map(noise, 1.0, 0.0, FLOW)
    torch.testing.assert_close(generate(student, noise, {}, [1.0], sampler), end, rtol=0, atol=1e-7)
    many, _ = sample_many(student, 5, [1.0, 0.5], sampler, 3, shape=(2,))
    assert many.shape == (5, 2)
    if sampler == "flow_map":
        again, _ = sample_many(student, 5, [1.0, 0.75, 0.5, 0.25], sampler, 3, shape=(2,), batch_size=2)
        torch.testing.assert_close(again, many, rtol=0, atol=1e-5)
        want = flow_map(TrajectoryMap(student), noise, [1.0, 0.5], FLOW)
        torch.testing.assert_close(generate(student, noise, {}, [1.0, 0.5], sampler, batch_size=2), want)
    student.jumps = False  # not trained to: what it predicts at r = t
    made, t = generate(student, noise, {}, [1.0], sampler), torch.ones(5, dtype=F64)
    there = end if sampler == "flow_map" else student(noise, t, {}).x0
    torch.testing.assert_close(made, there, rtol=0, atol=1e-7)


def test_a_flow_map_needs_its_target_time_and_no_further_guidance():
    with pytest.raises(ValueError, match=r"this ResidualMLP takes one time; use 'renoise' or 'ode'"):
        generate(mlp(), torch.randn(2, 2), {}, [1.0], "flow_map")
    with pytest.raises(ValueError, match=r"guidance_scale=2 has no meaning for the flow map"):
        bound(exact_student(), {}, "flow_map", 2.0)
    with pytest.raises(ValueError, match="choose renoise or ode"):
        DMD2(mlp(), sampler="flow_map")


def test_the_average_is_sampled_as_the_student_is():
    module = ready(MeanFlow(mlp(), num_steps=2))
    shift(module.student)
    noise = torch.randn(4, 2)
    x = noise
    for t, r in ((1.0, 0.5), (0.5, 0.0)):
        x = x - (t - r) * module.student(x, torch.tensor(t), r=torch.tensor(r)).raw
    torch.testing.assert_close(module.sample(4, noise=noise, weights="student"), x.detach())
    assert not torch.equal(module.sample(4, noise=noise), x)
    assert takes_target(module.sampling_network())


def test_stock_pipelines_refuse_a_second_time_and_cards_record_it():
    network = small_unet(8, 1, 0, (8, 16), norm_num_groups=4, attention_head_dim=8)
    add_second_time(network, input="difference")
    with pytest.raises(ValueError, match="which no stock pipeline fills"):
        stock_parts(network, FLOW, "flow_prediction", [1.0], "flow_map", None, None)
    config = student_config(network, FLOW, "flow_prediction", [1.0], "flow_map", None, None)
    assert config["sampler"] == "flow_map"
    assert config["second_time"]["add_second_time"]["input"] == "difference"
    plain = student_config(mlp().network, FLOW, "flow_prediction", [1.0], "ode", None, None)
    assert "second_time" not in plain


def test_the_teacher_of_a_shared_backbone_is_sampled_as_before():
    """The branch of the student is in the teacher's network, where it must change nothing."""
    teacher = mlp()
    noise = torch.randn(6, 2)
    want = generate(teacher, noise, {}, [1.0, 0.5], "ode")
    add_second_time(teacher.network)
    torch.testing.assert_close(generate(teacher, noise, {}, [1.0, 0.5], "ode"), want, rtol=0, atol=0)
    module = ready(FlowMapDistillation(mlp()))
    assert not takes_target(module.teacher)


class OfTwoTimes(torch.nn.Module):
    """A network that is made to take a target time, and of one time where that is the other."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(4, 32), torch.nn.Linear(32, 2)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.5)

    def forward(self, x, t, r):
        return self.outer(self.inner(torch.cat([x, torch.stack([t, t - r], 1).to(x)], 1)).tanh())


@pytest.mark.parametrize("role", [Copy(), Lora(rank=2)], ids=["copy", "lora"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [(SnapFlow, {}), (MeanFlow, {"sampler": "renoise"}), (CMT, {"form": "flow_map", "sampler": "renoise"})],
    ids=["snap_flow", "mean_flow", "cmt"],
)
def test_averages_jump_as_students_do(method, settings, role):
    """Also adapters' averages, on networks that have a target time of their own."""
    family = replace(PLAIN, target_time="r", needs_target=True)
    torch.manual_seed(0)
    teacher = Denoiser(OfTwoTimes(), FLOW, "flow_prediction", family=family)
    module = ready(method(teacher, student=role, shape=[2], **settings))
    noise, ones = torch.randn(16, 2), torch.ones(16, dtype=F64)
    with torch.no_grad():
        jump = noise - module.student(noise, ones, r=torch.zeros_like(ones)).flow_prediction
    for weights in (None, "student"):
        torch.testing.assert_close(module.sample(16, noise=noise, weights=weights), jump)
