"""Distil SDXL into four steps as a LoRA, on one GPU.

    lightning-distill cache --pipeline models/sdxl --prompts prompts.txt --out caches/sdxl
    cp caches/sdxl/null_cond.safetensors models/sdxl/
    python examples/sdxl_lora_one_gpu.py --model models/sdxl --cache caches/sdxl --out runs/sdxl_lora

One copy of the frozen weights in bfloat16 serves three networks: the teacher is the backbone with its adapters off, the
student and the fake score are adapters. Prompts are encoded beforehand: no text encoder, no autoencoder in memory.
A like run as a configuration, with DMD2's batch, length and warm-up: configs/recipe/sdxl_dmd2_4step_lora.yaml.
"""

import argparse

import lightning as L
import torch

from lightning_distill.callbacks import TrainingHealth
from lightning_distill.commands.export import export_module
from lightning_distill.data import CachedConditions
from lightning_distill.guidance import Guidance
from lightning_distill.methods import DMD2
from lightning_distill.networks.roles import Lora
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.optim import default_optimizer


def main() -> None:
    """Train, and write the LoRA file that stock diffusers loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the SDXL pipeline")
    parser.add_argument("--cache", required=True, help="store of lightning-distill cache")
    parser.add_argument("--out", default="runs/sdxl_lora")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--updates", type=int, default=2000, help="student updates")
    parser.add_argument("--batch", type=int, default=32, help="samples per update, one at a time on the GPU")
    args = parser.parse_args()

    optimizer = default_optimizer(5e-5)
    module = DMD2(
        PretrainedDenoiser(args.model, dtype="bfloat16"),
        student=Lora(rank=args.rank),
        fake_score=Lora(rank=args.rank),
        guidance=Guidance(8.0),
        num_steps=4,
        fake_score_steps=5,
        updates_per_sample=5,
        student_optimizer=optimizer,
        fake_score_optimizer=optimizer,
        accumulate_grad_batches=args.batch,
        activation_checkpointing=True,
    )
    trainer = L.Trainer(
        max_steps=args.updates,
        precision="bf16-mixed",
        devices=1,
        log_every_n_steps=10,
        default_root_dir=args.out,
        callbacks=[
            L.pytorch.callbacks.ModelCheckpoint(every_n_train_steps=200, save_last=True),
            TrainingHealth(every_n_steps=50),
        ],
    )
    trainer.fit(module, CachedConditions(args.cache, batch_size=args.batch))

    folder, difference = export_module(module.eval(), f"{args.out}/lora", lora="diffusers", overwrite=True)
    print(f"{folder}: its README.md has the lines that load it (largest difference to our samples: {difference:.1e})")
    if torch.cuda.is_available():
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
