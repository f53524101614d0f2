"""Student -> a folder that stock diffusers loads and samples exactly as we do, without any code of ours.

``DiffusionPipeline.from_pretrained(folder)`` restores the network and a scheduler whose *default* settings
are the student's sampler; what a scheduler cannot store (steps, guidance off) stands in the model card.

``stock.stock_parts`` chooses the parts and refuses what no stock pipeline samples; ``export_weights`` writes
the weights and the card of every network.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from lightning_distill import __version__
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.processes import NoiseProcess, change_process
from lightning_distill.stock import start_scale as scale_of_start
from lightning_distill.stock import stock_parts
from lightning_distill.times import validate_times

__all__ = ["export_denoiser", "export_pipeline", "export_weights", "verify_export"]

_CONFIG = "distill_config.json"


# --------------------------------------------------------------------------------------- public functions
def export_pipeline(
    network: nn.Module,
    process: NoiseProcess,
    prediction_type: str,
    times: Sequence[float],
    sampler: str,
    out_dir: str | Path,
    *,
    vae: nn.Module | None = None,
    null_class: int | None = None,
    start_scale: float | None = None,
    card: Mapping[str, Any] | None = None,
    license: str = "apache-2.0",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a student as a pipeline folder for stock diffusers.

    The folder appears at once when everything is written; an interrupted export leaves nothing behind.

    Args:
        network: the student's network, a ``UNet2DModel`` or ``DiTTransformer2DModel`` without adapters.
        process: noise process of the network.
        prediction_type: what the network outputs.
        times: the student's descending native times, without the final 0.
        sampler: ``renoise`` or ``ode``.
        out_dir: folder to create.
        vae: the decoder of a latent DiT.
        null_class: label that means "no class", named in the card.
        start_scale: factor on the unit noise that the student starts from; None asks ``process.prior``.
        card: JSON values for the model card, for example ``title``, ``teacher``, ``teacher_sha256``.
        license: SPDX name in the card's header.
        dtype: floating-point type of the saved weights, None for float32.
        overwrite: replace an earlier export in ``out_dir``.

    Returns:
        the folder.

    Raises:
        ValueError: no stock pipeline reproduces this student; the message says which times or parts would do.
        FileExistsError: ``out_dir`` exists and is not to be overwritten.
    """
    times = [float(t) for t in times]
    _check_target(Path(out_dir), overwrite)
    parts = stock_parts(network, process, prediction_type, times, sampler, vae, start_scale)
    network = _cast(network, dtype)
    modules = {parts.network_name: network, "scheduler": parts.scheduler}
    if vae is not None:
        modules["vae"] = _cast(vae, dtype)
    config = _config(network, process, prediction_type, times, sampler, card, dtype)
    config |= {
        "pipeline": parts.pipeline.__name__,
        "scheduler": type(parts.scheduler).__name__,
        "call": parts.call,
        "conditional": parts.conditional,
        "takes_generator": parts.takes_generator,
    }
    with _atomic_folder(Path(out_dir), overwrite) as folder:
        parts.pipeline(**modules).save_pretrained(folder, safe_serialization=True)
        _drop_local_paths(folder)
        usage = _pipeline_usage(config, network, null_class)
        _finish(folder, config, usage, license, "diffusers")
    return Path(out_dir)


def export_denoiser(
    denoiser: Denoiser, times: Sequence[float], sampler: str, out_dir: str | Path, **options: Any
) -> Path:
    """``export_pipeline`` of a role: adapters are merged, times are brought into the network's own process.

    Args:
        denoiser: the student, or one of its averages.
        times: descending native times of ``denoiser.process``.
        sampler: ``renoise`` or ``ode``.
        out_dir: folder to create.
        options: keyword arguments of ``export_pipeline``.

    Raises:
        ValueError: as ``export_pipeline``; or the network sees rescaled data, which no scheduler undoes.
    """
    from lightning_distill.networks.lora import merged_network

    process, start = denoiser.process, scale_of_start(denoiser.process, times[0])
    if denoiser.network_process is not None:
        if denoiser.data_scale != 1.0:
            raise ValueError(
                f"the student's network works on data divided by {denoiser.data_scale:g}, which no stock "
                "scheduler multiplies back; train on data of unit standard deviation, or use export_weights."
            )
        source, process = process, denoiser.network_process
        inner, factor = change_process(torch.tensor(list(times), dtype=torch.float64), source, process)
        times, start = inner.tolist(), start * float(factor[0])
    options.setdefault("null_class", denoiser.null_class)
    network = merged_network(denoiser)
    return export_pipeline(
        network, process, denoiser.prediction_type, times, sampler, out_dir, start_scale=start, **options
    )


def export_weights(
    network: nn.Module,
    process: NoiseProcess,
    prediction_type: str,
    times: Sequence[float],
    sampler: str,
    out_dir: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    license: str = "apache-2.0",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write any student's weights (``model.safetensors``), settings and card.

    Loading them needs the network's class. Arguments and atomicity are those of ``export_pipeline``; every
    process, sampler and valid time list is accepted.
    """
    times = [float(t) for t in times]
    validate_times(times, process)
    network = _cast(network, dtype)
    config = _config(network, process, prediction_type, times, sampler, card, dtype)
    with _atomic_folder(Path(out_dir), overwrite) as folder:
        save_model(network, str(folder / "model.safetensors"))
        _finish(folder, config, _weights_usage(config), license, "lightning-distill")
    return Path(out_dir)


@torch.no_grad()
def verify_export(
    out_dir: str | Path,
    expected: Tensor,
    *,
    seed: int = 0,
    class_labels: Sequence[int] | Tensor | None = None,
    tolerance: float = 1e-5,
) -> float:
    """Load an exported folder with stock diffusers and compare its images with our samples.

    Args:
        out_dir: folder written by ``export_pipeline``.
        expected: our samples x0 made with ``generator=torch.Generator().manual_seed(seed)``, (N, C, H, W);
            pixels, of which [-1, 1] is visible, or latents for a pipeline with a VAE.
        seed: seed of the starting noise and of the fresh noise.
        class_labels: labels of the N samples; None for unconditional networks.
        tolerance: largest accepted difference, on images in [0, 1].

    Returns:
        the largest difference.

    Raises:
        ValueError: the images differ by more than ``tolerance``.
    """
    config = json.loads((Path(out_dir) / _CONFIG).read_text())
    pipe = diffusers.DiffusionPipeline.from_pretrained(out_dir, torch_dtype=getattr(torch, config["dtype"]))
    pipe.set_progress_bar_config(disable=True)
    call = {**config["call"], "output_type": "pt"}
    if class_labels is not None:
        call["class_labels"] = torch.as_tensor(class_labels).tolist()
    if config["pipeline"] != "DiTPipeline":
        call["batch_size"] = len(expected)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config["takes_generator"]:
            call["generator"] = torch.Generator().manual_seed(seed)
        images = torch.as_tensor(pipe(**call).images).float()
    expected = expected.detach().float().cpu()
    if (vae := getattr(pipe, "vae", None)) is not None:
        expected = vae.decode(expected.to(vae.dtype) / vae.config.scaling_factor).sample.float()
    difference = float((images - (expected / 2 + 0.5).clamp(0, 1)).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"the pipeline in {Path(out_dir).name} makes other images than the student (largest difference "
            f"{difference:.3g}, allowed {tolerance:g}); compare seed, class labels, weights (student or "
            "average) and dtype of the two calls."
        )
    return difference


# ------------------------------------------------------------------------------------------------ writing
def _cast(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    dtype = dtype or torch.float32
    if all(p.dtype == dtype for p in network.parameters()):
        return network
    return nn.Module.to(copy.deepcopy(network), dtype)  # past diffusers' own, which warns


def _describe(process: NoiseProcess) -> dict[str, Any]:
    values = {k: v for k, v in vars(process).items() if isinstance(v, (int, float, str, bool))}
    return {"class": type(process).__name__, **values}


def _config(
    network: nn.Module,
    process: NoiseProcess,
    prediction_type: str,
    times: list[float],
    sampler: str,
    card: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    facts = dict(card or {})
    return {
        "lightning_distill": __version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "network": type(network).__name__,
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "num_steps": len(times),
        "times": times,
        "sampler": sampler,
        "process": _describe(process),
        "prediction_type": prediction_type,
        "teacher_sha256": facts.pop("teacher_sha256", None),
        "card": facts,
    }


def _check_target(target: Path, overwrite: bool) -> None:
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists already; give another folder, or overwrite=True to replace an export.")
    if target.is_symlink() or not (target / _CONFIG).is_file():
        raise FileExistsError(
            f"{target} is not the folder of an earlier export (with {_CONFIG}), so it is not replaced."
        )


@contextmanager
def _atomic_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside ``target``: takes its name when the block succeeds, is removed when it fails."""
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    partial, old = (target.parent / f".{target.name}.{mark}.{state}" for state in ("partial", "old"))
    try:
        partial.mkdir()
        yield partial
        _check_target(target, overwrite)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _drop_local_paths(folder: Path) -> None:
    """Remove the place a network was loaded from out of the configurations that diffusers wrote."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _finish(folder: Path, config: dict[str, Any], usage: str, license: str, library: str) -> None:
    config["weights_sha256"] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    facts = {k: v for k, v in config["card"].items() if k != "title"}
    process = ", ".join(f"{k}={v}" for k, v in config["process"].items() if k != "class")
    rows = {
        "network": config["network"],
        "steps": f"{config['num_steps']} ({config['sampler']})",
        "times": ", ".join(f"{t:g}" for t in config["times"]),
        "noise process": f"{config['process']['class']}({process})",
        "prediction type": config["prediction_type"],
        "weights": config["dtype"],
        **({"teacher sha256": config["teacher_sha256"]} if config["teacher_sha256"] else {}),
        **{k.replace("_", " "): v for k, v in facts.items()},
    }
    table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
    title = config["card"].get("title", f"A {config['num_steps']}-step {config['network']}")
    (folder / "README.md").write_text(
        f"---\nlicense: {license}\nlibrary_name: {library}\ntags:\n- distillation\n- few-step\n---\n\n# "
        f"{title}\n\n{usage}\n\n| | |\n|---|---|\n{table}\n\nWritten by lightning_distill {__version__}.\n"
    )


def _pipeline_usage(config: dict[str, Any], network: Any, null_class: int | None) -> str:
    load = "" if config["dtype"] == "float32" else f", torch_dtype=torch.{config['dtype']}"
    arguments, notes = (
        [],
        [f"Call it with exactly {config['num_steps']} steps; other numbers were not trained."],
    )
    if config["conditional"]:
        is_dit = config["pipeline"] == "DiTPipeline"
        labels = network.config.num_embeds_ada_norm if is_dit else network.config.num_class_embeds
        last = labels - 1 if null_class is None else null_class - 1
        arguments.append("class_labels=[0, 1]")
        notes.append(f"Class labels are 0 to {last}.")
        if null_class is not None:
            notes.append(f"The label {null_class} means no class.")
    if config["pipeline"] != "DiTPipeline":
        arguments.append("batch_size=2")
    arguments += [f"{k}={v}" for k, v in config["call"].items()]
    if config["takes_generator"]:
        seed = "generator = torch.Generator().manual_seed(0)"
        arguments.append("generator=generator")
    else:
        seed = "torch.manual_seed(0)"
        notes.append("Seed it globally: this pipeline's generator reaches the starting noise only.")
    if config["pipeline"] == "DiTPipeline":
        notes.append("Guidance is distilled into the student or not used: keep guidance_scale=1.0.")
    channels = 3 if config["pipeline"] == "DiTPipeline" else network.config.in_channels
    if channels not in (1, 3):
        arguments.append('output_type="np"')
    call = ", ".join(arguments)
    return (
        "```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("."{load})  # this folder\n{seed}\n'
        f"images = pipe({call}).images\n```\n\n" + " ".join(notes)
    )


def _weights_usage(config: dict[str, Any]) -> str:
    return (
        f"The weights of a `{config['network']}` in `model.safetensors`; `{_CONFIG}` holds the settings of "
        "its sampler. Build the network, then:\n\n"
        "```python\nimport json\nfrom safetensors.torch import load_model\n\n"
        f'load_model(network, "model.safetensors")\nsettings = json.load(open("{_CONFIG}"))\n```'
    )
