"""The EDM teacher of ImageNet-64, from OpenAI's weights to a folder that every recipe `imagenet64_*` reads.

    python examples/imagenet64_teacher.py edm_imagenet64_ema.pt models/edm-imagenet64

The file is published with consistency models (https://github.com/openai/consistency_models, arXiv:2303.01469); the
weights of its consistency models become folders in the same way, which stock diffusers samples. Nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from lightning_distill.networks.adm_weights import unet_from_adm
from lightning_distill.networks.specs import PretrainedDenoiser

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("weights", type=Path, help="state dict, read without running code from it")
parser.add_argument("out", type=Path, help="folder to write")
parser.add_argument("--size", type=int, default=64, help="height and width of the pictures")
parser.add_argument("--layers", type=int, default=3, help="residual blocks of a level")
parser.add_argument("--head", type=int, default=64, help="channels of an attention head")


def main() -> None:
    """Convert the weights, write the folder and read it as a teacher."""
    args = parser.parse_args()
    state = torch.load(args.weights, map_location="cpu", weights_only=True)
    network = unet_from_adm(state, args.size, args.layers, args.head)
    ConsistencyModelPipeline(network, CMStochasticIterativeScheduler()).save_pretrained(args.out)
    teacher = PretrainedDenoiser(str(args.out)).build()
    count = sum(p.numel() for p in teacher.parameters())
    print(f"{args.out}: {count / 1e6:.1f} million parameters, {teacher.num_classes} classes, {teacher.process}")


if __name__ == "__main__":
    main()
