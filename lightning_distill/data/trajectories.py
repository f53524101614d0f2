"""Batches from a store of teacher trajectories."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_distill.batch import Batch
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.checksums import verify_stores
from lightning_distill.data.loader import ResumableLoader, pinned
from lightning_distill.data.shards import difference, plain_key
from lightning_distill.data.store import Store, record_weight
from lightning_distill.guidance import IntervalGuidance, RandomGuidance
from lightning_distill.trajectories import describe_denoiser, describe_process

__all__ = ["StoredConditions", "StoredTrajectories", "Trajectories", "check_teacher"]

_FIELDS = ("noise", "x0", "states")
_PREDICTIONS = ("guided", "unguided", "scale")
#: tensors of a cache that are no conditions
_NO_CONDITIONS = (*_FIELDS, *_PREDICTIONS, "latents")


class StoredConditions:
    """Conditions from a store of ``lightning-distill cache``; trajectory i has row i modulo their number.

    Rows of weight 0 are left out; other weights do not count here, which is told.

    Args:
        folder: the store.
        names: tensors to take; None is every one that could be a condition.
    """

    def __init__(self, folder: str, names: Sequence[str] | None = None) -> None:
        self.store = Store(folder)
        known = [name for name in self.store.names if name not in _NO_CONDITIONS]
        self.names = known if names is None else [name for name in known if name in names]
        if not self.names:
            raise ValueError(
                f"the store {folder} has no conditions of this teacher"
                f"{'' if names is None else ' (' + ', '.join(names) + ')'}; it holds {', '.join(self.store.names)}."
            )
        weights = torch.tensor([record_weight(fact) for fact in self.store.facts(range(len(self.store)))])
        self.rows = weights.nonzero()[:, 0]
        if not len(self.rows):
            raise ValueError(f"every record of {folder} has the weight 0, so none can be used.")
        if len(weights[self.rows].unique()) > 1:
            rank_zero_warn(
                f"the records of {folder} have weights, and each that is not 0 is used equally often for trajectories."
            )

    @classmethod
    def chosen(cls, folder: str, keys: Sequence[str] | None, known: Sequence[str]) -> "StoredConditions":
        """Conditions by a user's choice, or those that a teacher knows.

        Args:
            folder: the store.
            keys: the choice; None for ``known``.
            known: conditions of the teacher; empty for every one that could be.

        Raises:
            ValueError: the store lacks one of ``keys``.
        """
        held = Store(folder).names
        if missing := [key for key in keys or () if key not in held]:
            raise ValueError(f"cond keys: the store {folder} has no {missing[0]!r}, but {', '.join(held)}.")
        return cls(folder, keys or known or None)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """Conditions of trajectories, in the stored dtypes.

        Args:
            indices: of the trajectories, (B,).
        """
        return self.store.gather(self.rows[indices % len(self.rows)], self.names)

    def identity(self) -> dict[str, Any]:
        """What the conditions are, for the key of a store of trajectories."""
        text = json.dumps(self.store.key, sort_keys=True)
        return {
            "key": hashlib.sha256(text.encode()).hexdigest(),
            "records": len(self.rows),
            "names": self.names,
        }


def check_teacher(key: Mapping[str, Any], module: Any, where: str, argument: str = "allow_other_teacher") -> None:
    """Refuse trajectories of another teacher than a method's, or of other guidance.

    What stores of earlier versions do not say is not compared: that of ``describe_denoiser``, and tables of alphas.

    Args:
        key: of the store.
        module: a method with its networks built; one without a teacher takes any trajectories.
        where: folder, for the message.
        argument: that lets them pass, for the message.

    Raises:
        ValueError: other weights, weights that are read or guided otherwise, states of another noise process, or
            guidance that the method does not have.
    """
    teacher = getattr(module, "teacher", None)
    if teacher is None or not hasattr(module, "teacher_fingerprint"):
        return
    found = module.teacher_fingerprint()
    if found != key["teacher"]:
        raise ValueError(
            f"the trajectories in {where} were made by another teacher (sha256 {key['teacher'][:12]}) than the "
            f"method's (sha256 {found[:12]}); make them with this teacher, or set {argument}=true."
        )
    if "denoiser" in key:
        ours = plain_key(describe_denoiser(teacher, key["guidance"], key.get("interval"), key["cond"]))
        if (differing := difference(key["denoiser"], ours)) is not None:
            raise ValueError(
                f"the trajectories in {where} were made by a teacher with {'='.join(differing[:2])}, but the method's "
                f"has {differing[2]}; make them with this teacher, or set {argument}=true."
            )
    process = describe_process(teacher.process)
    if "angles" not in key.get("process", {}):
        process.pop("angles", None)
    if key["point_times"] and process != key["process"]:
        raise ValueError(
            f"the states in {where} belong to the noise process {_shown(key['process'])}, but the teacher works in "
            f"{_shown(process)}; make them in this process, or set {argument}=true."
        )
    _check_guidance(key, module, where, argument)


def _check_guidance(key: Mapping[str, Any], module: Any, where: str, argument: str) -> None:
    """The scale of the trajectories is the method's, or one that each record tells its student."""
    policy = getattr(module, "guidance", None)
    if policy is None:
        return
    low, high = (float(w) for w in key["guidance"])
    interval = key.get("interval")
    made = f"guidance {low:g}" if low == high else f"guidance between {low:g} and {high:g}"
    made += "" if interval is None else f" at times from {interval[0]:g} to {interval[1]:g}"
    other = f"or set {argument}=true"
    if low < high:
        if not getattr(module, "_tells_scale", False):
            raise ValueError(
                f"the trajectories in {where} were made with {made}, which this student is not told; give a student "
                "that embeds the scale (TwoTime(kind=None, guidance=True) or GuidanceAdapters()), trajectories of one "
                f"scale, {other}."
            )
        if not low <= policy.scale <= high:
            raise ValueError(
                f"the trajectories in {where} were made with {made}, and samples would be told {policy.scale:g}; give "
                f"guidance=RandomGuidance({low:g}, {high:g}), {other}."
            )
        return  # every record tells its own
    bounds = [policy.low, policy.high] if isinstance(policy, IntervalGuidance) else None
    if isinstance(policy, RandomGuidance) or policy.scale != low or (low != 1.0 and bounds != interval):
        needed = f"Guidance({low:g})"
        if interval is not None:
            needed = f"IntervalGuidance({low:g}, {interval[0]:g}, {interval[1]:g})"
        raise ValueError(
            f"the trajectories in {where} were made with {made}, and the method has another; give it "
            f"guidance={needed}, {other}."
        )


def _shown(process: Mapping[str, Any]) -> str:
    return f"{process['name']}({', '.join(f'{k}={v}' for k, v in process.items() if k != 'name')})"


class StoredTrajectories:
    """A ``Source`` of records; floating numbers are given out as float32.

    Args:
        folder: store that ``lightning-distill trajectories`` wrote.
        conditions: store of the conditions, for trajectories that were made with one.
        pin_memory: put batches into page-locked memory.

    Raises:
        FileNotFoundError: there is no such store.
        ValueError: the store holds something else, is not complete, or the conditions are not those it was made with.
    """

    def __init__(self, folder: str, conditions: str | None = None, pin_memory: bool = False) -> None:
        self.store = Store(folder)
        self.key = self.store.key
        self.pin_memory = pin_memory
        if self.key.get("kind") != "trajectories":
            raise ValueError(
                f"the store {folder} holds no trajectories (its key says kind={self.key.get('kind')!r}); write them "
                "with 'lightning-distill trajectories'."
            )
        self.conditions = self._conditions(folder, conditions)
        self.times = torch.tensor(self.key["point_times"], dtype=torch.float64) if self.key["point_times"] else None

    def __len__(self) -> int:
        return len(self.store)

    @property
    def stores(self) -> list[Store]:
        """What is read: the records, and their conditions where these lie in a store of their own."""
        return [self.store] if self.conditions is None else [self.store, self.conditions.store]

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        """The records of the given indices; ``epoch`` plays no part."""
        found = {k: v.float() if v.is_floating_point() else v for k, v in self.store.gather(indices).items()}
        cond = {k: v for k, v in found.items() if k not in _NO_CONDITIONS}
        if self.conditions is not None:
            cond |= self.conditions.gather(indices)
        batch = Batch(
            cond=cond,
            **{name: found.get(name) for name in _FIELDS},
            times=self.times,
            predictions={name: found[name] for name in _PREDICTIONS if name in found},
            size=len(indices),
        )
        return pinned(batch) if self.pin_memory else batch

    def _conditions(self, folder: str, given: str | None) -> StoredConditions | None:
        wanted = self.key["cond"]
        if isinstance(wanted, str):
            if given is not None:
                raise ValueError(
                    f"the trajectories in {folder} were made with the conditions {wanted!r}, not with a store of them; "
                    "leave conditions out."
                )
            return None
        if given is None:
            raise ValueError(
                f"the conditions of the trajectories in {folder} ({', '.join(wanted['names'])}) lie in the store that "
                "was given as --cond; give its folder as conditions."
            )
        found = StoredConditions(given, wanted["names"])
        if found.identity() != wanted:
            raise ValueError(f"the trajectories in {folder} were made with other conditions than those in {given}.")
        return found


class Trajectories(DistillationDataModule):
    """What a teacher's solver made, from a store: pairs, states at K times, or guided predictions.

    Batches have ``x0`` (what the teacher made), ``noise``, and as far as they are stored ``states``, ``times`` and
    ``predictions``. Nothing is held in memory but the batch.

    Args:
        path: store that ``lightning-distill trajectories`` wrote.
        conditions: store of the conditions (prompt embeddings), for trajectories that were made with one.
        sigma_data: standard deviation of ``x0`` about its per-channel mean; None for the teacher's.
        allow_other_teacher: train with trajectories of another teacher, or noise process, than the method's.
        verify: compare the shards with their checksums before training; each is read once per machine, and again when
            its file has changed.
        **kwargs: arguments of ``DistillationDataModule``.

    Raises:
        FileNotFoundError: there is no such store.
        ValueError: the store holds something else, is not complete, or lacks its conditions.
    """

    def __init__(
        self,
        path: str,
        conditions: str | None = None,
        sigma_data: float | None = None,
        allow_other_teacher: bool = False,
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = path
        self.verify = verify
        self.allow_other_teacher = allow_other_teacher
        self.records = StoredTrajectories(path, conditions, self.pin_memory)
        key = self.records.key
        self.shape = tuple(key["shape"])
        self.num_classes = key["num_classes"] if key["cond"] == "classes" else None
        self.sigma_data = key["sigma_data"] if sigma_data is None else sigma_data
        self.pin_memory = False  # the records do it, with all of their fields

    def prepare_data(self) -> None:
        """Refuse damaged shards; called in one process per machine.

        Raises:
            ValueError: a shard does not match its checksum.
        """
        if self.verify:
            verify_stores(self.records.stores, "verify=false")

    def make_source(self) -> StoredTrajectories:
        """All records."""
        return self.records

    def train_dataloader(self) -> ResumableLoader:
        """As the base; the method's networks exist now, and its teacher must be the one of the store."""
        if self.trainer is not None and not self.allow_other_teacher:
            check_teacher(self.records.key, self.trainer.lightning_module, self.path)
        return super().train_dataloader()
