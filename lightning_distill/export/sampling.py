"""Samples from an export folder through stock diffusers, as a user of the folder would make them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_distill.export.check import network_without_weights, tensors_of_inputs
from lightning_distill.export.entries import ENTRIES, from_pipeline_layout, stock_inputs
from lightning_distill.export.folders import CONFIG, read_index
from lightning_distill.export.stock_run import run
from lightning_distill.export.two_passes import negative_inputs

__all__ = ["is_export", "sample_export"]


def is_export(folder: str | Path) -> bool:
    """Whether a folder was written by ``export_pipeline`` or ``export_lora``."""
    return (Path(folder).expanduser() / CONFIG).is_file()


@torch.no_grad()
def sample_export(
    folder: str | Path,
    n: int,
    *,
    seed: int = 0,
    prompts: Sequence[str] = (),
    cond: Mapping[str, Tensor] | None = None,
    classes: Sequence[int] | None = None,
    base: str | Path | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Call the pipeline of an export folder with the arguments that its card states.

    Args:
        folder: the export.
        n: number of samples; prompts, embeddings and classes are repeated in turn.
        seed: seed of all noise.
        prompts: texts, for folders with text encoders.
        cond: embeddings under our names instead, rows of any number.
        classes: labels, None for all in turn.
        base: pipeline folder of the base model, for LoRA files.

    Returns:
        samples in [-1, 1], (n, C, H, W) or (n, F, C, H, W), or latents for a folder without a decoder; and what they
        were made from.

    Raises:
        ValueError: what the pipeline needs is missing, or what it does not take is given.
    """
    folder = Path(folder).expanduser()
    config = json.loads((folder / CONFIG).read_text())
    entry = next((e for e in ENTRIES if e.name == config.get("pipeline")), None)
    if "pipeline" not in config:
        raise ValueError(f"{folder} holds bare weights, which no stock pipeline samples; see its README.md.")
    if "lora_file" in config and base is None:
        raise ValueError(f"{folder} is a LoRA file; give the pipeline folder of its base model as --base.")
    root = Path(base or folder).expanduser()
    parts = [key for key, value in read_index(root).items() if isinstance(value, list) and value[0] is not None]
    decodes = entry is None or "vae" in parts
    job: dict[str, Any] = {
        "folder": str(root),
        "keep": parts,
        "call": {**config["call"], **config["size"]},
        "seed": seed,
        "generator": config["takes_generator"],
        "dtype": config["dtype"],
        "output_type": "pt" if decodes else "latent",
    }
    if "lora_file" in config:
        job |= {"lora": [str(folder), config["lora_file"]]}
        job["scheduler"] = [config["scheduler"], str(folder / "scheduler")]
    tensors: dict[str, Tensor] = {}
    made_from: dict[str, Any] = {}
    if entry is None:
        if prompts or cond:
            raise ValueError(
                f"{folder} is conditioned on {_kind(config)}, not on text; leave out prompts and embeddings."
            )
        made_from = _labels(job, config, root, n, classes)
    elif cond:
        rows = {key: _repeat(value, n) for key, value in cond.items()}
        network = network_without_weights(root, entry)
        inputs = stock_inputs(entry, network, rows, config["size"])
        inputs |= negative_inputs(folder, entry, network, rows, config["size"])
        tensors = tensors_of_inputs(job, inputs, config["dtype"])
        if classes is not None:
            raise ValueError(f"{folder} is conditioned on text, not on classes; leave out --classes.")
    else:
        if not prompts or classes is not None:
            raise ValueError(
                f"{folder} is conditioned on text; give --prompt, or --embeddings for one without encoders."
            )
        if not any(key.startswith("text_encoder") for key in parts):
            raise ValueError(
                f"{folder} has no text encoder, so it cannot read a prompt; give --embeddings FILE.safetensors, or "
                "export again with --source, the pipeline folder of the teacher."
            )
        job["call"]["prompt"] = [prompts[i % len(prompts)] for i in range(n)]
        if "null_cond" in config and entry.negative_prompt:
            job["call"]["negative_prompt"] = [""] * n
        made_from = {"prompt": job["call"]["prompt"]}
    samples = run(job, tensors)
    if decodes:
        return samples * 2.0 - 1.0, made_from
    assert entry is not None
    latents = from_pipeline_layout(entry, network_without_weights(root, entry), samples, (n, *config["shape"]))
    return latents.transpose(1, 2) if latents.ndim == 5 else latents, made_from


def _labels(
    job: dict[str, Any], config: Mapping[str, Any], folder: Path, n: int, classes: Sequence[int] | None
) -> dict[str, Any]:
    if config["pipeline"] != "DiTPipeline":
        job["call"]["batch_size"] = n
    if not config["conditional"]:
        if classes is not None:
            raise ValueError(f"--classes {list(classes)}: the student has no classes.")
        return {}
    network = json.loads((folder / config["component"] / "config.json").read_text())
    total = network.get("num_embeds_ada_norm") or network.get("num_class_embeds") or 1
    total = config["null_class"] if config.get("null_class") is not None else total
    if wrong := [c for c in classes or () if not 0 <= c < total]:
        raise ValueError(f"--classes {wrong}: the student knows the classes 0 to {total - 1}.")
    known = list(classes or range(total))
    job["call"]["class_labels"] = [known[i % len(known)] for i in range(n)]
    return {"class_labels": job["call"]["class_labels"]}


def _kind(config: Mapping[str, Any]) -> str:
    return "class labels" if config["conditional"] else "nothing"


def _repeat(value: Tensor, n: int) -> Tensor:
    return value[torch.arange(n) % len(value)]
