"""Does an exported folder, loaded by stock diffusers, make the student's samples?"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_distill.export import stock_run
from lightning_distill.export.entries import ENTRIES, StockPipeline, stock_inputs, to_pipeline_layout
from lightning_distill.export.folders import CONFIG
from lightning_distill.export.two_passes import negative_inputs
from lightning_distill.generation import draw_noise, fitting_cond
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import family_of

__all__ = ["network_without_weights", "probe_cond", "tensors_of_inputs", "verify_export"]


@torch.no_grad()
def verify_export(
    out_dir: str | Path,
    expected: Tensor,
    *,
    seed: int = 0,
    class_labels: Sequence[int] | Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    base: str | Path | None = None,
    rounded: torch.dtype | None = None,
    fresh: bool = False,
    tolerance: float = 1e-5,
) -> float:
    """Load an exported folder with stock diffusers and compare what it makes with our samples.

    Args:
        out_dir: folder written by ``export_pipeline`` or ``export_lora``.
        expected: our samples x0 made with ``generator=torch.Generator().manual_seed(seed)``, (N, C, ...); pixels, of
            which [-1, 1] is visible, or latents.
        seed: seed of the starting noise and of the fresh noise.
        class_labels: labels of the N samples; None for networks without.
        cond: embeddings of the N samples under our names, for text-conditioned networks.
        base: pipeline folder of the base model, for LoRA files.
        rounded: dtype to which the samples' network has rounded the weights of ``base``, which are rounded for the
            comparison as well; None for not at all.
        fresh: run the pipeline in a new process that knows nothing of this package.
        tolerance: largest accepted difference: on images in [0, 1]; of latents relative to the largest value above 1.
            Guidance in two passes multiplies rounding, hence this, by 2 w - 1.

    Returns:
        the largest difference.

    Raises:
        ValueError: the images or latents differ by more than ``tolerance``.
        RuntimeError: the fresh process failed.
    """
    folder = Path(out_dir)
    config = json.loads((folder / CONFIG).read_text())
    entry = next((e for e in ENTRIES if e.name == config["pipeline"]), None)
    job: dict[str, Any] = {
        "folder": str(folder if base is None else base),
        "keep": [config["component"], "transformer_2", "scheduler", "vae"],
        "call": {**config["call"], **config["size"]},
        "seed": seed,
        "generator": config["takes_generator"],
        "dtype": config["dtype"],
        "rounded": None if rounded is None else str(rounded).removeprefix("torch."),
        "output_type": "pt" if entry is None else "latent",
    }
    if "lora_file" in config:
        job["lora"] = [str(folder), config["lora_file"]]
        job["scheduler"] = [config["scheduler"], str(folder / "scheduler")]
    expected = expected.detach().float().cpu()
    if entry is None:
        tensors = _labelled(job, config, folder, expected, class_labels)
    else:
        tensors = _embedded(job, config, entry, folder, Path(job["folder"]), expected, cond or {}, seed)
    difference = _in_fresh_process(job, tensors) if fresh else stock_run.difference(job, tensors)
    tolerance *= 2.0 * config.get("guidance_scale", 1.0) - 1.0
    if not difference <= tolerance:
        raise ValueError(
            f"the pipeline in {folder.name} makes other images than the student (largest difference "
            f"{difference:.3g}, allowed {tolerance:g}); compare seed, conditions, weights (student or "
            "average) and dtype of the two calls."
        )
    return difference


def _labelled(
    job: dict[str, Any], config: Mapping[str, Any], folder: Path, expected: Tensor, labels: Any
) -> dict[str, Tensor]:
    """Complete the call of a pipeline of class labels or nothing, whose images are compared."""
    if labels is not None:
        job["call"]["class_labels"] = torch.as_tensor(labels).tolist()
    if config["pipeline"] != "DiTPipeline":
        job["call"]["batch_size"] = len(expected)
    elif (folder / "vae").is_dir():
        vae: Any = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=getattr(torch, config["dtype"]))
        expected = vae.decode(expected.to(vae.dtype) / vae.config.scaling_factor).sample.float()
    return {"expected": (expected / 2 + 0.5).clamp(0, 1).contiguous()}


def _embedded(
    job: dict[str, Any],
    config: Mapping[str, Any],
    entry: StockPipeline,
    out_dir: Path,
    folder: Path,
    expected: Tensor,
    cond: Mapping[str, Any],
    seed: int,
) -> dict[str, Tensor]:
    """Complete the call of a text-conditioned pipeline, whose latents are compared."""
    size = config["size"]
    if not size:
        raise ValueError(f"{CONFIG} does not say the size of a sample; export with shape=[channels, height, width].")
    network = network_without_weights(folder, entry)
    inputs = stock_inputs(entry, network, cond, size) | negative_inputs(out_dir, entry, network, cond, size)
    tensors = tensors_of_inputs(job, inputs, config["dtype"])
    tensors["expected"] = to_pipeline_layout(entry, network, expected).contiguous()
    if entry.latents_first is not None:
        noise = draw_noise(expected.shape, torch.Generator().manual_seed(seed))
        tensors["input.latents"] = noise.permute(entry.latents_first).contiguous()
    return tensors


def tensors_of_inputs(job: dict[str, Any], inputs: Mapping[str, Any], dtype: str) -> dict[str, Tensor]:
    """Tensors of a call by the names that ``stock_run`` reads; what is none goes into the job's call."""
    tensors = {}
    for key, value in inputs.items():
        if isinstance(value, Tensor):
            tensors[f"input.{key}"] = _input(value, dtype)
        elif isinstance(value, list):
            tensors |= {f"input.{key}.{row}": _input(v, dtype) for row, v in enumerate(value)}
        else:
            job["call"][key] = value
    return tensors


def _input(value: Tensor, dtype: str) -> Tensor:
    value = value.to(getattr(torch, dtype)) if value.is_floating_point() else value
    return value.detach().cpu().contiguous().clone()


def network_without_weights(folder: Path, entry: StockPipeline) -> Any:
    """The network of a pipeline folder for what its class and configuration say."""
    cls: Any = getattr(diffusers, entry.model_class)
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder / entry.component))


def _in_fresh_process(job: Mapping[str, Any], tensors: dict[str, Tensor]) -> float:
    with tempfile.TemporaryDirectory() as temporary:
        described, inputs = Path(temporary) / "job.json", Path(temporary) / "tensors.safetensors"
        absolute = {**job, "folder": str(Path(job["folder"]).absolute())}
        described.write_text(json.dumps(absolute))
        save_file(tensors, inputs)
        run = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
        words = [sys.executable, "-c", run, stock_run.__file__, str(described), str(inputs)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        raise RuntimeError(f"the stock pipeline does not run in a process of its own: {reason}")
    return float(done.stdout.strip().splitlines()[-1])


def probe_cond(denoiser: Denoiser, n: int, size: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random embeddings for the comparison, padded where there is a mask, with the sizes the pipeline computes.

    They have the lengths of ``generation.fitting_cond``.

    Args:
        denoiser: the student.
        n: number of samples.
        size: ``height`` and ``width`` of the call.
        seed: of the embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    network = denoiser.network
    made = fitting_cond(denoiser, n)
    for key, value in made.items():
        if key == "time_ids":
            row: list[float] = [size["height"], size["width"], 0, 0, size["height"], size["width"]]
        elif key == "resolution":
            row = [size["height"], size["width"]]
        elif key == "aspect_ratio":
            row = [size["height"] / size["width"]]
        elif key == "encoder_attention_mask":
            made[key] = (torch.arange(value.shape[1]) < value.shape[1] - 2).long().expand(n, -1).contiguous()
            continue
        else:
            made[key] = torch.randn(value.shape, generator=generator)
            continue
        made[key] = torch.tensor(row, dtype=torch.float32).expand(n, -1).contiguous()
    assert set(family_of(network).required) <= set(made)
    return made
