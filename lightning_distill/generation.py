"""Sampling from any denoiser: the one path behind ``module.sample``, evaluation, the commands and the export test."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.batch import slice_cond
from lightning_distill.guidance import Guidance, guided, is_told
from lightning_distill.losses.oftsr import perturbed_source
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import example_cond
from lightning_distill.networks.signatures import call_parameters
from lightning_distill.networks.text_entries import MASK, TOKENS
from lightning_distill.parameterisations import TrajectoryMap, has_own_target, takes_target
from lightning_distill.prediction import Prediction
from lightning_distill.samplers import SAMPLERS, simulate

__all__ = [
    "bound",
    "default_cond",
    "draw_noise",
    "fitting_cond",
    "generate",
    "given_cond",
    "index_noise",
    "needed_conditions",
    "stock_noise",
]


def default_cond(denoiser: Denoiser, n: int, first: int = 0) -> dict[str, Tensor]:
    """Conditions of n samples when the user gives none.

    The classes in turn; nothing for unconditional networks; zeros for what a network cannot run without (embeddings,
    control pictures), for shapes, memory and speed: samples to look at have ``evaluation.conditions``.

    Args:
        denoiser: the network.
        n: number of samples.
        first: index of the first sample.
    """
    made = fitting_cond(denoiser, n) if denoiser.family.required else {}
    if denoiser.num_classes is None:
        return made
    needed = {key: value for key, value in made.items() if key in denoiser.family.required}
    return {**needed, "class_labels": torch.arange(first, first + n) % denoiser.num_classes}


def needed_conditions(denoiser: Denoiser) -> list[str]:
    """Conditions that a network cannot be sampled without and that the classes in turn do not give.

    Args:
        denoiser: of any family; of a plain module the arguments of its ``forward`` that have no default count.
    """
    needed = list(denoiser.family.required)
    if not denoiser.family.cond_keys:
        own = list(call_parameters(denoiser.network).values())[2:]
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed += [p.name for p in own if p.default is p.empty and p.kind in kinds and p.name not in ("r", "guidance")]
    known = set() if denoiser.num_classes is None else {"class_labels"}
    return [key for key in dict.fromkeys(needed) if key not in known]


def given_cond(denoiser: Denoiser, n: int, cond: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The user's conditions of n samples, or the classes in turn.

    Raises:
        ValueError: none are given, and the network needs what the classes do not say; or they have other numbers of
            rows, or labels that are no integers or none of the network's classes.
        TypeError: they are no mapping.
    """
    if cond is not None:
        _check_cond(denoiser, n, cond)
        return cond
    if missing := needed_conditions(denoiser):
        name = type(denoiser.network).__name__
        raise ValueError(
            f"{name} needs {', '.join(missing)} for every sample; give cond={{...}} with tensors of {n} rows, for "
            "example of a batch of the data module, or sample the exported pipeline with prompts."
        )
    return default_cond(denoiser, n)


def _check_cond(denoiser: Denoiser, n: int, cond: Mapping[str, Any]) -> None:
    if not isinstance(cond, Mapping):
        raise TypeError(f"cond is a {type(cond).__name__}; give a mapping such as {{'class_labels': tensor}}.")
    for key, value in cond.items():
        if isinstance(value, Tensor) and value.ndim and len(value) != n:
            raise ValueError(
                f"cond[{key!r}] has {len(value)} rows, and {n} samples are asked for; give one row for each."
            )
    labels, count = cond.get("class_labels"), denoiser.num_classes
    if labels is None or count is None:
        return
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise ValueError(f"cond['class_labels'] must be a tensor of {n} integers.")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) > count):  # count itself may be the null class
        raise ValueError(
            f"cond['class_labels'] has the labels {int(labels.min())} to {int(labels.max())}; the network has the "
            f"classes 0 to {count - 1}."
        )


def fitting_cond(denoiser: Denoiser, n: int) -> dict[str, Tensor]:
    """Example conditions (zeros, ones for masks) of the length of the null condition where one is stored.

    Guided calls have both, and want them of one length.

    Args:
        denoiser: the network.
        n: number of rows.
    """
    made = example_cond(denoiser.network, n)
    for key, value in denoiser.family.null.items():
        if key in made and isinstance(value, Tensor):
            made[key] = made[key].new_full((n, *value.shape[1:]), float(key == MASK))
    if MASK in made and TOKENS in made and not isinstance(denoiser.family.null.get(MASK), Tensor):
        made[MASK] = made[MASK].new_ones(n, made[TOKENS].shape[1])
    return made


def draw_noise(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Unit Gaussian noise from a generator, on the generator's device (CPU without one)."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device if generator else "cpu")


def stock_noise(denoiser: Denoiser, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Unit Gaussian noise shaped like x, drawn in the layout in which the family's stock pipeline keeps its latents.

    Pipelines that pack patches into tokens, or put frames before channels, draw the noise of later steps so.

    Args:
        denoiser: the network.
        x: samples, (B, C, ...).
        generator: source of the noise.
    """
    family = denoiser.family
    layout = x if family.pack is None else family.pack(x)
    if family.unpack is None or not isinstance(layout, Tensor):
        return draw_noise(x.shape, generator).to(x)
    return family.unpack(draw_noise(layout.shape, generator).to(x), x.shape)


def index_noise(n: int, shape: Sequence[int], seed: int, first: int = 0) -> Tensor:
    """Fixed noise of samples ``first .. first + n - 1``, independent of how they are batched; on the CPU."""
    from lightning_distill.randomness import RandomStreams

    return RandomStreams(seed).normal("sample", 0, first, (n, *shape))


def bound(
    denoiser: Denoiser, cond: Mapping[str, Any], sampler: str, guidance_scale: float | Guidance = 1.0
) -> Callable[..., Prediction]:
    """What samplers call: a network with its conditions and guidance.

    Students given a target time (``TwoTime``) become a ``TrajectoryMap``, of which every sampler takes what it needs:
    the jump to the next time (``flow_map``), to 0 (``renoise``), or the direction at t itself (``ode`` and higher
    orders). Networks that have one from the start (AnyFlow, a plain module's argument ``r``) do so for ``flow_map`` and
    where they were trained to jump (``Denoiser.jumps``); else they predict at r = t, as methods that know nothing of r
    train them and as their stock pipeline runs them.

    Args:
        denoiser: student or teacher.
        cond: conditions on the network's device.
        sampler: name in ``samplers.SAMPLERS``.
        guidance_scale: w of classifier-free guidance, for networks of one time and those that embed a scale; 1 leaves
            them to their own ``sampling_guidance``, or scale, where they have one. Or a policy, of whose random scales
            the median is taken.

    Raises:
        ValueError: ``flow_map`` for a network without a target time, or guidance of jumps.
    """
    policy = guidance_scale if isinstance(guidance_scale, Guidance) else None
    scale = guidance_scale.scale if isinstance(guidance_scale, Guidance) else guidance_scale
    two_times = takes_target(denoiser)
    maps = sampler == "flow_map" or denoiser.jumps or not has_own_target(denoiser)
    if two_times and maps and (scale == 1.0 or is_told(denoiser)):
        return TrajectoryMap(denoiser, cond, None if scale == 1.0 else torch.tensor(scale))
    if sampler == "flow_map" or (two_times and maps and sampler in ("renoise", "gamma")):
        name = type(denoiser.network).__name__
        if two_times:
            raise ValueError(
                f"guidance_scale={scale:g} has no meaning for the flow map of this {name}, whose jumps were "
                "trained with their guidance; use guidance_scale=1."
            )
        raise ValueError(
            f"sampler='flow_map' needs a network with a target time, and this {name} takes one time; use 'renoise' or "
            "'ode', or a student with student=TwoTime(...)."
        )

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        t = t.to(x.device).expand(len(x)) if t.ndim == 0 else t
        own = denoiser.sampling_guidance if policy is None and scale == 1.0 else policy
        if own is None:
            return guided(denoiser, x, t, cond, scale)
        return own(denoiser, x, t, cond, t.new_full((len(x),), 0.5))

    if sampler == "adams" and denoiser.coefficients is not None:
        denoise.coefficients = denoiser.coefficients  # type: ignore[attr-defined]
    return denoise


def beginning(denoiser: Denoiser, noise: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """Where samples begin: at noise, or at the pictures that a flow between pictures and their sources restores.

    Args:
        denoiser: whose family knows (``start``).
        noise: unit Gaussian, (B, ...).
        cond: conditions of the samples, on the same device.

    Raises:
        ValueError: the condition at which samples begin is missing, or has another shape than they.
    """
    if denoiser.family.start is None:
        return noise
    name, share = denoiser.family.start
    found = cond.get(name)
    if not isinstance(found, Tensor) or found.shape != noise.shape:
        seen = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else "missing"
        raise ValueError(
            f"samples of this {type(denoiser.network).__name__} begin at the condition {name!r}, which is {seen}; give "
            f"it in the shape of the samples, {tuple(noise.shape)}."
        )
    return perturbed_source(found, noise, share)


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Mapping[str, Any],
    times: Sequence[float],
    sampler: str = "renoise",
    *,
    guidance_scale: float | Guidance = 1.0,
    generator: torch.Generator | None = None,
    noise_scale: float = 1.0,
    noise_share: float = 0.2,
    batch_size: int | None = None,
    noisy: bool = False,
    until: float | None = None,
) -> Tensor:
    """Samples x0 from starting noise.

    Fresh noise of stochastic samplers is drawn step by step from ``generator``, after the starting noise: the order in
    which diffusers' pipelines draw theirs, so equal seeds give equal images.

    Args:
        denoiser: student or teacher.
        noise: unit Gaussian starting noise, (N, ...); its device does not matter. Flows that begin at a condition have
            it in their share of noise.
        cond: conditions, tensors of N rows.
        times: descending native times without the final 0.
        sampler: name in ``samplers.SAMPLERS``.
        guidance_scale: w of classifier-free guidance, or a policy; 1 is none.
        generator: source of the fresh noise.
        noise_scale: factor on the fresh noise of the renoise sampler.
        noise_share: share of fresh noise of the gamma sampler.
        batch_size: samples per network call; None means all at once. Stochastic samplers draw per chunk.
        noisy: ``noise`` is the noisy sample at ``times[0]`` itself, for example what ``until`` left; not for
            the sampler ``start_noise``, which adds the noise of the start to every prediction.
        until: native time below the last of ``times`` at which to stop, with samplers ``ode`` and ``renoise``.

    Returns:
        x0, or x_t at ``until``, (N, ...), float32, on the denoiser's device.

    Raises:
        ValueError: an unknown sampler, or one that cannot stop.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(sorted(SAMPLERS))}.")
    if until is not None and sampler not in ("ode", "renoise"):
        raise ValueError(f"sampler={sampler!r} cannot stop at t={until:g}; use ode or renoise.")
    if noisy and sampler == "start_noise":
        raise ValueError("sampler='start_noise' needs the starting noise itself; use ode for what another began.")
    device, process = denoiser.device, denoiser.process
    size = batch_size or len(noise)
    chunks = []
    for start in range(0, len(noise), size):
        part = noise[start : start + size].to(device)
        part_cond = slice_cond(cond, slice(start, start + size), len(noise))
        part_cond = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in part_cond.items()}

        denoise = bound(denoiser, part_cond, sampler, guidance_scale)

        def fresh(_step: int, x: Tensor) -> Tensor:
            return stock_noise(denoiser, x, generator)

        kwargs: dict[str, Any] = {"noise": fresh}
        if sampler == "renoise":
            kwargs["noise_scale"] = noise_scale
        if sampler == "gamma":
            kwargs["share"] = noise_share
        x = part if noisy else process.prior(beginning(denoiser, part, part_cond), times[0])
        if until is not None:
            kind: Literal["ode", "renoise"] = "ode" if sampler == "ode" else "renoise"
            chunks.append(simulate(denoise, x, [*times, until], process, len(times), kind, **kwargs))
            continue
        chunks.append(SAMPLERS[sampler](denoise, x, times, process, **kwargs))
    return torch.cat(chunks)
