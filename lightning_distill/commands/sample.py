"""``lightning-distill sample RUN_DIR | EXPORTED_FOLDER``: a grid PNG and the samples as npz.

A run is sampled by this package, an exported folder by stock diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_distill.commands.errors import CommandParser
from lightning_distill.commands.run_folder import find_run, load_run, weights_name
from lightning_distill.export.sampling import is_export, sample_export
from lightning_distill.generation import default_cond
from lightning_distill.plots import save_grid, save_strips

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """Sample a run or an exported folder and write ``samples.png`` and ``samples.npz``."""
    parser = CommandParser(prog="lightning-distill sample", description="Pictures from a run or an exported folder.")
    parser.add_argument("run_dir", help="run folder, for example runs/quickstart, or an exported folder")
    parser.add_argument("--n", type=int, help="number of samples (default: 60; the number of prompts)")
    parser.add_argument("--steps", type=int, help="student steps of a run (default: those it was trained with)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", help="of a run: ema (the default), student, or the name of an average")
    parser.add_argument("--classes", type=int, nargs="+", help="classes to cycle through (default: all)")
    parser.add_argument("--checkpoint", help="checkpoint file of a run (default: its last)")
    parser.add_argument("--prompt", action="append", default=[], help="text for an exported folder; may be repeated")
    parser.add_argument("--embeddings", help="safetensors file with embeddings by condition, instead of prompts")
    parser.add_argument("--base", help="pipeline folder of the base model, for an exported LoRA file")
    parser.add_argument("--out", help="folder for the files (default: the run folder)")
    args = parser.parse_args(list(words))
    if args.n is not None and args.n < 1:
        raise ValueError(f"--n {args.n}: give 1 sample or more.")
    exported = is_export(args.run_dir)
    of_runs = {"--steps": args.steps, "--weights": args.weights, "--checkpoint": args.checkpoint}
    of_exports = {"--prompt": args.prompt, "--embeddings": args.embeddings, "--base": args.base}
    if wrong := [name for name, value in (of_runs if exported else of_exports).items() if value]:
        kind, other = ("an exported folder", "a run") if exported else ("a run", "an exported folder")
        raise ValueError(f"{args.run_dir} is {kind}, and {', '.join(wrong)} is for {other}; leave it out.")
    x0, arrays = _from_export(args) if exported else _from_run(args)
    out = Path(args.out or args.run_dir).expanduser() if args.out or exported else find_run(args.run_dir)
    out.mkdir(parents=True, exist_ok=True)
    arrays |= {"x0": x0.numpy(), "seed": np.array(args.seed)}
    if x0.ndim >= 4:
        arrays["images"] = (x0.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).numpy()
    np.savez_compressed(out / "samples.npz", **arrays)
    if x0.ndim == 5:  # videos, a row of frames each
        save_strips({"samples": x0[:, :, :3]}, out / "samples.png", scale=1)
    else:
        save_grid(x0 if x0.ndim == 2 or x0.shape[1] in (1, 3) else x0[:, :3], out / "samples.png")
    print(f"{out / 'samples.png'}\n{out / 'samples.npz'}")


def _from_run(args: Any) -> tuple[Tensor, dict[str, Any]]:
    n = 60 if args.n is None else args.n
    module = load_run(args.run_dir, args.checkpoint)
    weights = weights_name(module, args.weights)
    network = module.sampling_network(weights)
    cond = default_cond(network, n)
    if args.classes is not None:
        if "class_labels" not in cond:
            raise ValueError(f"--classes {args.classes}: the student has no classes.")
        known = range(network.num_classes or 0)
        if wrong := [c for c in args.classes if c not in known]:
            raise ValueError(f"--classes {wrong}: the student knows the classes 0 to {len(known) - 1}.")
        cond["class_labels"] = torch.tensor(args.classes).repeat(n)[:n]
    generator = torch.Generator().manual_seed(args.seed)
    x0 = module.sample(n, cond, num_steps=args.steps, generator=generator, weights=weights, batch_size=500).cpu()
    return x0, {key: value.cpu().numpy() for key, value in cond.items() if key == "class_labels"}


def _from_export(args: Any) -> tuple[Tensor, dict[str, Any]]:
    cond = None
    if args.embeddings is not None:
        file = Path(args.embeddings).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"--embeddings {args.embeddings}: there is no such file.")
        cond = load_file(file)
    given = len(args.prompt) if args.prompt else (60 if cond is None else len(next(iter(cond.values()))))
    n = given if args.n is None else args.n
    x0, made_from = sample_export(
        args.run_dir, n, seed=args.seed, prompts=args.prompt, cond=cond, classes=args.classes, base=args.base
    )
    return x0, {key: np.array(value) for key, value in made_from.items()}
