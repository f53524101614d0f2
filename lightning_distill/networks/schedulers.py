"""What a diffusers scheduler says about the network it drives: noise process, prediction type, shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_distill.networks.families.base import Family, linear_mu
from lightning_distill.networks.json_files import read_json
from lightning_distill.networks.preconditioning import Preconditioning, read_preconditioning
from lightning_distill.processes import FlowMatching, NoiseProcess, TrigFlow, VariancePreserving

__all__ = ["read_preconditioned", "read_sampling_process", "read_scheduler"]


def read_scheduler(
    file: Path, family: Family | None = None, shape: Sequence[int] | None = None
) -> tuple[NoiseProcess | None, str | None]:
    """Noise process and prediction type of a diffusers scheduler; None for what it does not determine.

    A shift that depends on the resolution, mu in diffusers, is the fixed shift exp(mu) at one resolution.

    Args:
        file: ``scheduler_config.json``.
        family: of the network, for how its pipeline counts tokens and computes mu.
        shape: of one sample, for a shift that depends on it; None for the largest size the scheduler names.

    Raises:
        ValueError: the scheduler contradicts itself.
    """
    scheduler = _constructed(file)
    if scheduler is None:
        return None, None
    config, name = scheduler.config, type(scheduler).__name__
    kind = config.get("prediction_type", "epsilon")
    if name.startswith(("FlowMatch", "FlowMap")):
        return FlowMatching(_shift(config, family, shape)), "flow_prediction"
    flow = bool(config.get("use_flow_sigmas"))
    if flow != (kind == "flow_prediction"):
        raise ValueError(
            f"{file} contradicts itself: use_flow_sigmas={flow} and prediction_type={kind!r}; set both for a "
            "flow-matching model, neither for any other."
        )
    if flow:
        return FlowMatching(config.get("flow_shift", 1.0)), kind
    if (preconditioning := read_preconditioning(scheduler)) is not None:
        return preconditioning.process, "v_prediction"
    if name.startswith("SCM") or "beta_schedule" not in config:
        return None, None  # the scheduler holds half of the parameterisation
    return _variance_preserving(scheduler), kind


def read_preconditioned(file: Path) -> Preconditioning | None:
    """What stands between the samples and a network whose scheduler preconditions it; None for other schedulers.

    Args:
        file: ``scheduler_config.json``.
    """
    scheduler = _constructed(file)
    return None if scheduler is None else read_preconditioning(scheduler)


def _constructed(file: Path) -> Any:
    """The scheduler of a file, so that settings missing from it have the class's defaults; None for unknown classes."""
    import diffusers

    name = read_json(file).get("_class_name", "")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    return None if cls is None else cls.from_pretrained(str(file.parent), local_files_only=True)


def read_sampling_process(file: Path) -> NoiseProcess | None:
    """The process in which a pipeline samples where it is not the network's own: TrigFlow of Sana-Sprint."""
    return TrigFlow() if read_json(file).get("_class_name") == "SCMScheduler" else None


def _shift(config: Any, family: Family | None, shape: Sequence[int] | None) -> float:
    if not config.get("use_dynamic_shifting"):
        return float(config.shift)
    tokens = int(config.get("max_image_seq_len", 4096))
    if family is not None and shape is not None:
        tokens = family.tokens(shape)
    mu = (linear_mu if family is None else family.mu)(config, tokens)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _variance_preserving(scheduler: Any) -> VariancePreserving:
    config = scheduler.config
    zero = bool(config.get("rescale_betas_zero_snr"))
    if config.get("trained_betas") is None:
        process = VariancePreserving(
            config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps, zero
        )
        own = process.alpha(process.t_from_index(torch.arange(config.num_train_timesteps))).square()
        if torch.allclose(own, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6):
            return process
    # betas of its own, or a schedule changed afterwards, as CogVideoX does
    squared = scheduler.alphas_cumprod.double()
    if zero and squared[-1] < 1e-6:
        squared[-1] = 0.0  # some schedulers keep a crumb to divide by
    return VariancePreserving.from_alphas_cumprod(squared)
