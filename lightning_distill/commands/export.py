"""``lightning-distill export RUN_DIR OUT_DIR``: a folder that stock diffusers loads, checked in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_distill.commands.errors import CommandParser
from lightning_distill.commands.run_folder import load_run, weights_name
from lightning_distill.export import export_denoiser
from lightning_distill.generation import default_cond
from lightning_distill.methods.base import DistillationModule

__all__ = ["export_module", "main"]

_CHECK = """
import sys
from safetensors.torch import load_file
from lightning_distill.export import verify_export
expected = load_file(sys.argv[2])
print(verify_export(sys.argv[1], expected["x0"], seed=0, class_labels=expected.get("class_labels")))
"""


def export_module(
    module: DistillationModule, out_dir: str | Path, weights: str | None = None, overwrite: bool = False, n: int = 8
) -> tuple[Path, float]:
    """Export a student and compare the stock pipeline's images, in a fresh process, with ``module.sample``.

    Args:
        module: a trained module.
        out_dir: folder to create.
        weights: network to export, see ``module.sampling_network``.
        overwrite: replace an existing folder.
        n: samples compared.

    Returns:
        the folder, and the largest absolute difference of pixels in [-1, 1].

    Raises:
        ValueError: nothing in diffusers reproduces the student.
        FileExistsError: the folder exists.
        RuntimeError: the loaded pipeline gives other images.
    """
    network = module.sampling_network(weights)
    folder = export_denoiser(network, module.student_times, module.sampler, out_dir, overwrite=overwrite)
    cond = default_cond(network, n)
    x0 = module.sample(n, cond, generator=torch.Generator().manual_seed(0), weights=weights)
    with tempfile.TemporaryDirectory() as temporary:
        expected = Path(temporary) / "expected.safetensors"
        save_file({"x0": x0.cpu().contiguous(), **{k: v.contiguous() for k, v in cond.items()}}, expected)
        done = subprocess.run(
            [sys.executable, "-c", _CHECK, str(folder), str(expected)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        raise RuntimeError(f"{folder} was written, but the stock pipeline does not reproduce the student: {reason}")
    return folder, float(done.stdout.strip().splitlines()[-1])


def main(words: Sequence[str]) -> None:
    """Export the student of a run."""
    parser = CommandParser(prog="lightning-distill export", description="Student to diffusers pipeline.")
    parser.add_argument("run_dir", help="run folder, for example runs/quickstart")
    parser.add_argument("out_dir", help="folder to create")
    parser.add_argument("--weights", help="ema (the default), student, or the name of an average")
    parser.add_argument("--checkpoint", help="checkpoint file (default: the run's last)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it exists")
    args = parser.parse_args(list(words))
    if Path(args.out_dir).expanduser().exists() and not args.overwrite:
        raise FileExistsError(f"{args.out_dir} exists; give another folder, or --overwrite to replace it.")
    module = load_run(args.run_dir, args.checkpoint)
    folder, difference = export_module(module, args.out_dir, weights_name(module, args.weights), args.overwrite)
    print(f"{folder}\nstock pipeline in a fresh process: largest difference to sample() {difference:.1e}")
