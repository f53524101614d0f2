"""Planned memory of SDXL runs on one GPU: what fits into 16, 24 and 80 GB, from the published config.json alone.

    python benchmarks/plan.py

Writes ``benchmarks/results/latest/plan.json``. Nothing is downloaded and nothing allocated: the network is described
below as its authors published it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from make_tables import marked
from results import RESULTS, write_result

from lightning_distill.guidance import Guidance
from lightning_distill.methods import DMD2
from lightning_distill.networks.roles import Copy, Lora
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.planning import GIB, RESERVE, Plan, plan

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


def sdxl_folder(folder: Path) -> Path:
    """A pipeline folder without weights."""
    files = {"unet/config.json": SDXL, "scheduler/scheduler_config.json": SCHEDULER}
    files["model_index.json"] = {"_class_name": "StableDiffusionXLPipeline"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
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
    parser.add_argument("--only", help="settings whose name contains this")
    parser.add_argument("--table", action="store_true", help="only fill the table of docs/memory.md from the results")
    args = parser.parse_args()
    if not args.table:
        measure(args.only)
    page = Path(__file__).parents[1] / "docs" / "memory.md"
    result = json.loads((RESULTS / "latest" / "plan.json").read_text())
    page.write_text(marked(page.read_text(), "plan", table(result)))


def measure(only: str | None) -> None:
    """Plan the settings whose name contains ``only`` and write the figures."""
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = sdxl_folder(Path(temporary))
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
