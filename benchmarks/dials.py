r"""Do dials survive distillation: students of the digits told a guidance scale, over scales and numbers of steps.

    python benchmarks/dials.py --runs runs/dials

Methods of three families are trained for the same CPU seconds with scales drawn at random, each from its configuration
of the plane (``derive.py``). Students and the teacher under each of its solvers then make the same samples at every
scale and number of evaluations. Runs that are there are read, interrupted ones go on, and figures that are there are
kept. Besides the distance to the data, samples have one to an accurately solved teacher at each of the scales: a dial
that works is nearest to the teacher at its own.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from derive import PROBLEMS, derive, fitted
from dials_table import PICTURE, plot
from emoji import fit
from results import RESULTS, write_result
from torch import Tensor, nn

from lightning_distill.checkpoints import read_checkpoint
from lightning_distill.commands.quickstart import EVALUATION_SEED
from lightning_distill.commands.run_folder import find_checkpoint, find_run, load_run
from lightning_distill.evaluation.evaluator import Evaluator
from lightning_distill.evaluation.sampling import sample_many
from lightning_distill.guidance import telling
from lightning_distill.metrics.extractors import ZooClassifier
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.reference import load_reference
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import ZooDenoiser
from lightning_distill.times import few_step_times

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "digits"
#: configurations of the plane by the name of the student
STUDENTS = {
    "consistency": "method/consistency_distillation_ring.yaml",
    "flow_map": "method/flow_map_lsd_ring.yaml",
    "dmd2": "method/dmd2_4step_ring4.yaml",
}
#: scales that are told in training, smallest and largest
RANGE = (1.0, 6.0)
SCALES = (1.0, 2.0, 3.0, 5.0)
STEPS = (1, 2, 4)
#: numbers of steps of the teacher's solvers
SOLVERS = {
    "ode": (1, 2, 4, 8, 16, 32),
    "adams": (2, 4, 8, 16, 32),
    "dpmpp_2m": (2, 4, 8, 16, 32),
    "heun": (2, 4, 8, 16),
}
#: what counts as the teacher itself: solver and steps
ACCURATE = ("heun", 32)


# ------------------------------------------------------------------------------------------------ the dial
def told(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of the plane whose student is told a scale that is drawn for each sample.

    Args:
        config: as read from its file.
    """
    config = json.loads(json.dumps(config))  # aliases of YAML become copies
    model = config["model"]["init_args"]
    low, high = RANGE
    model["guidance"] = {"class_path": "RandomGuidance", "init_args": {"low": low, "high": high}}
    branch = {"class_path": "TwoTime", "init_args": {"kind": None, "guidance": True}}
    if model["student"]["class_path"] == "TwoTime":
        model["student"]["init_args"]["guidance"] = True
    else:
        model["student"] = branch
    if "fake_score" in model:
        model["fake_score"] = branch
    return config


# ------------------------------------------------------------------------------------------------ training
def train(who: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train a student, or what is missing of it.

    Args:
        who: name in ``STUDENTS``.
        args: of the command line.

    Returns:
        what was done: ``config``, ``method``, ``updates`` and ``cpu_seconds``.
    """
    plane, file, folder = args.runs / "plane" / f"{who}.yaml", args.runs / f"{who}.yaml", args.runs / who
    words = [f"--{key}={args.seed}" for key in ("seed_everything", "model.init_args.seed", "data.init_args.seed")]
    words += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    if not file.is_file():
        plane.parent.mkdir(parents=True, exist_ok=True)
        plane.write_text(yaml.safe_dump(told(yaml.safe_load((ROOT / "configs" / STUDENTS[who]).read_text()))))
        if args.updates:
            file.write_text(yaml.safe_dump(derive(yaml.safe_load(plane.read_text()), PROBLEMS["digits"], args.updates)))
        else:
            fitted(plane, PROBLEMS["digits"], args.seconds, args.runs, words)
    config = yaml.safe_load(file.read_text())
    wanted = config["trainer"]["max_steps"]
    begun = any(folder.glob("version_*/checkpoints/*.ckpt"))
    content = read_checkpoint(find_checkpoint(find_run(folder))) if begun else None
    if content is None or content["global_step"] < wanted:
        words = ["-c", str(file), *words, f"--trainer.logger.init_args.save_dir={args.runs}"]
        if content is not None:
            run = find_run(folder)
            words += [f"--trainer.logger.init_args.version={run.name}", f"--ckpt_path={find_checkpoint(run)}"]
        print(f"{who}: {wanted} updates", flush=True)
        fit(words)
        content = read_checkpoint(find_checkpoint(find_run(folder)))
    clock = next(state for key, state in content["callbacks"].items() if "CpuSeconds" in key)
    done = {"config": f"configs/{STUDENTS[who]}", "method": config["model"]["class_path"].rpartition(".")[2]}
    return {**done, "updates": content["global_step"], "cpu_seconds": clock["seconds"]}


# ------------------------------------------------------------------------------------------------ evaluation
@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """The samples that a network sees within it, one number for each of its calls."""
    seen: list[int] = []
    handle = network.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        handle.remove()


class Measures:
    """Figures of samples, with those of the teacher at every scale to compare them with.

    Args:
        teacher: of the digits.
        args: of the command line.
    """

    def __init__(self, teacher: Denoiser, args: argparse.Namespace) -> None:
        extractor, self.args = ZooClassifier(TEACHER), args
        measures = ("fd", "precision_recall", "class_accuracy")
        self.evaluator = Evaluator([extractor], {extractor.name: load_reference(TEACHER)}, measures, "held_out")
        self.kept_file = args.runs / "figures.json"
        self.kept = json.loads(self.kept_file.read_text()) if self.kept_file.is_file() else {}
        solver, steps = ACCURATE
        steps = min(steps, args.accurate_steps)
        self.teacher: dict[float, FeatureStatistics] = {}
        for scale in args.scales:
            # noise of its own: with that of the students, those that follow trajectories would seem nearer
            samples, _ = self.sample(teacher, solver, steps, scale, seed=EVALUATION_SEED + 1)
            points = self.evaluator.features(samples, None).points[extractor.name]
            self.teacher[scale] = FeatureStatistics.from_features(points)

    def sample(self, network: Denoiser, sampler: str, steps: int, scale: float, seed: int) -> tuple[Tensor, Any]:
        """Samples guided by ``scale``: told to networks that embed one, by two calls of others."""
        is_student = network.embeds_guidance
        times = few_step_times(network.process, steps)
        guidance = 1.0 if is_student else scale
        with telling(network, scale if is_student else None):
            return sample_many(network, self.args.samples, times, sampler, seed, guidance_scale=guidance)

    def row(self, who: str, network: Denoiser, sampler: str, steps: int, scale: float) -> dict[str, Any]:
        """Figures of a student, or of the teacher under a solver.

        Args:
            who: name of the student, or ``teacher``.
            network: in evaluation mode.
            sampler: name of the sampler.
            steps: number of its steps.
            scale: w.
        """
        key = f"{who}, {sampler}, {steps} steps, w={scale:g}, {self.args.samples} samples"
        if key not in self.kept:
            with counted(network.network) as calls:
                began = time.process_time()
                samples, labels = self.sample(network, sampler, steps, scale, EVALUATION_SEED)
                seconds = time.process_time() - began
            features = self.evaluator.features(samples, labels)
            found = self.evaluator.measure(features)
            own = FeatureStatistics.from_features(features.points["cnn"])
            self.kept[key] = {
                **{"who": who, "sampler": sampler, "steps": steps, "guidance": scale},
                "evaluations": sum(calls) / len(samples),
                "seconds_per_image": seconds / len(samples),
                **{name: found[f"{name}_cnn"] for name in ("fd", "precision", "recall")},
                "class_accuracy": found["class_accuracy"],
                "fd_teacher": {f"{w:g}": frechet_distance(own, other) for w, other in self.teacher.items()},
            }
            part = self.kept_file.with_suffix(".partial")
            part.write_text(json.dumps(self.kept))
            part.replace(self.kept_file)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in self.kept[key].items()}, flush=True)
        return self.kept[key]


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the teacher under every solver and of every student, over scales and steps."""
    teacher = ZooDenoiser(TEACHER).build().eval()
    measures, rows = Measures(teacher, args), []
    for solver, steps in SOLVERS.items():
        wanted = [n for n in steps if n <= args.accurate_steps]
        rows += [measures.row("teacher", teacher, solver, n, w) for n in wanted for w in args.scales]
    for who in STUDENTS:
        module = load_run(args.runs / who)
        network = module.sampling_network()
        rows += [measures.row(who, network, module.sampler, n, w) for n in STEPS for w in args.scales]
    return rows


# ------------------------------------------------------------------------------------------------ command line
def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what ``--smoke`` makes small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/dials"), help="folder of the runs")
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of each training")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="guidance scales to sample with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the record")
    parser.add_argument("--picture", type=Path, default=ROOT / PICTURE)
    parser.add_argument("--smoke", action="store_true", help="a few updates and samples: does every part run?")
    args = parser.parse_args(words)
    args.runs, args.updates, args.accurate_steps = args.runs.absolute(), None, ACCURATE[1]
    if args.smoke:
        args.updates, args.accurate_steps, args.samples = 2, 4, min(args.samples, 40)
        args.scales = args.scales[:2]
        if args.results == RESULTS:
            args.results, args.picture = args.runs / "results", args.runs / "dials.png"
    return args


def main(words: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Train what is missing, evaluate, draw, record; returns the figures."""
    args = arguments(words)
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    figures = {
        "training": {who: train(who, args) for who in STUDENTS},
        "rows": evaluate(args),
        "scales": list(args.scales),
        "range": list(RANGE),
        "samples": args.samples,
        "accurate": f"{ACCURATE[0]}, {min(ACCURATE[1], args.accurate_steps)} steps",
    }
    path = write_result("dials", figures, results=args.results, seeds=[args.seed], threads=1)
    plot(figures, args.picture)
    print(f"wrote {path.name} and {args.picture.name}")
    return figures


if __name__ == "__main__":
    main()
