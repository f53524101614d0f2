"""What every consistency and flow-map method learns of a ring in 400 updates, against the exact map of the teacher."""

from __future__ import annotations

import pytest
import torch
from conftest import fit
from sampling_of_cases import long, slow

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
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein
from lightning_distill.networks.analytic import analytic_denoiser, ring
from lightning_distill.networks.roles import Explicit
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.processes import FlowMatching
from lightning_distill.schedules import WarmupDecay
from lightning_distill.times import LogNormal

pytestmark = [pytest.mark.learn, pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")]

PROCESS = FlowMatching()
UPDATES = 400


def student(two_times=False, **settings):
    spec = NewDenoiser(lambda: ResidualMLP((2,), 128, 3), PROCESS, "flow_prediction", sigma_data=1.436)
    return TwoTime(Explicit(spec), **settings) if two_times else Explicit(spec)


def two_times(**settings):
    return lambda: student(True, **settings)


#: of pairs on even grids, see ``losses.consistency.pair_weight``
EVEN = {"weight": "inverse_c_out2", "metric": "mse"}
ONE_SIDED = {"tangent": "one_sided"}
#: run by ``make test`` and by CI; the others by ``make matrix``
FAST, LONG = ("ect",), ("scm", "semigroup", "shortcut")
#: method, settings, learning rate, largest error (about 1.4 times what it was)
CASES = {
    "consistency_distillation": (ConsistencyDistillation, {"intervals": 12, **EVEN}, 2e-3, 0.24),
    "ict": (
        ICT,
        {"total_updates": UPDATES, "first_intervals": 4, "last_intervals": 32},
        2e-3,
        0.5,
    ),
    "ect": (ECT, {"stage_updates": UPDATES // 5}, 2e-3, 0.42),
    "pcm": (PCM, {"num_steps": 2, "intervals": 16, "solver": "heun", **EVEN}, 2e-3, 0.18),
    "progressive": (ProgressiveDistillation, {"stages": 5, "stage_updates": UPDATES // 5}, 2e-3, 0.45),
    "scm": (SCM, {"times": LogNormal(-1.0, 1.4), "warmup_updates": 100, **ONE_SIDED}, 2e-3, 0.65),
    "mean_flow": (MeanFlow, {"student": two_times(), "power": 0.0, **ONE_SIDED}, 1e-3, 0.6),
    "lagrangian": (FlowMapDistillation, {"student": two_times(), **ONE_SIDED}, 2e-3, 0.17),
    "eulerian": (
        FlowMapDistillation,
        {"student": two_times(), "objective": "eulerian", **ONE_SIDED},
        5e-4,
        0.55,
    ),
    "semigroup": (FlowMapDistillation, {"student": two_times(), "objective": "progressive"}, 2e-3, 0.4),
    "shortcut": (
        Shortcut,
        {"student": two_times(input="difference"), "most_steps": 32, "equal_share": 0.5},
        2e-3,
        0.24,
    ),
    "free_flow": (FreeFlow, {"student": two_times(), **ONE_SIDED}, 5e-4, 0.7),
    "boot": (BOOT, {"student": two_times()}, 2e-3, 0.42),
    "cmt": (CMT, {"solver_steps": 12}, 2e-3, 0.17),
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


@pytest.mark.parametrize("name", [n if n in FAST else long(n) if n in LONG else slow(n) for n in CASES])
def test_one_step_is_near_the_end_of_the_trajectory(name, ring_problem):
    found, module = learned(name, ring_problem)
    print(f"{name}: {found:.3f}")
    assert found < CASES[name][3]
    mixture, _, noise, ends = ring_problem
    teacher = analytic_denoiser(mixture, PROCESS)
    if len(module.student_times) == 1:
        euler = error(generate(teacher, noise, {}, [1.0, 0.5], "ode"), ends)
        assert found < euler  # the teacher's own two steps


@pytest.mark.slow
def test_a_flow_map_is_better_in_several_steps(ring_problem):
    one, module = learned("lagrangian", ring_problem)
    _, _, noise, ends = ring_problem
    four = error(module.sample(1000, noise=noise, num_steps=4), ends)
    print(f"lagrangian: {one:.3f} in one step, {four:.3f} in four")
    assert four < 0.9 * one


@pytest.mark.slow
def test_score_regularised_consistency_has_the_distribution(ring_problem):
    """rCM's second term moves samples along the scores, so that the distribution is the measure, not the end points."""
    mixture, _, noise, _ = ring_problem

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=2e-3, betas=(0.0, 0.99), fused=True)

    settings = {
        "fake_score": student,
        "fake_score_steps": 1,
        "fake_score_optimizer": lambda: adam,
        "times": LogNormal(-0.4, 1.6),
        "prior_weight": "trig",
        "loss_weights": {"student/consistency": 1.0},
        "warmup_updates": 100,
        "matching_from": 100,
    }
    module = distilled(ring_problem, RCM, {**settings, **ONE_SIDED}, 2e-3)
    reference = mixture.sample(1000, torch.Generator().manual_seed(7))[0]
    teacher = analytic_denoiser(mixture, PROCESS)
    two = sliced_wasserstein(generate(teacher, noise, {}, [1.0, 0.5], "ode"), reference)
    found = sliced_wasserstein(module.sample(1000, noise=noise), reference)
    print(f"rcm: {found:.3f}, the teacher in two steps {two:.3f}")
    assert found < 0.6 * two
