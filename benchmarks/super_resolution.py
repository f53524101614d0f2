r"""Super-resolution of Fashion-MNIST: bicubic, a many-step teacher and its one-step students on unseen pictures.

    python benchmarks/super_resolution.py --data ROOT --runs runs

``ROOT`` is the folder of Fashion-MNIST's IDX files. What is missing below ``--runs`` is trained with the shipped
configurations (configs/teacher/fashion_sr.yaml and configs/method/*_fashion.yaml of ``STUDENTS``), runs that are there
are read, and interrupted ones go on. All are measured on test pictures, which no network has seen. With ``--keep``,
configurations of the last record that have no run are not trained: their rows stay, and the picture is without them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from emoji import fit
from results import RESULTS, write_result
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from lightning_distill.checkpoints import read_checkpoint
from lightning_distill.commands.run_folder import find_checkpoint, find_run, load_run
from lightning_distill.data.fashion import DATA_VARIABLE, load_fashion, pad_to_32
from lightning_distill.data.super_resolution import degrade
from lightning_distill.environment import machine
from lightning_distill.generation import beginning, generate, index_noise
from lightning_distill.methods.base import DistillationModule
from lightning_distill.methods.oftsr import OFTSR
from lightning_distill.metrics.extractors import ZooClassifier
from lightning_distill.metrics.features import extract
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.lpips_diversity import PerceptualDistance
from lightning_distill.metrics.reference import load_reference
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.times import few_step_times

ROOT = Path(__file__).resolve().parent.parent
#: told the low-resolution picture, starting from noise or from that picture
TEACHER, PATH_TEACHER = "teacher/fashion_sr.yaml", "teacher/fashion_sr_path.yaml"
#: told a picture of twice the resolution; restores no picture of the table
PRIVILEGED = "teacher/fashion_sr_half.yaml"
STUDENTS = (
    "method/oftsr_fashion.yaml",
    "method/oftsr_path_fashion.yaml",
    "method/tad_sr_fashion.yaml",
    "method/yonos_fashion.yaml",
    "method/ctmsr_fashion.yaml",
)
CONFIGS = (TEACHER, PATH_TEACHER, PRIVILEGED, *STUDENTS)
TEACHER_STEPS = (20, 4, 2, 1)
REALISM = (0.0, 0.25, 0.5, 0.75, 1.0)
#: noise of the reported pictures
SEED = 20_000


# ------------------------------------------------------------------------------------------------ training
def begun(config: str, args: argparse.Namespace) -> bool:
    """Whether a configuration has a run with a checkpoint."""
    return any((args.runs / Path(config).stem).glob("version_*/checkpoints/*.ckpt"))


def train(config: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train a configuration, or what is missing of it.

    Args:
        config: below ``configs``.
        args: of the command line.

    Returns:
        what was done: ``updates``, and ``cpu_seconds`` where the run has counted them.
    """
    file, folder = ROOT / "configs" / config, args.runs / Path(config).stem
    settings = yaml.safe_load(file.read_text())
    wanted = args.updates or settings["trainer"]["max_steps"]
    content = read_checkpoint(find_checkpoint(find_run(folder))) if begun(config, args) else None
    if content is None or content["global_step"] < wanted:
        words = ["-c", str(file), f"--trainer.max_steps={wanted}"]
        words += [f"--{key}={args.seed}" for key in ("seed_everything", "model.init_args.seed", "data.init_args.seed")]
        words += [f"--trainer.logger.init_args.save_dir={args.runs}", "--trainer.enable_progress_bar=false"]
        words += ["--trainer.enable_model_summary=false"]
        if args.precision:
            words.append(f"--trainer.precision={args.precision}")
        if args.batch_size:
            words.append(f"--data.init_args.batch_size={args.batch_size}")
        teacher = settings["model"]["init_args"].get("teacher", {})
        if teacher.get("class_path") == "RunDenoiser":
            path = args.runs / Path(teacher["init_args"]["path"]).name
            words.append(f"--model.init_args.teacher.init_args.path={path}")
        if content is not None:
            run = find_run(folder)
            words += [f"--trainer.logger.init_args.version={run.name}", f"--ckpt_path={find_checkpoint(run)}"]
        print(f"{folder.name}: {wanted} updates", flush=True)
        fit(words)
        content = read_checkpoint(find_checkpoint(find_run(folder)))
    clocks = [state["seconds"] for key, state in content.get("callbacks", {}).items() if "CpuSeconds" in key]
    return {"updates": content["global_step"], "cpu_seconds": clocks[0] if clocks else None}


# ------------------------------------------------------------------------------------------------ evaluation
@dataclass(frozen=True)
class Restorer:
    """One row of the table.

    Attributes:
        who: ``bicubic``, ``teacher``, or a student's class; of flows that begin at the low-resolution picture
            ``teacher from low`` and so on.
        nfe: network calls for a picture.
        call: restored pictures of starting noise and conditions, n rows each.
        realism: of students with that knob, else None.
    """

    who: str
    nfe: int
    call: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    realism: float | None = None

    @property
    def name(self) -> str:
        """``teacher, 20 steps``."""
        if self.who.startswith("teacher"):
            return f"{self.who}, {self.nfe} step{'s' if self.nfe > 1 else ''}"
        return self.who if self.realism is None else f"{self.who}, realism {self.realism:g}"

    @torch.no_grad()
    def restore(self, noise: Tensor, cond: Mapping[str, Tensor], batch_size: int = 250) -> Tensor:
        """Restored pictures (N, C, H, W) in [-1, 1].

        Args:
            noise: unit Gaussian starting noise, (N, C, H, W).
            cond: conditions, N rows each.
            batch_size: pictures of a network call.
        """
        parts = []
        for at in range(0, len(noise), batch_size):
            rows = slice(at, at + batch_size)
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(self.call(noise[rows], {key: value[rows] for key, value in cond.items()}).float())
        return torch.cat(parts).clamp(-1, 1)


def bicubic() -> Restorer:
    """The enlarged low-resolution picture itself."""
    return Restorer("bicubic", 0, lambda noise, cond: cond["low"])


def of_teacher(network: Denoiser, steps: int) -> Restorer:
    """Euler steps of the teacher on the uniform grid."""
    times = few_step_times(network.process, steps)
    who = f"teacher{_start(network)}"
    return Restorer(who, steps, lambda noise, cond: generate(network, noise, cond, times, "ode"))


def _start(network: Denoiser) -> str:
    """What a row says of where samples begin; nothing of noise."""
    return "" if network.family.start is None else f" from {network.family.start[0]}"


def of_student(module: DistillationModule) -> list[Restorer]:
    """One step of a student, at every realism where it has that knob."""
    who = f"{type(module).__name__}{_start(module.sampling_network())}"
    if not isinstance(module, OFTSR):
        return [Restorer(who, 1, lambda noise, cond: module.sample(len(noise), cond, noise=noise))]

    def at(realism: float) -> Restorer:
        def restored(noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            return module.restore(beginning(module.sampling_network(), noise, cond), cond, realism)

        return Restorer(who, 1, restored, realism)

    return [at(realism) for realism in REALISM]


def mean_psnr(made: Tensor, goal: Tensor) -> float | None:
    """Mean over pictures of the peak signal-to-noise ratio in dB; None if two are equal, for which it is infinite.

    Args:
        made: (N, C, H, W) in [-1, 1].
        goal: same shape.
    """
    ratios = peak_signal_noise_ratio(made, goal, data_range=2.0, dim=(1, 2, 3), reduction="none")
    assert isinstance(ratios, Tensor)
    return ratios.mean().item() if bool(ratios.isfinite().all()) else None


class Measures:
    """What a restored set of pictures is measured by.

    Args:
        factor: of the degradation.
        data: zoo entry with two extractors and their statistics of real pictures.
        lpips: perceptual distance, None where its weights are not there.
    """

    def __init__(self, factor: int, data: str = "fashion", lpips: PerceptualDistance | None = None) -> None:
        self.factor, self.lpips = factor, lpips
        extractors = (ZooClassifier(data), ZooClassifier(f"{data}/judge", "judge"))
        self.extractors = {e.frechet_name: e.build() for e in extractors}
        self.reference = {e.frechet_name: load_reference(e.data).statistics["train"] for e in extractors}

    def __call__(self, made: Tensor, x0: Tensor, low: Tensor) -> dict[str, float | None]:
        """Figures of restored pictures.

        Args:
            made: (N, C, H, W) in [-1, 1].
            x0: true pictures.
            low: what they were made from.

        Returns:
            ``psnr`` to the true ones; ``consistency``, the PSNR of what is left of ``made`` to ``low``; ``lpips``;
            Frechet distances to real pictures by their names.
        """
        figures: dict[str, float | None] = {
            "psnr": mean_psnr(made, x0),
            "consistency": mean_psnr(degrade(made, self.factor), low),
            "lpips": None,
        }
        if self.lpips is not None:
            pairs = zip(made.split(250), x0.split(250), strict=True)
            figures["lpips"] = torch.cat([self.lpips(a, b) for a, b in pairs]).mean().item()
        for name, extractor in self.extractors.items():
            found = FeatureStatistics.from_features(extract(extractor, made))
            figures[name] = frechet_distance(found, self.reference[name])
        return figures


def perceptual_distance() -> PerceptualDistance | None:
    """LPIPS, where its weights are there."""
    distance = PerceptualDistance()
    try:
        distance.check()
    except FileNotFoundError as error:
        print(f"without LPIPS: {error}")
        return None
    return distance


def unseen(root: str, count: int, factor: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The first test pictures (N, 1, 32, 32) in [-1, 1] and their conditions."""
    images, labels = load_fashion(root, "test")
    x0 = pad_to_32(images[:count])
    return x0, {"class_labels": labels[:count], "low": degrade(x0, factor)}


def restorers(config: str, args: argparse.Namespace) -> list[Restorer]:
    """The rows of a configuration's run."""
    module = load_run(args.runs / Path(config).stem)
    if config.startswith("teacher/"):
        return [of_teacher(module.sampling_network(), steps) for steps in args.teacher_steps]
    return of_student(module)


def evaluate(
    args: argparse.Namespace, trained: Mapping[str, Mapping[str, Any]], kept: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Rows of the table and its picture.

    Args:
        args: of the command line.
        trained: what ``train`` returned, by configuration.
        kept: record whose rows are taken for every other configuration.
    """
    factor = yaml.safe_load((ROOT / "configs" / TEACHER).read_text())["data"]["init_args"]["factor"]
    x0, cond = unseen(args.data, args.samples, factor)
    noise = index_noise(len(x0), tuple(x0.shape[1:]), SEED)
    measures = Measures(factor, lpips=perceptual_distance())
    rows: list[dict[str, Any]] = [{"who": "real", "nfe": 0, "realism": None, **measures(x0, x0, cond["low"])}]
    first = torch.stack([(cond["class_labels"] == label).nonzero()[0, 0] for label in cond["class_labels"].unique()])
    panels = {}
    for config in (None, TEACHER, PATH_TEACHER, *STUDENTS):
        if kept is not None and config is not None and config not in trained:
            rows += [row for row in kept["rows"] if row.get("config") == config]
            continue
        for restorer in [bicubic()] if config is None else restorers(config, args):
            made = restorer.restore(noise, cond)
            row = {"who": restorer.who, "nfe": restorer.nfe, "realism": restorer.realism}
            rows.append(row | measures(made, x0, cond["low"]) | {"config": config})
            panels[restorer.name] = made[first]
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    draw({**panels, "truth": x0[first]}, args.picture)
    here = {config: {**done, "cpu": machine()["cpu"]} for config, done in trained.items()}
    return {
        "rows": rows,
        "factor": factor,
        "samples": len(x0),
        "reference": {name: statistics.n for name, statistics in measures.reference.items()},
        "training": {**({} if kept is None else kept["training"]), **here},
    }


def last_record(args: argparse.Namespace) -> dict[str, Any]:
    """The record to keep rows of, every training with the processor it ran on.

    Raises:
        ValueError: there is none, or of other pictures or another seed.
    """
    file = args.results / "latest" / "super_resolution.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if record.get("samples") != args.samples or record["meta"]["seeds"] != [args.seed]:
        raise ValueError(f"--keep: {file} has no rows of {args.samples} pictures and seed {args.seed}; leave it out.")
    for done in record["training"].values():
        done.setdefault("cpu", record["meta"]["machine"]["cpu"])
    return record


def draw(panels: Mapping[str, Tensor], file: Path) -> None:
    """Named rows of pictures (N, 1, H, W) in [-1, 1], the same pictures in columns."""
    from matplotlib.figure import Figure

    columns = len(next(iter(panels.values())))
    figure = Figure(figsize=(0.72 * columns + 1.6, 0.72 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for line, (title, images) in zip(axes, panels.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title.replace(", ", ",\n"), fontsize=8, rotation=0, ha="right", va="center")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


# ------------------------------------------------------------------------------------------------ command line
def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what ``--smoke`` makes small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--samples", type=int, default=5000, help="test pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the record")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "super_resolution.png")
    parser.add_argument("--precision", help="of training, such as 32-true, where bfloat16 is slow")
    parser.add_argument("--keep", action="store_true", help="keep recorded rows of configurations without a run")
    parser.add_argument("--smoke", action="store_true", help="a few updates and samples: does every part run?")
    args = parser.parse_args(words)
    args.data, args.runs = str(Path(args.data).absolute()), args.runs.absolute()
    args.updates, args.batch_size, args.teacher_steps = None, None, TEACHER_STEPS
    if args.smoke:
        args.updates, args.batch_size, args.teacher_steps, args.samples = 2, 4, (2, 1), min(args.samples, 24)
        if args.results == RESULTS:
            args.results, args.picture = args.runs / "results", args.runs / "super_resolution.png"
    return args


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train what is missing, evaluate, draw, record; returns the figures."""
    args = arguments(words)
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ[DATA_VARIABLE] = args.data
    unseen(args.data, 1, 1)  # before any training
    kept = last_record(args) if args.keep else None
    wanted = [c for c in CONFIGS if kept is None or c not in kept["training"] or begun(c, args)]
    figures = evaluate(args, {config: train(config, args) for config in wanted}, kept)
    path = write_result("super_resolution", figures, results=args.results, seeds=[args.seed], threads=1)
    print(f"wrote {path.name} and {args.picture.name}")
    return figures


if __name__ == "__main__":
    main()
