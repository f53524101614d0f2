"""Reading model folders: which network, which weight files, which noise process.

Weights are read from safetensors only, and their headers can be checked without reading a tensor.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_distill.processes import FlowMatching, NoiseProcess, VariancePreserving

__all__ = [
    "WEIGHTS_VARIABLE",
    "beside",
    "check_diffusers_weights",
    "check_safetensors",
    "construct",
    "diffusers_class",
    "load_diffusers_network",
    "network_folder",
    "read_json",
    "read_scheduler",
    "resolve",
]

#: environment variable with the folder in which model names are looked up
WEIGHTS_VARIABLE = "LIGHTNING_DISTILL_WEIGHTS"

_COMPONENTS = ("transformer", "unet")


def load_diffusers_network(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The diffusers model in a folder (``config.json`` and safetensors), in eval mode."""
    variant = check_diffusers_weights(folder)
    network: nn.Module = diffusers_class(folder).from_pretrained(
        str(folder), torch_dtype=dtype, use_safetensors=True, local_files_only=True, variant=variant
    )
    return network.eval()


def network_folder(root: Path, subfolder: str | None = None) -> Path:
    """The folder of the network in a pipeline or model folder.

    Raises:
        FileNotFoundError: there is no diffusers model.
    """
    if subfolder is not None:
        if not (root / subfolder / "config.json").is_file():
            have = sorted(p.parent.name for p in root.glob("*/config.json"))
            raise FileNotFoundError(
                f"{root / subfolder / 'config.json'} does not exist; set subfolder to one of "
                f"{have or '(no model here)'}."
            )
        return root / subfolder
    if (root / "config.json").is_file():
        return root
    for name in _COMPONENTS:
        if (root / name / "config.json").is_file():
            return root / name
    raise FileNotFoundError(
        f"{root} holds no model: expected config.json, a diffusers pipeline with {' or '.join(_COMPONENTS)}, "
        "or a card.json with a network entry; give the model's folder as path, or its name as subfolder."
    )


def beside(root: Path, folder: Path, name: str) -> Path | None:
    """A file of a pipeline, given its folder or that of its network; None where there is none."""
    parents = [root]
    if (folder.parent / "model_index.json").is_file():
        parents.append(folder.parent)
    return next((parent / name for parent in parents if (parent / name).is_file()), None)


def diffusers_class(folder: Path) -> Any:
    """The model class that a folder's ``config.json`` names."""
    import diffusers

    name = read_json(folder / "config.json").get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(
            f"{folder / 'config.json'} names the model class {name!r}, which diffusers "
            f"{diffusers.__version__} does not have; update diffusers, or describe the network in a "
            "card.json beside it."
        )
    return cls


def check_diffusers_weights(folder: Path) -> str | None:
    """Check the headers of all weight files; returns the variant to load (fp16 files without plain ones)."""
    stem = "diffusion_pytorch_model"
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*"), *folder.glob("*.ckpt")))
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is read; convert the weights "
                f"to {stem}.safetensors (save_pretrained of diffusers writes it) and give that folder as "
                "path."
            )
        raise FileNotFoundError(
            f"{folder / (stem + '.safetensors')} does not exist; complete the download, or give another "
            f"folder as path or through {WEIGHTS_VARIABLE}."
        )
    variants = {_variant(f.name.removeprefix(stem)) for f in files}
    variant = None if None in variants else sorted(v for v in variants if v)[0]
    suffix = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{suffix}.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    for file in files:
        check_safetensors(file)
    return variant


def _variant(rest: str) -> str | None:
    """``fp16`` of ``.fp16.safetensors`` and ``.fp16-00001-of-00002.safetensors``; None for plain names."""
    name = rest.removesuffix(".safetensors").split("-")[0].lstrip(".")
    return name or None


def check_safetensors(file: Path) -> None:
    """Raise unless a file exists and its header accounts for every byte; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; complete the download, or give another folder as path or through "
            f"{WEIGHTS_VARIABLE}."
        )
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is not a safetensors file; other formats can run code when they are read.")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or incomplete ({error}); download it again.") from None


def read_scheduler(file: Path) -> tuple[NoiseProcess | None, str | None]:
    """Noise process and prediction type of a diffusers scheduler; None for what it does not determine."""
    import diffusers

    name = read_json(file).get("_class_name", "")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if cls is None:
        return None, None
    # constructed, so that settings missing from the file have the class's defaults
    config = cls.from_pretrained(str(file.parent), local_files_only=True).config
    if name.startswith(("FlowMatch", "FlowMap")):
        return FlowMatching(shift=config.shift), "flow_prediction"
    if config.get("use_flow_sigmas"):
        return FlowMatching(shift=config.get("flow_shift", 1.0)), "flow_prediction"
    if name.startswith(("EDM", "SCM", "CMStochastic")) or "beta_schedule" not in config:
        return None, None  # preconditioned networks: the scheduler holds half of the parameterisation
    kind = config.get("prediction_type", "epsilon")
    zero = bool(config.get("rescale_betas_zero_snr"))
    if config.get("trained_betas") is not None:
        from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
        betas = rescale_zero_terminal_snr(betas) if zero else betas
        return VariancePreserving.from_alphas_cumprod(torch.cumprod(1.0 - betas, dim=0)), kind
    process = VariancePreserving(
        config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps, zero
    )
    return process, kind


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or one clear sentence."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}); download the folder again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} where a JSON object is expected.")
    return content


def resolve(entry: Any, base: type, file: Path) -> type:
    """The class that ``{"class_path": ..., "init_args": ...}`` names, which must be a ``base``."""
    path = entry.get("class_path", "") if isinstance(entry, dict) else str(entry)
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{file} names {path!r}, which is no importable {base.__name__} class.")
    return cls


def construct(entry: Any, base: type, file: Path) -> Any:
    """An instance of the class that an entry names, with its ``init_args``."""
    cls = resolve(entry, base, file)
    try:
        return cls(**(entry.get("init_args") or {}))
    except TypeError as error:
        raise ValueError(f"{file} cannot construct {entry['class_path']}: {error}.") from None
