r"""Train shipped configurations over several seeds and compare the students with their teacher.

    python benchmarks/compare.py fashion --configs quickstart.yaml method/dmd2_fashion.yaml --seeds 0 1 2 --data ROOT

    python benchmarks/compare.py fashion --store STORE --configs method/boss_fashion.yaml:num_steps=8 \
        method/reflow_fashion.yaml+method/insta_flow_fashion.yaml

``:key=value`` sets an argument of the method. ``+`` trains stages one after the other: each is the teacher of the next,
and CPU seconds are those of all. Every run is a process of its own with one thread; CPU seconds are those of training
alone. Figures use 5,000 samples, noise that no training or checkpoint choice has seen, and the held-out half of the
reference.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_RUN = """
import json, sys, time, torch
torch.set_num_threads(1)
from lightning_distill.cli import trainer_cli
from lightning_distill.commands.quickstart import evaluate_student, figures_of
from lightning_distill.networks.specs import ZooDenoiser
stages, zoo, samples, many, out = json.loads(sys.argv[1])
seconds, teacher = 0.0, []
for words in stages:
    start = time.process_time()
    cli = trainer_cli([*words, *teacher])
    seconds += time.process_time() - start
    teacher = [f"--model.init_args.teacher.init_args.path={cli.trainer.log_dir}"]
if not cli.model.require_teacher().zoo_name:  # a stage before was no copy of the shipped teacher
    cli.model.teacher = ZooDenoiser(zoo).build().eval()
row, teachers = evaluate_student(cli.model.eval(), samples, bf16=zoo == "fashion", many=many)
figures = figures_of(row)
figures |= {f"fd_teacher_{t.nfe}": t.metrics["fd_cnn"] for t in teachers}
figures["parameters"] = sum(p.numel() for p in cli.model.student.parameters())
figures |= {"cpu_seconds": seconds, "student_updates": cli.trainer.global_step, "method": type(cli.model).__name__}
open(out, "w").write(json.dumps(figures))
"""


def identity(row: dict[str, Any]) -> tuple[str, str, str]:
    """What makes a row of results a configuration of its own."""
    return row["config"], str(row.get("settings")), str(row.get("after"))


def parse(entry: str) -> dict[str, Any]:
    """Configuration, settings and earlier stages of a word of the command line."""
    *before, last = entry.split("+")
    config, *settings = last.split(":")
    row: dict[str, Any] = {"config": f"configs/{config}"}
    if settings:
        row["settings"] = dict(setting.split("=", 1) for setting in settings)
    return row | ({"after": [f"configs/{c}" for c in before]} if before else {})


def run(entry: str, seed: int, args: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """One training run, of one stage or several, and its figures."""
    row = parse(entry) | {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "figures.json")
        stages = []
        for config in (*row.get("after", ()), row["config"]):
            words = ["fit", "-c", config, f"--seed_everything={seed}", f"--model.init_args.seed={seed}"]
            words += [f"--data.init_args.seed={seed}", f"--trainer.logger.init_args.save_dir={folder}"]
            words += ["--trainer.enable_progress_bar=false"]
            if args.store and "class_path: Trajectories" in Path(config).read_text():
                words.append(f"--data.init_args.path={args.store}")
            stages.append(words)
        stages[-1].append("--trainer.enable_checkpointing=false")
        stages[-1] += [f"--model.init_args.{key}={value}" for key, value in row.get("settings", {}).items()]
        job = json.dumps([stages, args.problem, args.samples, args.many, out])
        done = subprocess.run(
            [sys.executable, "-c", _RUN, job], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{entry} seed {seed}: {done.stderr[-2000:]}")
        figures = json.loads(Path(out).read_text())
    row |= {"fd": figures.pop("fd_cnn"), **figures}
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def main() -> None:
    """Run everything and write ``compare_<problem>``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=["fashion", "digits"])
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--many", type=int, default=50, help="steps of the teacher at its best")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--store", help="folder of the teacher's trajectories, for configurations that read them")
    parser.add_argument("--data", help="folder of the data set, for configurations that use data")
    args = parser.parse_args()
    args.store = args.store and str(Path(args.store).resolve())
    os.chdir(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if args.data:
        environment["LIGHTNING_DISTILL_DATA"] = args.data

    def jobs() -> Iterator[tuple[str, int]]:
        for config in args.configs:
            for seed in args.seeds:
                yield config, seed

    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda job: run(*job, args, environment), jobs()))

    from results import RESULTS, write_result

    latest = RESULTS / "latest" / f"compare_{args.problem}.json"
    if latest.is_file():  # keep the rows of configurations that were not run again
        again = {identity(parse(entry)) for entry in args.configs}
        rows = [r for r in json.loads(latest.read_text())["rows"] if identity(r) not in again] + rows
    write_result(f"compare_{args.problem}", {"rows": rows}, seeds=args.seeds)


if __name__ == "__main__":
    main()
