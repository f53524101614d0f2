"""Model cards and the settings file of export folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from lightning_distill import __version__
from lightning_distill.export.folders import CONFIG, SourceFacts
from lightning_distill.export.stock import StockParts
from lightning_distill.networks.second_time import second_time_of
from lightning_distill.networks.sources import NULL_FILE
from lightning_distill.processes import NoiseProcess

__all__ = ["combine_usage", "finish", "pipeline_usage", "student_config", "text_usage", "weights_usage"]


def student_config(
    network: nn.Module,
    process: NoiseProcess,
    prediction_type: str,
    times: list[float],
    sampler: str,
    card: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """What ``distill_config.json`` says about a student; ``finish`` adds checksums."""
    facts = dict(card or {})
    described = {k: v for k, v in vars(process).items() if isinstance(v, (int, float, str, bool))}
    installed = second_time_of(network)
    return {
        "lightning_distill": __version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "network": type(network).__name__,
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "num_steps": len(times),
        "times": times,
        "sampler": sampler,
        "process": {"class": type(process).__name__, **described},
        "prediction_type": prediction_type,
        **({} if installed is None else {"second_time": installed.settings}),
        "teacher_sha256": facts.pop("teacher_sha256", None),
        "card": facts,
    }


def finish(
    folder: Path,
    config: dict[str, Any],
    usage: str,
    license: str | None,
    library: str,
    source: SourceFacts | None = None,
    relation: str | None = None,
) -> None:
    """Write settings with checksums, and the card.

    Args:
        folder: folder with all weights.
        config: from ``student_config``.
        usage: text of the card.
        license: SPDX name; None is the source's, or apache-2.0 without a source, but none for text-conditioned
            models, which are always made from someone's.
        library: that loads the folder.
        source: the teacher's pipeline.
        relation: ``finetune`` or ``adapter``, of the student to the teacher.
    """
    copied = () if source is None else source.components
    config["weights_sha256"] = {
        path.relative_to(folder).as_posix(): _sha256(path)
        for path in sorted(folder.rglob("*.safetensors"))
        if path.relative_to(folder).parts[0] not in copied
    }
    unknown = source is None and license is None and bool(config.get("size"))
    own = None if unknown else "apache-2.0"
    header: dict[str, Any] = {"license": license or (own if source is None else source.license)}
    if unknown:
        usage += "\n\nThe licence is that of the base model, which this folder does not know; state it before sharing."
    if source is not None:
        if license is None:
            header |= source.license_lines
            usage += (
                f"\n\nThe licence ({source.license}) is that of {source.name}, as its model card states it."
                if source.license
                else f"\n\n{source.name} states no licence in its folder; find it before passing this student on."
            )
        header |= {"base_model": source.name, "base_model_relation": relation}
        config["base_model"] = source.name
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    header |= {"library_name": library}
    facts = {k: v for k, v in config["card"].items() if k != "title"}
    process = ", ".join(f"{k}={v}" for k, v in config["process"].items() if k != "class")
    rows = {
        "network": config["network"],
        "steps": f"{config['num_steps']} ({config['sampler']})",
        "times": ", ".join(f"{t:g}" for t in config["times"]),
        "noise process": f"{config['process']['class']}({process})",
        "prediction type": config["prediction_type"],
        "weights": config["dtype"],
        **({"base model": source.name} if source is not None else {}),
        **({"teacher sha256": config["teacher_sha256"]} if config["teacher_sha256"] else {}),
        **{k.replace("_", " "): v for k, v in facts.items()},
        **{f"sha256 of {name}": digest for name, digest in config["weights_sha256"].items()},
    }
    table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
    title = config["card"].get("title", f"A {config['num_steps']}-step {config['network']}")
    top = "\n".join(f"{k}: {v}" for k, v in header.items() if v)
    (folder / "README.md").write_text(
        f"---\n{top}\ntags:\n- distillation\n- few-step\n---\n\n# "
        f"{title}\n\n{usage}\n\n| | |\n|---|---|\n{table}\n\nWritten by lightning_distill {__version__}.\n"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ how to call it
def _loading(config: Mapping[str, Any]) -> str:
    return "" if config["dtype"] == "float32" else f", torch_dtype=torch.{config['dtype']}"


def pipeline_usage(config: Mapping[str, Any], network: Any, null_class: int | None) -> str:
    """Text of the card of a pipeline that takes class labels or nothing."""
    arguments, notes = [], _steps(config)
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
        scale = config["call"]["guidance_scale"]
        notes.append(
            "Guidance is distilled into the student or not used: keep guidance_scale=1.0."
            if scale == 1.0
            else f"The student is guided in two passes, as it was trained: keep guidance_scale={scale}."
        )
    channels = 3 if config["pipeline"] == "DiTPipeline" else network.config.in_channels
    if channels not in (1, 3):
        arguments.append('output_type="np"')
    return (
        "```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("."{_loading(config)})  # this folder\n{seed}\n'
        f"images = pipe({', '.join(arguments)}).images\n```\n\n" + " ".join(notes)
    )


def _steps(config: Mapping[str, Any]) -> list[str]:
    """What is to be said about the number of steps."""
    notes = [f"Call it with exactly {config['num_steps']} steps; other numbers were not trained."]
    if config["folded"]:
        notes.append(
            "The target time of each step is part of the weights, so that other times (or another scale of guidance, "
            "where the network was told one) make no samples."
        )
    return notes


def text_usage(config: Mapping[str, Any], parts: StockParts, load: str) -> str:
    """Text of the card of a text-conditioned pipeline.

    Args:
        config: with ``call`` and ``size``.
        parts: of the export.
        load: lines that make ``pipe``.
    """
    entry = parts.entry
    assert entry is not None
    call = {**config["call"], **(entry.negative_prompt if parts.guided else {})}
    arguments = ['prompt="a red fox in the snow"']
    arguments += [f"{k}={v!r}" for k, v in {**config["size"], **call}.items()]
    notes = _steps(config)
    if not config["size"]:
        notes.append("Give the height and width that the student was trained at.")
    if parts.takes_generator:
        seed = "generator = torch.Generator().manual_seed(0)"
        arguments.append("generator=generator")
    else:
        seed = "torch.manual_seed(0)"
        notes.append("Seed it globally: this pipeline's generator reaches the starting noise only.")
    off = ", ".join(f"{k}={v}" for k, v in entry.guidance_off.items())
    if parts.embeds_guidance:
        notes.append(
            f"guidance_scale={config['call']['guidance_scale']} is an input of the network: the scale it was trained "
            "with. No other guidance is used."
        )
    elif parts.guided:
        scale = ", ".join(f"{k}={call[k]}" for k in (*entry.guidance_off, *(entry.guided or {})))
        notes.append(
            f"The student is guided in two passes, as it was trained: keep {scale}. The other pass has the empty "
            "prompt (give the negative prompt with which the student was trained, if there was one); calls with "
            f"embeddings take those of `{NULL_FILE}`, or zeros where there is no such file."
        )
    elif off:
        notes.append(f"Classifier-free guidance is distilled into the student or not used: keep {off}.")
    output = "frames" if "3D" in entry.model_class else "images"
    return (
        f"```python\nimport torch\n{load}\n{seed}\n{output} = pipe({', '.join(arguments)}).{output}\n```\n\n"
        + " ".join(notes)
    )


def combine_usage(config: Mapping[str, Any], parts: StockParts, whole: bool) -> str:
    """Lines that make ``pipe`` from a folder.

    Args:
        config: of the export.
        parts: of the export.
        whole: the folder has every component; else it is combined with those of the base model.
    """
    scheduler, network, dtype = type(parts.scheduler).__name__, config["network"], _loading(config)
    if whole:
        return (
            f"from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("."{dtype})  # this folder'
        )
    name = parts.network_name
    return (
        f"from diffusers import {parts.pipeline.__name__}, {network}, {scheduler}\n\n"
        f"# this folder has the {name} and the scheduler; everything else comes from the base model\n"
        f"pipe = {parts.pipeline.__name__}.from_pretrained(\n"
        f'    "BASE_MODEL",\n    {name}={network}.from_pretrained(".", subfolder="{name}"{dtype}),\n'
        f'    scheduler={scheduler}.from_pretrained(".", subfolder="scheduler"){dtype},\n)'
    )


def weights_usage(config: Mapping[str, Any]) -> str:
    """Text of the card of bare weights."""
    return (
        f"The weights of a `{config['network']}` in `model.safetensors`; `{CONFIG}` holds the settings of "
        "its sampler. Build the network, then:\n\n"
        "```python\nimport json\nfrom safetensors.torch import load_model\n\n"
        f'load_model(network, "model.safetensors")\nsettings = json.load(open("{CONFIG}"))\n```'
    )
