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
    store = Path(data["init_args"]["path"])
    StoreWriter(store, {}, RECORDS).write(0, {k: v.contiguous() for k, v in tensors.items()})
    if "regression_pairs" in model:
        teacher = teacher_fingerprint(PretrainedDenoiser(**model["teacher"]["init_args"]).build())
        cond = StoredConditions(str(store), list(tiny.cond(1))).identity()
        key = {"kind": "trajectories", "teacher": teacher, "cond": cond, "num_classes": None}
        scale = model["guidance"]["init_args"]["scale"]
        key |= {"point_times": [], "shape": list(tiny.shape), "sigma_data": 1.0, "guidance": [scale, scale]}
        pairs = {name: torch.randn(RECORDS, *tiny.shape) for name in ("noise", "x0")}
        StoreWriter(model["regression_pairs"], key, RECORDS).write(0, pairs)
    words = ["--model.init_args.accumulate_grad_batches=2"]
    return words + ([f"--model.init_args.shape={json.dumps(list(tiny.shape))}"] if "shape" in model else [])


def write_model(tiny: Tiny, path: Path) -> None:
    """A pipeline folder with network, scheduler and null condition."""
    path.mkdir(parents=True)
    tiny.save(path)
    if not tiny.zeros:
        save_file({k: v.contiguous() for k, v in tiny.null().items()}, path / "null_cond.safetensors")
