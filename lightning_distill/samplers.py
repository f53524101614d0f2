"""Samplers: free functions with one signature, nothing stateful.

    sampler(denoise, x, times, process, *, noise=None) -> x0

``denoise(x_t, t) -> Prediction`` is a student, or a teacher with its guidance; ``times`` is a descending
list of native times without the final clean time 0; ``x`` is the noisy sample at ``times[0]``, for example
``process.prior(eps, times[0])``. The number of steps is ``len(times)``. Training-time rollouts use the same
loop (``simulate``) and the same step (``transport``), so a student is sampled exactly as it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.capabilities import check_capability
from lightning_distill.losses.subinterval import noise_further
from lightning_distill.prediction import Prediction
from lightning_distill.processes import FlowMatching, NoiseProcess, change_process, expand
from lightning_distill.times import validate_times

__all__ = [
    "SAMPLERS",
    "adams",
    "adams_coefficients",
    "adams_direction",
    "check_capability",
    "dpmpp_2m",
    "flow_map",
    "gamma",
    "heun",
    "heun_step",
    "ode",
    "renoise",
    "simulate",
    "start_noise",
    "to_clean",
    "transport",
]

Denoise = Callable[[Tensor, Tensor], Prediction]
TwoTimeDenoise = Callable[[Tensor, Tensor, Tensor], Prediction]
#: ``noise(i, x)`` is the eps of the input at ``times[i]``, i >= 1, shaped like x
Noise = Callable[[int, Tensor], Tensor]


def _time(t: float, x: Tensor) -> Tensor:
    return torch.tensor(t, dtype=torch.float64, device=x.device)


def _gaussian(_step: int, x: Tensor) -> Tensor:
    return torch.randn_like(x)


def to_clean(denoise: Denoise) -> Denoise:
    """The prediction of clean data: that of a two-time student is its jump to 0."""
    if getattr(denoise, "capability", None) != "two_time":
        return denoise
    two_times: Callable[..., Prediction] = denoise
    return lambda x, t: two_times(x, t, torch.zeros_like(t))


def transport(prediction: Prediction, r: Tensor | float, eps: Tensor | None = None) -> Tensor:
    """The noisy sample at time r made from a prediction: x_r = alpha_r x0 + sigma_r eps.

    With the predicted noise this is the deterministic step (DDIM; Euler in flow-matching coordinates), with
    fresh noise the renoise step.

    Args:
        prediction: network output at (x_t, t).
        r: native target times, (B,), () or a float, in [0, t_max].
        eps: fresh noise shaped like x_t; None means the predicted noise.

    Returns:
        x_r, shape and dtype of x_t.
    """
    x0 = prediction.x0
    r = torch.as_tensor(r, dtype=torch.float64, device=x0.device)
    return prediction.process.add_noise(x0, prediction.eps if eps is None else eps, r)


def simulate(
    denoise: Denoise,
    x: Tensor,
    times: Sequence[float],
    process: NoiseProcess,
    stop: int,
    kind: Literal["renoise", "ode"] = "renoise",
    noise: Noise | None = None,
    noise_scale: float = 1.0,
) -> Tensor:
    """The noisy input of step ``stop``: the first ``stop`` steps of ``renoise`` or ``ode``.

    This is the backward simulation of training (DMD2, arXiv:2405.14867, Sec. 4.4), run without graph by the
    caller.

    Args:
        denoise: network, (x_t, t) -> Prediction.
        x: noisy sample at ``times[0]``, (B, ...).
        times: descending native times without the final 0.
        process: process of the times.
        stop: k in [0, len(times) - 1]; 0 returns ``x``.
        kind: ``renoise`` adds fresh noise to each x0, ``ode`` keeps the predicted noise.
        noise: eps of the input at ``times[i]``; None draws from the global generator. Unused by ``ode``.
        noise_scale: gamma, factor on the fresh noise.

    Returns:
        x at ``times[stop]``, shape and dtype of ``x``.

    Raises:
        ValueError: bad times, an unknown kind, or ``stop`` outside the list.
    """
    validate_times(times, process)
    if kind not in ("renoise", "ode"):
        raise ValueError(f"kind={kind!r} is unknown; simulate 'renoise' or 'ode'.")
    if not 0 <= stop < len(times):
        raise ValueError(f"stop={stop} is outside the {len(times)} steps of {list(times)}; use 0..{len(times) - 1}.")
    check_capability(denoise, kind, times, process)
    noise = noise or _gaussian
    if kind == "renoise":
        denoise = to_clean(denoise)
    for i in range(stop):
        prediction = denoise(x, _time(times[i], x))
        eps = None if kind == "ode" else noise_scale * noise(i + 1, x)
        x = transport(prediction, times[i + 1], eps)
    return x


def renoise(
    denoise: Denoise,
    x: Tensor,
    times: Sequence[float],
    process: NoiseProcess,
    *,
    noise: Noise | None = None,
    noise_scale: float = 1.0,
) -> Tensor:
    """Predict x0, add fresh noise for the next time, repeat (consistency models, arXiv:2303.01469, Alg. 1).

    Args:
        denoise: network, (x_t, t) -> Prediction.
        x: noisy sample at ``times[0]``, (B, ...).
        times: descending native times without the final 0.
        process: process of the times.
        noise: eps of the input at ``times[i]``, i >= 1; None draws from the global generator.
        noise_scale: gamma in x_r = alpha_r x0 + gamma sigma_r eps; below 1 trades diversity for fidelity.

    Returns:
        x0, (B, ...).
    """
    x = simulate(denoise, x, times, process, len(times) - 1, "renoise", noise, noise_scale)
    return to_clean(denoise)(x, _time(times[-1], x)).x0


def ode(
    denoise: Denoise, x: Tensor, times: Sequence[float], process: NoiseProcess, *, noise: Noise | None = None
) -> Tensor:
    """Keep the predicted noise: DDIM (arXiv:2010.02502, Eq. 12, eta = 0), Euler in flow-matching coordinates.

    First order. ``noise`` is accepted for the common signature and unused.
    """
    x = simulate(denoise, x, times, process, len(times) - 1, "ode")
    return denoise(x, _time(times[-1], x)).x0


def start_noise(
    denoise: Denoise, x: Tensor, times: Sequence[float], process: NoiseProcess, *, noise: Noise | None = None
) -> Tensor:
    """Add the starting noise to every prediction of x0 (arXiv:2405.20320): exact where flows are straight.

    ``noise`` is accepted for the common signature and unused.
    """
    validate_times(times, process)
    check_capability(denoise, "start_noise", times, process)
    eps = x / process.prior_std(float(times[0]))
    return renoise(denoise, x, times, process, noise=lambda _i, _x: eps)


def heun_step(denoise: Denoise, x: Tensor, t: Tensor, r: Tensor, process: NoiseProcess) -> Tensor:
    """One step of ``heun`` from t to r, both native times, (B,) or ()."""
    prediction = denoise(x, t)
    trial = denoise(transport(prediction, r), r)
    velocity = 0.5 * (prediction.flow_prediction + trial.flow_prediction)
    t_flow, scale = change_process(t, process, FlowMatching())
    r_flow, r_scale = change_process(r, process, FlowMatching())
    return expand(scale / r_scale, x) * x + expand((r_flow - t_flow) / r_scale, x) * velocity


def heun(
    denoise: Denoise, x: Tensor, times: Sequence[float], process: NoiseProcess, *, noise: Noise | None = None
) -> Tensor:
    """Heun's method in flow-matching coordinates, 2 N - 1 evaluations; the last step, to 0, is Euler.

    x' = x / (alpha + sigma) obeys dx'/dt' = eps - x0 with t' = sigma / (alpha + sigma) whatever the process
    is, and both stay finite where alpha = 0. Second order. ``noise`` is unused.
    """
    validate_times(times, process)
    check_capability(denoise, "heun", times, process)
    for t, r in pairwise(times):
        x = heun_step(denoise, x, _time(t, x), _time(r, x), process)
    return denoise(x, _time(times[-1], x)).x0


def dpmpp_2m(
    denoise: Denoise, x: Tensor, times: Sequence[float], process: NoiseProcess, *, noise: Noise | None = None
) -> Tensor:
    """DPM-Solver++(2M) (arXiv:2211.01095, Alg. 2): linear extrapolation of x0 in lambda = ln(alpha / sigma).

        D_i = x0_i + h_i / (2 h_{i-1}) (x0_i - x0_{i-1}),     h_i = lambda_{i+1} - lambda_i

    and then the first-order step with D_i in the place of x0_i. The first and the last step are first
    order, and so is the second one after a start at alpha = 0, where h_0 is infinite. ``noise`` is unused.
    """
    validate_times(times, process)
    check_capability(denoise, "dpmpp_2m", times, process)
    lambdas = 0.5 * process.log_snr(torch.tensor(list(times), dtype=torch.float64))
    steps = lambdas.diff(dim=0).to(x.device)
    previous: Tensor | None = None
    for i, (t, r) in enumerate(pairwise(times)):
        x0 = denoise(x, _time(t, x)).x0
        extrapolated = x0 if previous is None else x0 + (0.5 * steps[i] / steps[i - 1]).to(x0) * (x0 - previous)
        x = transport(Prediction.from_x0(extrapolated, x, _time(t, x), process), r)
        previous = x0
    return denoise(x, _time(times[-1], x)).x0


def adams_coefficients(times: Sequence[float] | Tensor) -> Tensor:
    """Two-step Adams-Bashforth with variable steps: f_i = 1, d_i = h_i / (2 h_{i-1}), d_0 = 0.

    Args:
        times: flow-matching times with the final 0, (N + 1,), or of every element, (N + 1, D).

    Returns:
        f and d, (2, N) or (2, N, D), float64.
    """
    steps = torch.as_tensor(times, dtype=torch.float64).diff(dim=0)
    differences = torch.cat([torch.zeros_like(steps[:1]), 0.5 * steps[1:] / steps[:-1]])
    return torch.stack([torch.ones_like(differences), differences])


def adams_direction(v: Tensor, previous: Tensor, factor: Tensor, difference: Tensor) -> Tensor:
    """The direction f v + d (v - v_previous) of velocities (B, ...), with coefficients ()."""
    return factor.to(v) * v + difference.to(v) * (v - previous)


def adams(
    denoise: Denoise, x: Tensor, times: Sequence[float], process: NoiseProcess, *, noise: Noise | None = None
) -> Tensor:
    """Two-step Adams-Bashforth in flow-matching coordinates: second order with one evaluation a step.

        x'_{i+1} = x'_i + h_i [ f_i v_i + d_i (v_i - v_{i-1}) ]

    Coefficients are those of ``adams_coefficients``, or ``denoise.coefficients(times)``, (2, N), where some were
    learned for these times. ``noise`` is unused.
    """
    validate_times(times, process)
    check_capability(denoise, "adams", times, process)
    native = torch.tensor([*times, 0.0], dtype=torch.float64, device=x.device)
    flow, scale = change_process(native, process, FlowMatching())
    learned = getattr(denoise, "coefficients", None)
    found = None if learned is None else learned(times)
    coefficients = adams_coefficients(flow) if found is None else found.to(x.device)
    previous: Tensor | None = None
    for i, (factor, difference) in enumerate(coefficients.unbind(1)):
        v = denoise(x, native[i]).flow_prediction
        direction = adams_direction(v, v if previous is None else previous, factor, difference)
        x = (scale[i] / scale[i + 1]).to(x) * x + ((flow[i + 1] - flow[i]) / scale[i + 1]).to(x) * direction
        previous = v
    return x


def flow_map(
    denoise: TwoTimeDenoise,
    x: Tensor,
    times: Sequence[float],
    process: NoiseProcess,
    *,
    noise: Noise | None = None,
) -> Tensor:
    """Jump from time to time with a two-time network, the last jump to 0.

    In flow matching the network's ``flow_prediction`` is the average velocity u(x, t, r) and the jump is
    x_r = x_t + (r - t) u (MeanFlow, arXiv:2505.13447, Eq. 12); for a plain callable u pass
    ``lambda x, t, r: Prediction(u(x, t, r), x, t, process, "flow_prediction")``. In another process the
    jump is the same in flow-matching coordinates.

    Args:
        denoise: two-time network, (x_t, t, r) -> Prediction.
        x: noisy sample at ``times[0]``, (B, ...).
        times: descending native times without the final 0.
        process: process of the times.
        noise: unused.

    Returns:
        x0, (B, ...).
    """
    validate_times(times, process)
    check_capability(denoise, "flow_map", times, process)
    for t, r in zip(times, [*times[1:], 0.0]):
        x = transport(denoise(x, _time(t, x), _time(r, x)), r)
    return x


def gamma(
    denoise: TwoTimeDenoise,
    x: Tensor,
    times: Sequence[float],
    process: NoiseProcess,
    *,
    noise: Noise | None = None,
    share: float = 0.2,
) -> Tensor:
    """Jump below each next time and add fresh noise up to it (gamma-sampling of CTM, arXiv:2310.02279, Section 3.4).

        x_s = X_{t -> s}(x_t),     sigma_s / alpha_s = sqrt(1 - gamma^2) sigma_r / alpha_r,     x_r = x_s noised to r

    gamma = 0 is ``flow_map`` and gamma = 1 is ``renoise``. The last jump is to 0.

    Args:
        denoise: two-time network, (x_t, t, r) -> Prediction.
        x: noisy sample at ``times[0]``, (B, ...).
        times: descending native times without the final 0.
        process: process of the times.
        noise: the fresh noise before the step at ``times[i]``, i >= 1; None draws from the global generator.
        share: gamma in [0, 1].

    Raises:
        ValueError: bad times, or a gamma out of range.
    """
    validate_times(times, process)
    check_capability(denoise, "gamma", times, process)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"gamma(share={share}): the share of fresh noise lies in [0, 1].")
    noise = noise or _gaussian
    for i, (t, later) in enumerate(pairwise(times)):
        r = _time(later, x)
        kept = torch.tensor(1.0 - share**2, dtype=torch.float64, device=x.device)
        s = process.t_from_log_snr(process.log_snr(r) - kept.log()) if share < 1.0 else torch.zeros_like(r)
        x = noise_further(transport(denoise(x, _time(t, x), s), s), s, r, noise(i + 1, x), process)
    return transport(denoise(x, _time(times[-1], x), _time(0.0, x)), 0.0)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "renoise": renoise,
    "ode": ode,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "adams": adams,
    "start_noise": start_noise,
    "flow_map": flow_map,
    "gamma": gamma,
}
