"""DMD2 here and in NVIDIA FastGen's public code: the same network, batch, dtype and thread, in one process.

    git clone https://github.com/NVlabs/FastGen
    python benchmarks/fastgen.py --fastgen FastGen             # about a quarter of an hour on one idle core
    python benchmarks/fastgen.py --fastgen FastGen --threads 1 2 --dtypes float32 bfloat16
    python benchmarks/fastgen.py --fastgen FastGen --tangents  # updates of sCM and MeanFlow, as long
    python benchmarks/fastgen.py --fastgen FastGen --quality   # seconds until a student is good, hours

The network is FastGen's EDM SongUNet (3.5 M parameters, 32x32, ten classes), taken through the door for plain modules.
FastGen runs its own model class, optimizers, schedules, clipping and averaging callbacks in the order of its trainer;
this library runs in Lightning's Trainer. A cycle is one student and four critic updates; blocks of cycles of the two
sides alternate, and CPU seconds of one thread, or seconds of several, are compared. Rows of implementation
``lightning_distill`` have FastGen's mathematics, which ``check`` proves on identical draws; ``..., cheaper settings``
have the same fixed point. Nothing of FastGen is shipped here: its code is read from the folder given.
"""

import argparse
import logging
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bare import bare_trainer
from counting import floor_bytes
from fastgen_parts import OURS, PEER, SHAPE, Alternate, Repeated, compare, examples, line, peer_data, row
from fastgen_peer import BLOCKS, Peer, PeerHeads, load, network
from fastgen_quality import POINTS, quality
from fastgen_tangents import MODULES as TANGENT_MODULES
from fastgen_tangents import VARIANTS as TANGENT_VARIANTS
from fastgen_tangents import tangents
from results import write_result
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill.batch import Batch
from lightning_distill.ema import ConstantEMA
from lightning_distill.guidance import Guidance
from lightning_distill.methods import DMD2
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.processes import EDM, NoiseProcess
from lightning_distill.randomness import Draws
from lightning_distill.times import TimeDistribution

#: adversarial term, guidance scale
VARIANTS: dict[str, tuple[bool, float]] = {"plain": (False, 1.0), "gan": (True, 1.0), "gan, guidance 2": (True, 2.0)}
CHEAPER = "lightning_distill, cheaper settings"


class Levels(TimeDistribution):
    """Uniform over a table of noise levels, FastGen's ``polynomial`` times.

    Args:
        levels: ascending, float64.
    """

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels

    def quantile(self, u: Tensor, process: NoiseProcess) -> Tensor:  # noqa: D102
        return self.levels[(u.double() * len(self.levels)).long().clamp(max=len(self.levels) - 1)]


def peer_levels(teacher: torch.nn.Module) -> Levels:
    """The noise levels that FastGen draws training times from."""
    schedule = teacher.noise_scheduler
    return Levels(schedule.sigmas[schedule._min_step : schedule._max_step + 1].double())


def method(
    library: SimpleNamespace, weights: Mapping[str, Any], gan: bool, guidance: float, equal: bool = True
) -> DMD2:
    """This library's DMD2 on FastGen's network, with FastGen's mathematics or with cheaper settings."""
    teacher = network(library)
    teacher.load_state_dict(weights["teacher"])
    levels = peer_levels(teacher)
    denoiser = Denoiser(teacher, EDM(), "sample", sigma_data=0.5, null_cond={"condition": 0.0})
    settings: dict[str, Any] = {"updates_per_sample": 2}
    if equal:
        settings = {"matching_times": levels, "critic_times": levels, "ema": [ConstantEMA(0.9999)]}
    if gan and equal:
        settings |= {"gan": PeerHeads(library), "loss_weights": {"fake_score/gan": 1.0}, "gan_at_scores": True}
    elif gan:
        settings |= {"gan": Adversary(BLOCKS), "gan_at_scores": True, "gan_every": 4}
    module = DMD2(denoiser, shape=SHAPE, fake_score_steps=4, guidance=Guidance(guidance), check_data=False, **settings)
    module.configure_model()
    for name in ("student", "fake_score"):
        getattr(module, name).network.load_state_dict(weights["net" if name == "student" else name])
    return module


# ---------------------------------------------------------------------------------------------------- equal mathematics
class Given(Draws):
    """Draws that are given by the last part of their name; times are given as uniform numbers."""

    def __init__(self, phase: str, start: Tensor, noise: Tensor, u: Tensor) -> None:
        self.phase, self.update, self.first, self.slice_index = phase, 0, 0, 0
        self._start, self._noise, self._u = start, noise, u

    def normal(self, name: str, shape: Any) -> Tensor:  # noqa: D102
        return self._start if name == "start" else self._noise

    def uniform(self, name: str, n: int) -> Tensor:  # noqa: D102
        return self._u

    def integer(self, name: str, high: int) -> int:  # noqa: D102
        return 0

    def of_slice(self) -> Draws:  # noqa: D102
        return self


def check(library: SimpleNamespace, guidance: float = 2.0, batch: int = 2) -> dict[str, float]:
    """Losses and gradients of both sides on the same weights, samples, noise and times, in float64.

    The normaliser is 1 / (d + 1e-6) there and 1 / max(d, 1e-6) here, with d the mean distance of a sample from the
    teacher's prediction; times in the middle of the table keep d well above that.

    Returns:
        relative differences of the two losses and of the gradients of student, fake score and heads.
    """
    generator = torch.Generator().manual_seed(5)
    names = ("teacher", "net", "fake_score")
    states = {name: network(library, seed=index).state_dict() for index, name in enumerate(names)}
    weights = {name: {k: v + 0.02 * torch.randn_like(v) for k, v in state.items()} for name, state in states.items()}
    data = examples(batch)
    data = Batch(x0=data.x0.double(), cond={k: v.double() for k, v in data.cond.items()}, size=batch)
    peer = Peer(library, weights, True, guidance, peer_data(data), "float64")
    module = method(library, weights, True, guidance).double()
    assert module.discriminator is not None
    module.discriminator.inner.load_state_dict(peer.model.discriminator.state_dict())  # type: ignore[union-attr]
    peer.model.config.gan_use_same_t_noise = True  # as the given draws have it
    z, eps = (torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    u = (torch.arange(batch, dtype=torch.float64) + 0.5) / batch
    t = peer_levels(peer.model.teacher).quantile(u, module.process)
    start, t_max = peer.model.net.noise_scheduler.latents(noise=z), torch.full_like(t, module.process.t_max)

    def differ(theirs: Tensor, ours: Tensor, pairs: dict[str, tuple[Any, Any]]) -> dict[str, float]:
        theirs.backward()
        ours.backward()
        found = {"loss": float((theirs - ours).detach().abs() / theirs.detach().abs())}
        for name, (their, our) in pairs.items():
            a, b = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (their, our))
            found[name] = float((a - b).norm() / a.norm())
        return found

    model, differences = peer.model, {}
    condition, null = peer.data["condition"], peer.data["neg_condition"]
    for phase in module.phases:
        module.draws = Given(f"{phase}0", z, eps, u)
        module._rollouts.clear()
        model._setup_grad_requirements(0 if phase == "student" else 1)
        with module._only(phase):
            ours = module.weighted_sum(phase, getattr(module, f"{phase}_loss")(data))
            if phase == "student":
                losses, _ = model._student_update_step(start, t_max, t, eps, peer.data, condition, null)
                pairs = {"student": (model.net, module.student)}
            else:
                losses, _ = model._fake_score_discriminator_update_step(
                    start, t_max, t, eps, peer.data["real"], condition
                )
                pairs = {
                    "fake_score": (model.fake_score, module.fake_score),
                    "discriminator": (model.discriminator, module.discriminator),
                }
            found = differ(losses["total_loss"], ours, pairs)
        differences |= {f"{phase}/{name}": value for name, value in found.items()}
    return differences


def measure(
    library: SimpleNamespace, variant: str, equal: bool, args: argparse.Namespace, dtype: str = "float32"
) -> list[dict[str, Any]]:
    """Both sides of one comparison; in bfloat16 both under autocast."""
    gan, guidance = VARIANTS[variant]
    state = network(library).state_dict()
    weights = dict.fromkeys(("teacher", "net", "fake_score"), state)
    data = examples(args.batch)
    autocast = {} if dtype == "float32" else {"precision_amp": dtype}
    peer = Peer(library, weights, gan, None if guidance == 1.0 else guidance, peer_data(data), **autocast)
    module = method(library, weights, gan, guidance, equal)
    slices = module.slices_per_cycle
    batch = Batch(
        x0=torch.cat([data.x0] * slices) if gan else None,
        cond={k: torch.cat([v] * slices) for k, v in data.cond.items()},
        size=args.batch * slices,
    )
    probe = Alternate(peer, args.batch, args.block)
    trainer = bare_trainer(
        max_steps=2 + args.block * args.repeats,
        callbacks=[probe],
        precision="bf16-mixed" if autocast else "32-true",
    )
    trainer.fit(module, DataLoader(Repeated(batch), batch_size=None))
    sides = {
        "peer": (PEER, peer.model, peer.optimizers),
        "ours": (OURS if equal else CHEAPER, module, trainer.optimizers),
    }
    rows = []
    for side, (name, model, optimizers) in sides.items():
        floor = floor_bytes((*model.parameters(), *model.buffers()), optimizers)
        rows.append(row(variant, name, probe.seconds[side], probe.counted[side], floor, args.batch, dtype=dtype))
    compare(*rows)
    return rows


def point(word: str) -> tuple[float, int]:
    """Learning rate and critic updates per student update of ``1e-4:4``."""
    rate, _, ratio = word.partition(":")
    return float(rate), int(ratio)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Check, measure, print a table and write ``throughput_fastgen``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastgen", required=True, metavar="FOLDER", help="checkout of FastGen")
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *TANGENT_VARIANTS], help="all by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of torch, one table after the other")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="of autocast")
    parser.add_argument("--repeats", type=int, default=7, help="blocks per side")
    parser.add_argument("--block", type=int, default=1, help="cycles per block")
    parser.add_argument("--tangents", action="store_true", help="measure updates of sCM and MeanFlow instead")
    group = parser.add_argument_group("seconds until a student is good (see fastgen_quality.py)")
    group.add_argument("--quality", action="store_true", help="measure these instead; stopped runs go on")
    group.add_argument("--out", type=Path, default=Path("fastgen_quality"), help="folder of the runs")
    group.add_argument("--budget", type=float, default=900.0, help="CPU seconds of a run")
    group.add_argument(
        "--first", type=float, default=240.0, help="CPU seconds of every point; each side's best goes on"
    )
    group.add_argument("--every", type=float, default=30.0, help="CPU seconds between two looks at the student")
    group.add_argument("--samples", type=int, default=2560, help="samples of a look")
    group.add_argument("--seeds", type=int, default=1, help="of each side's best point; all others have one")
    group.add_argument(
        "--points", type=point, nargs="+", default=list(POINTS), metavar="RATE:RATIO", help="of the grid"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads[0])
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    known = list(TANGENT_VARIANTS if args.tangents else VARIANTS)
    args.variants = [name for name in args.variants or known if name in known]
    library = load(args.fastgen, TANGENT_MODULES if args.tangents else {})
    if args.tangents:
        return tangents(library, args)
    if args.quality:
        return quality(library, args)
    differences = check(library)
    print("relative differences on equal draws:", {k: f"{v:.1e}" for k, v in differences.items()}, flush=True)
    if (worst := max(differences.values())) > 1e-4:
        raise SystemExit(f"the two sides differ by {worst:.1e} on equal draws, so their speeds cannot be compared.")
    rows = []
    for threads, dtype, variant, equal in product(args.threads, args.dtypes, args.variants, (True, False)):
        torch.set_num_threads(threads)
        rows += measure(library, variant, equal, args, dtype)
        for entry in rows[-2:]:
            print(line(entry), flush=True)
    figures = {"rows": rows, "equality": differences, "repeats": args.repeats}
    write_result("throughput_fastgen", figures, seeds=[0])
    return figures


if __name__ == "__main__":
    main()
