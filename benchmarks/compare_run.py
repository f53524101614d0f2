"""One training run of ``compare.py`` and its figures, in a process of its own.

python benchmarks/compare_run.py '{"stages": [{"words": [...], ...}], "problem": "digits", ...}' figures.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from derive import PROBLEMS, fitted

from lightning_distill.bfloat16 import bfloat16_pays
from lightning_distill.cli import trainer_cli
from lightning_distill.commands.quickstart import evaluate_student, figures_of
from lightning_distill.evaluation.passing import verdict
from lightning_distill.networks.specs import ZooDenoiser


def train(job: dict[str, Any]) -> tuple[Any, float]:
    """All stages, one after the other; the last one's command line and the CPU seconds of all."""
    seconds, earlier, start, cli = 0.0, [], None, None
    problem = PROBLEMS[job["problem"]]
    for stage in job["stages"]:
        config, *more = stage["words"]
        if not bfloat16_pays():
            more = [*more, "--trainer.precision=32-true"]
        if stage["seconds"] is not None:
            words = [*more, *earlier]
            config = str(fitted(Path(config), problem, stage["seconds"], Path(job["folder"]), words, start))
        elif start is not None:
            more += ["--model.init_args.student=FromCheckpoint", f"--model.init_args.student.init_args.path={start}"]
        begun = time.process_time()
        cli = trainer_cli(["fit", "-c", config, *more, *earlier])
        seconds += time.process_time() - begun
        if stage["start"]:
            start = cli.trainer.log_dir
        else:
            earlier, start = [f"--model.init_args.teacher.init_args.path={cli.trainer.log_dir}"], None
    return cli, seconds


def main() -> None:
    """Train, evaluate, write."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    cli, seconds = train(job)
    if not cli.model.require_teacher().zoo_name:  # a stage before was no copy of the shipped teacher
        cli.model.teacher = ZooDenoiser(job["problem"]).build().eval()
    row, teachers = evaluate_student(
        cli.model.eval(),
        job["samples"],
        bf16=None if job["problem"] == "fashion" else False,
        many=job["many"],
        judge=True,
    )
    figures = figures_of(row)
    figures |= {f"fd_teacher_{t.nfe}": t.metrics["fd_cnn"] for t in teachers}
    figures["progress_judge"] = row.metrics.get("progress_judge")
    figures["objections"] = verdict(row, teachers, {"cnn": "fd_cnn", "judge": "fd_judge"})
    figures["parameters"] = sum(p.numel() for p in cli.model.student.parameters())
    figures |= {"cpu_seconds": seconds, "student_updates": cli.trainer.global_step, "method": type(cli.model).__name__}
    Path(sys.argv[2]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
