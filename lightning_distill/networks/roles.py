"""How a method's network is realised: a copy of the teacher, an adapter, an earlier run, another module.

A method states the roles it needs (student, fake score); a ``Role`` builds one from the teacher. At
initialisation a role made from a teacher has the teacher's weights bit for bit (``Explicit`` excepted), hence
its output; a trained copy may differ in the last digit, where torch multiplies a weight that requires
gradients in another order. Every role is in the mode of its source, eval for teachers: distillation runs
without the dropout of the teacher's training, but with that of ``Lora(dropout=...)``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeGuard

from torch import Tensor, nn

from lightning_distill.checkpoints import read_checkpoint
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import Family
from lightning_distill.networks.folders import beside, load_diffusers_network, network_folder, read_scheduler
from lightning_distill.networks.lora import (
    AdapterDenoiser,
    add_adapter,
    add_adapter_copy,
    check_adapter,
    load_role_state,
    role_state,
    trainable_parameters,
)
from lightning_distill.networks.merging import merged_network, widen
from lightning_distill.networks.specs import (
    DenoiserSpec,
    as_denoiser,
    same_path,
)

if TYPE_CHECKING:
    from lightning_distill.networks.guidance_adapters import GuidedDenoiser

__all__ = [
    "Copy",
    "Explicit",
    "FromCheckpoint",
    "Lora",
    "Role",
    "averaged_copy",
    "check_alone",
    "load_role_state",
    "role_state",
    "trainable_parameters",
    "with_network",
]

#: what of a fake score's state tells it the student's step
_STEPS = "step_condition."


class Role(ABC):
    """How one trained network is made from its source.

    Attributes:
        shares_weights: whether the role runs on the source's own parameters (frozen, with an adapter).
    """

    shares_weights: ClassVar[bool] = False

    @abstractmethod
    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:
        """Make the network of the role.

        Args:
            source: the teacher.
            name: name of the role, for adapters and messages.

        Returns:
            a denoiser whose trained parameters require gradients and are float32 or wider.
        """

    def check(self) -> None:  # noqa: B027  (a copy has nothing to check)
        """Find what is wrong without reading a weight; raises one clear sentence."""

    def learned_steps(self) -> dict[str, Tensor]:
        """What an earlier fake score learned about the steps of its student, beside its network; else nothing."""
        return {}


class Copy(Role):
    """A deep copy of the source with every weight trained, in float32 whatever the source's dtype is."""

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        copied = with_network(source, merged_network(source, widened=True))
        if next(copied.parameters(), None) is None:
            raise ValueError(
                f"{type(source.network).__name__} has no parameters, so a copy of it cannot be trained; give "
                f"the {name or 'student'} a network of its own with Explicit(spec)."
            )
        return _master(copied)


class Lora(Role):
    """A low-rank adapter on the source's own frozen network: teacher and roles share one set of big weights.

    Args:
        rank: inner dimension of the low-rank product, >= 1.
        alpha: scale numerator, None for ``rank`` (scale 1).
        target_modules: endings of layer names, None for the defaults of the model class.
        dropout: dropout on the adapter's input while it trains, [0, 1). Its masks come from torch's own generator: runs
            repeat and resume bit for bit, but several processes draw others than one.
        seed: of the adapter's random half.
        dora: learn the norm of every row of the weights beside their direction (DoRA, arXiv:2402.09353); not with
            dropout.
    """

    shares_weights: ClassVar[bool] = True

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        dora: bool = False,
    ) -> None:
        self.rank = rank
        self.alpha = alpha
        self.target_modules = None if target_modules is None else list(target_modules)
        self.dropout = dropout
        self.seed = seed
        self.dora = dora

    def check(self) -> None:  # noqa: D102
        check_adapter(self.rank, self.dropout, self.dora)

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        made = add_adapter(
            source,
            name,
            rank=self.rank,
            alpha=self.alpha,
            target_modules=self.target_modules,
            dropout=self.dropout,
            dora=self.dora,
            seed=self.seed,
        )
        made = source.with_lora(made) if _guided(source) else made
        return made.train() if self.dropout else made


class Explicit(Role):
    """Another network, for example a smaller one.

    Args:
        spec: how it is made; it must work on the teacher's samples and noise process.
    """

    def __init__(self, spec: DenoiserSpec) -> None:
        self.spec = spec

    def check(self) -> None:  # noqa: D102
        self.spec.check()

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        network = as_denoiser(self.spec)
        role = name or "student"
        if not same_path(network.process, source.process):
            raise ValueError(
                f"the {role} works with {network.process!r} and the teacher with {source.process!r}; give "
                f"the {role}'s spec the teacher's process, and its own as network_process."
            )
        own, theirs = network.sample_shape, source.sample_shape
        if own is not None and theirs is not None and own != theirs:
            raise ValueError(
                f"the {role} ({type(network.network).__name__}) makes samples of shape {own} and the teacher "
                f"({type(source.network).__name__}) of shape {theirs}; set the {role}'s in_channels and "
                "sample_size to the teacher's."
            )
        return _master(network)


class FromCheckpoint(Role):
    """Warm start from a run or checkpoint of this package, or from an exported diffusers folder.

    A checkpoint of full weights gives a copy of the teacher with these weights; one of adapters gives an
    adapter of the same rank, alpha and targets on the teacher, or a copy with the adapter fused when
    ``merge`` is set. What a fake score was told about the student's steps is no part of its network; a fake score that
    is told the same takes it over.

    Args:
        path: checkpoint file; run folder, or the folder of its versions (the newest run's last checkpoint is taken);
            or a diffusers folder with ``model_index.json`` or ``config.json``.
        role: role to read from a checkpoint; ``student_ema`` means its only profile,
            ``student_ema.<profile>`` a given one.
        merge: fuse a saved adapter into a full copy.
    """

    def __init__(self, path: str, role: str = "student_ema", merge: bool = False) -> None:
        self.path = str(path)
        self.role = role
        self.merge = merge

    def check(self) -> None:  # noqa: D102
        path = Path(self.path).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"FromCheckpoint(path={self.path!r}) does not exist; give a run folder, a .ckpt file of an earlier "
                "run, or an exported diffusers folder."
            )
        place = self.place()
        if place.is_dir():
            if (place / ".metadata").is_file():
                raise ValueError(
                    f"{place} is a sharded checkpoint; make it one file with lightning-distill convert {place} "
                    "OUT.ckpt, and give that."
                )
            network_folder(place)

    def place(self) -> Path:
        """The checkpoint, or the diffusers folder, that is read."""
        from lightning_distill.commands.run_folder import find_checkpoint, find_run  # reads methods, which have roles

        path = Path(self.path).expanduser()
        is_run = path.is_dir() and ((path / "config.yaml").is_file() or any(path.glob("version_*")))
        return find_checkpoint(find_run(path)) if is_run else path

    def holds(self, part: str) -> bool:
        """Whether a checkpoint's weights have a name with ``part`` in it."""
        place = self.place()
        return place.is_file() and any(part in key for key in self._role_state(place)[0])

    def learned_steps(self) -> dict[str, Tensor]:  # noqa: D102
        place = self.place()
        state = self._role_state(place)[0] if place.is_file() else {}
        return {key.removeprefix(_STEPS): value for key, value in state.items() if key.startswith(_STEPS)}

    def build(self, source: Denoiser, name: str | None = None) -> Denoiser:  # noqa: D102
        self.check()
        path = self.place()
        if path.is_dir():
            return self._from_folder(path, source)
        state, found = self._role_state(path)
        state = {key: value for key, value in state.items() if not key.startswith(_STEPS)}
        origin = f"role {found!r} of {path}"
        alone = not any(key.startswith(("network.", "adapter.")) for key in state)
        if any(key.startswith("adapters.") for key in state) and (alone or not _guided(source)):
            raise ValueError(
                f"{origin} holds guidance adapters, which are no weights of the teacher's network; use that run as "
                "teacher with RunDenoiser(path), or resume it."
            )
        if not any(key.startswith("adapter.") for key in state):
            if isinstance(source, AdapterDenoiser):
                source = with_network(source, merged_network(source))
            copied = Copy().build(source, name)
            load_role_state(copied, state, origin)
            return copied
        if self.merge:
            # a throw-away copy: the teacher's own network stays without the adapter
            source = with_network(source, merged_network(source))
        adapter = self._adapter(source, state, name, origin)
        if not self.merge:
            return adapter
        return _master(with_network(adapter if _guided(adapter) else source, merged_network(adapter, widened=True)))

    def _adapter(self, source: Denoiser, state: dict[str, Tensor], name: str | None, origin: str) -> AdapterDenoiser:
        downs = [key for key in state if key.endswith(".lora_A.weight")]
        paths = [key.removeprefix("adapter.").removesuffix(".lora_A.weight") for key in downs]
        if not downs or "lora_alpha" not in state:
            raise ValueError(f"{origin} is no complete adapter (lora_A weights or lora_alpha are missing).")
        adapter = add_adapter(
            source,
            name,
            rank=state[downs[0]].shape[0],
            alpha=state["lora_alpha"].item(),
            target_modules=paths,
            dora=any(key.endswith(".lora_magnitude_vector.weight") for key in state),
            exact_names=True,
        )
        adapter = source.with_lora(adapter) if _guided(source) else adapter
        load_role_state(adapter, state, origin)
        return adapter

    def _role_state(self, path: Path) -> tuple[dict[str, Tensor], str]:
        tensors: dict[str, Tensor] = read_checkpoint(path)["state_dict"]
        roles: dict[str, dict[str, Tensor]] = {}
        for key in tensors:
            cuts = [key.find(part) for part in (".network.", ".adapter.", ".adapters.") if part in key]
            if cuts:
                roles.setdefault(key[: min(cuts)], {})
        matches = [r for r in roles if r == self.role or r.startswith(f"{self.role}.")]
        if len(matches) != 1:
            problem = "holds no" if not matches else "holds several"
            raise ValueError(
                f"{path} {problem} role {self.role!r}; set role to one of {sorted(roles) or '(it holds no networks)'}."
            )
        prefix = f"{matches[0]}."
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, matches[0]

    def _from_folder(self, path: Path, source: Denoiser) -> Denoiser:
        folder = network_folder(path)
        network = load_diffusers_network(folder)
        file = beside(path, folder, "scheduler/scheduler_config.json")
        # a few-step scheduler need not determine either
        process, kind = read_scheduler(file) if file is not None else (None, None)
        if process is not None and not same_path(process, source.network_process or source.process):
            raise ValueError(
                f"{file} describes {process!r}, and the teacher works with "
                f"{source.network_process or source.process!r}; start from a student of the same process."
            )
        base = type(source.network).__name__
        if type(network) is not type(source.network) or kind not in (None, source.prediction_type):
            raise ValueError(
                f"{folder} holds a {type(network).__name__} with {kind or 'an unstated prediction type'}, "
                f"and the teacher is a {base} with {source.prediction_type}; use "
                "Explicit(PretrainedDenoiser(path)) for a student of another kind."
            )
        copied = Copy().build(source)
        load_role_state(copied, {f"network.{k}": v for k, v in network.state_dict().items()}, str(folder))
        return copied


def averaged_copy(denoiser: Denoiser, name: str) -> Denoiser:
    """A frozen average of a role, equal to it now.

    A float32 copy; for adapters one more adapter on the backbone, which would else be copied with it.

    Args:
        denoiser: the role, usually the student.
        name: name of the average; unique on a shared backbone.

    Returns:
        a denoiser in eval mode without trained parameters.
    """
    if isinstance(denoiser, AdapterDenoiser):
        low_rank, name = AdapterDenoiser(denoiser, denoiser.adapter_name), f"{denoiser.adapter_name}_{name}"
        second = add_adapter_copy(low_rank, name)
        return denoiser.with_lora(second).eval() if _guided(denoiser) else second
    if _guided(denoiser) and not denoiser.owns_network:
        return denoiser.averaged()
    copied = _master(with_network(denoiser, merged_network(denoiser, widened=True)))
    return copied.requires_grad_(False).eval()


def with_network(source: Denoiser, network: nn.Module, family: Family | None = None) -> Denoiser:
    """The same denoiser around another network, which is called as ``family`` says; None for as the source's."""
    if _guided(source):
        return source.around(network, family)
    if not isinstance(source, AdapterDenoiser):
        same = (source.process, source.network_process, source.family)
        made = copy.deepcopy(source, {id(source.network): network, **{id(part): part for part in same}})
        made.family = family or source.family
        return made
    made = Denoiser(
        network,
        source.process,
        source.prediction_type,
        network_process=source.network_process,
        sigma_data=source.sigma_data,
        data_scale=source.data_scale,
        null_class=source.null_class,
        family=family or source.family,
    )
    made.jumps = source.jumps
    return made.eval()


def _guided(denoiser: Denoiser) -> TypeGuard[GuidedDenoiser]:
    from lightning_distill.networks.guidance_adapters import GuidedDenoiser  # which imports this module

    return isinstance(denoiser, GuidedDenoiser)


def check_alone(denoiser: Denoiser, user: str) -> None:
    """Refuse guidance adapters where only the network of a role is taken.

    Args:
        denoiser: made by the role.
        user: role that takes its network.
    """
    if _guided(denoiser):
        raise ValueError(
            f"{user} takes a network alone, and the guidance adapters beside it would be lost; begin at the network "
            "without them, or distil the guidance into it: GuidanceDistillation(student=TwoTime(kind=None, "
            "guidance=True))."
        )


def _master(denoiser: Denoiser) -> Denoiser:
    """Trainable, with float32 weights where they were narrower."""
    widen(denoiser)
    return denoiser.requires_grad_(True)
