r"""Train shipped configurations over several seeds and compare the students with their teacher.

    python benchmarks/compare.py fashion --configs quickstart.yaml method/dmd2_fashion.yaml --seeds 0 1 2 --data ROOT

    python benchmarks/compare.py digits --seconds 60 --configs method/*_ring*.yaml --seeds 0

    python benchmarks/compare.py fashion --store STORE --configs method/boss_fashion.yaml:num_steps=8 \
        method/reflow_fashion.yaml+method/insta_flow_fashion.yaml

    python benchmarks/compare.py digits --seconds 60 --configs method/cmt_ring.yaml@10~method/scm_ring.yaml@20

``:key=value`` sets an argument of the method. ``+`` and ``~`` train stages one after the other, and CPU seconds are
those of all: before ``+`` stands the teacher of the next stage, before ``~`` the student that it begins with. With
``--seconds`` configurations of the plane are rewritten for the pictures, with as many updates as fit (``derive.py``);
``@10`` gives a stage seconds of its own. What the record holds is run again only with ``--again``. Every run is a
process of its own with one thread; CPU seconds are those of training alone. Figures use 5,000 samples, noise that no
training or checkpoint choice has seen, and the held-out half of the reference.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from derive import PROBLEMS, derive

from lightning_distill.environment import machine


def identity(row: dict[str, Any]) -> tuple[str, str, str, float | None]:
    """What makes a row of results a configuration of its own."""
    return row["config"], str(row.get("settings")), str(row.get("after")), row.get("seconds")


@dataclass
class Stage:
    """One training run of an entry of the command line.

    Attributes:
        config: its file.
        settings: arguments of the method.
        seconds: CPU seconds of a configuration of the plane, None for those of all.
        start: the next stage's student begins as this stage's, whose teacher is the same; else it is the next one's
            teacher.
    """

    config: str
    settings: dict[str, str]
    seconds: float | None
    start: bool = False


def stages_of(entry: str) -> list[Stage]:
    """The stages of a word of the command line."""
    stages = []
    for word in re.findall(r"[^+~]+[+~]?", entry):
        before, _, seconds = word.rstrip("+~").partition("@")
        config, *settings = re.split(r":(?=[\w.]+=)", before)
        stages.append(
            Stage(
                f"configs/{config}",
                dict(setting.split("=", 1) for setting in settings),
                float(seconds) if seconds else None,
                word.endswith("~"),
            )
        )
    return stages


def parse(entry: str, seconds: float | None = None) -> dict[str, Any]:
    """Configuration, settings, earlier stages and time of a word of the command line.

    Args:
        entry: the word.
        seconds: of the stages of the plane that have none of their own.
    """
    *before, last = stages_of(entry)
    row: dict[str, Any] = {"config": last.config}
    if of_the_plane(last.config) and (total := sum(fitted_seconds(stages_of(entry), seconds))):
        row["seconds"] = total
    if last.settings:
        row["settings"] = last.settings
    if before:
        words = re.findall(r"[^+~]+[+~]", entry)
        row["after"] = [f"configs/{word.removesuffix('+')}" for word in words]
    return row


def matching(entry: str) -> list[str]:
    """Configurations that a word with ``*`` names; other words as they are."""
    if "*" not in entry:
        return [entry]
    root = Path("configs")
    return sorted(str(path.relative_to(root)) for path in root.glob(entry))


def of_the_plane(config: str) -> bool:
    """Whether a configuration is of a problem in two dimensions."""
    return Path(config).stem.rpartition("_")[2] in ("ring", "ring4") or "_ring_" in config


def fits(entry: str, args: argparse.Namespace) -> bool:
    """Whether a configuration can be run on the problem; says why not."""
    plane = [stage.config for stage in stages_of(entry) if of_the_plane(stage.config)]
    if not plane:
        return True
    try:
        if any(stage.seconds is None and stage.config in plane for stage in stages_of(entry)) and args.seconds is None:
            raise ValueError("it is of a problem in the plane, which is rewritten for pictures, with --seconds.")
        for config in plane:
            derive(yaml.safe_load(Path(config).read_text()), PROBLEMS[args.problem], 100)
    except ValueError as error:
        print(f"left out: {entry}: {error}", file=sys.stderr)
        return False
    return True


def fitted_seconds(stages: list[Stage], seconds: float | None) -> list[float]:
    """Of the stages that are fitted into a time, those of the plane; 0 for the others, which take what they take."""
    return [(stage.seconds or seconds or 0.0) if of_the_plane(stage.config) else 0.0 for stage in stages]


def run(entry: str, seed: int, args: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """One training run, of one stage or several, and its figures."""
    row = parse(entry, args.seconds) | {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "figures.json")
        stages = []
        parts = stages_of(entry)
        for part, seconds in zip(parts, fitted_seconds(parts, args.seconds)):
            words = [part.config, f"--seed_everything={seed}", f"--model.init_args.seed={seed}"]
            words += [f"--data.init_args.seed={seed}", f"--trainer.logger.init_args.save_dir={folder}"]
            words += ["--trainer.enable_progress_bar=false"]
            words += [f"--model.init_args.{key}={value}" for key, value in part.settings.items()]
            if args.store and "class_path: Trajectories" in Path(part.config).read_text():
                words.append(f"--data.init_args.path={args.store}")
            stages.append({"words": words, "seconds": seconds or None, "start": part.start})
        stages[-1]["words"].append("--trainer.enable_checkpointing=false")
        job = {"stages": stages, "problem": args.problem, "samples": args.samples, "many": args.many, "folder": folder}
        done = subprocess.run(
            [sys.executable, "benchmarks/compare_run.py", json.dumps(job), out],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{entry} seed {seed}: {done.stderr[-2000:]}")
        figures = json.loads(Path(out).read_text())
    if not math.isfinite(figures["fd_cnn"]):
        raise RuntimeError(f"{entry} seed {seed}: the samples are not finite.")
    row |= {"fd": figures.pop("fd_cnn"), **figures, "cpu": machine()["cpu"]}
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def main() -> None:
    """Run everything and write ``compare_<problem>``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=[*PROBLEMS])
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--many", type=int, default=50, help="steps of the teacher at its best")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--store", help="folder of the teacher's trajectories, for configurations that read them")
    parser.add_argument("--seconds", type=float, help="CPU seconds of a method whose configuration is of the plane")
    parser.add_argument("--again", action="store_true", help="run what is in the record, too")
    parser.add_argument("--data", help="folder of the data set, for configurations that use data")
    args = parser.parse_args()
    args.store = args.store and str(Path(args.store).resolve())
    os.chdir(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if args.data:
        environment["LIGHTNING_DISTILL_DATA"] = args.data

    from results import RESULTS, write_result

    latest = RESULTS / "latest" / f"compare_{args.problem}.json"
    kept = json.loads(latest.read_text())["rows"] if latest.is_file() else []
    entries = [found for entry in args.configs for found in matching(entry) if fits(found, args)]
    wanted = [(entry, seed) for entry in entries for seed in args.seeds]
    done = {(*identity(row), row["seed"]) for row in kept}
    if not args.again:
        wanted = [job for job in wanted if (*identity(parse(job[0], args.seconds)), job[1]) not in done]
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(run, *job, args, environment): job for job in wanted}
        for future in as_completed(futures):
            try:
                row = future.result()
            except RuntimeError as error:
                failed.append(str(error))
                print(error, file=sys.stderr, flush=True)
                continue
            mine = (*identity(row), row["seed"])
            kept = [r for r in kept if (*identity(r), r["seed"]) != mine] + [row]
            kept.sort(key=lambda r: (*map(str, identity(r)), r["seed"]))
            write_result(f"compare_{args.problem}", {"rows": kept}, seeds=sorted({r["seed"] for r in kept}))
    if failed:
        raise SystemExit(f"{len(failed)} of {len(wanted)} runs failed; the reasons are above.")


if __name__ == "__main__":
    main()
