"""Stock schedulers whose grid of times is a student's.

    process             sampler  scheduler
    VariancePreserving  renoise  LCMScheduler, original_inference_steps fitted, or times given at the call
    VariancePreserving  ode      DDIMScheduler, trailing; DPMSolverMultistepScheduler of order 1 with times given at the
                                 call; Euler for students starting from sigma(t) x noise
    FlowMatching        renoise  FlowMatchLCMScheduler, shift and last time fitted, or times given at the call
    FlowMatching        ode      FlowMatchEulerDiscreteScheduler, likewise; FlowMapEuler in DiTPipeline
    TrigFlow            renoise  SCMScheduler
    PreconditionedEDM   renoise  CMStochasticIterativeScheduler, with times given at the call

With one step both samplers are the same. Functions return the scheduler and the arguments that a call needs beyond the
number of steps.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler

from lightning_distill.networks.preconditioning import PreconditionedEDM
from lightning_distill.processes import FlowMatching, TrigFlow, VariancePreserving, change_process

__all__ = [
    "OTHERWISE",
    "check_start",
    "cm_scheduler",
    "flow_map_scheduler",
    "flow_scheduler",
    "scm_scheduler",
    "vp_scheduler",
]

#: what remains possible where nothing of diffusers fits
OTHERWISE = "export_weights(...) writes the weights and a card for use with this package."


def check_start(start: float, owner: str) -> None:
    """Raise unless a student starts from unit noise."""
    if abs(start - 1.0) > 1e-6:
        raise ValueError(
            f"the student starts from {start:.6g} x noise, but stock {owner} from unit noise, which gives "
            "other images; start at t_max of a process with zero terminal SNR or of FlowMatching. "
            f"{OTHERWISE}"
        )


# ------------------------------------------------------------------------------------------------ variance preserving
def _grid(scheduler: Any, num_steps: int, **options: Any) -> list[float] | None:
    """A scheduler's own default timesteps, None where it refuses the number of steps."""
    try:
        scheduler.set_timesteps(num_steps, **options)
    except ValueError:
        return None
    return [float(t) for t in scheduler.timesteps]


def _betas(process: VariancePreserving) -> dict[str, Any]:
    """Scheduler settings that give the coefficients of a process."""
    total = process.num_train_timesteps
    if process.beta_schedule != "given":
        return {
            "num_train_timesteps": total,
            "beta_schedule": process.beta_schedule,
            "beta_start": process.beta_start,
            "beta_end": process.beta_end,
            "rescale_betas_zero_snr": process.zero_terminal_snr,
        }
    squared = process.alpha(process.t_from_index(torch.arange(total))).square()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), squared[:-1]])
    return {"num_train_timesteps": total, "trained_betas": (1.0 - squared / previous).tolist()}


def vp_scheduler(
    process: VariancePreserving,
    prediction_type: str,
    times: list[float],
    fresh_noise: bool,
    start: float,
    *,
    scales_start: bool = True,
    grid_argument: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Scheduler of a student in a variance-preserving process.

    Args:
        process: noise process of the network.
        prediction_type: what the network outputs.
        times: descending native times.
        fresh_noise: renoise with two or more steps.
        start: factor on the starting noise.
        scales_start: the pipeline multiplies its noise by ``init_noise_sigma``.
        grid_argument: the pipeline's call takes ``timesteps``.

    Raises:
        ValueError: nothing in diffusers has these times; the message says which would do.
    """
    if prediction_type == "flow_prediction":
        raise ValueError(
            "stock schedulers of variance-preserving processes read epsilon, sample and v_prediction, not "
            f"flow_prediction; {OTHERWISE}"
        )
    total, n = process.num_train_timesteps, len(times)
    indices = process.index_from_t(torch.tensor(times, dtype=torch.float64)).tolist()
    wanted = [round(i) for i in indices]
    betas = {"prediction_type": prediction_type, **_betas(process)}
    trailing = {"timestep_spacing": "trailing", **betas}
    whole = max(abs(i - w) for i, w in zip(indices, wanted)) <= 1e-6
    scheduler: Any
    offered: list[float] | None
    if scales_start and not fresh_noise and not process.zero_terminal_snr and abs(start - 1.0) > 1e-6:
        # its start is sigma(t_max) x noise
        scheduler = EulerDiscreteScheduler(**trailing)
        offered = _grid(scheduler, n)
        level = float(scheduler.init_noise_sigma)
        if abs(level / math.hypot(level, 1.0) - start) > 1e-6:
            check_start(start, "VP schedulers")
        if grid_argument and whole and offered != wanted:
            return scheduler, {"timesteps": wanted}
    elif fresh_noise or n == 1:
        check_start(start, "LCM schedulers")
        if wanted[-1] == 0:
            raise ValueError(
                "the student's last time is the scheduler timestep 0, where the stock LCMScheduler returns "
                f"its input unchanged; take fewer steps than {total}. {OTHERWISE}"
            )
        # a large scaling makes its boundary condition c_skip vanish at every timestep but 0
        settings = {"clip_sample": False, "timestep_scaling": 1e4, **betas}
        scheduler = LCMScheduler(original_inference_steps=n, **settings)
        offered = _grid(scheduler, n)
        for original in range(n, total + 1):
            if _grid(scheduler, n, original_inference_steps=original) == wanted:
                scheduler = LCMScheduler(original_inference_steps=original, **settings)
                offered = [float(i) for i in wanted]
                break
        else:
            if grid_argument and whole:
                return LCMScheduler(original_inference_steps=total, **settings), {"timesteps": wanted}
    else:
        check_start(start, "DDIM schedulers")
        scheduler = DDIMScheduler(set_alpha_to_one=True, clip_sample=False, **trailing)
        # it steps down by total // n, whatever its next timestep is
        offered = _grid(scheduler, n) if total % n == 0 else None
        if grid_argument and whole and offered != wanted and not process.zero_terminal_snr:
            # of order 1 it is DDIM, and takes any timesteps; but 2^-12 for a terminal alpha of 0
            return DPMSolverMultistepScheduler(solver_order=1, **betas), {"timesteps": wanted}
    if offered != [float(i) for i in wanted] or not whole:
        grid = "none" if offered is None else str([int(i) for i in offered])
        raise ValueError(
            f"the student's times are the scheduler timesteps {[round(i, 3) for i in indices]}, but the grid "
            f"that the stock {type(scheduler).__name__} can give with {n} steps is {grid}; train the student "
            f"on few_step_times(process, N) with N a divisor of {total}. {OTHERWISE}"
        )
    return scheduler, {}


# ------------------------------------------------------------------------------------------------ flow matching
def _stock(name: str) -> Any:
    try:
        return getattr(diffusers, name)
    except AttributeError:
        raise ValueError(
            f"this export needs diffusers.{name}, which version {diffusers.__version__} does not have; "
            "upgrade diffusers."
        ) from None


def _flow_grid(scheduler: Any, n: int, even: bool) -> list[float]:
    """The times a flow-matching scheduler makes of the grid that it is handed, or of its own."""
    if even:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / n, n))
    else:
        scheduler.set_timesteps(n)
    return [float(s) for s in scheduler.sigmas][:n]


def _same(offered: list[float], times: list[float]) -> bool:
    return max(abs(a - b) for a, b in zip(offered, times, strict=True)) <= 1e-6


def _trailing_shift(times: list[float]) -> float:
    """The shift k = t (1 - s) / (s (1 - t)) of a shifted trailing grid, read off its second time."""
    if len(times) == 1:
        return 1.0
    s, t = 1.0 - 1.0 / len(times), times[1]
    return t * (1.0 - s) / (s * (1.0 - t))


def flow_scheduler(
    times: list[float], fresh_noise: bool, *, even: bool = False, grid_argument: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Scheduler of a student in flow matching.

    A pipeline with an even grid has it shifted. By itself a scheduler spaces its grid down to 0.001 rather than 1 / N,
    and shifts it; stretching its end to the last time, under another shift, restores every shifted trailing grid: both
    are Moebius functions of the step number that are 1 at step 0, which leaves two numbers to fit. The shift is found
    by bisection on the second time.

    Args:
        times: descending native times.
        fresh_noise: renoise with two or more steps.
        even: the pipeline hands the scheduler 1, 1 - 1/N, ..., 1/N.
        grid_argument: the pipeline's call takes ``sigmas``.

    Raises:
        ValueError: nothing in diffusers has these times; the message says which would do.
    """
    cls = _stock("FlowMatchLCMScheduler" if fresh_noise else "FlowMatchEulerDiscreteScheduler")
    n = len(times)
    if even or n == 1:
        scheduler = cls(shift=_trailing_shift(times))
        if _same(_flow_grid(scheduler, n, even), times):
            return scheduler, {}

    def second_time(log_shift: float) -> float:
        return _flow_grid(cls(shift=math.exp(log_shift), shift_terminal=times[-1]), n, even)[1]

    low, high = (0.0, 0.0) if n <= 2 else (-6.0, 6.0)
    while high - low > 1e-9:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if second_time(middle) < times[1] else (low, middle)
    scheduler = cls(shift=math.exp(0.5 * (low + high)), shift_terminal=times[-1])
    offered = _flow_grid(scheduler, n, even)
    if _same(offered, times):
        return scheduler, {}
    if grid_argument:
        return cls(shift=1.0), {"sigmas": times}
    raise _no_flow_grid(scheduler, offered, times)


def flow_map_scheduler(times: list[float]) -> tuple[Any, dict[str, Any]]:
    """Trailing Euler for DiTPipeline, which hands its scheduler no grid and scales its input by it."""
    if any(abs(1000.0 * t - round(1000.0 * t)) > 1e-6 for t in times):
        raise ValueError(
            "a DiT embeds integer timesteps: our sampler rounds 1000 t, DiTPipeline does not, and the times "
            f"{[round(t, 5) for t in times]} give other images; use multiples of 0.001. {OTHERWISE}"
        )
    scheduler = _stock("FlowMapEulerDiscreteScheduler")(shift=_trailing_shift(times))
    if not _same(offered := _flow_grid(scheduler, len(times), False), times):
        raise _no_flow_grid(scheduler, offered, times)
    return scheduler, {}


def _no_flow_grid(scheduler: Any, offered: list[float], times: list[float]) -> ValueError:
    return ValueError(
        f"with {len(times)} steps the stock {type(scheduler).__name__} can give by default the times "
        f"{[round(s, 4) for s in offered]}, but the student has {[round(t, 4) for t in times]}; train "
        f"it on a shifted trailing grid: few_step_times(FlowMatching(shift), N). {OTHERWISE}"
    )


# ------------------------------------------------------------------------------------------------ EDM
def cm_scheduler(
    process: PreconditionedEDM, times: list[float], fresh_noise: bool, start: float
) -> tuple[Any, dict[str, Any]]:
    """Scheduler of consistency models for a student with EDM's preconditioning.

    Its boundary condition is EDM's own c_skip and c_out at sigma_min = 0. Its noise levels lie on a grid of N between
    sigma_max and that, evenly spaced to the power 1 / rho, of which the call names some; N and rho are searched.

    Args:
        process: of the network, told 250 ln sigma.
        times: descending noise levels.
        fresh_noise: renoise, the one sampler there is for two or more steps.
        start: factor on the starting noise.

    Raises:
        ValueError: the pipeline has no such times, start or sampler; the message says what would do.
    """
    if process.time_factor != 250.0:
        raise ValueError(
            f"the network is told {process.time_factor:g} ln sigma, and ConsistencyModelPipeline tells 250 ln sigma. "
            f"{OTHERWISE}"
        )
    if not fresh_noise and len(times) > 1:
        raise ValueError(
            "ConsistencyModelPipeline adds fresh noise in every step; train the student with one step or with "
            f"sampler='renoise'. {OTHERWISE}"
        )
    if abs(start / times[0] - 1.0) > 1e-6:
        raise ValueError(
            f"the student starts from {start:g} x noise at sigma = {times[0]:g}, but ConsistencyModelPipeline from "
            f"{times[0]:g} x noise. {OTHERWISE}"
        )
    levels = {"sigma_min": 0.0, "sigma_max": times[0], "sigma_data": process.sigma_data, "clip_denoised": False}
    cls = _stock("CMStochasticIterativeScheduler")
    if len(times) == 1:
        return cls(num_train_timesteps=2, **levels), {}
    shares = np.array(times) / times[0]
    sizes = np.arange(len(times), 20_000, dtype=np.float64)[:, None]  # N - 1
    for rho in (7.0, 1.0):
        indices = np.round((1.0 - shares ** (1.0 / rho)) * sizes)
        errors = np.abs((1.0 - indices / sizes) ** rho / shares - 1.0).max(axis=1)
        if (found := np.flatnonzero(errors < 1e-6)).size:
            chosen = [int(i) for i in indices[found[0]]]
            scheduler = cls(num_train_timesteps=int(sizes[found[0], 0]) + 1, rho=rho, **levels)
            return scheduler, {"timesteps": chosen[::-1]}
    raise ValueError(
        f"the noise levels {[round(t, 4) for t in times]} lie on no grid of the stock {cls.__name__}; train the "
        f"student on few_step_times(EDM(), {len(times)}), or on two of any levels. {OTHERWISE}"
    )


# ------------------------------------------------------------------------------------------------ TrigFlow
def scm_scheduler(times: list[float], fresh_noise: bool) -> tuple[Any, dict[str, Any]]:
    """Scheduler of Sana-Sprint, which samples a flow-matching network in TrigFlow with fresh noise.

    Its latents are multiplied by ``sigma_data`` and divided again before the network sees them.

    Args:
        times: descending times in flow matching, the network's own process.
        fresh_noise: renoise with two or more steps.

    Raises:
        ValueError: the pipeline has no such times.
    """
    if not fresh_noise and len(times) > 1:
        raise ValueError(
            "SanaSprintPipeline has fresh noise in every step, and no other pipeline embeds the guidance scale; use "
            f"sampler='renoise'. {OTHERWISE}"
        )
    angles, _ = change_process(torch.tensor(times, dtype=torch.float64), FlowMatching(), TrigFlow())
    scheduler, wanted = _stock("SCMScheduler")(), angles.tolist()
    if len(times) == 2:
        return scheduler, {} if abs(wanted[1] - 1.3) < 1e-6 else {"intermediate_timesteps": wanted[1]}
    offered = [0.5 * math.pi * (1.0 - i / len(times)) for i in range(len(times))]
    if max(abs(a - b) for a, b in zip(offered, wanted)) > 1e-6:
        raise ValueError(
            f"with {len(times)} steps SanaSprintPipeline samples at the angles {[round(a, 4) for a in offered]}, but "
            f"the student has {[round(a, 4) for a in wanted]}; train it on these, or with 1 or 2 steps. {OTHERWISE}"
        )
    return scheduler, {"intermediate_timesteps": None}
