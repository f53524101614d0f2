"""Tiny random models, caches and pairs under the names that recipes give."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CMStochasticIterativeScheduler
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import MAKERS, Tiny, random_network
from torchvision.models import efficientnet_b0

from lightning_distill.data.store import StoreWriter
from lightning_distill.data.trajectories import StoredConditions
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.trajectories import teacher_fingerprint

#: family by the beginning of the model's name
FAMILIES = {
    "stable-diffusion-v1-5": "sd15",
    "stable-diffusion-2-1-base": "sd15",
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3.5": "sd3",
    "PixArt-Sigma": "pixart_sigma",
    "Sana_1600M": "sana",
    "SANA_Sprint": "sana",
    "FLUX.1": "flux",
    "Qwen-Image": "qwen_image",
    "Wan2.1": "wan",
    "edm-imagenet64": "edm",
}
RECORDS = 16


def tiny_of(path: Path) -> Tiny:
    """The tiny model that stands in for the one of a name."""
    family = next(family for start, family in FAMILIES.items() if path.name.startswith(start))
    return edm() if family == "edm" else MAKERS[family]()


def edm() -> Tiny:
    """EDM's network for ImageNet of 64 pixels, narrow and shallow."""
    network = random_network(
        "UNet2DModel", sample_size=16, layers_per_block=1, num_class_embeds=1000, block_out_channels=(4, 8),
        attention_head_dim=8, norm_num_groups=4, attn_norm_num_groups=4, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), downsample_type="resnet",
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), upsample_type="resnet",
    )  # fmt: skip
    return Tiny(
        "edm", "ConsistencyModelPipeline", network, CMStochasticIterativeScheduler(), (3, 16, 16), "mid_block",
        "up_blocks.0", {}, lambda cond: {}, kind="v_prediction", component="unet",
    )  # fmt: skip


def stand_in(config: dict[str, Any]) -> list[str]:
    """Write what a recipe reads, below the current folder; the words that fit its command line to the tiny model."""
    model, data = config["model"]["init_args"], config["data"]
    path = Path(model["teacher"]["init_args"]["path"])
    tiny = tiny_of(path)
    write_model(tiny, path)
    tensors = tiny.cond(RECORDS)
    if data["class_path"].endswith("CachedLatents"):
        tensors["x0"] = torch.randn(RECORDS, *tiny.shape)
    if (store := conditions_of(config)) is not None:
        StoreWriter(store, {}, RECORDS).write(0, {k: v.contiguous() for k, v in tensors.items()})
    elif data["class_path"].endswith("ImageFolder"):
        write_pictures(Path(data["init_args"]["root"]), tiny.shape[-1])
    if store is not None and (pairs := pairs_of(config)) is not None:
        write_pairs(pairs, store, model, tiny)
    words = ["--model.init_args.accumulate_grad_batches=2"]
    if data["class_path"].endswith("ImageFolder"):
        words += [f"--data.init_args.size={tiny.shape[-1]}", "--data.init_args.num_workers=0"]
    if "features" in model:
        torch.save(efficientnet_b0().state_dict(), model["features"]["init_args"]["weights"])
        words.append("--model.init_args.features.init_args.size=32")
    if "ConstantEMA" in str(model.get("ema")):  # which warns of runs shorter than its memory
        words.append("--model.init_args.ema=[]")
    if "shape" in model:
        words.append(f"--model.init_args.shape={json.dumps(list(tiny.shape))}")
    taps = ((model.get("gan") or {}).get("init_args") or {}).get("taps", [])
    known = dict(tiny.network.named_modules())
    if any(tap not in known for tap in taps):  # blocks of a deeper network
        words.append(f"--model.init_args.gan.init_args.taps={json.dumps([tiny.block, tiny.late])}")
    return words


def write_pictures(folder: Path, size: int) -> None:
    """Pictures of two classes, of a standard deviation of about .5 in [-1, 1]."""
    generator = np.random.default_rng(0)
    for index in range(RECORDS):
        file = folder / f"class_{index % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(17, 239, (size, size, 3)).astype(np.uint8)).save(file)


def conditions_of(config: dict[str, Any]) -> Path | None:
    """The store of conditions that a recipe reads, None for labels and pictures."""
    data = config["data"]["init_args"]
    path = data.get("conditions", data.get("path"))
    return None if path is None else Path(path)


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
    if not tiny.zeros and tiny.cond_shapes:
        save_file({k: v.contiguous() for k, v in tiny.null().items()}, path / "null_cond.safetensors")
