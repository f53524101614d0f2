r"""Train shipped configurations over several seeds and compare the students with their teacher.

    python benchmarks/compare.py fashion --configs quickstart.yaml method/dmd2_fashion.yaml --seeds 0 1 2 --data ROOT

    python benchmarks/compare.py digits --seconds 60 --configs method/*_ring*.yaml --seeds 0

    python benchmarks/compare.py fashion --store STORE --configs method/boss_fashion.yaml:num_steps=8 \
        method/reflow_fashion.yaml+method/insta_flow_fashion.yaml

``:key=value`` sets an argument of the method. ``+`` trains stages one after the other: each is the teacher of the next,
and CPU seconds are those of all. With ``--seconds`` configurations of the plane are rewritten for the digits, with as
many updates as fit (``derive.py``). What the record holds is run again only with ``--again``. Every run is a process of
its own with one thread; CPU seconds are those of training alone. Figures use 5,000 samples, noise that no training or
checkpoint choice has seen, and the held-out half of the reference.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml
from derive import derive

from lightning_distill.environment import machine


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
    config = parse(entry)["config"]
    if not of_the_plane(config):
        return True
    try:
        if args.problem != "digits" or args.seconds is None:
            raise ValueError("it is of a problem in the plane, which is rewritten for digits, with --seconds.")
        derive(yaml.safe_load(Path(config).read_text()), 100)
    except ValueError as error:
        print(f"left out: {entry}: {error}", file=sys.stderr)
        return False
    return True


def run(entry: str, seed: int, args: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """One training run, of one stage or several, and its figures."""
    row = parse(entry) | {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "figures.json")
        stages = []
        for config in (*row.get("after", ()), row["config"]):
            words = [config, f"--seed_everything={seed}", f"--model.init_args.seed={seed}"]
            words += [f"--data.init_args.seed={seed}", f"--trainer.logger.init_args.save_dir={folder}"]
            words += ["--trainer.enable_progress_bar=false"]
            if args.store and "class_path: Trajectories" in Path(config).read_text():
                words.append(f"--data.init_args.path={args.store}")
            stages.append(words)
        stages[-1].append("--trainer.enable_checkpointing=false")
        stages[-1] += [f"--model.init_args.{key}={value}" for key, value in row.get("settings", {}).items()]
        seconds = args.seconds if of_the_plane(row["config"]) else None
        job = {"stages": stages, "problem": args.problem, "samples": args.samples, "many": args.many}
        job |= {"seconds": seconds, "folder": folder}
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
    row |= {"seconds": seconds} if seconds else {}
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
    done = {(*identity(row), row["seed"]) for row in kept if row.get("seconds") in (None, args.seconds)}
    if not args.again:
        wanted = [(entry, seed) for entry, seed in wanted if (*identity(parse(entry)), seed) not in done]
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
            kept.sort(key=lambda r: (r["config"], str(r.get("settings")), str(r.get("after")), r["seed"]))
            write_result(f"compare_{args.problem}", {"rows": kept}, seeds=sorted({r["seed"] for r in kept}))
    if failed:
        raise SystemExit(f"{len(failed)} of {len(wanted)} runs failed; the reasons are above.")


if __name__ == "__main__":
    main()
