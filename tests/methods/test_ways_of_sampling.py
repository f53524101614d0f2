"""A student is sampled as it was trained, whatever its teacher was trained for."""

from dataclasses import replace

import pytest
import torch
from small_problems import mlp, ready
from torch import nn

from lightning_distill.batch import Batch
from lightning_distill.guidance import Guidance
from lightning_distill.methods import DMD2, LADD, ConsistencyDistillation, LearnedSolver, MeanFlow, SiD
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families.base import PLAIN
from lightning_distill.networks.roles import Lora
from lightning_distill.processes import FlowMatching

GAN = Adversary(taps=["layers.0"], features="teacher")


class TwoTimes(nn.Module):
    """A network with a target time of its own, which is t where none is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 2))
        self.jumps = []

    def forward(self, x, t, r=None):
        r = t if r is None else r
        self.jumps.append(float((t - r).abs().max()))
        return self.layers(torch.cat([x, t[:, None].to(x), r[:, None].to(x)], 1))


def teacher(required=False, jumps=False):
    made = Denoiser(TwoTimes(), FlowMatching(), "flow_prediction", family=replace(PLAIN, needs_target=required))
    made.jumps = jumps
    return made


def longest(module, act):
    module.student.network.jumps.clear()
    act()
    return max(module.student.network.jumps)


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("jumps", [False, True])
@pytest.mark.parametrize(
    ("method", "settings"), [(DMD2, {}), (SiD, {}), (LADD, {"gan": GAN}), (ConsistencyDistillation, {})]
)
def test_methods_of_one_time_sample_at_the_target_time_they_train(method, settings, jumps, required):
    module = ready(method(teacher(required, jumps), num_steps=2, shape=[2], ema=[], **settings))
    batch = Batch(x0=torch.randn(4, 2))
    assert longest(module, lambda: module.student_loss(batch)) == 0.0
    assert longest(module, lambda: module.sample(4)) == 0.0
    noise = torch.randn(4, 2)
    want = module.student(noise, torch.ones(4).double()).x0
    torch.testing.assert_close(module.sample(4, num_steps=1, noise=noise), want)


@pytest.mark.parametrize("required", [False, True])
def test_flow_maps_jump(required):
    module = ready(MeanFlow(teacher(required), num_steps=1, shape=[2]))
    average = module.sampling_network().network
    module.sample(4)
    assert max(average.jumps) == 1.0


@pytest.mark.parametrize("role", [None, Lora(rank=2, target_modules=["inner"])], ids=["copy", "lora"])
def test_guidance_of_a_teachers_sampling_is_not_the_students(role):
    first = LearnedSolver(mlp(3), num_steps=2, guidance=Guidance(3.0), solver_steps=4)
    first.configure_model()
    source = first.sampling_network()
    assert source.sampling_guidance is not None
    module = ready(DMD2(source, student=role, num_steps=1, guidance=Guidance(3.0)))
    cond = {"class_labels": torch.arange(4) % 3}
    noise = torch.randn(4, 2)
    want = module.student(noise, torch.ones(4).double(), cond).x0
    torch.testing.assert_close(module.sample(4, cond, noise=noise), want)
    assert source.sampling_guidance is not None


@pytest.mark.parametrize("number", [None, 0, -1])
def test_no_steps_are_refused_in_words(number):
    with pytest.raises(ValueError, match=f"num_steps={number}: a student needs at least one step"):
        DMD2(mlp(), num_steps=number)
