"""Which stock diffusers pipeline and scheduler reproduce a student, with default settings.

    network      process, output         sampler  pipeline                  scheduler
    UNet2DModel  VP: epsilon, sample, v  renoise  ConsistencyModelPipeline  LCM, original_inference_steps=N
    UNet2DModel  VP: epsilon, sample, v  ode      ConsistencyModelPipeline  trailing DDIM; Euler for students
                                                                            starting from sigma(t) x noise
    UNet2DModel  flow: flow_prediction   renoise  DDPMPipeline              FlowMatchLCM, shift and end fitted
    (no labels)                          ode      DDPMPipeline              FlowMatchEuler, likewise
    DiT + VAE    VP: epsilon, sample, v  both     DiTPipeline               LCM, trailing DDIM
    DiT + VAE    flow: flow_prediction   ode      DiTPipeline               FlowMapEuler, shift fitted

With one step both samplers are the same. Everything else is refused with what would do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, EulerDiscreteScheduler, LCMScheduler, UNet2DModel
from torch import nn

from lightning_distill.processes import FlowMatching, NoiseProcess, VariancePreserving
from lightning_distill.times import validate_times

__all__ = ["StockParts", "start_scale", "stock_parts"]

_OTHERWISE = "export_weights(...) writes the weights and a card for use with this package."


@dataclass(frozen=True)
class StockParts:
    """Stock parts that reproduce a student.

    Attributes:
        pipeline: pipeline class of diffusers.
        scheduler: scheduler whose default grid is the student's times.
        call: arguments of every call, which a pipeline folder cannot store.
        network_name: component name of the network in the pipeline.
        conditional: whether a call takes class labels.
    """

    pipeline: type
    scheduler: Any
    call: dict[str, Any]
    network_name: str
    conditional: bool

    @property
    def takes_generator(self) -> bool:
        """False where the generator reaches the starting noise only and the global seed drives all draws."""
        return self.pipeline is not diffusers.DiTPipeline


def stock_parts(
    network: nn.Module,
    process: NoiseProcess,
    prediction_type: str,
    times: list[float],
    sampler: str,
    vae: Any | None,
    given_start: float | None,
) -> StockParts:
    """Choose the pipeline and scheduler of a student.

    Args:
        network: the student's network.
        process: noise process of the network.
        prediction_type: what the network outputs.
        times: the student's descending native times, without the final 0.
        sampler: ``renoise`` or ``ode``.
        vae: autoencoder of a latent DiT, else None.
        given_start: factor on the starting noise, None to ask the process.

    Raises:
        ValueError: nothing in diffusers reproduces this student; the message says what would do.
    """
    validate_times(times, process)
    name = type(network).__name__
    if sampler not in ("renoise", "ode"):
        raise ValueError(f"sampler={sampler!r} cannot be exported; stock schedulers exist for 'renoise' and 'ode'.")
    if not isinstance(network, (UNet2DModel, DiTTransformer2DModel)):
        raise ValueError(
            f"{name} has no stock diffusers pipeline; pipelines are written for UNet2DModel and "
            f"DiTTransformer2DModel. {_OTHERWISE}"
        )
    if any("lora_" in key for key, _ in network.named_parameters()):
        raise ValueError(f"this {name} still carries adapters; pass the role to export_denoiser, which merges them.")
    settings: Any = network.config
    is_dit = isinstance(network, DiTTransformer2DModel)
    if is_dit and vae is None:
        raise ValueError(
            f"DiTPipeline decodes latents, so a {name} is exported with its autoencoder: pass "
            f"vae=AutoencoderKL(...). For a transformer in pixel space, {_OTHERWISE}"
        )
    if not is_dit and vae is not None:
        raise ValueError(f"the stock pipelines of {name} have no autoencoder; leave out vae=. {_OTHERWISE}")
    if vae is not None and vae.config.latent_channels != settings.in_channels:
        raise ValueError(
            f"the autoencoder has {vae.config.latent_channels} latent channels and the {name} "
            f"{settings.in_channels}; pass the autoencoder of the teacher."
        )
    if not isinstance(settings.sample_size, int):
        raise ValueError(
            f"the stock pipelines of {name} sample squares, but sample_size is {settings.sample_size}; {_OTHERWISE}"
        )
    conditional = is_dit or settings.num_class_embeds is not None
    fresh_noise = sampler == "renoise" and len(times) > 1
    start = start_scale(process, times[0]) if given_start is None else given_start
    call: dict[str, Any] = {"num_inference_steps": len(times)}
    if isinstance(process, VariancePreserving):
        scheduler = _vp_scheduler(process, prediction_type, times, fresh_noise, start, scales_start=not is_dit)
        pipeline: type = diffusers.ConsistencyModelPipeline
    elif isinstance(process, FlowMatching):
        if prediction_type != "flow_prediction":
            raise ValueError(
                f"stock flow-matching schedulers read flow_prediction, not {prediction_type}; {_OTHERWISE}"
            )
        _check_start(start, "flow-matching schedulers")
        if is_dit and fresh_noise:
            raise ValueError(
                "no stock flow-matching scheduler with fresh noise runs in DiTPipeline; train the student "
                f"with one step or with sampler='ode'. {_OTHERWISE}"
            )
        if conditional and not is_dit:
            raise ValueError(
                f"no stock pipeline gives class labels to a flow-matching {name} (DDPMPipeline has none, and "
                "ConsistencyModelPipeline cannot drive flow-matching schedulers); use a variance-preserving "
                f"process or a DiT. {_OTHERWISE}"
            )
        scheduler = _flow_map(times) if is_dit else _flow_match(times, fresh_noise)
        pipeline = diffusers.DDPMPipeline
    else:
        raise ValueError(
            f"no stock pipeline samples a {name} in {type(process).__name__}; a network that itself works in "
            f"VariancePreserving or FlowMatching (Denoiser's network_process) can be exported. {_OTHERWISE}"
        )
    if is_dit:
        pipeline, call["guidance_scale"] = diffusers.DiTPipeline, 1.0
    return StockParts(pipeline, scheduler, call, "transformer" if is_dit else "unet", conditional)


def start_scale(process: NoiseProcess, t: float) -> float:
    """Factor on the unit noise from which a student starts at native time ``t``."""
    return process.prior_std(t)


def _check_start(start: float, owner: str) -> None:
    if abs(start - 1.0) > 1e-6:
        raise ValueError(
            f"the student starts from {start:.6g} x noise, but stock {owner} from unit noise, which gives "
            "other images; start at t_max of a process with zero terminal SNR or of FlowMatching. "
            f"{_OTHERWISE}"
        )


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


def _vp_scheduler(
    process: VariancePreserving,
    prediction_type: str,
    times: list[float],
    fresh_noise: bool,
    start: float,
    scales_start: bool,
) -> Any:
    if prediction_type == "flow_prediction":
        raise ValueError(
            "stock schedulers of variance-preserving processes read epsilon, sample and v_prediction, not "
            f"flow_prediction; {_OTHERWISE}"
        )
    total, n = process.num_train_timesteps, len(times)
    indices = process.index_from_t(torch.tensor(times, dtype=torch.float64)).tolist()
    wanted = [round(i) for i in indices]
    betas = {"prediction_type": prediction_type, **_betas(process)}
    trailing = {"timestep_spacing": "trailing", **betas}
    scheduler: Any
    offered: list[float] | None
    if scales_start and not fresh_noise and not process.zero_terminal_snr and abs(start - 1.0) > 1e-6:
        # its start is sigma(t_max) x noise
        scheduler = EulerDiscreteScheduler(**trailing)
        offered = _grid(scheduler, n)
        level = float(scheduler.init_noise_sigma)
        if abs(level / math.hypot(level, 1.0) - start) > 1e-6:
            _check_start(start, "VP schedulers")
    elif fresh_noise or n == 1:
        _check_start(start, "LCM schedulers")
        if wanted[-1] == 0:
            raise ValueError(
                "the student's last time is the scheduler timestep 0, where the stock LCMScheduler returns "
                f"its input unchanged; take fewer steps than {total}. {_OTHERWISE}"
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
        _check_start(start, "DDIM schedulers")
        scheduler = DDIMScheduler(set_alpha_to_one=True, clip_sample=False, **trailing)
        # it steps down by total // n, whatever its next timestep is
        offered = _grid(scheduler, n) if total % n == 0 else None
    if offered != [float(i) for i in wanted] or max(abs(i - w) for i, w in zip(indices, wanted)) > 1e-6:
        grid = "none" if offered is None else str([int(i) for i in offered])
        raise ValueError(
            f"the student's times are the scheduler timesteps {[round(i, 3) for i in indices]}, but the grid "
            f"that the stock {type(scheduler).__name__} can give with {n} steps is {grid}; train the student "
            f"on few_step_times(process, N) with N a divisor of {total}. {_OTHERWISE}"
        )
    return scheduler


def _stock(name: str) -> Any:
    try:
        return getattr(diffusers, name)
    except AttributeError:
        raise ValueError(
            f"this export needs diffusers.{name}, which version {diffusers.__version__} does not have; "
            "upgrade diffusers."
        ) from None


def _check_flow_grid(scheduler: Any, times: list[float]) -> Any:
    scheduler.set_timesteps(len(times))
    offered = [float(s) for s in scheduler.sigmas][: len(times)]
    if max(abs(a - b) for a, b in zip(offered, times)) > 1e-6:
        raise ValueError(
            f"with {len(times)} steps the stock {type(scheduler).__name__} can give by default the times "
            f"{[round(s, 4) for s in offered]}, but the student has {[round(t, 4) for t in times]}; train "
            f"it on a shifted trailing grid: few_step_times(FlowMatching(shift), N). {_OTHERWISE}"
        )
    return scheduler


def _flow_match(times: list[float], fresh_noise: bool) -> Any:
    """The scheduler whose default grid is ``times``.

    By default these schedulers space their grid down to 0.001 rather than 1 / N and shift it. Stretching its
    end to the last time, under another shift, restores every shifted trailing grid: both are Moebius
    functions of the step number that are 1 at step 0, which leaves two numbers to fit. The shift is found by
    bisection on the second time.
    """
    cls = _stock("FlowMatchLCMScheduler" if fresh_noise else "FlowMatchEulerDiscreteScheduler")
    n = len(times)
    if n == 1:
        return _check_flow_grid(cls(shift=1.0), times)

    def second_time(log_shift: float) -> float:
        scheduler = cls(shift=math.exp(log_shift), shift_terminal=times[-1])
        scheduler.set_timesteps(n)
        return float(scheduler.sigmas[1])

    low, high = (0.0, 0.0) if n == 2 else (-6.0, 6.0)
    while high - low > 1e-9:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if second_time(middle) < times[1] else (low, middle)
    return _check_flow_grid(cls(shift=math.exp(0.5 * (low + high)), shift_terminal=times[-1]), times)


def _flow_map(times: list[float]) -> Any:
    """Trailing Euler for DiTPipeline, with the shift k = t (1 - s) / (s (1 - t)) read off the second time."""
    shift = 1.0
    if len(times) > 1:
        s = 1.0 - 1.0 / len(times)
        shift = times[1] * (1.0 - s) / (s * (1.0 - times[1]))
    if any(abs(1000.0 * t - round(1000.0 * t)) > 1e-6 for t in times):
        raise ValueError(
            "a DiT embeds integer timesteps: our sampler rounds 1000 t, DiTPipeline does not, and the times "
            f"{[round(t, 5) for t in times]} give other images; use multiples of 0.001. {_OTHERWISE}"
        )
    return _check_flow_grid(_stock("FlowMapEulerDiscreteScheduler")(shift=shift), times)
