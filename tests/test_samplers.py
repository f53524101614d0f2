"""Samplers against closed forms and against diffusers' schedulers."""

import inspect
import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from lightning_distill.networks.analytic import GaussianMixture, analytic_denoiser, gaussian_flow_map
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.small import small_unet
from lightning_distill.prediction import Prediction
from lightning_distill.processes import EDM, FlowMatching, TrigFlow, VariancePreserving, change_process
from lightning_distill.samplers import (
    SAMPLERS,
    adams,
    adams_coefficients,
    dpmpp_2m,
    flow_map,
    heun,
    ode,
    renoise,
    simulate,
    transport,
)
from lightning_distill.times import few_step_times

F64 = torch.float64
PROCESSES = [
    FlowMatching(),
    VariancePreserving(),
    VariancePreserving(zero_terminal_snr=True),
    EDM(),
    TrigFlow(),
]
IDS = ["flow", "vp", "vp-ztsnr", "edm", "trig"]
by_process = pytest.mark.parametrize("process", PROCESSES, ids=IDS)
MEAN = torch.tensor([0.3, -0.5], dtype=F64)
COV = torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=F64)


def gaussian(process):
    return analytic_denoiser(GaussianMixture(MEAN[None], covariances=COV[None]), process)


def uniform_flow_grid(process, n):
    """n times whose flow-matching times are evenly spaced down to 0 (left out)."""
    top = change_process(torch.tensor(process.t_max, dtype=F64), process, FlowMatching())[0]
    flow = top * (1.0 - torch.arange(n, dtype=F64) / n)
    times = change_process(flow, FlowMatching(), process)[0]
    return times.clamp(max=process.t_max).tolist()


def exact(x, t, r, process):
    return gaussian_flow_map(MEAN, COV, x, torch.tensor(t, dtype=F64), torch.tensor(r, dtype=F64), process)


def error(sampler, process, times, x):
    return (sampler(gaussian(process), x, times, process) - exact(x, times[0], 0.0, process)).norm().item()


@pytest.mark.sparse(2)
@by_process
@pytest.mark.parametrize(("sampler", "order"), [(ode, 1), (heun, 2), (adams, 2)])
def test_order_of_convergence(sampler, order, process):
    x = process.prior(torch.randn(8, 2, dtype=F64))
    errors = [error(sampler, process, uniform_flow_grid(process, n), x) for n in (32, 64, 128)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)
    assert errors[-1] < 0.05


@pytest.mark.sparse(3)
@by_process
def test_dpmpp_2m_is_second_order_in_log_snr(process):
    x = process.prior(torch.randn(8, 2, dtype=F64), 0.5 * process.t_max)
    start = process.log_snr(torch.tensor(0.5 * process.t_max, dtype=F64))
    errors = []
    for n in (64, 128, 256):
        log_snr = start + (18.0 - start) * torch.arange(n, dtype=F64) / (n - 1)
        times = process.t_from_log_snr(log_snr).tolist()
        times[0] = 0.5 * process.t_max
        errors.append(error(dpmpp_2m, process, times, x))
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(4.0, rel=0.1)


def test_dpmpp_2m_beats_first_order_from_pure_noise():
    process = VariancePreserving(zero_terminal_snr=True)
    x = torch.randn(64, 2, dtype=F64)
    times = uniform_flow_grid(process, 64)
    assert error(dpmpp_2m, process, times, x) < 0.2 * error(ode, process, times, x)


def test_dpmpp_2m_is_the_published_update():
    """Alg. 2 of arXiv:2211.01095, written out for three steps in a VP process."""
    process = VariancePreserving()
    denoise, times = gaussian(process), [0.9, 0.6, 0.3]
    x = torch.randn(5, 2, dtype=F64)
    a, s = (f(torch.tensor(times)).tolist() for f in (process.alpha, process.sigma))
    lam = [math.log(u / v) for u, v in zip(a, s)]
    d0 = denoise(x, torch.tensor(times[0])).x0
    y = s[1] / s[0] * x - a[1] * math.expm1(lam[0] - lam[1]) * d0
    d1 = denoise(y, torch.tensor(times[1])).x0
    r = (lam[1] - lam[0]) / (lam[2] - lam[1])
    y = s[2] / s[1] * y - a[2] * math.expm1(lam[1] - lam[2]) * ((1 + 0.5 / r) * d1 - 0.5 / r * d0)
    expected = denoise(y, torch.tensor(times[2])).x0
    # float32 literals of the times above would cost 1e-8
    torch.testing.assert_close(dpmpp_2m(denoise, x, times, process), expected, rtol=0, atol=1e-6)


def test_adams_is_exact_for_a_velocity_linear_in_time():
    """v = a + b t: every step but the first, which is Euler's, integrates it exactly, however uneven the grid."""
    flow, (a, b) = FlowMatching(), torch.randn(2, 5, 2, dtype=F64)
    times = [1.0, 0.75, 0.3, 0.1]

    def line(x, t):
        return Prediction((a + b * t).expand_as(x), x, t.expand(len(x)), flow, "flow_prediction")

    x = torch.randn(5, 2, dtype=F64)
    first = (times[1] - times[0]) * (a + b * times[0])
    rest = -a * times[1] - 0.5 * b * times[1] ** 2
    torch.testing.assert_close(adams(line, x, times, flow), x + first + rest, rtol=0, atol=1e-12)


@by_process
def test_adams_without_differences_is_ode(process):
    x, times = process.prior(torch.randn(6, 2, dtype=F64)), uniform_flow_grid(process, 4)
    denoise = gaussian(process)

    def euler(*at):
        return denoise(*at)

    euler.coefficients = lambda flow: torch.stack([torch.ones(4, dtype=F64), torch.zeros(4, dtype=F64)])
    torch.testing.assert_close(adams(euler, x, times, process), ode(denoise, x, times, process), rtol=0, atol=1e-9)
    euler.coefficients = lambda flow: None  # learned for other times
    torch.testing.assert_close(adams(euler, x, times, process), adams(denoise, x, times, process), rtol=0, atol=0)
    flow = change_process(torch.tensor([*times, 0.0], dtype=F64), process, FlowMatching())[0]
    steps = flow.diff().tolist()
    expected = [0.0, *(0.5 * h / before for before, h in pairwise(steps))]
    assert adams_coefficients(flow)[1].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("sampler", [ode, heun, adams])
def test_ode_samplers_do_not_depend_on_the_process(sampler):
    """On the same noise levels the probability-flow ODE is one and the same."""
    flow, start = FlowMatching(), 0.9
    eps = torch.randn(6, 2, dtype=F64)
    times = [0.9, 0.7, 0.45, 0.2]
    expected = sampler(gaussian(flow), start * eps, times, flow)
    for process in PROCESSES[1:]:
        native, scale = change_process(torch.tensor(times, dtype=F64), flow, process)
        out = sampler(gaussian(process), scale[0] * start * eps, native.tolist(), process)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["renoise", "ode", "heun", "dpmpp_2m", "adams"])
@pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving(zero_terminal_snr=True), TrigFlow()])
def test_samplers_are_finite_from_pure_noise(name, process):
    x = torch.randn(16, 2)
    for n in (1, 2, 3, 8):
        out = SAMPLERS[name](gaussian(process), x, few_step_times(process, n), process)
        assert bool(out.isfinite().all())
        assert out.dtype == x.dtype
        if n == 1:
            torch.testing.assert_close(out, MEAN.float().expand(16, 2), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------- rollouts
def rollout_variance(sampler, **kwargs):
    """Variance of the output of the posterior-mean student on N(0, .25); flow steps [1, .75, .5, .25].

    The rollout is linear in its independent noises: sample j gets noise i only if i = j.
    """
    process, times = FlowMatching(), [1.0, 0.75, 0.5, 0.25]
    denoise = analytic_denoiser(GaussianMixture([[0.0]], std=0.5), process)
    basis = torch.eye(4, dtype=F64)[:, :, None]
    out = sampler(denoise, basis[0], times, process, noise=lambda i, x: basis[i], **kwargs)
    return out.square().sum().item()


def test_rollout_variances_of_posterior_mean_students():
    assert rollout_variance(renoise) == pytest.approx(0.07255, abs=5e-6)
    assert rollout_variance(ode) == pytest.approx(0.11597, abs=5e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_noise_scale_follows_its_recursion(gamma):
    # v' = a^2 c^2 v + gamma^2 s^2, with the posterior-mean gain c = a l / (a^2 l + s^2)
    v, times = 1.0, [1.0, 0.75, 0.5, 0.25]
    gain = [(1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2) for t in times]
    for c, r in zip(gain, times[1:]):
        v = (1 - r) ** 2 * c**2 * v + gamma**2 * r**2
    expected = gain[-1] ** 2 * v
    assert rollout_variance(renoise, noise_scale=gamma) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", ["renoise", "ode"])
def test_simulation_is_the_beginning_of_sampling(kind):
    process = VariancePreserving()
    denoise, times = gaussian(process), few_step_times(process, 4)
    eps = torch.randn(4, 3, 2, dtype=F64)
    full = SAMPLERS[kind](denoise, eps[0], times, process, noise=lambda i, x: eps[i])
    for stop in range(4):
        x = simulate(denoise, eps[0], times, process, stop, kind, noise=lambda i, x: eps[i])
        rest = SAMPLERS[kind](denoise, x, times[stop:], process, noise=lambda i, x, k=stop: eps[i + k])
        torch.testing.assert_close(rest, full, rtol=0, atol=0)
    x = torch.randn(3, 2)
    assert simulate(denoise, x, times, process, 0, kind) is x


def test_noise_is_asked_for_by_the_step_that_it_enters():
    process, seen = FlowMatching(), []

    def noise(i, x):
        seen.append(i)
        return torch.full_like(x, float(i))

    times = [0.8, 0.6, 0.3]
    simulate(gaussian(process), torch.randn(3, 2), times, process, 1, noise=noise)
    renoise(gaussian(process), torch.randn(3, 2), times, process, noise=noise)
    assert seen == [1, 1, 2]
    # the input of step 1 is noisy by noise(1), which is 1 everywhere
    start = torch.randn(3, 2)
    x = simulate(gaussian(process), start, times, process, 1, noise=noise)
    x0 = gaussian(process)(start, torch.tensor(0.8)).x0
    torch.testing.assert_close(x, 0.4 * x0 + 0.6, rtol=0, atol=1e-6)


def test_fresh_noise_comes_from_the_global_generator():
    process = FlowMatching()
    x = torch.randn(3, 2)
    torch.manual_seed(1)
    first = renoise(gaussian(process), x, [1.0, 0.5], process)
    torch.manual_seed(1)
    fresh = torch.randn(3, 2)
    again = renoise(gaussian(process), x, [1.0, 0.5], process, noise=lambda i, x: fresh)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, renoise(gaussian(process), x, [1.0, 0.5], process))


def test_transport_passes_gradients_and_takes_times_per_sample():
    process = TrigFlow()
    x_t, t, r = torch.randn(3, 2, dtype=F64), torch.tensor([1.5, 1.0, 0.5]), torch.tensor([1.0, 0.0, 0.25])
    x0 = torch.randn(3, 2, dtype=F64, requires_grad=True)
    eps = torch.randn(3, 2, dtype=F64)
    out = transport(Prediction.from_x0(x0, x_t, t, process), r, eps)
    expected = r.double().cos()[:, None] * x0 + r.double().sin()[:, None] * eps
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(out.sum(), x0)
    torch.testing.assert_close(gradient, r.double().cos()[:, None].expand(3, 2), rtol=0, atol=1e-14)
    # at r = t the deterministic step stands still
    same = transport(Prediction.from_x0(x0, x_t, t, process), t)
    torch.testing.assert_close(same, x_t, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------- flow map
@by_process
@pytest.mark.parametrize("n", [1, 2, 5])
def test_flow_map_with_the_exact_map_is_exact_in_any_number_of_steps(process, n):
    """The two-time network whose transport is the exact map: a mean velocity in flow-matching coordinates."""
    flow = FlowMatching()

    def denoise(x, t, r):
        (tf, rf), scales = change_process(torch.stack([t, r]), process, flow)
        end = exact(x, t.item(), r.item(), process)
        mean_velocity = (scales[0] * x - scales[1] * end) / (tf - rf)
        return Prediction(mean_velocity, x, t, process, "flow_prediction")

    x = process.prior(torch.randn(8, 2, dtype=F64))
    times = uniform_flow_grid(process, n)
    out = flow_map(denoise, x, times, process)
    torch.testing.assert_close(out, exact(x, times[0], 0.0, process), rtol=0, atol=1e-8)


def test_flow_map_of_an_average_velocity_is_meanflows_step():
    process, seen = FlowMatching(), []

    def u(x, t, r):
        seen.append((t.item(), r.item()))
        return x * (t - r) + t

    x = torch.randn(4, 2, dtype=F64)
    times = [1.0, 0.6]
    out = flow_map(lambda x, t, r: Prediction(u(x, t, r), x, t, process, "flow_prediction"), x, times, process)
    y = x + (0.6 - 1.0) * (x * 0.4 + 1.0)
    expected = y + (0.0 - 0.6) * (y * 0.6 + 0.6)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert seen == [(1.0, 0.6), (0.6, 0.0)]


# ----------------------------------------------------------------------------------------------- contracts
def test_samplers_share_one_signature():
    for name, sampler in SAMPLERS.items():
        assert sampler.__name__ == name
        parameters = list(inspect.signature(sampler).parameters.values())
        assert [p.name for p in parameters[:5]] == ["denoise", "x", "times", "process", "noise"]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[4:])


@pytest.mark.parametrize(("name", "calls"), [("renoise", 4), ("ode", 4), ("heun", 7), ("dpmpp_2m", 4), ("adams", 4)])
def test_number_of_network_evaluations(name, calls):
    process, seen = FlowMatching(), []
    teacher = gaussian(process)

    def denoise(x, t):
        assert t.dtype == F64
        seen.append(t.item())
        return teacher(x, t)

    SAMPLERS[name](denoise, torch.randn(2, 2), [1.0, 0.75, 0.5, 0.25], process)
    assert len(seen) == calls
    assert set(seen) == {1.0, 0.75, 0.5, 0.25}


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_refuse_bad_times(name):
    with pytest.raises(ValueError, match="leave out the final clean time 0"):
        SAMPLERS[name](gaussian(FlowMatching()), torch.randn(2, 2), [1.0, 0.5, 0.0], FlowMatching())
    with pytest.raises(ValueError, match="empty"):
        SAMPLERS[name](gaussian(FlowMatching()), torch.randn(2, 2), [], FlowMatching())


def test_simulate_refuses_bad_arguments():
    args = (gaussian(FlowMatching()), torch.randn(2, 2), [1.0, 0.5], FlowMatching())
    with pytest.raises(ValueError, match="outside the 2 steps"):
        simulate(*args, 2)
    with pytest.raises(ValueError, match="'heun' is unknown"):
        simulate(*args, 1, "heun")


# ----------------------------------------------------------------------------------------------- diffusers
def tiny_unet():
    return small_unet(8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8).eval()


@torch.no_grad()
def diffusers_loop(scheduler, network, x, generator=None):
    kwargs = {} if generator is None else {"generator": generator}
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x, **kwargs).prev_sample
    return x


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_renoise_is_the_lcm_scheduler(n, zero_terminal_snr):
    network, process = tiny_unet(), VariancePreserving(zero_terminal_snr=zero_terminal_snr)
    scheduler = LCMScheduler(
        prediction_type="v_prediction",
        original_inference_steps=n,
        clip_sample=False,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    scheduler.set_timesteps(n)
    x = torch.randn(2, 1, 8, 8)
    expected = diffusers_loop(scheduler, network, x, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        out = renoise(
            Denoiser(network, process, "v_prediction"),
            x,
            few_step_times(process, n),
            process,
            noise=lambda i, x: torch.randn(x.shape, generator=generator),
        )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_ode_is_the_ddim_scheduler(zero_terminal_snr):
    network, process = tiny_unet(), VariancePreserving(zero_terminal_snr=zero_terminal_snr)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    scheduler.set_timesteps(4)
    x = torch.randn(2, 1, 8, 8)
    expected = diffusers_loop(scheduler, network, x)
    with torch.no_grad():
        out = ode(Denoiser(network, process, "v_prediction"), x, few_step_times(process, 4), process)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_samplers_are_the_flow_matching_scheduler(stochastic):
    network, process = tiny_unet(), FlowMatching()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = torch.randn(2, 1, 8, 8)
    torch.manual_seed(5)
    expected = diffusers_loop(scheduler, network, x)
    torch.manual_seed(5)
    sampler = renoise if stochastic else ode
    with torch.no_grad():
        out = sampler(Denoiser(network, process, "flow_prediction"), x, few_step_times(process, 4, shift=3.0), process)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
