"""What every consistency and flow-map method learns of a ring in 400 updates, against the exact map of the teacher."""

from __future__ import annotations

import pytest
import torch
from conftest import fit

from lightning_distill.batch import Batch
from lightning_distill.ema import PowerEMA
from lightning_distill.generation import generate
from lightning_distill.methods import (
    BOOT,
    CMT,
    ECT,
    ICT,
    PCM,
    RCM,
    SCM,
    ConsistencyDistillation,
    FlowMapDistillation,
    FreeFlow,
    MeanFlow,
    ProgressiveDistillation,
    Shortcut,
)
from lightning_distill.networks.analytic import analytic_denoiser, ring
from lightning_distill.networks.roles import Explicit
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import FlowMatching
from lightning_distill.schedules import WarmupDecay

pytestmark = [pytest.mark.learn, pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")]

PROCESS = FlowMatching()
UPDATES = 400


def student(two_times=False, **settings):
    spec = NewDenoiser(lambda: ResidualMLP((2,), 128, 3), PROCESS, "flow_prediction", sigma_data=1.436)
    return TwoTime(Explicit(spec), **settings) if two_times else Explicit(spec)


def two_times(**settings):
    return lambda: student(True, **settings)


ONE_SIDED = {"tangent": "one_sided"}
#: method, settings, learning rate, largest error (about 1.4 times what it was)
CASES = {
CASES_HERE
}


@pytest.fixture(scope="module")
def ring_problem():
    mixture = ring()
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    data = Batch(x0=mixture.sample(50_000, torch.Generator().manual_seed(0))[0])
    return mixture, data, noise, mixture.flow_map(noise, 1.0, 0.0, PROCESS)


def error(samples, ends) -> float:
    """Root mean squared distance to the exact ends of the same noises."""
    return (samples - ends).square().sum(1).mean().sqrt().item()


def distilled(ring_problem, method, settings, lr, updates=UPDATES, batch_size=256):
    mixture, data, _, _ = ring_problem
    torch.manual_seed(0)

    def optimizer(parameters):
        return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99), fused=True)

    def decay(optimizer):
        return WarmupDecay(optimizer, 20, updates, "linear", decay_start=updates // 3, final=0.02)

    made = {k: v() if callable(v) else v for k, v in settings.items()}
    module = method(
        analytic_denoiser(mixture, PROCESS),
        **{"student": student(), "student_optimizer": optimizer, "student_scheduler": decay, **made},
        ema=[PowerEMA(0.05)],
        check_data=False,
    )
    fit(module, updates, data, batch_size)
    return module


def learned(name, ring_problem):
    method, settings, lr, _ = CASES[name]
    _, _, noise, ends = ring_problem
    module = distilled(ring_problem, method, settings, lr, batch_size=64 if method is CMT else 256)
    return error(module.sample(len(noise), noise=noise), ends), module


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in CASES])
def test_one_step_is_near_the_end_of_the_trajectory(name, ring_problem):
    found, module = learned(name, ring_problem)
    print(f"{name}: {found:.3f}")
    assert found < CASES[name][3]
    mixture, _, noise, ends = ring_problem
    teacher = analytic_denoiser(mixture, PROCESS)
    if len(module.student_times) == 1:
        euler = error(generate(teacher, noise, {}, [1.0, 0.5], "ode"), ends)
        assert found < 1.1 * euler  # the teacher's own two steps


def test_a_flow_map_is_as_good_in_several_steps(ring_problem):
    _, module = learned("lagrangian", ring_problem)
    _, _, noise, ends = ring_problem
    one, four = (error(module.sample(1000, noise=noise, num_steps=n), ends) for n in (1, 4))
    print(f"lagrangian: {one:.3f} {four:.3f}")
    assert four < one
    assert one > 3.0 * error(module.sample(1000, noise=noise, num_steps=64), ends) or four < 0.12
