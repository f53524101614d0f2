"""What SANA-Sprint learns of a ring, and that its relatives do not learn from targets that are wrong."""

from __future__ import annotations

import pytest
import torch
from test_trajectory_learning import (
    ONE_SIDED,
    PROCESS,
    distilled,
    error,
    ring_problem,  # noqa: F401  (a fixture)
    student,
    two_times,
)

from lightning_distill.batch import Batch
from lightning_distill.generation import generate
from lightning_distill.methods import APEX, TBCM, AnyFlow, SANASprint, TwinFlow
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.analytic import analytic_denoiser, ring
from lightning_distill.networks.roles import Explicit
from lightning_distill.networks.small import ResidualMLP
from lightning_distill.networks.specs import NewDenoiser
from lightning_distill.networks.two_time import TwoTime
from lightning_distill.times import LogNormal, Uniform

pytestmark = [pytest.mark.learn, pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")]

METHODS = "lightning_distill.methods"


# ------------------------------------------------------------------------------------------------ SANA-Sprint
def heads(parameters):
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.0, 0.99), fused=True)


def sprint(ring_problem, **weights):  # noqa: F811
    """Distances of one step: to the ends of the trajectories, and of the distributions."""
    settings = {
        "student": student,
        "gan": lambda: Adversary(taps=["input"], width=32, kind="hinge", features="teacher"),
        "times": LogNormal(-1.0, 1.4),
        "warmup_updates": 80,
        "constant": 0.1,
        "discriminator_optimizer": lambda: heads,
        "loss_weights": {f"student/{name}": weight for name, weight in {"gan": 0.25, **weights}.items()},
        **ONE_SIDED,
    }
    module = distilled(ring_problem, SANASprint, settings, 2e-3, updates=300)
    mixture, _, noise, ends = ring_problem
    made, reference = module.sample(len(noise), noise=noise), mixture.sample(1000, torch.Generator().manual_seed(7))[0]
    found = error(made, ends), sliced_wasserstein(made, reference)
    print(f"sana_sprint {weights}: {found[0]:.3f}, {found[1]:.3f}")
    return found


@pytest.mark.long
def test_a_sprint_of_one_step_beats_two_of_the_teacher(ring_problem):  # noqa: F811
    mixture, _, noise, ends = ring_problem
    two = generate(analytic_denoiser(mixture, PROCESS), noise, {}, [1.0, 0.5], "ode")
    reference = mixture.sample(1000, torch.Generator().manual_seed(7))[0]
    end, distribution = sprint(ring_problem)
    assert end < error(two, ends)
    assert distribution < 0.85 * sliced_wasserstein(two, reference)


@pytest.mark.slow
def test_the_game_alone_knows_no_trajectories(ring_problem):  # noqa: F811
    both, alone = sprint(ring_problem), sprint(ring_problem, consistency=0.0)
    assert alone[0] > 1.5 * both[0]


# ------------------------------------------------------------------------------------------------ controls
def turn_round(monkeypatch, module, name, position):
    """A target function whose argument at a position has the other sign."""
    import importlib

    right = getattr(importlib.import_module(f"{METHODS}.{module}"), name)

    def wrong(*args, **kwargs):
        return right(*args[:position], -args[position], *args[position + 1 :], **kwargs)

    monkeypatch.setattr(f"{METHODS}.{module}.{name}", wrong)


#: method, settings, learning rate, and the argument of its target that is turned round: the student's derivative, or
#: the direction of the first step
CONTROLS = {
    "tbcm": (
        TBCM,
        {"solver_steps": 4, "times": LogNormal(-1.0, 1.4), "warmup_updates": 50, **ONE_SIDED},
        1e-3,
        ("scm", "scm_tangent", 4),
    ),
    "any_flow": (
        AnyFlow,
        {
            "student": two_times(kind="gated_copy"),
            "training_times": Uniform(0.0, 1.0),
            "from_data": False,
            "balance": False,
            "tangent": "one_sided",
        },
        1e-3,
        ("mean_flow", "mean_flow_target", 1),
    ),
    "twin_flow": (
        TwinFlow,
        {"student": two_times(kind="scaled_difference"), "from_data": False, "robust": None, "clamp": None},
        2e-3,
        ("twin_flow", "rcgm_target", 3),
    ),
    "apex": (
        APEX,
        {
            "student": lambda: TwoTime(
                Explicit(
                    NewDenoiser(
                        lambda: ResidualMLP((2,), 128, 3, num_classes=4), PROCESS, "flow_prediction", sigma_data=1.436
                    )
                ),
                kind="scaled_difference",
            ),
            "from_data": False,
            "robust": None,
            "clamp": None,
            "order": 1,
        },
        2e-3,
        ("twin_flow", "rcgm_target", 3),
    ),
}


def labelled(noise):
    """Four labelled modes, half of the labels dropped."""
    mixture = ring(4, labelled=True)
    x0, labels = mixture.sample(20_000, torch.Generator().manual_seed(0))
    drop = torch.arange(len(labels)) % 2 == 0
    data = Batch(x0=x0, cond={"class_labels": torch.where(drop, 4, labels)})
    return mixture, data, noise, mixture.flow_map(noise, 1.0, 0.0, PROCESS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
def test_a_target_turned_round_is_not_learned(name, ring_problem, monkeypatch):  # noqa: F811
    method, settings, lr, turned = CONTROLS[name]
    problem = labelled(ring_problem[2]) if method is APEX else ring_problem
    cond = {"class_labels": torch.full((1000,), 4)} if method is APEX else None

    # before that TwinFlow's one step is not better than with a wrong map
    length = {"updates": 400, "batch_size": 256} if method is TwinFlow else {"updates": 150, "batch_size": 128}

    def learned():
        module = distilled(problem, method, settings, lr, **length)
        return error(module.sample(1000, cond, noise=problem[2]), problem[3])

    right = learned()
    turn_round(monkeypatch, *turned)
    wrong = learned()
    print(f"{name} after {length['updates']} updates: {right:.3f}, turned round {wrong:.3f}")
    assert right < 0.8 * wrong
