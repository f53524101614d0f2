"""``lightning-distill quickstart``: distil a shipped teacher, evaluate it, show it, export it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_distill.bfloat16 import bfloat16_pays
from lightning_distill.cli import trainer_cli
from lightning_distill.commands.errors import CommandParser
from lightning_distill.commands.export import export_module
from lightning_distill.commands.run_folder import find_run
from lightning_distill.configs import config_path
from lightning_distill.evaluation.evaluator import Evaluator
from lightning_distill.evaluation.runner import EvaluationRunner
from lightning_distill.evaluation.sampling import sample_many
from lightning_distill.evaluation.table import print_table
from lightning_distill.evaluation.teacher import TeacherCache
from lightning_distill.methods.base import DistillationModule
from lightning_distill.metrics.extractors import ZooClassifier
from lightning_distill.metrics.reference import load_reference
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.plots import save_comparison
from lightning_distill.records import EvaluationLog, EvaluationRow
from lightning_distill.report import write_report
from lightning_distill.times import few_step_times

__all__ = ["evaluate_student", "figures_of", "main"]

#: noise of the reported samples; the cards of the teachers use another
EVALUATION_SEED = 20_000


def evaluate_student(
    module: DistillationModule, n: int, bf16: bool | None = None, many: int = 50, judge: bool = False
) -> tuple[EvaluationRow, list[EvaluationRow]]:
    """Figures of a student of a shipped teacher, and the teacher's own from its card.

    Args:
        module: trained module, in evaluation mode.
        n: samples; 5,000 for a figure that is reported.
        bf16: sample under bfloat16 autocast; None where that is faster.
        many: steps of the teacher at its best.
        judge: measure in the features of the second shipped classifier, too.
    """
    name = module.require_teacher().zoo_name or ""
    extractors = [ZooClassifier(name), *([ZooClassifier(f"{name}/judge", "judge")] if judge else [])]
    evaluator = Evaluator(extractors, {e.name: load_reference(e.data) for e in extractors}, half="held_out")
    runner = EvaluationRunner(evaluator, n, EVALUATION_SEED, bf16=bfloat16_pays() if bf16 is None else bf16)
    nfe = len(module.student_times)
    teacher = runner.teacher_rows(module, [nfe, many], TeacherCache())
    row = runner.student_row(module, nfe, "ema" if module.student_ema else "student", teacher, stage="test")
    return row, teacher


def figures_of(row: EvaluationRow) -> dict[str, Any]:
    """The figures that benchmarks record, by their fixed names."""
    names = {"progress": "progress_cnn", "fd_cnn": "fd_cnn", "recall": "recall_cnn", "precision": "precision_cnn"}
    names |= {"class_accuracy": "class_accuracy", "images_per_second": "samples_per_second"}
    return {key: row.metrics[name] for key, name in names.items()} | {"nfe": row.nfe, "samples": row.num_samples}


def main(words: Sequence[str]) -> None:
    """Train, evaluate, draw, export, report."""
    parser = CommandParser(
        prog="lightning-distill quickstart", description="Distil the shipped Fashion-MNIST teacher into one step."
    )
    parser.add_argument("--smoke", action="store_true", help="a few updates and samples: does every part run?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs", help="folder of runs; this one gets quickstart/version_N there")
    args = parser.parse_args(list(words))
    if Path(args.out).expanduser().is_file():
        raise ValueError(f"--out {args.out} is a file; give a folder.")
    config = config_path("quickstart.yaml")
    words = ["fit", "-c", str(config), f"--model.init_args.seed={args.seed}", f"--seed_everything={args.seed}"]
    words += [f"--trainer.logger.init_args.save_dir={args.out}"]
    if not bfloat16_pays():
        words += ["--trainer.precision=32-true"]
    if args.smoke:
        words += ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1"]
    started = time.perf_counter()
    cpu_started = time.process_time()
    cli = trainer_cli(words)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    module: DistillationModule = cli.model.eval()
    run = find_run(cli.trainer.log_dir)

    print("evaluating ...", flush=True)
    row, teacher = evaluate_student(module, 200 if args.smoke else 5000)
    picture = _draw(module, run / "quickstart.png")
    folder, difference = export_module(module, run / "pipeline", overwrite=True)
    log = EvaluationLog.load(run)
    print_table(EvaluationLog([row], teacher))
    print("progress: 0 is the teacher with as many steps, 1 the teacher with many")
    EvaluationLog([*log.rows, replace(row, step=cli.trainer.global_step)], teacher, log.reference).save(run)
    record = {
        **figures_of(row),
        "fd_cnn": {
            **{f"teacher_{t.nfe}": t.metrics["fd_cnn"] for t in teacher if t.nfe in (1, 2, 4, 50)},
            "student_1": row.metrics["fd_cnn"],
        },
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "student_updates": cli.trainer.global_step,
        "seed": args.seed,
        "export_difference": difference,
    }
    written = _record(record, run, args.smoke)
    page = write_report([run], run / "report.html")
    print(
        f"\npictures    {picture}\nreport      {page}   (open it in a browser)\nfigures     {written}\n"
        f"pipeline    {folder}   (stock diffusers gives the same images: difference {difference:.0e})\n"
        f"curves      tensorboard --logdir {shlex.quote(str(run))}\n"
        f"more        lightning-distill sample {shlex.quote(str(run))} --n 100\n"
        "next        configs/method/dmd2_fashion.yaml adds real data and a GAN; README.md: your own model"
    )


def _draw(module: DistillationModule, path: Path) -> Path:
    """Teacher with 50 steps, student, teacher with the student's steps, from the same noise."""
    teacher = module.require_teacher()
    steps = len(module.student_times)

    def images(network: Denoiser, times: list[float], sampler: str) -> torch.Tensor:
        return sample_many(network, 60, times, sampler, EVALUATION_SEED, bf16=bfloat16_pays())[0]

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
