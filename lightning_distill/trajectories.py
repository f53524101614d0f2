"""What a teacher's solver does with a noise, as records to learn from.

    pairs     (noise, x0)                                  DMD's regression, reflow, distillation of outputs
    points    the pair, and the states at K times          CMT, BOSS, AccVideo, image-free consistency (TBCM)
    guided    the points, and the teacher's predictions    guidance distillation on guided trajectories (AGD)
              there, with guidance and without

A record is a function of its index: noise, class and guidance scale depend on (seed, index) alone, so that any process
may compute any record. Everything here is in memory; ``data/store.py`` keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.checkpoints import fingerprint
from lightning_distill.generation import default_cond
from lightning_distill.guidance import guided, is_told
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.merging import base_state_dict
from lightning_distill.prediction import Prediction
from lightning_distill.processes import NoiseProcess
from lightning_distill.randomness import RandomStreams
from lightning_distill.samplers import SAMPLERS
from lightning_distill.times import validate_times

__all__ = [
    "RECORDS",
    "SOLVERS",
    "Recipe",
    "Trajectory",
    "describe_denoiser",
    "describe_process",
    "point_indices",
    "record_noise",
    "run_solver",
    "teacher_fingerprint",
    "trajectory_key",
    "trajectory_records",
]

RECORDS = ("pairs", "points", "guided")
#: deterministic solvers of the teacher, by name and by the names other libraries use
SOLVERS = {"ode": "ode", "euler": "ode", "ddim": "ode", "heun": "heun", "dpmpp_2m": "dpmpp_2m", "dpmpp2m": "dpmpp_2m"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How records are made.

    Attributes:
        records: ``pairs``, ``points`` or ``guided``.
        times: grid of the solver, descending native times without the final 0.
        solver: name in ``SOLVERS``.
        guidance: bounds of w, drawn uniformly per record; equal bounds are one fixed scale.
        points: K, stored states per record, in [1, len(times)]; 0 for pairs.
        dtype: of what is stored, ``float32``, ``float16`` or ``bfloat16``.
        seed: of noise and scales.
        bf16: run the network under bfloat16 autocast.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    records: Literal["pairs", "points", "guided"]
    times: tuple[float, ...]
    solver: str = "dpmpp_2m"
    guidance: tuple[float, float] = (1.0, 1.0)
    points: int = 0
    dtype: str = "float16"
    seed: int = 0
    bf16: bool = False
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.records not in RECORDS:
            raise ValueError(f"records={self.records!r} is unknown; choose one of {', '.join(RECORDS)}.")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r} is unknown; choose one of {', '.join(SOLVERS)}.")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(_DTYPES)}.")
        if (self.records == "pairs") != (self.points == 0) or not 0 <= self.points <= len(self.times):
            raise ValueError(
                f"points={self.points} of {self.records} with {len(self.times)} solver steps: pairs have no points "
                "(0), the other records between 1 and the number of steps."
            )
        if not self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance={self.guidance}: give one scale, or the smallest and the largest.")
        object.__setattr__(self, "solver", SOLVERS[self.solver])

    @property
    def varied(self) -> bool:
        """Whether every record has a guidance scale of its own."""
        return self.guidance[0] != self.guidance[1]


@dataclass(frozen=True)
class Trajectory:
    """One batch of solver runs.

    Attributes:
        x0: end points, (B, ...).
        states: inputs of the network at the kept times, (B, K, ...).
        guided: the predictions the solver used there, as ``flow_prediction``, (B, K, ...).
    """

    x0: Tensor
    states: Tensor
    guided: Tensor


@torch.no_grad()
def run_solver(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Mapping[str, Any],
    times: Sequence[float],
    solver: str,
    *,
    guidance_scale: float | Tensor = 1.0,
    interval: tuple[float, float] | None = None,
    keep: Sequence[int] = (),
) -> Trajectory:
    """Integrate from noise to data, and keep some of the states on the way.

    Args:
        denoiser: the teacher.
        noise: unit Gaussian starting noise, (B, ...), on the denoiser's device.
        cond: conditions, tensors of B rows on the same device.
        times: descending native times without the final 0.
        solver: name in ``SOLVERS``.
        guidance_scale: w, a number or (B,).
        interval: native times, lower and upper, outside of which w = 1.
        keep: indices of the times whose states are kept.
    """
    process, grid = denoiser.process, [float(t) for t in times]
    wanted = {grid[k] for k in keep}
    seen: dict[float, tuple[Tensor, Tensor]] = {}

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        outside = interval is not None and not interval[0] <= float(t) <= interval[1]
        w = 1.0 if outside else guidance_scale
        prediction = guided(denoiser, x, t.to(x.device).expand(len(x)), cond, w)
        if wanted and (now := float(t)) in wanted:
            seen[now] = x, prediction.flow_prediction  # Heun's trial points come before the state of that time
        return prediction

    x0 = SAMPLERS[SOLVERS[solver]](denoise, process.prior(noise, grid[0]), grid, process)
    empty = noise.new_empty(len(noise), 0, *noise.shape[1:])
    kept = [seen[grid[k]] for k in keep]
    states, predictions = (torch.stack(part, dim=1) for part in zip(*kept)) if kept else (empty, empty)
    return Trajectory(x0, states, predictions)


def point_indices(steps: int, points: int) -> list[int]:
    """Indices of K states evenly over a solver's grid, from its start: floor(i N / K).

    Where K divides N, these are exactly the input times of a K-step student on the same kind of grid.

    Args:
        steps: N.
        points: K.
    """
    return [i * steps // points for i in range(points)]


def record_noise(seed: int, first: int, n: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Starting noise of records ``first .. first + n - 1``, on the CPU, float32, rounded to what ``dtype`` can hold.

    The solver starts from the noise as it is stored, so that a pair is exact whatever its dtype.
    """
    return RandomStreams(seed).normal("trajectory/noise", 0, first, (n, *shape)).to(dtype).float()


def trajectory_records(
    denoiser: Denoiser,
    recipe: Recipe,
    first: int,
    n: int,
    shape: Sequence[int],
    cond: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Records ``first .. first + n - 1``, in one pass of the solver.

    Args:
        denoiser: the teacher, in eval mode.
        recipe: how.
        first: index of the first record.
        n: number of records.
        shape: of one sample.
        cond: conditions of these records, tensors of n rows; None cycles through the classes by index, or gives none
            where the teacher has no classes.

    Returns:
        on the CPU by name: ``noise`` and ``x0`` (n, ...); ``states`` (n, K, ...) unless pairs are wanted; for guided
        records also ``guided`` and ``unguided`` (n, K, ...), flow predictions, and ``scale`` (n,), float32, which
        records of varied guidance always have; ``class_labels`` (n,), int64, where ``cond`` was None.

    Raises:
        ValueError: what the teacher made is not finite, or does not fit into the dtype.

    Notes:
        AGD (arXiv:2503.07274) stores the two branches of the guided prediction; here the guided and the conditional one
        are kept, from which the unconditional one follows. Velocities (eps - x0) are stored because both x0 and eps
        come from them without loss of digits at any noise level.
    """
    if denoiser.family.start is not None:
        raise ValueError(
            f"trajectories of this teacher begin at the condition {denoiser.family.start[0]!r}, and stores hold those "
            "that begin at noise; OFTSR needs no store."
        )
    dtype, device = _DTYPES[recipe.dtype], denoiser.device
    own = default_cond(denoiser, n, first) if cond is None and denoiser.num_classes is not None else {}
    placed = {k: v.to(device) for k, v in (cond or own).items()}
    noise = record_noise(recipe.seed, first, n, shape, dtype)
    low, high = recipe.guidance
    scale: float | Tensor = low
    if recipe.varied:
        u = RandomStreams(recipe.seed).uniform("trajectory/guidance", 0, first, (n,))
        scale = (low + (high - low) * u).float().to(device)
    keep = point_indices(len(recipe.times), recipe.points) if recipe.points else []
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
        run = run_solver(
            denoiser,
            noise.to(device),
            placed,
            recipe.times,
            recipe.solver,
            guidance_scale=scale,
            interval=recipe.interval,
            keep=keep,
        )
        found = {"noise": noise, "x0": run.x0}
        if keep:
            found["states"] = run.states
        if recipe.records == "guided":
            found["guided"] = run.guided
            found["unguided"] = _unguided(denoiser, run.states, [recipe.times[k] for k in keep], placed)
    found = {key: value.to(dtype).cpu() for key, value in found.items()}
    for key, value in found.items():
        if bad := int((~value.flatten(1).isfinite().all(dim=1)).sum()):
            raise ValueError(
                f"{bad} of the records {first} to {first + n - 1} have NaN or inf in {key}; check the teacher and its "
                f"guidance, or store them in a wider dtype than {recipe.dtype}."
            )
    if recipe.varied or recipe.records == "guided":
        found["scale"] = scale.cpu() if isinstance(scale, Tensor) else torch.full((n,), float(scale))
    return found | own


@torch.no_grad()
def _unguided(denoiser: Denoiser, states: Tensor, times: Sequence[float], cond: Mapping[str, Any]) -> Tensor:
    """Conditional predictions at states (B, K, ...), as ``flow_prediction``."""
    predictions = []
    for state, time in zip(states.unbind(1), times):
        t = torch.full((len(state),), time, dtype=torch.float64, device=state.device)
        one = torch.ones(len(state), device=state.device) if is_told(denoiser) else None
        predictions.append(denoiser(state, t, cond, guidance=one).flow_prediction)
    return torch.stack(predictions, dim=1)


def teacher_fingerprint(denoiser: Denoiser) -> str:
    """SHA-256 of a frozen denoiser's own weights: its network's, then those of the adapters that guide it.

    What roles added to its network is left out.
    """
    beside = [v for k, v in denoiser.state_dict().items() if k.startswith("adapters.")]
    return fingerprint([*base_state_dict(denoiser.network).values(), *beside])


def describe_process(process: NoiseProcess) -> dict[str, Any]:
    """What tells one process from another, as plain values; a flow's shift moves grids, not samples: left out.

    A table of alphas, which no settings tell, is told by atan2(sigma, alpha) at 17 even times, to 1e-4 rad.
    """
    plain = (bool, int, float, str)
    facts: dict[str, Any] = {k: v for k, v in vars(process).items() if isinstance(v, plain) and k != "shift"}
    if facts.get("beta_schedule") == "given":
        t = torch.linspace(0.0, process.t_max, 17, dtype=torch.float64)
        # rounded, since tables made on two machines may differ in the last digits of float32
        facts["angles"] = [round(angle, 4) for angle in torch.atan2(process.sigma(t), process.alpha(t)).tolist()]
    return {"name": type(process).__name__, **facts}


def describe_denoiser(
    denoiser: Denoiser,
    guidance: Sequence[float],
    interval: Sequence[float] | None,
    cond: Mapping[str, Any] | str,
) -> dict[str, Any]:
    """What a network's predictions depend on beside its weights and the conditions, as plain values.

    Args:
        denoiser: the teacher; the process it is given x_t in does not matter.
        guidance: bounds of w.
        interval: of guidance, None for all times.
        cond: as in ``trajectory_key``.

    Returns:
        ``prediction_type``, ``process`` and ``data_scale`` of the network itself; and of what stands beside the
        conditions, as far as guidance of this kind reads it: ``null``, by condition a value or a tensor's SHA-256, or
        ``told``, the scale that the network is told where w is 1.
    """
    inner = denoiser.network_process
    facts: dict[str, Any] = {
        "prediction_type": denoiser.prediction_type,
        "process": describe_process(inner or denoiser.process),
        "data_scale": 1.0 if inner is None else float(denoiser.data_scale),
    }
    plain = all(w == 1.0 for w in guidance)
    if is_told(denoiser):
        return facts | ({"told": denoiser.family.guidance_scale} if plain or interval is not None else {})
    if plain:
        return facts
    names = cond["names"] if isinstance(cond, Mapping) else ["class_labels"] if cond == "classes" else []
    null = {name: denoiser._null_value(name) for name in names}
    return facts | {"null": {k: fingerprint([v]) if isinstance(v, Tensor) else v for k, v in null.items()}}


def trajectory_key(
    denoiser: Denoiser, recipe: Recipe, shape: Sequence[int], cond: Mapping[str, Any] | str
) -> dict[str, Any]:
    """Everything that records depend on: the key of their store.

    A calling convention (``Family``) is told by the network's class alone.

    Args:
        denoiser: the teacher.
        recipe: how.
        shape: of one sample.
        cond: where conditions come from: ``classes``, ``none``, or what identifies a store of them.
    """
    validate_times(recipe.times, denoiser.process)
    facts = {key: value for key, value in asdict(recipe).items() if key not in ("times", "points", "interval")}
    if recipe.interval is not None:
        facts["interval"] = list(recipe.interval)
    return {
        "kind": "trajectories",
        "teacher": teacher_fingerprint(denoiser),
        "network": type(denoiser.network).__name__,
        "process": describe_process(denoiser.process),
        "denoiser": describe_denoiser(denoiser, recipe.guidance, recipe.interval, cond),
        "sigma_data": float(denoiser.sigma_data),
        "num_classes": denoiser.num_classes,
        "shape": list(shape),
        "cond": cond,
        **facts,
        "steps": len(recipe.times),
        "times": list(recipe.times),
        "point_times": [recipe.times[k] for k in point_indices(len(recipe.times), recipe.points)]
        if recipe.points
        else [],
    }
