"""Reading model folders: which network and which weight files.

Weights are read from safetensors only, and their headers can be checked without reading a tensor.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_distill.networks.json_files import read_json
from lightning_distill.networks.schedulers import read_scheduler
from lightning_distill.networks.weightless import is_weightless, skeleton

__all__ = [
    "WEIGHTS_VARIABLE",
    "beside",
    "check_diffusers_weights",
    "check_safetensors",
    "construct",
    "diffusers_class",
    "load_diffusers_network",
    "load_single_file",
    "network_folder",
    "read_json",
    "read_scheduler",
    "resolve",
    "variant_of",
]

#: environment variable with the folder in which model names are looked up
WEIGHTS_VARIABLE = "LIGHTNING_DISTILL_WEIGHTS"

_COMPONENTS = ("transformer", "unet")


def load_diffusers_network(folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None) -> nn.Module:
    """The diffusers model in a folder (``config.json`` and safetensors), in eval mode.

    Args:
        folder: of the network.
        dtype: of the weights.
        variant: ``fp16`` for ``*.fp16.safetensors``; None for plain files, or the only variant there is.
    """
    if is_weightless():
        return _empty_network(folder, dtype)
    variant = check_diffusers_weights(folder, variant)
    network: nn.Module = diffusers_class(folder).from_pretrained(
        str(folder), torch_dtype=dtype, use_safetensors=True, local_files_only=True, variant=variant
    )
    return network.eval()


def load_single_file(file: Path, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The diffusers model of which ``file`` holds the weights and ``folder`` the ``config.json``, in eval mode.

    Weights under their original names (as trained, before conversion) are translated where diffusers knows how.

    Raises:
        ValueError: the weights do not fit the configuration.
    """
    from safetensors.torch import load_file

    if is_weightless():
        return _empty_network(folder, dtype)
    cls = diffusers_class(folder)
    network: nn.Module
    try:
        if hasattr(cls, "from_single_file"):
            network = cls.from_single_file(
                str(file), config=str(folder), torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
            )
        else:
            network = cls.from_config(cls.load_config(str(folder), local_files_only=True))
            network.load_state_dict(load_file(file))
            network = network.to(dtype)
    except (RuntimeError, ValueError, LookupError, AttributeError) as error:  # conversions expect what they look for
        reason = str(error).strip().splitlines()[-1].strip() if str(error) else type(error).__name__
        raise ValueError(
            f"{file} does not fit {cls.__name__} as described in {folder / 'config.json'}: {reason}"
        ) from None
    return network.eval()


def _empty_network(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The network that a folder's ``config.json`` describes, without weights, in the dtypes it would be loaded in."""
    cls = diffusers_class(folder)
    with skeleton():
        network: nn.Module = cls.from_config(cls.load_config(str(folder), local_files_only=True))
    wide = getattr(cls, "_keep_in_fp32_modules", None) or ()
    for name, module in network.named_modules():
        if not any(part in name.split(".") for part in wide):
            module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
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


def check_diffusers_weights(folder: Path, wanted: str | None = None) -> str | None:
    """Check the headers of all weight files; returns the variant to load (fp16 files without plain ones).

    Args:
        folder: of the network.
        wanted: the variant that the caller asks for.
    """
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
    variants = {variant_of(f.name.removeprefix(stem)) for f in files}
    if wanted is not None and wanted not in variants:
        have = sorted(v or "(plain)" for v in variants)
        raise FileNotFoundError(f"{folder} has no weights of variant {wanted!r}; set variant to one of {have}.")
    variant = wanted or (None if None in variants else sorted(v for v in variants if v)[0])
    suffix = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{suffix}.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    else:
        files = [f for f in files if variant_of(f.name.removeprefix(stem)) == variant]
    for file in files:
        check_safetensors(file)
    return variant


def variant_of(rest: str) -> str | None:
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
