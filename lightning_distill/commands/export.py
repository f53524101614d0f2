"""``lightning-distill export RUN_DIR OUT_DIR``: a folder that stock diffusers loads, checked in a fresh process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_distill.commands.errors import CommandParser
from lightning_distill.commands.run_folder import load_run, weights_name
from lightning_distill.export import export_denoiser, export_lora, export_pipeline, probe_cond, verify_export
from lightning_distill.export.adapters import LORA_STYLES
from lightning_distill.export.folders import CONFIG, source_of
from lightning_distill.export.pipeline import stock_student
from lightning_distill.export.target_times import stock_sampler
from lightning_distill.generation import default_cond, draw_noise, generate
from lightning_distill.methods.base import DistillationModule
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.experts import ConditionExperts, ExpertNetwork, PromptExperts, single_experts
from lightning_distill.networks.merging import widest, without_adapters
from lightning_distill.networks.prompt_groups import CENTRES
from lightning_distill.networks.quantisation import holds_quantised
from lightning_distill.networks.second_time import remove_second_time

__all__ = ["export_module", "main"]


def export_module(
    module: DistillationModule,
    out_dir: str | Path,
    weights: str | None = None,
    overwrite: bool = False,
    n: int = 8,
    *,
    lora: Literal["diffusers", "kohya"] | None = None,
    source: str | Path | None = None,
    license: str | None = None,
    fresh: bool = True,
) -> tuple[Path, float]:
    """Export a student and compare the stock pipeline's samples, in a fresh process, with ``module.sample``.

    Experts for groups of classes or prompts become one pipeline each, ``expert_0`` and so on in ``out_dir``; beside
    those for prompts lie the centres of the groups, by which ``prompt_groups.group_of`` finds the one for a prompt.

    Args:
        module: a trained module.
        out_dir: folder to create.
        weights: network to export, see ``module.sampling_network``.
        overwrite: replace an existing folder.
        n: samples compared; at most 2 of text-conditioned models.
        lora: ``diffusers`` or ``kohya`` for a LoRA file of an adapter student; None for the whole pipeline.
        source: pipeline folder of the teacher; None for the one it was read from.
        license: SPDX name for the card; None for that of the source.
        fresh: compare in a new process; else in this one.

    Returns:
        the folder, and the largest difference (see ``verify_export``): at most 1e-5, or 5e-2 where frozen weights are
        quantised here. Our samples are made in float32, as the pipeline's are, also by a network in half precision.

    Raises:
        ValueError: nothing in diffusers reproduces the student.
        FileExistsError: the folder exists.
        RuntimeError: the loaded pipeline makes other samples.
    """
    if module.noise_scale != 1.0:
        raise ValueError(
            f"the student samples with noise_scale={module.noise_scale:g}, which no stock scheduler has; set "
            "noise_scale to 1 in the configuration of the run to export it with the plain sampler."
        )
    network = module.sampling_network(weights)
    differences = []
    pipelines = _pipelines(network, Path(out_dir))
    taken = [str(folder) for *_, folder in pipelines if folder.exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)}: these exist; give another folder, or overwrite=True.")
    for part, labels, folder in pipelines:
        differences.append(_export(module, part, labels, folder, weights, overwrite, n, lora, source, license, fresh))
    if isinstance(network.network, PromptExperts):
        save_file({CENTRES: network.network.centres.cpu()}, Path(out_dir) / "centres.safetensors")
    return Path(out_dir), max(differences)


def _pipelines(network: Denoiser, out_dir: Path) -> list[tuple[Denoiser, Tensor | None, Path]]:
    """What becomes a pipeline each, the classes it knows (None for all) and its folder."""
    experts = network.network
    if isinstance(experts, PromptExperts):
        return [(single, None, out_dir / f"expert_{k}") for k, single in enumerate(single_experts(network))]
    if not isinstance(experts, ConditionExperts):
        return [(network, None, out_dir)]
    owner = experts.groups[:-1].cpu()
    return [
        (single, (owner == k).nonzero().squeeze(1), out_dir / f"expert_{k}")
        for k, single in enumerate(single_experts(network))
    ]


def _export(
    module: DistillationModule,
    network: Denoiser,
    labels: Tensor | None,
    folder: Path,
    weights: str | None,
    overwrite: bool,
    n: int,
    lora: Literal["diffusers", "kohya"] | None,
    source: str | Path | None,
    license: str | None,
    fresh: bool,
) -> float:
    known = [role for role in (network, module.teacher) if role is not None]
    source = source or next((path for role in known if (path := source_of(role.network)) is not None), None)
    options: dict[str, Any] = {"source": source, "shape": module.sample_shape, "license": license}
    if labels is not None:
        options["card"] = {"classes": labels.tolist()}
    export = export_denoiser if lora is None else partial(export_lora, style=lora)
    export(network, module.student_times, module.sampler, folder, overwrite=overwrite, **options)
    size = json.loads((folder / CONFIG).read_text())["size"]
    one = single_experts(network)[0] if isinstance(network.network, ExpertNetwork) else network
    cond = default_cond(one, n)
    if labels is not None:
        cond = {"class_labels": labels[torch.arange(n) % len(labels)]}
    if size:
        n = min(n, 2)
        cond = probe_cond(one, n, size)
    generator = torch.Generator().manual_seed(0)
    exact = not holds_quantised(network.network)
    narrow = {p.dtype for p in network.network.parameters()} & {torch.float16, torch.bfloat16}
    rounded = next(iter(narrow)) if exact and lora is not None and len(narrow) == 1 else None
    with widest(network.network):
        if isinstance(module.sampling_network(weights).network, PromptExperts):  # which would send prompts to others
            noise = draw_noise((n, *module.sample_shape), generator)
            x0 = generate(network, noise, cond, module.student_times, module.sampler, generator=generator)
        else:
            x0 = module.sample(n, cond, generator=generator, weights=weights)
    with tempfile.TemporaryDirectory() as temporary:
        base = None if lora is None else source or _base_pipeline(module, network, Path(temporary) / "base")
        embedded: dict[str, Any] = {"cond": cond} if size else {"class_labels": cond.get("class_labels")}
        try:
            tolerance = 1e-5 if exact else 5e-2
            return verify_export(folder, x0, base=base, rounded=rounded, fresh=fresh, tolerance=tolerance, **embedded)
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(
                f"{folder} was written, but the stock pipeline does not reproduce the student: {error}"
            ) from None


def _base_pipeline(module: DistillationModule, network: Denoiser, folder: Path) -> Path:
    """The original network as a pipeline folder, where the teacher came from none."""
    process, times, start = stock_student(network, module.student_times)
    original = without_adapters(network.network)
    remove_second_time(original)  # the file has it
    return export_pipeline(
        original,
        process,
        network.prediction_type,
        times,
        stock_sampler(network, module.sampler, module.student_times),
        folder,
        start_scale=start,
        shape=module.sample_shape,
    )


def main(words: Sequence[str]) -> None:
    """Export the student of a run."""
    parser = CommandParser(prog="lightning-distill export", description="Student to diffusers pipeline or LoRA file.")
    parser.add_argument("run_dir", help="run folder, for example runs/quickstart")
    parser.add_argument("out_dir", help="folder to create")
    parser.add_argument("--lora", choices=LORA_STYLES, help="a LoRA file with these names instead of the pipeline")
    parser.add_argument("--source", help="pipeline folder of the teacher (default: the one it was read from)")
    parser.add_argument("--license", help="SPDX name for the card (default: the source's)")
    parser.add_argument("--weights", help="ema (the default), student, or the name of an average")
    parser.add_argument("--checkpoint", help="checkpoint file (default: the run's last)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it exists")
    args = parser.parse_args(list(words))
    if Path(args.out_dir).expanduser().exists() and not args.overwrite:
        raise FileExistsError(f"{args.out_dir} exists; give another folder, or --overwrite to replace it.")
    module = load_run(args.run_dir, args.checkpoint)
    folder, difference = export_module(
        module,
        args.out_dir,
        weights_name(module, args.weights),
        args.overwrite,
        lora=args.lora,
        source=args.source,
        license=args.license,
    )
    print(f"{folder}\nstock pipeline in a fresh process: largest difference to sample() {difference:.1e}")
