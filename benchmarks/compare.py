"""Train shipped configurations over several seeds and compare the students with their teacher.

    python benchmarks/compare.py fashion --configs quickstart.yaml method/dmd2_fashion.yaml --seeds 0 1 2 --data ROOT

Every run is a process of its own with one thread; CPU seconds are those of training alone. Figures use 5,000 samples,
noise that no training or checkpoint choice has seen, and the held-out half of the reference.
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
words, zoo, samples, out = json.loads(sys.argv[1])
start = time.process_time()
cli = trainer_cli(words)
seconds = time.process_time() - start
figures = figures_of(evaluate_student(cli.model.eval(), samples, bf16=zoo == "fashion")[0])
figures |= {"cpu_seconds": seconds, "student_updates": cli.trainer.global_step, "method": type(cli.model).__name__}
open(out, "w").write(json.dumps(figures))
"""


def run(config: str, seed: int, problem: str, samples: int, environment: dict[str, str]) -> dict[str, Any]:
    """One training run and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "figures.json")
        words = ["fit", "-c", f"configs/{config}", f"--seed_everything={seed}", f"--model.init_args.seed={seed}"]
        words += [f"--data.init_args.seed={seed}", f"--trainer.logger.init_args.save_dir={folder}"]
        words += ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
        job = json.dumps([words, problem, samples, out])
        done = subprocess.run(
            [sys.executable, "-c", _RUN, job], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{config} seed {seed}: {done.stderr[-2000:]}")
        figures = json.loads(Path(out).read_text())
    row = {"config": f"configs/{config}", "seed": seed, "fd": figures.pop("fd_cnn"), **figures}
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def main() -> None:
    """Run everything and write ``compare_<problem>``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=["fashion", "digits"])
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data", help="folder of the data set, for configurations that use data")
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if args.data:
        environment["LIGHTNING_DISTILL_DATA"] = args.data

    def jobs() -> Iterator[tuple[str, int]]:
        for config in args.configs:
            for seed in args.seeds:
                yield config, seed

    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda job: run(*job, args.problem, args.samples, environment), jobs()))

    from results import RESULTS, write_result

    latest = RESULTS / "latest" / f"compare_{args.problem}.json"
    if latest.is_file():  # keep the rows of configurations that were not run again
        again = {f"configs/{c}" for c in args.configs}
        rows = [r for r in json.loads(latest.read_text())["rows"] if r["config"] not in again] + rows
    write_result(f"compare_{args.problem}", {"rows": rows}, seeds=args.seeds)


if __name__ == "__main__":
    main()
