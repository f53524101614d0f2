"""Noise processes against autograd, diffusers' schedulers and independently written formulas."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.processes import (
    EDM,
    FlowMatching,
    TrigFlow,
    VariancePreserving,
    change_process,
    expand,
)

F64 = torch.float64
PROCESSES = [
    FlowMatching(),
    FlowMatching(shift=3.0),
    VariancePreserving(),
    VariancePreserving("linear", 1e-4, 0.02),
    VariancePreserving("squaredcos_cap_v2"),
    VariancePreserving(zero_terminal_snr=True),
    EDM(),
    TrigFlow(),
]
IDS = ["flow", "flow-shift3", "vp", "vp-linear", "vp-cosine", "vp-ztsnr", "edm", "trig"]
by_process = pytest.mark.parametrize("process", PROCESSES, ids=IDS)


def times(process, n=64):
    """Times inside (0, t_max), none of them on an index of VP."""
    return process.t_max * (torch.arange(n, dtype=F64) + 0.37) / n


@by_process
@pytest.mark.parametrize(("value", "slope"), [("alpha", "d_alpha"), ("sigma", "d_sigma")])
def test_derivatives_are_those_of_autograd(process, value, slope):
    t = times(process).requires_grad_()
    y = getattr(process, value)(t)
    if y.requires_grad:
        (expected,) = torch.autograd.grad(y.sum(), t)
    else:
        expected = torch.zeros_like(t)
    torch.testing.assert_close(getattr(process, slope)(t.detach()), expected, rtol=1e-10, atol=1e-12)


@by_process
def test_sigma_rises_from_zero_and_snr_falls(process):
    t = torch.cat([torch.zeros(1, dtype=F64), times(process)])
    assert process.sigma(t)[0] == 0
    assert process.alpha(t)[0] == 1
    assert bool((process.sigma(t).diff() > 0).all())
    assert bool((process.log_snr(t)[1:].diff() < 0).all())


@by_process
def test_log_snr_has_an_inverse(process):
    t = times(process)
    torch.testing.assert_close(process.t_from_log_snr(process.log_snr(t)), t, rtol=1e-10, atol=1e-12)


@by_process
def test_coefficients_are_float64_of_the_shape_of_t(process):
    for t in (torch.tensor(0.3), torch.rand(2, 3), torch.tensor([1], dtype=torch.int64)):
        for name in ("alpha", "sigma", "d_alpha", "d_sigma", "log_snr", "network_time"):
            out = getattr(process, name)(t)
            assert out.dtype == F64, name
            assert out.shape == t.shape, name


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_vp_is_the_scheduler_at_every_index(schedule, zero_terminal_snr):
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=schedule,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    squared = scheduler.alphas_cumprod.double()
    for process in (
        VariancePreserving(schedule, zero_terminal_snr=zero_terminal_snr),
        VariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod),
    ):
        index = torch.arange(1000)
        t = process.t_from_index(index)
        torch.testing.assert_close(process.alpha(t).square(), squared, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(process.sigma(t).square(), 1.0 - squared, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(process.network_time(t), index.double(), rtol=0, atol=1e-10)
        assert bool(process.alpha(t[-1]) == 0) is zero_terminal_snr
        assert process.zero_terminal_snr is zero_terminal_snr


def test_vp_without_zero_terminal_snr_keeps_data_at_its_end():
    # SD1.5: alpha(999) = .0683, so an epsilon error is multiplied by 14.6 in x0
    process = VariancePreserving()
    end = torch.tensor(1.0)
    assert process.alpha(end).item() == pytest.approx(0.0683, abs=2e-4)
    assert (process.sigma(end) / process.alpha(end)).item() == pytest.approx(14.61, abs=0.01)


def test_vp_refuses_alphas_that_do_not_fall():
    with pytest.raises(ValueError, match="must fall strictly"):
        VariancePreserving.from_alphas_cumprod([0.9, 0.95, 0.5])
    with pytest.raises(ValueError, match="must fall strictly"):
        VariancePreserving.from_alphas_cumprod([1.2, 0.95, 0.5])


@pytest.mark.parametrize("data_scale", [1.0, 0.5])
@pytest.mark.parametrize("target", PROCESSES, ids=IDS)
@pytest.mark.parametrize("source", PROCESSES, ids=IDS)
def test_change_of_process_keeps_x0_and_eps(source, target, data_scale):
    ratio = torch.logspace(-1.2, 0.8, 9, dtype=F64)  # sigma / alpha within the reach of every process
    t = source.t_from_log_snr(-2.0 * ratio.log())
    x0, eps = torch.randn(2, 9, 5, dtype=F64)
    t_new, factor = change_process(t, source, target, data_scale)
    moved = expand(factor, x0) * source.add_noise(x0, eps, t)
    expected = target.add_noise(x0 / data_scale, eps, t_new)
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-10)
    # there and back: the target sees data divided by s, so the way back divides by 1 / s
    back, factor_back = change_process(t_new, target, source, 1.0 / data_scale)
    torch.testing.assert_close(back, t, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(factor * factor_back, torch.ones_like(t), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "source",
    [FlowMatching(), VariancePreserving(zero_terminal_snr=True), TrigFlow()],
    ids=["flow", "vp", "trig"],
)
@pytest.mark.parametrize("target", [FlowMatching(), TrigFlow()], ids=["flow", "trig"])
def test_change_of_process_is_finite_at_both_ends(source, target):
    ends = torch.tensor([0.0, source.t_max], dtype=F64)
    t_new, factor = change_process(ends, source, target)
    torch.testing.assert_close(t_new, torch.tensor([0.0, target.t_max], dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(factor, torch.ones(2, dtype=F64), rtol=0, atol=1e-12)


def test_trigflow_and_flow_matching_are_related_as_in_sana():
    """t = sin/(sin + cos), x_fm = x_trig/(sin + cos), F sqrt(t^2 + (1-t)^2) = (1-2t) x_fm + (1-2t+2t^2) v."""
    tau = torch.linspace(0.01, math.pi / 2 - 0.01, 21, dtype=F64)
    x0, z = torch.randn(2, 21, 3, dtype=F64)
    s, c = tau.sin()[:, None], tau.cos()[:, None]
    t, factor = change_process(tau, TrigFlow(), FlowMatching())
    torch.testing.assert_close(t[:, None], s / (s + c), rtol=0, atol=1e-14)
    torch.testing.assert_close(factor[:, None], 1 / (s + c), rtol=0, atol=1e-14)
    t, v = t[:, None], z - x0
    x_fm = TrigFlow().add_noise(x0, z, tau) * factor[:, None]
    network = ((1 - 2 * t) * x_fm + (1 - 2 * t + 2 * t**2) * v) / (t**2 + (1 - t) ** 2).sqrt()
    torch.testing.assert_close(network, c * z - s * x0, rtol=0, atol=1e-13)


def test_edm_preconditioning_is_a_change_to_trigflow():
    """D = c_skip x + c_out F(c_in x) with EDM's Table 1, where F has the opposite sign."""
    sd = 0.5
    weight = torch.randn(3, 3, dtype=F64)
    seen = {}

    class Net(torch.nn.Module):
        def forward(self, x, t):
            seen["x"], seen["t"] = x, t
            return (x @ weight).tanh() * (1 + t[:, None])

    denoiser = Denoiser(Net(), EDM(), "v_prediction", network_process=TrigFlow(), sigma_data=sd)
    sigma = torch.logspace(-2, 1.8, 12, dtype=F64)
    x = torch.randn(12, 3, dtype=F64) * sigma[:, None]
    out = denoiser(x, sigma)
    s = sigma[:, None]
    c_skip = sd**2 / (s**2 + sd**2)
    c_out = s * sd / (s**2 + sd**2).sqrt()
    c_in = 1 / (s**2 + sd**2).sqrt()
    torch.testing.assert_close(seen["x"], c_in * x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(seen["t"], torch.atan(sigma / sd), rtol=1e-12, atol=1e-13)
    raw = ((c_in * x) @ weight).tanh() * (1 + torch.atan(s / sd))
    torch.testing.assert_close(out.x0, c_skip * x - c_out * raw, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.x_t, x, rtol=0, atol=0)
    assert isinstance(out.process, EDM)


def test_shift_fixes_the_ends_and_moves_the_middle():
    warp = FlowMatching(shift=3.0).warp
    torch.testing.assert_close(
        warp(torch.tensor([0.0, 0.25, 0.5, 1.0])), torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=F64)
    )
    # the path itself does not know about the shift
    t = torch.rand(5)
    torch.testing.assert_close(FlowMatching(3.0).sigma(t), FlowMatching().sigma(t), rtol=0, atol=0)


@by_process
def test_prior_is_noise_of_the_start_level(process):
    eps = torch.randn(2, 3)
    t = 0.4 * process.t_max
    std = 1.0 if isinstance(process, VariancePreserving) else float(process.sigma(torch.tensor(t, dtype=F64)))
    torch.testing.assert_close(process.prior(eps, t), std * eps)
    torch.testing.assert_close(process.prior(eps), process.prior(eps, process.t_max))
    for bad in (0.0, -0.1, process.t_max * 1.01):
        with pytest.raises(ValueError, match="start time"):
            process.prior(eps, bad)


def test_network_times_follow_each_convention():
    assert FlowMatching().network_time(torch.tensor(0.25)).item() == 250.0
    assert VariancePreserving().network_time(torch.tensor(1.0)).item() == 999.0
    assert EDM().network_time(torch.tensor(2.0)).item() == pytest.approx(1000 * math.log(2.0) / 4)


def test_expand_broadcasts_over_samples():
    like = torch.zeros(4, 1, 2, 2, dtype=torch.float32)
    out = expand(torch.arange(4, dtype=F64), like)
    assert out.shape == (4, 1, 1, 1)
    assert out.dtype == torch.float32
    assert expand(torch.tensor(2.0), like).shape == ()


@pytest.mark.parametrize("make", [lambda: FlowMatching(0.0), lambda: EDM(1.0, 0.5), lambda: EDM(0.0, 80.0)])
def test_constructors_refuse_nonsense(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_prior_std_is_sigma_except_in_vp(process):
    for share in (0.1, 0.5, 1.0):
        t = share * process.t_max
        sigma = float(process.sigma(torch.tensor(t, dtype=torch.float64)))
        expected = 1.0 if isinstance(process, VariancePreserving) else sigma
        assert process.prior_std(t) == expected


@pytest.mark.parametrize("source", [FlowMatching(), TrigFlow()], ids=["flow", "trig"])
@pytest.mark.parametrize("target", [FlowMatching(), TrigFlow()], ids=["flow", "trig"])
def test_a_change_between_flows_is_differentiable_up_to_both_ends(source, target):
    """Continuous-time methods differentiate there; a logarithm of 0 would make it NaN."""
    ends = torch.tensor([0.0, source.t_max], dtype=torch.float64)
    found, slope = torch.func.jvp(
        lambda t: torch.stack(change_process(t, source, target)), (ends,), (torch.ones(2).double(),)
    )
    torch.testing.assert_close(found[0], torch.tensor([0.0, target.t_max], dtype=torch.float64))
    step = 1e-7
    inside = ends + torch.tensor([step, -step], dtype=torch.float64)
    difference = (torch.stack(change_process(inside, source, target)) - found) / (inside - ends)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [p for p in PROCESSES if isinstance(p, VariancePreserving)], ids=IDS[2:6])
@pytest.mark.parametrize("source", [FlowMatching(), TrigFlow()], ids=["flow", "trig"])
def test_time_has_a_derivative_at_the_noisiest_sample(source, target):
    """Rounding puts it at or beyond t_max, where a clamp has none."""
    end = change_process(torch.tensor([target.t_max], dtype=F64), target, source)[0]

    def slope(t):
        return torch.func.jvp(lambda t: change_process(t, source, target)[0], (t,), (torch.ones_like(t),))[1]

    assert float(change_process(end, source, target)[0]) <= target.t_max
    torch.testing.assert_close(slope(end), slope(end - 1e-9), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", [p for p in PROCESSES if isinstance(p, VariancePreserving)], ids=IDS[2:6])
def test_differences_may_step_beyond_the_noisiest_sample(target):
    end = change_process(torch.tensor([target.t_max], dtype=F64), target, FlowMatching())[0]
    around = torch.cat([end - 1e-6, end + 1e-6])
    t = change_process(around, FlowMatching(), target, beyond=True)[0]
    slope = torch.func.jvp(lambda t: change_process(t, FlowMatching(), target)[0], (end,), (torch.ones_like(end),))[1]
    torch.testing.assert_close((t[1:] - t[:1]) / 2e-6, slope, rtol=1e-4, atol=0)
    assert float(change_process(around[1:], FlowMatching(), target)[0]) == target.t_max


@pytest.mark.parametrize(
    ("start", "far"), [(FlowMatching(), 0.999), (TrigFlow(), 1.569), (EDM(), 79.0)], ids=["flow", "trig", "edm"]
)
@pytest.mark.parametrize("terminal", [False, True])
def test_times_beyond_the_end_stand_still(start, far, terminal):
    """Where no timestep is as noisy, time is the last one's and has no derivative; at the last one it has."""
    process = VariancePreserving(zero_terminal_snr=terminal)
    t = torch.tensor([0.4 * start.t_max, far], dtype=F64, requires_grad=True)
    native = change_process(t, start, process)[0]
    (slope,) = torch.autograd.grad(native.sum(), t)
    with torch.no_grad():
        step = 1e-7
        differences = (change_process(t + step, start, process)[0] - change_process(t - step, start, process)[0]) / step
    torch.testing.assert_close(slope, differences / 2, rtol=1e-5, atol=1e-6)
    if not terminal:
        assert float(native[1].detach()) == 1.0
        assert float(slope[1]) == 0.0
    end = torch.tensor(1.0, dtype=F64, requires_grad=True)
    again = process.t_from_coefficients(process.alpha(end), process.sigma(end))
    (slope,) = torch.autograd.grad(again, end)
    assert float(slope) == pytest.approx(1.0, rel=1e-6)
