"""``lightning-distill sample RUN_DIR``: a grid PNG and the samples as npz."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lightning_distill.commands.errors import CommandParser
from lightning_distill.commands.run_folder import find_run, load_run, weights_name
from lightning_distill.generation import default_cond
from lightning_distill.plots import save_grid

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """Sample a run and write ``samples.png`` and ``samples.npz``."""
    parser = CommandParser(prog="lightning-distill sample", description="Pictures from a training run.")
    parser.add_argument("run_dir", help="run folder, for example runs/quickstart")
    parser.add_argument("--n", type=int, default=60, help="number of samples")
    parser.add_argument("--steps", type=int, help="student steps (default: those it was trained with)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", help="ema (the default), student, or the name of an average")
    parser.add_argument("--classes", type=int, nargs="+", help="classes to cycle through (default: all)")
    parser.add_argument("--checkpoint", help="checkpoint file (default: the run's last)")
    parser.add_argument("--out", help="folder for the files (default: the run folder)")
    args = parser.parse_args(list(words))
    if args.n < 1:
        raise ValueError(f"--n {args.n}: give 1 sample or more.")
    module = load_run(args.run_dir, args.checkpoint)
    weights = weights_name(module, args.weights)
    network = module.sampling_network(weights)
    cond = default_cond(network, args.n)
    if args.classes is not None:
        if not cond:
            raise ValueError(f"--classes {args.classes}: the student has no classes.")
        known = range(network.num_classes or 0)
        if wrong := [c for c in args.classes if c not in known]:
            raise ValueError(f"--classes {wrong}: the student knows the classes 0 to {len(known) - 1}.")
        cond["class_labels"] = torch.tensor(args.classes).repeat(args.n)[: args.n]
    generator = torch.Generator().manual_seed(args.seed)
    x0 = module.sample(args.n, cond, num_steps=args.steps, generator=generator, weights=weights, batch_size=500).cpu()
    out = Path(args.out).expanduser() if args.out else find_run(args.run_dir)
    out.mkdir(parents=True, exist_ok=True)
    arrays = {"x0": x0.numpy(), "seed": np.array(args.seed)}
    if "class_labels" in cond:
        arrays["class_labels"] = cond["class_labels"].cpu().numpy()
    if x0.ndim == 4:
        arrays["images"] = (x0.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).numpy()
    np.savez_compressed(out / "samples.npz", **arrays)  # type: ignore[arg-type]
    save_grid(x0, out / "samples.png")
    print(f"{out / 'samples.png'}\n{out / 'samples.npz'}")
