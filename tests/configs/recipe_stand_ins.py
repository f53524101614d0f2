"""Tiny random models, caches and pairs under the names that recipes give."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_pipelines import MAKERS, Tiny

from lightning_distill.data.store import StoreWriter
from lightning_distill.data.trajectories import StoredConditions
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.trajectories import teacher_fingerprint

#: family by the beginning of the model's name
FAMILIES = {
    "stable-diffusion-v1-5": "sd15",
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3.5": "sd3",
    "PixArt-Sigma": "pixart_sigma",
    "Sana_1600M": "sana",
    "SANA_Sprint": "sana",
    "FLUX.1": "flux",
    "Qwen-Image": "qwen_image",
    "Wan2.1": "wan",
}
RECORDS = 16


def stand_in(config: dict[str, Any]) -> list[str]:
    """Write what a recipe reads, below the current folder; the words that fit its command line to the tiny model."""
    model, data = config["model"]["init_args"], config["data"]
    path = Path(model["teacher"]["init_args"]["path"])
    tiny = MAKERS[next(family for start, family in FAMILIES.items() if path.name.startswith(start))]()
    write_model(tiny, path)
    tensors = tiny.cond(RECORDS)
    if data["class_path"].endswith("CachedLatents"):
        tensors["x0"] = torch.randn(RECORDS, *tiny.shape)
    store = conditions_of(config)
    StoreWriter(store, {}, RECORDS).write(0, {k: v.contiguous() for k, v in tensors.items()})
    if (pairs := pairs_of(config)) is not None:
        write_pairs(pairs, store, model, tiny)
    words = ["--model.init_args.accumulate_grad_batches=2"]
    if "shape" in model:
        words.append(f"--model.init_args.shape={json.dumps(list(tiny.shape))}")
    taps = ((model.get("gan") or {}).get("init_args") or {}).get("taps", [])
    known = dict(tiny.network.named_modules())
    if any(tap not in known for tap in taps):  # blocks of a deeper network
        words.append(f"--model.init_args.gan.init_args.taps={json.dumps([tiny.block, tiny.late])}")
    return words


def conditions_of(config: dict[str, Any]) -> Path:
    """The store of conditions that a recipe reads."""
    data = config["data"]["init_args"]
    return Path(data.get("conditions", data["path"]))


def pairs_of(config: dict[str, Any]) -> Path | None:
    """The store of the teacher's pairs that a recipe reads, None where it reads none."""
    if config["data"]["class_path"].endswith("Trajectories"):
        return Path(config["data"]["init_args"]["path"])
    pairs = config["model"]["init_args"].get("regression_pairs")
    return None if pairs is None else Path(pairs)


def write_pairs(folder: Path, store: Path, model: dict[str, Any], tiny: Tiny) -> None:
    """Random pairs under the names of the teacher, the conditions and the guidance of a recipe."""
    teacher = teacher_fingerprint(PretrainedDenoiser(**model["teacher"]["init_args"]).build())
    cond = StoredConditions(str(store), list(tiny.cond(1))).identity()
    key = {"kind": "trajectories", "teacher": teacher, "cond": cond, "num_classes": None}
    scale = model["guidance"]["init_args"]["scale"]
    key |= {"point_times": [], "shape": list(tiny.shape), "sigma_data": 1.0, "guidance": [scale, scale]}
    pairs = {name: torch.randn(RECORDS, *tiny.shape) for name in ("noise", "x0")}
    StoreWriter(folder, key, RECORDS).write(0, pairs)


def write_model(tiny: Tiny, path: Path) -> None:
    """A pipeline folder with network, scheduler and null condition."""
    path.mkdir(parents=True)
    tiny.save(path)
    if not tiny.zeros:
        save_file({k: v.contiguous() for k, v in tiny.null().items()}, path / "null_cond.safetensors")
