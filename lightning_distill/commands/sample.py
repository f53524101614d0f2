"""``lightning-distill sample RUN_DIR | EXPORTED_FOLDER``: a grid PNG and the samples as npz.

A run is sampled by this package, for conditions of its data where it needs more than classes; an exported folder by
stock diffusers. Samples that are latents are kept as such, without a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_distill.commands.errors import CommandParser, is_user_error, one_line
from lightning_distill.commands.run_folder import find_run, load_run, read_config, read_data, weights_name
from lightning_distill.evaluation.conditions import RunConditions
from lightning_distill.evaluation.sampling import makes_pixels
from lightning_distill.export.sampling import is_export, sample_export
from lightning_distill.generation import default_cond, needed_conditions
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.plots import save_grid, save_strips

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """Sample a run or an exported folder and write ``samples.png`` and ``samples.npz``."""
    parser = CommandParser(prog="lightning-distill sample", description="Pictures from a run or an exported folder.")
    parser.add_argument("run_dir", help="run folder, for example runs/quickstart, or an exported folder")
    parser.add_argument("--n", type=int, help="number of samples (default: 60; the number of prompts)")
    parser.add_argument("--steps", type=int, help="student steps of a run (default: those it was trained with)")
    parser.add_argument("--guidance", type=float, help="guidance scale of a run's student (default: its own)")
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
    of_runs = {"--steps": args.steps, "--guidance": args.guidance}
    of_runs |= {"--weights": args.weights, "--checkpoint": args.checkpoint}
    of_exports = {"--prompt": args.prompt, "--embeddings": args.embeddings, "--base": args.base}
    if wrong := [name for name, value in (of_runs if exported else of_exports).items() if value not in (None, [])]:
        kind, other = ("an exported folder", "a run") if exported else ("a run", "an exported folder")
        remedy = "leave it out"
        if not exported and (args.prompt or args.embeddings):
            remedy = (
                f"export it first with lightning-distill export {args.run_dir} OUT, and sample OUT, or leave it out"
            )
        raise ValueError(f"{args.run_dir} is {kind}, and {', '.join(wrong)} is for {other}; {remedy}.")
    x0, arrays, pixels = _from_export(args) if exported else _from_run(args)
    out = (
        Path(args.out or args.run_dir).expanduser() if args.out or exported else find_run(args.run_dir, args.checkpoint)
    )
    out.mkdir(parents=True, exist_ok=True)
    arrays |= {"x0": x0.numpy(), "seed": np.array(args.seed)}
    if pixels:
        arrays["images"] = (x0.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).numpy()
    np.savez_compressed(out / "samples.npz", **arrays)
    if x0.ndim == 2 or pixels:
        if x0.ndim == 5:  # videos, a row of frames each
            save_strips({"samples": x0}, out / "samples.png", scale=1)
        else:
            save_grid(x0, out / "samples.png")
        print(out / "samples.png")
    else:
        what = "an export without an autoencoder" if exported else "this run"
        again = "" if exported else f"lightning-distill export {args.run_dir} OUT and "
        print(
            f"{what} makes latents of shape {tuple(x0.shape[1:])}, which are no pictures; {again}lightning-distill "
            "sample OUT --prompt TEXT make pictures, where the pipeline's folder has its autoencoder."
        )
    print(out / "samples.npz")


def _from_run(args: Any) -> tuple[Tensor, dict[str, Any], bool]:
    n = 60 if args.n is None else args.n
    module = load_run(args.run_dir, args.checkpoint)
    weights = weights_name(module, args.weights)
    network = module.sampling_network(weights)
    cond = _conditions(find_run(args.run_dir, args.checkpoint), network, n)
    if args.classes is not None:
        if "class_labels" not in cond:
            raise ValueError(f"--classes {args.classes}: the student has no classes.")
        known = range(network.num_classes or 0)
        if wrong := [c for c in args.classes if c not in known]:
            raise ValueError(f"--classes {wrong}: the student knows the classes 0 to {len(known) - 1}.")
        cond["class_labels"] = torch.tensor(args.classes).repeat(n)[:n]
    generator = torch.Generator().manual_seed(args.seed)
    options = {"num_steps": args.steps, "guidance_scale": args.guidance, "weights": weights, "batch_size": 500}
    x0 = module.sample(n, cond, generator=generator, **options).cpu()
    pixels = makes_pixels(network, x0.shape[1:])
    x0 = x0.transpose(1, 2) if pixels and x0.ndim == 5 else x0
    return x0, {key: value.cpu().numpy() for key, value in cond.items() if key == "class_labels"}, pixels


def _conditions(run: Path, network: Denoiser, n: int) -> dict[str, Any]:
    """Classes in turn, or what the first rows of the run's data have where the network needs more.

    Raises:
        ValueError: the data are not there any more, or do not have it.
    """
    if not (needed := needed_conditions(network)):
        return default_cond(network, n)
    try:
        conditions = RunConditions(read_data(read_config(run)))
        cond = conditions(network, n)
    except Exception as error:
        if not is_user_error(error):
            raise
        raise ValueError(
            f"the student needs {', '.join(needed)} for every sample, and the data of its run do not give them "
            f"({one_line(error).rstrip('.')}); restore them, or export it with lightning-distill export {run} OUT "
            "and use lightning-distill sample OUT --prompt TEXT."
        ) from None
    print(f"{', '.join(needed)}: of the first rows of the run's {conditions.name}")
    return cond


def _from_export(args: Any) -> tuple[Tensor, dict[str, Any], bool]:
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
    pixels = x0.ndim in (4, 5) and x0.shape[-3] in (1, 3)
    return x0, {key: np.array(value) for key, value in made_from.items()}, pixels
