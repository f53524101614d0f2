"""``lightning-distill quickstart``: distil a shipped teacher, evaluate it, show it, export it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_distill.cli import trainer_cli
from lightning_distill.commands.errors import CommandParser
from lightning_distill.commands.export import export_module
from lightning_distill.commands.run_folder import find_run
from lightning_distill.configs import config_path
from lightning_distill.evaluation import evaluate_samples, sample_many
from lightning_distill.methods.base import DistillationModule
from lightning_distill.metrics.features import load_classifier
from lightning_distill.metrics.progress import progress
from lightning_distill.metrics.reference import load_reference
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.plots import save_comparison
from lightning_distill.times import few_step_times
from lightning_distill.zoo import zoo_card

__all__ = ["evaluate_student", "main"]

#: noise of the reported samples; the cards of the teachers use another
EVALUATION_SEED = 20_000


def evaluate_student(module: DistillationModule, zoo_name: str, n: int, bf16: bool = True) -> dict[str, Any]:
    """Figures of a student of a shipped teacher, with the teacher's own from its card.

    Args:
        module: trained module.
        zoo_name: the teacher's entry.
        n: samples.
        bf16: sample under bfloat16 autocast.

    Returns:
        ``fd_cnn``, ``precision``, ``recall``, ``class_accuracy``, ``progress``, ``nfe``, ``images_per_second``,
        ``samples``, and the ``teacher`` figures of the card.
    """
    card = zoo_card(zoo_name)["figures"]
    reference, classifier = load_reference(zoo_name), load_classifier(zoo_name)
    network, times = module.sampling_network(), module.student_times
    sample_many(network, 64, times, module.sampler, EVALUATION_SEED, bf16=bf16)  # warm-up
    start = time.perf_counter()
    images, labels = sample_many(network, n, times, module.sampler, EVALUATION_SEED, bf16=bf16)
    seconds = time.perf_counter() - start
    figures = evaluate_samples(images, labels, reference, classifier)
    best = min(card["fd_cnn"].values())
    own = card["fd_cnn"].get(str(len(times)))
    figures["progress"] = progress(own, figures["fd_cnn"], best) if own is not None else float("nan")
    return {**figures, "nfe": len(times), "images_per_second": n / seconds, "samples": n, "teacher": card}


def main(words: Sequence[str]) -> None:
    """Train, evaluate, draw, export, report."""
    parser = CommandParser(
        prog="lightning-distill quickstart", description="Distil the shipped Fashion-MNIST teacher into one step."
    )
    parser.add_argument("--smoke", action="store_true", help="a few updates and samples: does every part run?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs", help="folder for the run")
    args = parser.parse_args(list(words))
    config = config_path("quickstart.yaml")
    words = ["fit", "-c", str(config), f"--model.init_args.seed={args.seed}", f"--seed_everything={args.seed}"]
    words += [f"--trainer.logger.init_args.save_dir={args.out}"]
    if args.smoke:
        words += ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1"]
    started = time.perf_counter()
    cpu_started = time.process_time()
    cli = trainer_cli(words)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    module: DistillationModule = cli.model.eval()
    run = find_run(cli.trainer.log_dir)

    print("evaluating ...", flush=True)
    result = evaluate_student(module, "fashion", 200 if args.smoke else 5000)
    teacher = result["teacher"]
    picture = _draw(module, run / "quickstart.png")
    folder, difference = export_module(module, run / "pipeline", overwrite=True)
    _table(result, teacher)
    record = {
        "progress": result["progress"],
        "nfe": result["nfe"],
        "fd_cnn": {
            **{f"teacher_{k}": teacher["fd_cnn"][k] for k in ("1", "2", "4", "50")},
            "student_1": result["fd_cnn"],
        },
        "recall": result["recall"],
        "precision": result["precision"],
        "class_accuracy": result["class_accuracy"],
        "images_per_second": result["images_per_second"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "student_updates": cli.trainer.global_step,
        "samples": result["samples"],
        "seed": args.seed,
        "export_difference": difference,
    }
    written = _record(record, run, args.smoke)
    print(
        f"\npictures    {picture}\nfigures     {written}\n"
        f"pipeline    {folder}   (stock diffusers gives the same images: difference {difference:.0e})\n"
        f"curves      tensorboard --logdir {run}\nmore        lightning-distill sample {run} --n 100\n"
        "next        configs/method/dmd2_fashion.yaml adds real data and a GAN; README.md: your own model"
    )


def _draw(module: DistillationModule, path: Path) -> Path:
    """Teacher with 50 steps, student, teacher with the student's steps, from the same noise."""
    teacher = module.require_teacher()
    steps = len(module.student_times)

    def images(network: Denoiser, times: list[float], sampler: str) -> torch.Tensor:
        return sample_many(network, 60, times, sampler, EVALUATION_SEED, bf16=True)[0]

    def plural(n: int) -> str:
        return f"{n} step" + ("s" if n > 1 else "")

    many, few = few_step_times(teacher.process, 50), few_step_times(teacher.process, steps)
    panels = {
        "teacher, 50 steps": images(teacher, many, "ode"),
        f"student, {plural(steps)}": images(module.sampling_network(), module.student_times, module.sampler),
        f"teacher, {plural(steps)}": images(teacher, few, "ode"),
    }
    save_comparison(panels, path)
    return path


def _table(result: dict[str, Any], teacher: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "steps", "fd_cnn", "recall", "class accuracy", "images/s")
    for steps in ("50", "4", "2", "1"):
        table.add_row(
            "teacher",
            steps,
            f"{teacher['fd_cnn'][steps]:.2f}",
            f"{teacher['recall'][steps]:.2f}",
            f"{teacher['class_accuracy'][steps]:.3f}",
            "",
        )
    table.add_row(
        "student",
        str(result["nfe"]),
        f"{result['fd_cnn']:.2f}",
        f"{result['recall']:.2f}",
        f"{result['class_accuracy']:.3f}",
        f"{result['images_per_second']:.0f}",
        style="bold",
    )
    Console().print(table)
    print(f"progress {result['progress']:.3f}   (0: teacher with as many steps, 1: teacher with many)")


def _record(record: dict[str, Any], run: Path, smoke: bool) -> Path:
    """The figures as JSON: in the run folder, and among the repository's results when this is a checkout."""
    file = run / "quickstart.json"
    file.write_text(json.dumps(record, indent=2) + "\n")
    results = Path(__file__).parents[2] / "benchmarks" / "results.py"
    if smoke or not results.is_file():
        return file
    import importlib.util

    spec = importlib.util.spec_from_file_location("results", results)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_result("quickstart", record)
    return file
