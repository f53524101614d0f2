"""Planned memory of SDXL runs on one GPU: what fits into 16, 24 and 80 GB, from the published config.json alone.

    python benchmarks/plan.py
    python benchmarks/plan.py --recipes     # every configs/recipe at full size, for docs/recipes.md

Writes ``benchmarks/results/latest/plan.json`` or ``recipes.json``. Nothing is downloaded and nothing allocated: the
networks are described below as their authors published them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import recipes_table
import torch
from make_tables import marked
from results import RESULTS, write_result
from safetensors.torch import save_file

from lightning_distill.commands.plan import parse_config, plan_config
from lightning_distill.configs import config_path
from lightning_distill.guidance import Guidance
from lightning_distill.methods import DMD2
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.quantisation import quantisable, quantised_bytes
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.networks.weightless import weightless
from lightning_distill.plan_parts import GIB, RESERVE, Plan
from lightning_distill.planning import plan
from lightning_distill.strategies.sharding import block_names

#: unet/config.json of stabilityai/stable-diffusion-xl-base-1.0: 2.57e9 parameters
SDXL = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
PARAMETERS = 2_567_463_684
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
WAN_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


@dataclass(frozen=True)
class Published:
    """What authors published about a model.

    Attributes:
        pipeline: class of the stock pipeline.
        config: of the network; what is not here has the default of its class.
        scheduler: its configuration.
        billions: parameters by the published weights, against which the plan is compared.
        null: shape of each unconditional embedding, (1, ...), as the text encoders make it of one prompt.
    """

    pipeline: str
    config: dict[str, Any]
    scheduler: dict[str, Any]
    billions: float
    null: dict[str, tuple[int, ...]] = field(default_factory=dict)


def text(tokens: int, width: int, *, masked: bool = False, pooled: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of one encoded prompt."""
    shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (1, tokens, width)}
    shapes |= {"encoder_attention_mask": (1, tokens)} if masked else {}
    return shapes | ({"pooled_projections": (1, pooled)} if pooled else {})


def wan(billions: float, **config: int) -> Published:
    """Both sizes of Wan 2.1."""
    return Published(
        "WanPipeline", {"_class_name": "WanTransformer3DModel", **config}, WAN_SCHEDULER, billions, text(512, 4096)
    )


#: by the name of the folder below ``models/`` that recipes give
MODELS = {
    "stable-diffusion-v1-5": Published(
        "StableDiffusionPipeline",
        {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "sample_size": 64},
        {**SCHEDULER, "_class_name": "PNDMScheduler", "skip_prk_steps": True},
        0.860,
        text(77, 768),
    ),
    "stable-diffusion-2-1-base": Published(
        "StableDiffusionPipeline",
        {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "sample_size": 64,
            "use_linear_projection": True,
        },
        {**SCHEDULER, "_class_name": "PNDMScheduler", "skip_prk_steps": True},
        0.866,
        text(77, 1024),
    ),
    "stable-diffusion-xl-base-1.0": Published("StableDiffusionXLPipeline", SDXL, SCHEDULER, 2.567),
    "stable-diffusion-3.5-medium": Published(
        "StableDiffusion3Pipeline",
        {
            "_class_name": "SD3Transformer2DModel",
            "caption_projection_dim": 1536,
            "dual_attention_layers": list(range(13)),
            "num_attention_heads": 24,
            "num_layers": 24,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
        },
        FLOW,
        2.243,
        text(333, 4096, pooled=2048),
    ),
    "PixArt-Sigma-XL-2-512-MS": Published(
        "PixArtSigmaPipeline",
        {"_class_name": "PixArtTransformer2DModel", "caption_channels": 4096, "sample_size": 64},
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
        },
        0.611,
        text(300, 4096, masked=True),
    ),
    "Sana_1600M_1024px_diffusers": Published(
        "SanaPipeline",
        {"_class_name": "SanaTransformer2DModel"},
        {**WAN_SCHEDULER, "_class_name": "DPMSolverMultistepScheduler"},
        1.604,
        text(300, 2304, masked=True),
    ),
    "SANA_Sprint_1.6B_1024px_teacher_diffusers": Published(
        "SanaPipeline",
        {"_class_name": "SanaTransformer2DModel", "qk_norm": "rms_norm_across_heads"},
        {**WAN_SCHEDULER, "_class_name": "DPMSolverMultistepScheduler"},
        1.604,
        text(300, 2304, masked=True),
    ),
    "FLUX.1-dev": Published(
        "FluxPipeline",
        {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        {**FLOW, "use_dynamic_shifting": True},
        11.901,
    ),
    "Qwen-Image": Published(
        "QwenImagePipeline",
        {"_class_name": "QwenImageTransformer2DModel"},
        {**FLOW, "shift": 1.0, "use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192},
        20.430,
        text(512, 3584, masked=True),
    ),
    "edm-imagenet64": Published(
        "ConsistencyModelPipeline",
        {
            "_class_name": "UNet2DModel",
            "attention_head_dim": 64,
            "attn_norm_num_groups": 32,
            "block_out_channels": [192, 384, 576, 768],
            "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
            "downsample_type": "resnet",
            "layers_per_block": 3,
            "num_class_embeds": 1000,
            "resnet_time_scale_shift": "scale_shift",
            "sample_size": 64,
            "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
            "upsample_type": "resnet",
        },
        {"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 40},
        0.296,
    ),
    "Wan2.1-T2V-1.3B-Diffusers": wan(1.419, ffn_dim=8960, num_attention_heads=12, num_layers=30),
    "Wan2.1-T2V-14B-Diffusers": wan(14.288),
}


def model_folder(folder: Path, model: str) -> Path:
    """A pipeline folder without weights."""
    published = MODELS[model]
    part = "unet" if published.config["_class_name"].startswith("UNet") else "transformer"
    files = {f"{part}/config.json": published.config, "scheduler/scheduler_config.json": published.scheduler}
    files["model_index.json"] = {"_class_name": published.pipeline}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    if published.null:
        masks = {"encoder_attention_mask": torch.int64}
        null = {key: torch.ones(shape, dtype=masks.get(key)) for key, shape in published.null.items()}
        save_file(null, folder / "null_cond.safetensors")
    return folder


#: rank of both adapters, and whether activations are recomputed, by the name of the run
SETTINGS: dict[str, dict] = {
    "LoRA": {"lora": 64},
    "full weights": {},
    "LoRA, no checkpointing": {"lora": 64, "checkpointing": False},
}


def planned(folder: Path, options: dict) -> Plan:
    """Four steps, guidance 8, 1024 x 1024, one sample at a time, bf16-mixed."""
    rank = options.get("lora")

    def build() -> DMD2:
        return DMD2(
            PretrainedDenoiser(str(folder), dtype="bfloat16"),
            student=Lora(rank) if rank else Copy(),
            fake_score=Lora(rank) if rank else Copy(),
            guidance=Guidance(8.0),
            num_steps=4,
            activation_checkpointing=options.get("checkpointing", True),
        )

    return plan(build, 1, "bf16-mixed")


def row(run: Plan) -> dict:
    """Figures of one run, GiB."""
    return {
        "need_gib": round(run.need / GIB, 2),
        "weights_gib": round(sum(sum(role.weights.values()) for role in run.roles) / GIB, 2),
        "optimizer_gib": round(sum(role.optimizer for role in run.roles) / GIB, 2),
        "phase_peak_gib": round(run.largest_phase.peak / GIB, 2),
        "trained": sum(role.trained for role in run.roles),
    }


# ------------------------------------------------------------------------------------------------ recipes
#: GPUs of a table: GiB of one that a process finds free, and their number
DEVICES = {"1 x 24 GB": (23.5, 1), "1 x 80 GB": (79.0, 1), "8 x 80 GB": (79.0, 8)}
#: dense bfloat16 FLOP/s of an H100, and the share of it that a run is assumed to reach
PEAK, SHARE = 989e12, 0.4


def variants(run: Plan, single: Plan, teacher: Denoiser) -> dict[str, Plan]:
    """What can be changed without another recipe, each on top of those before.

    Args:
        run: the recipe as it is.
        single: with one sample at a time.
        teacher: its network without weights.
    """
    found = {"as is": run}
    if run.batch_size > 1:
        found["one sample at a time"] = single
    if all(role.shared for role in run.roles if role.trained):  # only adapters leave the teacher's weights rounded
        found["int8 teacher"] = single.with_8bit_weights()
    last = list(found.values())[-1]
    found["8-bit optimizers"] = last.with_8bit_optimizers()
    if "int8 teacher" in found:
        found["nf4 teacher"] = in_4_bits(single, teacher).with_8bit_optimizers()
    return found


def in_4_bits(run: Plan, teacher: Denoiser) -> Plan:
    """The same run with ``quantize: nf4`` of the teacher."""
    layers = quantisable(teacher.network, "nf4", teacher.family.blocks).values()
    full = small = 0
    for layer in layers:
        rows, columns = layer.weight.shape
        full += layer.weight.nbytes
        small += quantised_bytes("nf4", rows, columns, layer.weight.element_size())
    first, *others = run.roles
    kind = max(first.weights, key=first.weights.__getitem__)
    weights = {**first.weights, kind: first.weights[kind] - full, "nf4": small}
    return replace(run, roles=(replace(first, weights=weights, quantisable=(0, 0)), *others))


def divided(run: Plan, over: int, teacher: Denoiser) -> float:
    """GiB of one of several processes whose networks are sharded; an upper bound.

    Weights and states are divided. Gradients count whole, as in the plan of one device, and with them what is gathered
    in bfloat16: the block at work, the next one, and all that lies outside of blocks.
    """
    modules = dict(teacher.network.named_modules())
    blocks = [sum(p.numel() for p in modules[name].parameters()) for name in block_names(teacher)]
    outside = sum(p.numel() for p in teacher.network.parameters()) - sum(blocks)
    gathered = 2 * (outside + 2 * max(blocks)) if over > 1 else 0
    return (run.resident / over + run.need - run.resident + gathered) / GIB


def recipe(name: str, folder: Path) -> dict:
    """Figures of one recipe.

    Args:
        name: of its file, without suffix.
        folder: an empty folder.
    """
    file = config_path(f"recipe/{name}.yaml")
    path = "--model.init_args.teacher.init_args.path"
    model = Path(parse_config(["--config", str(file)])["model"]["init_args"]["teacher"]["init_args"]["path"]).name
    start = time.process_time()
    config = parse_config(["--config", str(file), f"{path}={model_folder(folder, model)}"])
    settings = config["model"]["init_args"]
    samples = config["data"]["init_args"]["batch_size"]
    one = {**config, "model": {**config["model"], "init_args": {**settings, "accumulate_grad_batches": samples}}}
    single = plan_config(one, batch_size=1, count=True)
    micro = samples // settings["accumulate_grad_batches"]
    run = single if micro == 1 else plan_config(config)
    with weightless():
        spec = settings["teacher"]["init_args"]
        teacher = PretrainedDenoiser(spec["path"], dtype=spec.get("dtype") or "float32").build()
    # not those of the plan's teacher, in whose network the students' adapters may have installed parts
    parameters = sum(p.numel() for p in teacher.network.parameters())
    assert abs(parameters / 1e9 - MODELS[model].billions) < 0.002, (model, parameters)
    fits = {}
    found = variants(run, single, teacher)
    for device, (memory, number) in DEVICES.items():
        needs = {change: round(divided(made, number, teacher), 1) for change, made in found.items()}
        fits[device] = {"needs_gib": needs, "fits": next((c for c, need in needs.items() if need <= memory), None)}
    steps = len(settings.get("student_times") or ()) or settings.get("num_steps") or 1
    student, *critics = single.phases
    judged = any(phase.name == "discriminator" for phase in critics)  # on the student's samples, without rollouts
    repeats = settings.get("discriminator_steps", 1) if judged else settings.get("fake_score_steps", 0)
    # the critic's first update takes the student's samples; a rollout has (steps + 1) / 2 steps on average, and the
    # counted ones have one
    forwards = repeats * (steps - 1) / 2 - 1 if critics and not judged else 0
    critic = sum(phase.flop for phase in critics)
    gflop = samples * (student.flop + repeats * critic + forwards * single.forward_flop) / 1e9
    return {
        "model": model,
        "parameters": parameters,
        "trained": sum(role.trained for role in single.roles),
        "samples_per_update": samples,
        "micro_batch": micro,
        "gradients_stay": True,
        "steps": steps,
        "devices": fits,
        "forward_gflop": round(single.forward_flop / 1e9, 1),
        "gflop_per_update": round(gflop),
        "estimated_seconds_per_update": round(gflop * 1e9 / (SHARE * PEAK), 2),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def plan_recipes(only: str | None) -> None:
    """Plan the recipes whose name contains ``only``; figures of the others stay as they were recorded."""
    file = RESULTS / "latest" / "recipes.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else {}
    paths = sorted((config_path("quickstart.yaml").parent / "recipe").glob("*.yaml"))
    for path in (path for path in paths if only is None or only in path.stem):
        with tempfile.TemporaryDirectory() as temporary:
            rows[path.stem] = recipe(path.stem, Path(temporary))
        print(f"{path.stem:24} {rows[path.stem]}", flush=True)
        facts = {"precision": "bf16-mixed", "reserve_gib": RESERVE / GIB, "peak_flops": PEAK, "share": SHARE}
        write_result("recipes", {**facts, "rows": dict(sorted(rows.items()))})


def table(result: dict) -> str:
    """Table of docs/memory.md.

    Args:
        result: content of ``plan.json``.
    """
    lines = ["| run | needed, GiB | weights | optimizer states | gradients and activations |", "|---|---|---|---|---|"]
    for name, run in result["rows"].items():
        cells = [f"{run[key]:.1f}" for key in ("need_gib", "weights_gib", "optimizer_gib", "phase_peak_gib")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    side, batch = result["size"], result["batch_size"]
    setting = f"{side} x {side}, batch {batch}, {result['precision']}, {result['reserve_gib']:g} GiB of it reserve"
    return "\n".join([*lines, "", f"{result['model']}, DMD2 in four steps with guidance: {setting}."])


def main() -> None:
    """Plan every setting and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="settings or recipes whose name contains this")
    parser.add_argument("--recipes", action="store_true", help="plan the recipes instead")
    parser.add_argument("--table", action="store_true", help="only fill the table of the page from the results")
    args = parser.parse_args()
    if not args.table:
        (plan_recipes if args.recipes else measure)(args.only)
    name, page, make = ("recipes", "recipes", recipes_table.table) if args.recipes else ("plan", "memory", table)
    file = Path(__file__).parents[1] / "docs" / f"{page}.md"
    result = json.loads((RESULTS / "latest" / f"{name}.json").read_text())
    file.write_text(marked(file.read_text(), name, make(result)))


def measure(only: str | None) -> None:
    """Plan the settings whose name contains ``only`` and write the figures."""
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(Path(temporary), "stable-diffusion-xl-base-1.0")
        for name, options in SETTINGS.items():
            if only and only not in name:
                continue
            start = time.process_time()
            run = planned(folder, options)
            assert run.roles[0].parameters == PARAMETERS
            rows[name] = row(run)
            rows[name]["cpu_seconds"] = round(time.process_time() - start, 1)
            rows[f"{name}, 8-bit Adam"] = row(run.with_8bit_optimizers())
            if "lora" in options:
                rows[f"{name}, int8 teacher"] = row(run.with_8bit_weights())
                rows[f"{name}, int8 teacher, 8-bit Adam"] = row(run.with_8bit_weights().with_8bit_optimizers())
            print(f"{name:24} {rows[name]}", flush=True)
    figures = {"model": "SDXL", "size": 1024, "batch_size": 1, "precision": "bf16-mixed", "rows": rows}
    print(write_result("plan", {**figures, "reserve_gib": RESERVE / GIB}))


if __name__ == "__main__":
    main()
