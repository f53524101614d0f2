"""Seconds until a student is good, here and in FastGen, from the same teacher weights on the same network.

The network is the shipped Fashion-MNIST teacher behind FastGen's network interface; data-free DMD2 to one step, batch
48, float32. Each side has its own defaults, an average of the same power profile, and the same grid of learning rates
and critic updates per student update. A third side has the optimizers of this library's quick start (a critic of twice
the rate, a short memory of squares) and, where that is faster, bfloat16; a fourth is FastGen with the momentum of this
library's defaults, none, which tells what of a difference are settings. CPU seconds count training alone; the distance
is taken at every ``every`` seconds of it. Runs are kept in a folder and go on where they stopped.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bare import bare_trainer
from fastgen_peer import Peer
from lightning.pytorch import Callback, Trainer
from results import RESULTS, write_result
from torch import Tensor, nn

from lightning_distill.batch import Batch
from lightning_distill.bfloat16 import bfloat16_pays
from lightning_distill.data import InMemory, ResumableLoader
from lightning_distill.ema import PowerEMA
from lightning_distill.generation import index_noise
from lightning_distill.methods import DMD2
from lightning_distill.metrics.features import extract, load_classifier
from lightning_distill.metrics.frechet import FeatureStatistics, frechet_distance
from lightning_distill.metrics.progress import progress
from lightning_distill.metrics.reference import load_reference
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import ZooDenoiser, as_denoiser
from lightning_distill.optim import default_optimizer
from lightning_distill.processes import EDM
from lightning_distill.zoo import zoo_file

SHAPE = (1, 32, 32)
BATCH = 48
#: learning rate and critic updates per student update, FastGen's default first
POINTS = ((1e-4, 4), (3e-4, 4), (6e-4, 4), (1e-4, 1), (3e-4, 1), (6e-4, 1))
GOALS = (0.8, 0.9)


def fashion(library: SimpleNamespace) -> type[nn.Module]:
    """The shipped teacher as a network of FastGen's: x0 of an x_t with noise level t, labels as condition."""

    class Fashion(library.base.FastGenNetwork):  # type: ignore[misc, name-defined]
        """Lives in EDM's process; the exact change of process is inside."""

        def __init__(self) -> None:
            super().__init__("x0", "edm")
            own = as_denoiser(ZooDenoiser("fashion"))
            self.inner = Denoiser(
                own.network,
                EDM(),
                own.prediction_type,
                network_process=own.process,
                sigma_data=own.sigma_data,
                data_scale=1.0,
                null_class=own.null_class,
            )

        def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, **_: Any) -> Tensor:
            """The prediction of x0."""
            return self.inner(x_t, t, {"class_labels": condition}).x0

    return Fashion


class Judge:
    """Progress of a one-step student in ``fd_cnn``, on the noise of one seed.

    Args:
        samples: number of samples.
    """

    def __init__(self, samples: int) -> None:
        card = json.loads(zoo_file("fashion", "card.json", "benchmarks/package_teacher.py").read_text())
        distances = {int(steps): row["fd_cnn"] for steps, row in card["figures"]["by_steps"].items()}
        self.first, self.best = distances[1], min(distances.values())
        self.classifier, self.reference = load_classifier("fashion"), load_reference("fashion")
        self.noise, self.labels = index_noise(samples, SHAPE, 5), torch.arange(samples) % 10

    @torch.no_grad()
    def __call__(self, network: nn.Module, one_step: Callable[[Tensor, Tensor], Tensor] | None = None) -> float:
        """Progress of a network.

        Args:
            network: what is switched to evaluation.
            one_step: images of noise and labels; by default the network predicts x0 of pure noise at level 80.
        """

        def at_80(noise: Tensor, labels: Tensor) -> Tensor:
            images: Tensor = network(80.0 * noise, torch.full((len(noise),), 80.0, dtype=torch.float64), labels)
            return images

        training = network.training
        network.eval()
        batches = zip(self.noise.split(250), self.labels.split(250))
        parts = [(one_step or at_80)(noise, labels).clamp(-1, 1) for noise, labels in batches]
        network.train(training)
        statistics = FeatureStatistics.from_features(extract(self.classifier, torch.cat(parts)))
        distance = frechet_distance(statistics, self.reference.statistics["train"])
        return progress(self.first, distance, self.best)


class Curve:
    """What a run has reached, kept in a file beside its weights."""

    def __init__(self, folder: Path, name: str, budget: float, every: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.weights = folder / f"{name}.json", folder / f"{name}.ckpt"
        self.budget, self.every = budget, every
        self.points: list[list[float]] = []
        if self.file.is_file() and self.weights.is_file():
            self.points = json.loads(self.file.read_text())
        self.seconds = self.points[-1][0] if self.points else 0.0

    @property
    def finished(self) -> bool:
        """Whether the best goal or the end of the budget is reached."""
        return self.seconds >= self.budget or any(done >= max(GOALS) for _, done in self.points)

    def spent(self, seconds: float, judge: Callable[[], float], save: Callable[[Path], None]) -> None:
        """Add seconds of training; at every so many of them the student is judged and everything saved."""
        due = int(self.seconds / self.every) != int((self.seconds + seconds) / self.every)
        self.seconds += seconds
        if due or self.finished:
            self.points.append([self.seconds, judge()])
            partial = self.weights.with_suffix(".partial")
            save(partial)
            partial.replace(self.weights)
            self.file.write_text(json.dumps(self.points))

    def reached(self, goal: float) -> float | None:
        """Seconds until a progress, None if it never came."""
        return next((seconds for seconds, done in self.points if done >= goal), None)


def train_peer(
    library: SimpleNamespace, curve: Curve, judge: Judge, rate: float, ratio: int, seed: int = 0, momentum: bool = True
) -> None:
    """FastGen with its defaults and these two settings."""
    make = fashion(library)
    state = make().state_dict()
    data = {"real": torch.zeros(BATCH, *SHAPE)}
    settings = {"student_update_freq": ratio + 1, "input_shape": list(SHAPE)}
    weights = dict.fromkeys(("teacher", "net", "fake_score"), state)
    peer = Peer(library, weights, False, None, data, network=make, rate=rate, power=PowerEMA().gamma, **settings)
    if not momentum:
        for group in (group for optimizer in peer.optimizers for group in optimizer.param_groups):
            group["betas"] = DMD2.default_betas
    torch.manual_seed(seed)
    if curve.points:
        kept = torch.load(curve.weights, weights_only=False)  # FastGen's schedules hold numbers of numpy
        peer.load_state_dict(kept)
        torch.set_rng_state(kept["random"])

    def save(path: Path) -> None:
        torch.save({**peer.state_dict(), "random": torch.get_rng_state()}, path)

    def with_labels() -> None:
        peer.data["condition"] = torch.randint(0, 10, (BATCH,))
        peer.data["neg_condition"] = torch.full((BATCH,), 10)

    while not curve.finished:
        start = time.process_time()
        for _ in range(ratio + 1):
            with_labels()
            peer.step()
        curve.spent(time.process_time() - start, lambda: judge(peer.model.ema), save)


class _Watch(Callback):
    def __init__(self, curve: Curve, judge: Judge, key: str) -> None:
        self.curve, self.judge, self.key, self.start = curve, judge, key, 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = self.start or time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        now = time.process_time()
        student = pl_module.sampling_network(None)

        def one_step(noise: Tensor, labels: Tensor) -> Tensor:
            return pl_module.sample(len(noise), {self.key: labels}, noise=noise)

        self.curve.spent(now - self.start, lambda: self.judge(student.network, one_step), trainer.save_checkpoint)
        self.start = time.process_time()  # the loop between two batches counts, judging does not
        trainer.should_stop = self.curve.finished


def train_ours(library: SimpleNamespace, curve: Curve, judge: Judge, rate: float, ratio: int, seed: int = 0) -> None:
    """This library with its defaults and these two settings."""
    teacher = Denoiser(fashion(library)(), EDM(), "sample", sigma_data=0.664)
    _fit(curve, judge, DMD2(teacher, shape=list(SHAPE), seed=seed, **_settings(rate, ratio)), BATCH, "condition")


def train_quick_start(
    library: SimpleNamespace, curve: Curve, judge: Judge, rate: float, ratio: int, seed: int = 0
) -> None:
    """The optimizers of this library's quick start, at this rate of the student."""
    short = {"betas": (0.0, 0.99), "weight_decay": 0.0}
    module = DMD2(ZooDenoiser("fashion"), seed=seed, **_settings(rate, ratio, 2.0, **short))
    _fit(curve, judge, module, BATCH, "class_labels", precision="bf16-mixed" if bfloat16_pays() else "32-true")


def _settings(rate: float, ratio: int, critic: float = 1.0, **optimizer: Any) -> dict[str, Any]:
    optimizer = {"betas": DMD2.default_betas, **optimizer}
    return {
        "fake_score_steps": ratio,
        "updates_per_sample": min(2, ratio),
        "student_optimizer": default_optimizer(rate, **optimizer),
        "fake_score_optimizer": default_optimizer(critic * rate, **optimizer),
    }


def _fit(curve: Curve, judge: Judge, module: DMD2, batch: int, key: str, **settings: Any) -> None:
    module.configure_model()
    labels = {key: torch.arange(1000) % 10}
    loader = ResumableLoader(InMemory(Batch(cond=labels, size=1000)), batch, slices=module.slices_per_cycle)
    trainer = bare_trainer(max_steps=10**6, callbacks=[_Watch(curve, judge, key)], **settings)
    trainer.fit(module, loader, ckpt_path=str(curve.weights) if curve.points else None)


SIDES: dict[str, Callable[..., None]] = {
    "FastGen": train_peer,
    "FastGen, no momentum": partial(train_peer, momentum=False),
    "lightning_distill": train_ours,
    "lightning_distill, quick start": train_quick_start,
}


def quality(library: SimpleNamespace, args: argparse.Namespace, results: Path = RESULTS) -> dict[str, Any]:
    """Run the grid on all sides and write ``quality_fastgen``.

    Every point of the grid has ``first`` seconds; the one of each side that is best by then has the whole budget, and
    other seeds.
    """
    judge = Judge(args.samples)

    def run(name: str, point: tuple[float, int], budget: float, seed: int = 0) -> Curve:
        file = f"{name}_{point[0]:g}_{point[1]}".replace(", ", "_") + (f"_seed{seed}" if seed else "")
        curve = Curve(args.out, file, budget, args.every)
        if not curve.finished:
            SIDES[name](library, curve, judge, *point, seed=seed)
        rows[name, point, seed] = row = {"implementation": name, "rate": point[0], "fake_score_steps": point[1]}
        row |= {"seed": seed, "points": curve.points, "best": max(done for _, done in curve.points)}
        row |= {f"seconds_to_{goal}": curve.reached(goal) for goal in GOALS}
        print({k: v for k, v in row.items() if k != "points"}, flush=True)
        figures = {"rows": list(rows.values()), "samples": args.samples, "budget": args.budget, "first": args.first}
        write_result("quality_fastgen", figures, results=results, seeds=sorted({row["seed"] for row in rows.values()}))
        return curve

    rows: dict[tuple[str, tuple[float, int], int], dict[str, Any]] = {}
    by_then: dict[str, dict[tuple[float, int], tuple[float, float]]] = {}
    # point by point, so that the sides meet the same moods of the machine
    for point in args.points:
        for name in SIDES:
            found = run(name, point, min(args.first, args.budget)).points
            # what came first of those that reached the last goal, where runs end
            by_then.setdefault(name, {})[point] = max(
                (min(done, max(GOALS)), -seconds) for seconds, done in found if seconds <= args.first + args.every
            )
    for seed, (name, reached) in product(range(args.seeds), by_then.items()):
        run(name, max(reached, key=reached.__getitem__), args.budget, seed)
    return {"rows": list(rows.values()), "samples": args.samples, "budget": args.budget, "first": args.first}
