"""Train the small classifier of a data set and write its reference statistics into the zoo.

    python benchmarks/build_reference.py digits
    python benchmarks/build_reference.py fashion --data ROOT
    python benchmarks/build_reference.py fashion/judge --data ROOT

Writes ``classifier.safetensors``, ``classifier.json`` and ``reference.safetensors`` into its folder of
``lightning_distill/zoo``. One thread; about 10 CPU seconds for digits and 150 for fashion.

The ``judge`` of a data set is a second extractor of another shape, trained from another seed with other augmentation,
and described by other halves: it is for the final verdict only, never for tuning or for choosing a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import lightning_distill.zoo
from lightning_distill.data.digits import load_digits
from lightning_distill.data.fashion import load_fashion, pad_to_32
from lightning_distill.metrics.features import SmallClassifier, extract, save_classifier
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.reference import HALVES, Reference, save_reference


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained and described.

    Attributes:
        network: arguments of ``SmallClassifier``.
        epochs: passes over the training pictures.
        half: pictures in each half of the reference.
        max_shift: largest random shift, in pixels.
        flip: mirror half of the pictures.
        learning_rate: peak of the one-cycle schedule.
        batch_size: pictures per update.
    """

    network: dict
    epochs: int
    half: int
    max_shift: int
    flip: bool
    learning_rate: float = 4e-3
    batch_size: int = 256


RECIPES = {
    "digits": Recipe(
        {"image_size": 8, "widths": [32, 64, 64], "strides": [1, 2, 2]},
        epochs=60,
        half=899,
        max_shift=1,
        flip=False,
        learning_rate=2e-3,
        batch_size=64,
    ),
    "fashion": Recipe(
        {"image_size": 32, "widths": [24, 48, 64, 96], "strides": [2, 1, 2, 2]},
        epochs=8,
        half=5000,
        max_shift=1,
        flip=True,
    ),
    "digits/judge": Recipe(
        {"image_size": 8, "widths": [48, 48, 96], "strides": [1, 1, 2], "num_features": 48},
        epochs=60,
        half=899,
        max_shift=0,
        flip=False,
        learning_rate=2e-3,
        batch_size=64,
    ),
    "fashion/judge": Recipe(
        {"image_size": 32, "widths": [32, 32, 64, 64, 96], "strides": [2, 1, 2, 1, 2], "num_features": 48},
        epochs=8,
        half=5000,
        max_shift=2,
        flip=False,
    ),
}


def load(name: str, root: str | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train on, to test on, and to describe."""
    if name.startswith("digits"):
        return load_digits("train"), load_digits("test"), load_digits("all")
    images, labels = load_fashion(root, "train")
    test_images, test_labels = load_fashion(root, "test")
    train = (pad_to_32(images), labels)
    return train, (pad_to_32(test_images), test_labels), train


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Shift every picture by a few pixels into a border of -1, and mirror half of them."""
    n, _, height, width = images.shape
    k = recipe.max_shift
    padded = F.pad(images, (k, k, k, k), value=-1.0)
    down, right = torch.randint(0, 2 * k + 1, (2, n))
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    if recipe.flip:
        columns = torch.where(torch.rand(n, 1, 1, 1) < 0.5, columns.flip(-1), columns)
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[torch.arange(n)[:, None, None, None], channels, rows, columns]


def train(images: Tensor, labels: Tensor, recipe: Recipe) -> SmallClassifier:
    """One-cycle AdamW on the cross-entropy with light label smoothing, bf16 autocast."""
    classifier = SmallClassifier(**recipe.network).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe.learning_rate, weight_decay=5e-2)
    batches = len(images) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.epochs * batches, pct_start=0.2
    )
    for epoch in range(recipe.epochs):
        started, seen = time.process_time(), 0.0
        for rows in torch.randperm(len(images))[: batches * recipe.batch_size].split(recipe.batch_size):
            x = augment(images[rows], recipe).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = classifier.logits(x)
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seen += loss.item()
        print(f"epoch {epoch}: loss {seen / batches:.4f}, {time.process_time() - started:.1f} CPU s", flush=True)
    # it is stored in half precision, so it is measured in half precision
    return classifier.to(memory_format=torch.contiguous_format).half().float().eval().requires_grad_(False)


def build(name: str, root: str | None, out: Path, seed: int) -> dict:
    """Train, measure, write; returns the figures."""
    torch.manual_seed(seed)
    recipe = RECIPES[name]
    (images, labels), (test_images, test_labels), (real, real_labels) = load(name, root)
    started = time.process_time()
    classifier = train(images, labels, recipe)
    seconds = time.process_time() - started
    predicted = classifier.classify(extract(classifier, test_images)).argmax(dim=1)
    accuracy = (predicted == test_labels).double().mean().item()

    features = extract(classifier, real)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    rows = {half: order[i * recipe.half : (i + 1) * recipe.half] for i, half in enumerate(HALVES)}
    statistics = {"train": FeatureStatistics.from_features(features)}
    statistics |= {half: FeatureStatistics.from_features(features[rows[half]]) for half in HALVES}
    floors = {
        "selection_vs_train": frechet_distance(statistics["selection"], statistics["train"]),
        "held_out_vs_train": frechet_distance(statistics["held_out"], statistics["train"]),
        "selection_vs_held_out": frechet_distance(statistics["selection"], statistics["held_out"]),
        "test_vs_train": frechet_distance(
            FeatureStatistics.from_features(extract(classifier, test_images)[: recipe.half]),
            statistics["train"],
        ),
    }
    figures = {
        "data": name.split("/")[0],
        "test_accuracy": round(accuracy, 4),
        "training_cpu_seconds": round(seconds, 1),
        "epochs": recipe.epochs,
        "seed": seed,
        "fd_floors": {key: round(value, 4) for key, value in floors.items()},
    }
    save_classifier(classifier, out, **figures)
    info = {
        "extractor": "fd_judge" if "judge" in name else "fd_cnn",
        "data": name.split("/")[0],
        "fd_floors": figures["fd_floors"],
    }
    halves = {half: features[rows[half]] for half in HALVES}
    save_reference(Reference(statistics, halves, {h: real_labels[rows[h]] for h in HALVES}, info), out)
    files = ("classifier.safetensors", "classifier.json", "reference.safetensors")
    for file in files:
        (out / file).chmod(0o644)  # safetensors writes files that only their owner can read
    return {**figures, "bytes": sum((out / file).stat().st_size for file in files)}


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--data", help="folder of the Fashion-MNIST files (default: LIGHTNING_DISTILL_DATA)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the zoo entry)")
    parser.add_argument("--seed", type=int, help="default: 0, and 1 for a judge")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out or Path(lightning_distill.zoo.__file__).parent / args.name
    seed = args.seed if args.seed is not None else int(args.name.endswith("judge"))
    print(json.dumps(build(args.name, args.data, out, seed), indent=2))


if __name__ == "__main__":
    main()
