"""Text to emoji from nothing: train a teacher on captions, distil it to four steps and to one, measure all of them.

    python benchmarks/emoji.py --package package --text-encoder ENCODER --out runs/emoji_benchmark

``package`` is the unpacked npm package emoji-datasource-google, ``ENCODER`` the folder of a plain text model
(docs/text_to_emoji.md). The configurations are configs/teacher/emoji.yaml and configs/method/dmd2_emoji*.yaml, with as
many updates as fit into the given CPU seconds of one thread. The same command goes on after an interruption.

The figures are of captions whose emoji no network has seen: caption retrieval (R@1 of a probe that learned from the
training pictures, beside the ceiling of the real pictures and chance), KID and a Frechet distance in named features.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clock import CpuSeconds
from results import RESULTS, write_result
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_distill.cli import trainer_cli
from lightning_distill.commands.run_folder import find_checkpoint, load_run
from lightning_distill.commands.trajectories import main as make_trajectories
from lightning_distill.data.emoji import Emoji, caption_store, emoji_pictures
from lightning_distill.data.store import Store
from lightning_distill.generation import generate, index_noise
from lightning_distill.metrics.efficientnet import EfficientNetLite0
from lightning_distill.metrics.features import FeatureExtractor, extract
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.kid import kernel_distance
from lightning_distill.metrics.progress import progress
from lightning_distill.metrics.retrieval import caption_retrieval
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.sources import NULL_FILE
from lightning_distill.networks.text_entries import POOLED, TOKENS
from lightning_distill.times import few_step_times

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "teacher": "teacher/emoji.yaml",
    "student_4": "method/dmd2_emoji_4step.yaml",
    "student_1": "method/dmd2_emoji.yaml",
}
#: share of the updates at full learning rate; that of the one-step student ends with its warm-up on pairs
PLATEAU = {"teacher": 0.65, "student_4": 0.65, "student_1": 0.7}
#: pairs that the teacher makes of each training caption, and steps of its solver
PAIRS, PAIR_STEPS, GUIDANCE = 2, 12, 2.0
#: noise of the reported samples
SEED = 20_000
#: principal components of the features in which the Frechet distance is measured: 10 samples or more for each
COMPONENTS = 32


# ------------------------------------------------------------------------------------------------ training
def fit(words: Sequence[str]) -> tuple[Any, CpuSeconds]:
    """One training run through the command line, and its clock."""
    torch.set_num_threads(1)
    cli = trainer_cli(["fit", *words, f"--trainer.callbacks+={CpuSeconds.__module__}.CpuSeconds"])
    return cli, next(c for c in cli.trainer.callbacks if type(c).__name__ == "CpuSeconds")


def common_words(stage: str, args: argparse.Namespace, store: Store) -> list[str]:
    """The configuration of a stage with the files of this benchmark."""
    words = ["-c", str(ROOT / "configs" / STAGES[stage])]
    words += [f"--{key}={args.seed}" for key in ("seed_everything", "model.init_args.seed", "data.init_args.seed")]
    words += [f"--data.init_args.root={args.package}", f"--data.init_args.store={store.folder}"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    if args.batch_size:
        words.append(f"--data.init_args.batch_size={args.batch_size}")
    if stage == "teacher":
        network = "--model.init_args.network.init_args"
        words.append(f"{network}.null_cond={store.folder / NULL_FILE}")
        words.append(f"{network}.network.init_args.cross_attention_dim={store.shapes[TOKENS][-1]}")
    else:
        words.append(f"--model.init_args.teacher.init_args.path={args.out / 'teacher' / 'version_0'}")
    if stage == "student_1":
        seen = training_captions(args)
        words.append(f"--model.init_args.regression_conditions={seen.folder}")
        words.append(f"--model.init_args.regression_pairs={make_pairs(args, seen)}")
    return words


def training_captions(args: argparse.Namespace) -> Store:
    """Embeddings of the captions that students may see."""
    captions = Emoji(root=str(args.package), size=32).captions
    return caption_store(captions, str(args.text_encoder), cache=args.cache)


def make_pairs(args: argparse.Namespace, seen: Store) -> Path:
    """Pictures that the guided teacher makes of the training captions; what is there already is kept."""
    folder = args.out / "pairs"
    number = args.batch_size if args.smoke else PAIRS * len(seen)
    words = ["--teacher", str(args.out / "teacher" / "version_0"), "--cond", str(seen.folder), "--cond-keys", TOKENS]
    words += ["--num", str(number), "--steps", str(PAIR_STEPS), "--guidance", str(GUIDANCE), "--bf16"]
    make_trajectories([*words, "--batch-size", "48", "--out", str(folder)])
    return folder


def train(stage: str, budget: float, args: argparse.Namespace, store: Store) -> dict[str, Any]:
    """Train a stage, or what is missing of it.

    Args:
        stage: of ``STAGES``.
        budget: CPU seconds, from which the number of updates is estimated when the stage begins.
        args: of the command line.
        store: embeddings of all captions.

    Returns:
        what was done: ``updates``, ``cpu_seconds``.
    """
    note, run = args.out / f"{stage}.json", args.out / stage / "version_0"
    if note.is_file() and "cpu_seconds" in (known := json.loads(note.read_text())):
        return known
    words = common_words(stage, args, store)
    if not note.is_file():
        probe = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", f"--trainer.max_steps={args.probe}"]
        if args.smoke:
            updates = args.probe
        else:
            updates = max(10, int(budget / statistics.median(fit([*words, *probe])[1].per_update)))
        note.write_text(json.dumps({"updates": updates}))
    plan: dict[str, Any] = json.loads(note.read_text())
    updates = plan["updates"]
    print(f"{stage}: {updates} updates", flush=True)
    words += [f"--trainer.max_steps={updates}", f"--trainer.logger.init_args.save_dir={args.out}"]
    words += [f"--trainer.logger.init_args.name={stage}", "--trainer.logger.init_args.version=version_0"]
    words += ["--trainer.callbacks+=lightning_distill.commands.trainer.StudentCheckpoint"]
    words += [f"--trainer.callbacks.init_args.every_n_train_steps={max(1, min(200, updates // 4))}"]
    plateau = int(PLATEAU[stage] * updates)
    words += schedule_words("student", updates, plateau)
    if stage == "student_1":  # the critic waits for the end of the warm-up
        words.append(f"--model.init_args.regression_steps={plateau}")
        words += schedule_words("fake_score", max(12, updates - plateau), None)
    elif stage == "student_4":
        words += schedule_words("fake_score", updates, plateau)
    if any((run / "checkpoints").glob("last*.ckpt")):
        words.append(f"--ckpt_path={find_checkpoint(run)}")
    _, clock = fit(words)
    plan["cpu_seconds"] = clock.seconds
    note.write_text(json.dumps(plan))
    return plan


def schedule_words(role: str, updates: int, plateau: int | None) -> list[str]:
    """Updates of a learning-rate schedule, and those before its decay; None is that of the configuration."""
    schedule = f"--model.init_args.{role}_scheduler.init_args"
    words = [f"{schedule}.total_steps={updates}"]
    return words if plateau is None else [*words, f"{schedule}.decay_start={plateau}"]


# ------------------------------------------------------------------------------------------------ evaluation
class PixelMeans(nn.Module):
    """Means of 4 x 4 pixels as features, where no trained extractor is installed."""

    num_features = 192

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, 192) of images (N, 3, 32, 32)."""
        return F.avg_pool2d(images, 4).flatten(1)


def extractor(kind: str) -> tuple[str, FeatureExtractor]:
    """Name and network of the features: EfficientNet-Lite0 where its weights are installed."""
    if kind == "effnet":
        return kind, EfficientNetLite0().build()
    if kind == "pixels8":
        return kind, PixelMeans()
    try:
        EfficientNetLite0().check()
    except FileNotFoundError as error:
        print(f"features are means of pixels: {error}")
        return extractor("pixels8")
    return extractor("effnet")


@dataclass(frozen=True)
class Sampler:
    """One row of the table.

    Attributes:
        who: ``teacher`` or ``student``.
        network: what samples.
        times: descending native times.
        kind: ``ode`` or ``renoise``.
        guidance: scale w.
    """

    who: str
    network: Denoiser
    times: Sequence[float]
    kind: str
    guidance: float

    @property
    def name(self) -> str:
        """``teacher, 50 steps``."""
        return f"{self.who}, {len(self.times)} step{'s' if len(self.times) > 1 else ''}"

    def sample(self, tokens: Tensor, seed: int) -> Tensor:
        """Pictures in [-1, 1] of N captions, (N, 3, 32, 32); equal seeds are equal starting noise."""
        assert self.network.sample_shape is not None
        noise = index_noise(len(tokens), self.network.sample_shape, seed)
        with torch.autocast("cpu", torch.bfloat16):
            x0 = generate(
                self.network,
                noise,
                {TOKENS: tokens},
                self.times,
                self.kind,
                guidance_scale=self.guidance,
                generator=torch.Generator().manual_seed(seed),
                batch_size=64,
            )
        return x0.float().clamp(-1, 1)


def samplers(args: argparse.Namespace) -> list[Sampler]:
    """Teacher with many, four steps and one, and the students; all at the guidance of the training."""
    found: list[Sampler] = []
    for stage in ("student_4", "student_1"):
        module = load_run(args.out / stage / "version_0")
        teacher, scale = module.require_teacher(), module.guidance_scale
        if not found:
            many = few_step_times(teacher.process, args.teacher_steps)
            found.append(Sampler("teacher", teacher, many, "ode", scale))
        own = module.student_times
        found.append(Sampler("student", module.sampling_network(), own, module.sampler, 1.0))
        found.append(Sampler("teacher", teacher, few_step_times(teacher.process, len(own)), "ode", scale))
    return found


class Components:
    """Projection on the leading principal components of a set of features.

    Args:
        features: (N, d).
        count: components kept, fewer where N or d are small.
    """

    def __init__(self, features: Tensor, count: int = COMPONENTS) -> None:
        self.mean = features.double().mean(dim=0)
        _, vectors = torch.linalg.eigh(FeatureStatistics.from_features(features).cov)
        self.vectors = vectors[:, -min(count, len(features) - 1) :]

    def statistics(self, features: Tensor) -> FeatureStatistics:
        """Mean and covariance of features (N, d) in these components."""
        return FeatureStatistics.from_features((features.double() - self.mean) @ self.vectors)


def evaluate(args: argparse.Namespace, store: Store) -> dict[str, Any]:
    """All figures; writes the picture."""
    settings = {"root": str(args.package), "size": 32, "store": str(store.folder)}
    train_data = Emoji(**settings, split="train", cond_keys=[POOLED])
    held_data = Emoji(**settings, split="held_out", cond_keys=[TOKENS, POOLED])
    order = torch.randperm(len(train_data.rows), generator=torch.Generator().manual_seed(0))
    seen = train_data.make_source().gather(order[: args.most], 0)
    held = held_data.make_source().gather(torch.arange(len(held_data.rows))[: args.most], 0)
    # skin tones have nearly the caption of the plain emoji: one caption for each name is to be told from the others
    names = [held_data.pictures[i].name for i in held_data.rows.tolist()][: held.size]
    plain = torch.tensor([i for i, name in enumerate(names) if name not in names[:i]])
    kind, network = extractor(args.features)
    assert seen.x0 is not None
    assert held.x0 is not None
    seen_features, real = extract(network, seen.x0, 64), extract(network, held.x0, 64)
    components = Components(seen_features)
    reference = components.statistics(real)
    rows: list[dict[str, Any]] = []
    everyone = samplers(args)
    for sampler in everyone:
        figures: dict[str, list[float]] = {"recall": [], "kid": [], "fd": []}
        for draw in range(args.draws):
            made = extract(network, sampler.sample(held.cond[TOKENS], SEED + draw), 64)
            found = caption_retrieval(
                made[plain], real[plain], held.cond[POOLED][plain], seen_features, seen.cond[POOLED]
            )
            figures["recall"].append(found.recall)
            figures["kid"].append(kernel_distance(made, real))
            figures["fd"].append(frechet_distance(components.statistics(made), reference))
        row = {"who": sampler.who, "nfe": len(sampler.times), "guidance": sampler.guidance}
        rows.append({**row, **{key: statistics.fmean(values) for key, values in figures.items()}})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    for row in rows:
        row["progress"] = kid_progress(row, rows)
    some = seen_features[: len(real)]
    chosen = plain[torch.linspace(0, len(plain) - 1, min(args.columns, len(plain))).long()]
    captions = [held_data.captions[i] for i in chosen.tolist()]
    draw_picture(args.picture, captions, held.x0[chosen], held.cond[TOKENS][chosen], everyone)
    return {
        "rows": rows,
        "ceiling": found.ceiling,
        "chance": found.chance,
        "real": {
            "kid": kernel_distance(some, real),
            "fd": frechet_distance(components.statistics(some), reference),
        },
        "features": kind,
        "frechet": f"fd_{kind}_pca{components.vectors.shape[1]}",
        "captions": {"training": len(train_data.rows), "held_out": held.size, "names": len(plain)},
        "draws": args.draws,
    }


def kid_progress(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Progress of a student in KID; None for teachers, and where the teacher does not fall with steps."""
    if row["who"] == "teacher":
        return None
    teachers = {r["nfe"]: r["kid"] for r in rows if r["who"] == "teacher"}
    try:
        return progress(teachers[row["nfe"]], row["kid"], teachers[max(teachers)])
    except ValueError:
        return None


def draw_picture(
    file: Path, captions: Sequence[str], real: Tensor, tokens: Tensor, everyone: Sequence[Sampler]
) -> None:
    """Captions in columns; real pictures, teacher and students in rows, all from the same noise."""
    from matplotlib.figure import Figure

    best, *others = sorted(everyone, key=lambda s: -len(s.times))
    ranked = [best, *sorted(others, key=lambda s: s.who)]  # students, then the teacher with as few steps
    panels = {"real": real} | {s.name: s.sample(tokens, SEED) for s in ranked}
    figure = Figure(figsize=(1.15 * len(captions) + 0.4, 1.12 * len(panels) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), len(captions), squeeze=False)
    for line, (title, images) in zip(axes, panels.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.clamp(-1, 1).permute(1, 2, 0).mul(0.5).add(0.5).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title.replace(", ", ",\n"), fontsize=8)
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title("\n".join(textwrap.wrap(caption, 16, max_lines=3, placeholder=" ...")), fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


# ------------------------------------------------------------------------------------------------ command line
def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what ``--smoke`` makes small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="folder of the npm package")
    parser.add_argument("--text-encoder", type=Path, required=True, help="folder of a plain text model")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/emoji_benchmark)")
    parser.add_argument("--cache", help="folder of the embeddings (default: the user's)")
    parser.add_argument("--teacher-seconds", type=float, default=10_800.0, help="CPU seconds of the teacher")
    parser.add_argument("--student-seconds", type=float, default=2700.0, help="CPU seconds of each student")
    parser.add_argument("--features", choices=["auto", "effnet", "pixels8"], default="auto")
    parser.add_argument("--draws", type=int, default=4, help="samples of each held-out caption")
    parser.add_argument("--columns", type=int, default=10, help="captions in the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="folder for the record (default: benchmarks/results)")
    parser.add_argument("--picture", type=Path, help="file of the picture (default: docs/images/emoji.png)")
    parser.add_argument("--smoke", action="store_true", help="a few updates and samples: does every part run?")
    args = parser.parse_args(words)
    args.package, args.text_encoder = args.package.absolute(), args.text_encoder.absolute()
    args.probe, args.most, args.teacher_steps, args.batch_size = 12, None, 50, None
    if args.smoke:
        args.probe, args.most, args.teacher_steps, args.batch_size, args.draws = 2, 24, 5, 4, 1
        args.out = args.out or Path(tempfile.mkdtemp(prefix="emoji_"))
        args.results, args.picture = args.results or args.out / "results", args.picture or args.out / "emoji.png"
    args.out = (args.out or Path("runs/emoji_benchmark")).absolute()
    args.results = args.results or RESULTS
    args.picture = args.picture or ROOT / "docs" / "images" / "emoji.png"
    return args


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Cache, train, distil, evaluate, draw, record; returns the figures."""
    args = arguments(words)
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    captions = [picture.caption for picture in emoji_pictures(args.package)]
    store = caption_store(captions, str(args.text_encoder), cache=args.cache)
    spent = {
        stage: train(stage, args.teacher_seconds if stage == "teacher" else args.student_seconds, args, store)
        for stage in STAGES
    }
    figures = {**evaluate(args, store), "training": spent}
    path = write_result("emoji", figures, results=args.results, seeds=[args.seed], threads=1)
    print(f"wrote {path.name} and {args.picture.name}")
    return figures


if __name__ == "__main__":
    main()
