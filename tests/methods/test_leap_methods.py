"""SnapFlow: zeros, orders, shares, what it learns, messages."""

from __future__ import annotations

import pytest
import torch
from exact_students import COV, F64, FLOW, MEAN, MIXTURE, data, exact_module, loss_and_slope
from small_problems import mlp, ready
from test_trajectory_learning import distilled, error, ring_problem, two_times  # noqa: F401  (a fixture)

from lightning_distill.generation import generate
from lightning_distill.losses.flow_maps import euler_slope
from lightning_distill.methods import SnapFlow
from lightning_distill.networks.analytic import analytic_denoiser, gaussian_flow_map


# ------------------------------------------------------------------------------------------------ SnapFlow
def test_two_steps_of_a_linear_flow():
    """v = a x: x - t/2 a x, then half the time later: slope a x (1 - a t / 4)."""
    x, t, a = torch.randn(5, 2, dtype=F64), torch.linspace(0.2, 1.0, 5, dtype=F64), 0.7
    seen = []

    def velocity(y, s):
        seen.append(s)
        return a * y

    found = euler_slope(velocity, x, t)
    torch.testing.assert_close(found, a * x * (1 - a * t / 4)[:, None])
    torch.testing.assert_close(torch.stack(seen), torch.stack([t, t / 2]))
    torch.testing.assert_close(euler_slope(velocity, x, t, 1), a * x)


def test_many_steps_are_the_average_velocity():
    x, t = torch.randn(6, 2, dtype=F64), torch.linspace(0.3, 1.0, 6, dtype=F64)
    want = (x - end_of(x, t)) / t[:, None]
    errors = [
        float((euler_slope(lambda y, s: MIXTURE.velocity(y, s, FLOW), x, t, n) - want).abs().max()) for n in (32, 64)
    ]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)
    leaf = torch.randn(2, dtype=F64, requires_grad=True)
    assert not euler_slope(lambda y, s: leaf * y, x, t).requires_grad


def end_of(x, t):
    return gaussian_flow_map(MEAN, COV, x, t, torch.zeros_like(t), FLOW)


def test_the_exact_map_has_no_loss_but_that_of_its_steps():
    def losses(steps, fault=0.0, **settings):
        module = exact_module(SnapFlow, two_times=True, fault=fault, euler_steps=steps, from_data=False, **settings)
        _, slope, terms = loss_and_slope(module, data())
        return {name: float(value.detach()) for name, value in terms.losses.items()} | {"slope": slope}

    few, many = losses(16), losses(32)
    assert few["flow"] < 1e-12
    assert few["shortcut"] / many["shortcut"] == pytest.approx(4.0, rel=0.15)
    assert many["shortcut"] < 1e-3
    spoilt = losses(32, 0.1)
    assert spoilt["flow"] > 1e-3
    assert spoilt["slope"] > 10 * abs(many["slope"])


def test_velocities_of_pairs_are_right_in_the_mean_alone():
    module = exact_module(SnapFlow, two_times=True, euler_steps=32, shortcut_share=0.25)
    _, slope, terms = loss_and_slope(module, data(20_000))
    _, away, _ = loss_and_slope(exact_module(SnapFlow, two_times=True, fault=0.3, euler_steps=32), data(20_000))
    assert float(terms.losses["flow"].detach()) > 0.3
    assert abs(slope) < 0.05 * away


def test_a_student_starts_as_its_own_eulers_step():
    teacher = mlp()
    module = ready(SnapFlow(teacher))
    noise = torch.randn(5, 2)
    assert torch.equal(module.sample(5, noise=noise), generate(teacher, noise, {}, [1.0], "ode"))
    # told r = 0 when sampled, in every step
    seen = []
    original = module.sampling_network().forward
    module.sampling_network().forward = lambda *args, r=None, **kw: (seen.append(r), original(*args, r=r, **kw))[1]
    module.sample(5, num_steps=3, generator=torch.Generator().manual_seed(0))
    assert [float(r.max()) for r in seen] == [0.0, 0.0, 0.0]
    for settings, message in (
        ({"euler_steps": 0}, "at least one step"),
        ({"shortcut_share": 1.0}, "both need samples"),
        ({"sampler": "flow_map"}, "choose renoise"),
    ):
        with pytest.raises(ValueError, match=message):
            SnapFlow(mlp(), **settings)


@pytest.mark.learn
@pytest.mark.filterwarnings("ignore:ConstantEMA", "ignore:.*eval mode")
def test_one_step_is_as_good_as_its_own_steps(ring_problem):  # noqa: F811
    """The student's one step reaches the N Euler steps of its target: 6 of them, beside the teacher's two."""
    mixture, _, noise, ends = ring_problem
    settings = {"student": two_times(), "from_data": False, "euler_steps": 6}
    module = distilled(ring_problem, SnapFlow, settings, 2e-3, updates=300, batch_size=128)
    found = error(module.sample(len(noise), noise=noise), ends)
    teacher = analytic_denoiser(mixture, FLOW)
    two = error(generate(teacher, noise, {}, [1.0, 0.5], "ode"), ends)
    print(f"snap: {found:.3f}, the teacher in two steps {two:.3f}")
    assert found < 0.45 < two
