"""Train the two-dimensional students over several seeds and compare them with their teachers.

    python benchmarks/toy.py                                  # every two-dimensional configuration, three seeds
    python benchmarks/toy.py ring4 --configs tdm cdm --seeds 0
    python benchmarks/toy.py ring4 --configs dmd2 uni_instruct --critic oracle --seeds 0 1 2 3 4
    python benchmarks/toy.py checkerboard --picture checkerboard.png

Configurations are found by the end of their names (``tdm_ring4.yaml``); rows of those that are not run are kept. The
checkerboard has two teachers, the same network of configs/teacher/checkerboard.yaml: ``short`` is the documented
problem (six CPU seconds of training), ``long`` is the configuration as it is shipped. The teacher of ring4 is exact.
``--critic oracle`` exchanges the fake score for the posterior mean over the student's last samples, which does not lag.
CPU seconds are those of one thread, from the command line to the last update. Distances are between 5,000 samples
(20,000 of ring4) and as many fresh points, averaged over four draws of both (one draw of 5,000 moves them by a tenth);
``sw2_floor`` is the distance between two sets of fresh points, and ``ratio`` is the student's distance over that of the
teacher with 100 Euler steps from the same noise. ``chi2`` compares histograms of 16 x 16 cells on [-2.5, 2.5]^2 (0
equal, 1 disjoint) and sees the folds of a student that ``sw2`` hardly sees. On the ring ``rmse`` is the root mean
squared distance to the exact ends of the teacher's trajectories from the same noise, with the student's own steps; flow
maps have ``rmse_2`` and ``rmse_4``.
"""

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, write_result
from torch import Tensor

from lightning_distill.cli import import_everything, trainer_cli
from lightning_distill.data.toy import sample_toy
from lightning_distill.generation import default_cond, generate, index_noise
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.manifold import precision_recall
from lightning_distill.metrics.progress import progress
from lightning_distill.metrics.sliced_wasserstein import sliced_wasserstein
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.plots import save_comparison
from lightning_distill.times import few_step_times

SAMPLES, DRAWS, REFERENCE_SEED, NOISE_SEED, CELLS, SIDE = 5000, 4, 11, 12, 16, 2.5
#: problems, and the samples of a draw
PROBLEMS = {"checkerboard": SAMPLES, "ring4": 20_000, "ring": SAMPLES}
SCHEDULE = "--model.init_args.student_scheduler.init_args"
#: settings that turn the shipped teacher into the one of the documented problem
TEACHERS = {
    "short": [
        "--trainer.max_steps=850",
        f"{SCHEDULE}.total_steps=850",
        f"{SCHEDULE}.decay_start=280",
        "--model.init_args.student_optimizer.init_args.lr=0.004",
    ],
    "long": [],
}
#: settings that exchange the fake score
CRITICS = {"learned": [], "oracle": ["--model.init_args.fake_score=OracleScore"]}


def train(config: str, folder: str, seed: int, *words: str) -> tuple[Any, float]:
    """One training run; the command line after it, and its CPU seconds."""
    start = time.process_time()
    settings = [f"--seed_everything={seed}", f"--model.init_args.seed={seed}", f"--data.init_args.seed={seed}"]
    settings += [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.enable_progress_bar=false"]
    cli = trainer_cli(["fit", "-c", config, *settings, *words])
    return cli, time.process_time() - start


def points(problem: str, seed: int, n: int = SAMPLES) -> Tensor:
    """Points of the data, (n, 2)."""
    return sample_toy(problem, n, torch.Generator().manual_seed(seed))[0]


def histogram(x: Tensor) -> Tensor:
    """Share of the points in each cell, (CELLS^2 + 1,); the last is everything outside."""
    cell = ((x.double() / SIDE + 1) * CELLS / 2).floor().long()
    inside = ((cell >= 0) & (cell < CELLS)).all(dim=1)
    index = torch.where(inside, cell[:, 0] * CELLS + cell[:, 1], CELLS**2)
    return torch.bincount(index, minlength=CELLS**2 + 1).double() / len(x)


def chi2(x: Tensor, problem: str) -> float:
    """Symmetric chi-square distance of two histograms, in [0, 1]; the data's has 200,000 points."""
    p, q = histogram(x), histogram(points(problem, REFERENCE_SEED + 1, 200_000))
    return 0.5 * ((p - q).square() / (p + q).clamp_min(1e-12)).sum().item()


def draws(problem: str) -> list[tuple[Tensor, Tensor]]:
    """Starting noise and data of every draw, each (N, 2)."""
    n = PROBLEMS[problem]
    noises = [index_noise(n, (2,), NOISE_SEED + i) for i in range(DRAWS)]
    return [(noise, points(problem, REFERENCE_SEED + 20 + i, n)) for i, noise in enumerate(noises)]


def mean_distance(make: Callable[[Tensor], Tensor], problem: str) -> tuple[float, Tensor]:
    """Sliced Wasserstein distance of generated points, averaged over the draws, and the points of the first.

    Args:
        make: starting noise (N, 2) -> points (N, 2).
        problem: name of the data.
    """
    made = [(make(noise), data) for noise, data in draws(problem)]
    return sum(sliced_wasserstein(x, data) for x, data in made) / DRAWS, made[0][0]


def teacher_figures(teacher: Denoiser, problem: str) -> tuple[dict[str, float], Tensor]:
    """Distances of the teacher's own sampling, and its points after 100 steps."""
    figures: dict[str, float] = {}
    for steps in (1, 2, 4, 100):
        times = few_step_times(teacher.process, steps)

        def sample(noise: Tensor, times: list[float] = times) -> Tensor:
            return generate(teacher, noise, default_cond(teacher, len(noise)), times, "ode")

        figures[f"sw2_teacher_{steps}"], x = mean_distance(sample, problem)
    figures["chi2_teacher_100"] = chi2(x, problem)
    return figures, x


def distances_to_ends(module: Any) -> dict[str, float]:
    """Root mean squared distance to the ends of an exact teacher's trajectories, by steps of the student."""
    noise, process = index_noise(SAMPLES, (2,), NOISE_SEED), module.process
    ends = module.teacher.network.mixture.flow_map(process.prior(noise, process.t_max), process.t_max, 0.0, process)
    wanted = {"rmse": None} | ({"rmse_2": 2, "rmse_4": 4} if module.capability == "two_time" else {})
    made = {key: module.sample(SAMPLES, noise=noise, num_steps=steps) for key, steps in wanted.items()}
    return {key: (x - ends).square().sum(dim=1).mean().sqrt().item() for key, x in made.items()}


def student_row(module: Any, problem: str, teacher: dict[str, float]) -> tuple[dict[str, Any], Tensor]:
    """Figures of a student."""
    sw2, x = mean_distance(lambda noise: module.sample(len(noise), noise=noise), problem)
    data, n = points(problem, REFERENCE_SEED), PROBLEMS[problem]
    pairs = [(points(problem, 100 + 2 * i, n), points(problem, 101 + 2 * i, n)) for i in range(DRAWS)]
    floors = [sliced_wasserstein(*pair) for pair in pairs]
    manifold = precision_recall(x[:SAMPLES], data)
    row = {
        "samples": n,
        "sw2": sw2,
        "sw2_floor": sum(floors) / len(floors),
        "ratio": sw2 / teacher["sw2_teacher_100"],
        "progress": progress(teacher[f"sw2_teacher_{len(module.student_times)}"], sw2, teacher["sw2_teacher_100"]),
        "fd": frechet_distance(FeatureStatistics.from_features(x), FeatureStatistics.from_features(data)),
        "precision": manifold.precision,
        "recall": manifold.recall,
        "chi2": chi2(x, problem),
        **(distances_to_ends(module) if problem == "ring" else {}),
        **teacher,
    }
    return row, x


def configurations(problem: str, names: list[str] | None) -> list[str]:
    """Configurations of a problem, all or by the beginning of their names."""
    found = sorted(str(path) for path in Path("configs/method").glob(f"*_{problem}.yaml"))
    if names is None:
        return found
    chosen = [f"configs/method/{name}_{problem}.yaml" for name in names]
    if missing := set(chosen) - set(found):
        raise SystemExit(f"{', '.join(sorted(missing))} does not exist")
    return chosen


def compare(
    problem: str, config: str, seeds: list[int], folder: str, panels: dict[str, Tensor], critic: str
) -> list[dict[str, Any]]:
    """Rows of one configuration."""
    rows = []
    for name in TEACHERS if problem == "checkerboard" else ["exact"]:
        words: list[str] = []
        facts: dict[str, Any] = {"teacher": name, "teacher_cpu_seconds": 0.0}
        if problem == "checkerboard":
            cli, seconds = train("configs/teacher/checkerboard.yaml", f"{folder}/{name}", 0, *TEACHERS[name])
            facts["teacher_cpu_seconds"] = seconds
            words = [f"--model.init_args.teacher.init_args.path={folder}/{name}/{cli.trainer.logger.name}"]
        known: dict[str, float] = {}
        for seed in seeds:
            cli, seconds = train(config, folder, seed, "--trainer.enable_checkpointing=false", *CRITICS[critic], *words)
            module = cli.model.eval()
            if not known:
                known, drawn = teacher_figures(module.teacher, problem)
                panels[f"{problem}: {name} teacher, 100 steps"] = drawn
            figures, drawn = student_row(module, problem, known)
            panels[f"{Path(config).stem}, {name} teacher, seed {seed}"] = drawn
            row = {"method": type(module).__name__, "config": config, "nfe": len(module.student_times), "seed": seed}
            row |= {"critic": critic} if critic != "learned" else {}
            row |= {"student_updates": cli.trainer.global_step, "cpu_seconds": seconds, **facts, **figures}
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Run the chosen problems and write ``compare_<problem>``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", metavar="problem", help=", ".join(PROBLEMS))
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="beginnings of the configurations' names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--critic", choices=list(CRITICS), default="learned")
    parser.add_argument("--picture", help="PNG of the points")
    args = parser.parse_args()
    problems = args.problems or list(PROBLEMS)
    if unknown := set(problems) - set(PROBLEMS):
        parser.error(f"unknown problem {', '.join(sorted(unknown))}; choose from {', '.join(PROBLEMS)}")
    picture = args.picture and Path(args.picture).resolve()
    os.chdir(Path(__file__).resolve().parent.parent)
    torch.set_num_threads(1)
    import_everything()  # outside the clock
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for problem in problems:
        panels = {f"{problem}: data": points(problem, REFERENCE_SEED)}
        latest = RESULTS / "latest" / f"compare_{problem}.json"
        rows = json.loads(latest.read_text())["rows"] if latest.is_file() else []
        for config in configurations(problem, args.configs):
            with tempfile.TemporaryDirectory() as folder:
                new = compare(problem, config, args.seeds, folder, panels, args.critic)
            others = [row for row in rows if (row["config"], row.get("critic", "learned")) != (config, args.critic)]
            rows = sorted(others + new, key=lambda row: (row["config"], row.get("critic", "learned")))
            write_result(f"compare_{problem}", {"rows": rows}, seeds=args.seeds, samples=PROBLEMS[problem])
        if picture:
            save_comparison(panels, picture.with_stem(f"{picture.stem}_{problem}") if len(problems) > 1 else picture)


if __name__ == "__main__":
    main()
