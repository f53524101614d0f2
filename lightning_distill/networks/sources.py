"""Everything that a model folder or weight file says about its network, merged with what the user gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_distill.networks.families import FAMILIES, Family
from lightning_distill.networks.families.base import SAME
from lightning_distill.networks.folders import (
    beside,
    check_diffusers_weights,
    check_safetensors,
    construct,
    diffusers_class,
    load_diffusers_network,
    load_single_file,
    network_folder,
    read_json,
    resolve,
)
from lightning_distill.networks.schedulers import read_preconditioned, read_sampling_process, read_scheduler
from lightning_distill.networks.seeding import seeded
from lightning_distill.networks.weightless import is_weightless, skeleton
from lightning_distill.prediction import PREDICTION_TYPES
from lightning_distill.processes import FlowMatching, NoiseProcess

__all__ = ["FolderSource", "Given", "check_prediction_type", "same_path"]

#: file with the unconditional embeddings of a model, beside its ``model_index.json``
NULL_FILE = "null_cond.safetensors"


def same_path(a: NoiseProcess, b: NoiseProcess) -> bool:
    """Whether two processes put the same x_t at the same native time (a flow's ``shift`` does not matter)."""
    t = torch.linspace(1e-3, 1.0, 101, dtype=torch.float64) * min(a.t_max, b.t_max)
    return type(a) is type(b) and all(
        torch.allclose(f(t), g(t), rtol=1e-5, atol=1e-7) for f, g in ((a.alpha, b.alpha), (a.sigma, b.sigma))
    )


def check_prediction_type(kind: str) -> None:
    """Raise for a name that is no prediction type."""
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={kind!r} is unknown; choose one of {', '.join(PREDICTION_TYPES)}.")


@dataclass(frozen=True)
class Given:
    """What the user says about a network; None for what the files are to say.

    Attributes:
        subfolder: component of the pipeline.
        process: noise process.
        prediction_type: what the network outputs.
        sigma_data: standard deviation of the data.
        null_class: label that means "no class".
        null_cond: file with the unconditional embeddings.
        variant: of the weight files.
        config_path: folder with the configuration of a weight file.
        shape: of one sample.
    """

    subfolder: str | None = None
    process: NoiseProcess | None = None
    prediction_type: str | None = None
    sigma_data: float | None = None
    null_class: int | None = None
    null_cond: str | None = None
    variant: str | None = None
    config_path: str | None = None
    shape: Sequence[int] | None = None


class FolderSource:
    """One network with its process and its scalars.

    Args:
        path: folder of a pipeline or a network, or a weight file.
        given: the user's settings.

    Attributes:
        process: noise process of the network.
        prediction_type: what it outputs.
        network_process: the process behind a change of process that the card or the scheduler asks for.
        preconditioning: what the scheduler says of it; None for networks whose scheduler applies none.
        sampling_process: the process in which the pipeline samples, where that is another one.
        sigma_data: standard deviation of the data.
        null_class: label that means "no class".

    Raises:
        ValueError: contradicting, missing or unknown settings.
        FileNotFoundError: there is no network.
    """

    def __init__(self, path: Path, given: Given) -> None:
        self.given = given
        self.file = path if path.is_file() else None
        root = self._root(path)
        own = read_json(root / "card.json") if (root / "card.json").is_file() and self.file is None else {}
        self.root = root
        self.network = own.get("network")
        self.folder = root if self.network else network_folder(root, given.subfolder)
        self.card_file = beside(root, self.folder, "card.json") or root / "card.json"
        self.card = read_json(self.card_file) if self.card_file.is_file() else {}
        self.family = self._family()
        self.scheduler_file = beside(root, self.folder, "scheduler/scheduler_config.json")
        self.sampling_process: NoiseProcess | None = None
        scheduler_process: NoiseProcess | None = None
        scheduler_type: str | None = None
        preconditioning = None
        if self.scheduler_file is not None:
            preconditioning = read_preconditioned(self.scheduler_file)
            if preconditioning is not None and "network_process" in self.card:
                preconditioning = None  # the card describes it in its own way
            else:
                scheduler_process, scheduler_type = read_scheduler(self.scheduler_file, self.family, given.shape)
            self.sampling_process = read_sampling_process(self.scheduler_file)
        card_process = None
        if "process" in self.card:
            card_process = construct(self.card["process"], NoiseProcess, self.card_file)
        card, scheduler = str(self.card_file), str(self.scheduler_file)
        flow = self.family is not None and self.family.flow
        default = f"its class {self.family.model_class}" if self.family is not None else ""
        self.process: NoiseProcess = _agreed(
            "process",
            self.folder,
            [
                ("argument process", given.process),
                (card, card_process),
                (scheduler, scheduler_process),
                (default, FlowMatching() if flow else None),
            ],
            same_path,
        )
        self._shift_from_scheduler = self.process is scheduler_process and given.shape is None
        self.prediction_type: str = _agreed(
            "prediction_type",
            self.folder,
            [
                ("argument prediction_type", given.prediction_type),
                (card, self.card.get("prediction_type")),
                (scheduler, scheduler_type),
                (default, "flow_prediction" if flow else None),
            ],
            lambda a, b: a == b,
        )
        check_prediction_type(self.prediction_type)
        self.network_process: NoiseProcess | None = None
        if "network_process" in self.card:
            self.network_process = construct(self.card["network_process"], NoiseProcess, self.card_file)
        self.preconditioning = preconditioning
        spread = self.card.get("sigma_data", 1.0) if given.sigma_data is None else given.sigma_data
        if preconditioning is not None:
            self.network_process = preconditioning.network_process
            spread = _agreed(
                "sigma_data",
                self.folder,
                [
                    ("argument sigma_data", given.sigma_data),
                    (card, self.card.get("sigma_data")),
                    (scheduler, preconditioning.sigma_data),
                ],
                math.isclose,
            )
        self.sigma_data = float(spread)
        self.null_class = self.card.get("null_class") if given.null_class is None else given.null_class

    def _root(self, path: Path) -> Path:
        if self.file is None:
            return path
        check_safetensors(self.file)
        if self.given.config_path is None:
            raise ValueError(
                f"{path} is a single file, which does not say what network its weights belong to; give config_path=... "
                "(a folder with the config.json of the model, or with its pipeline without weights)."
            )
        root = Path(self.given.config_path).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"config_path={self.given.config_path!r} is no folder; it holds the config.json.")
        return root

    def _family(self) -> Family | None:
        if self.network:
            return None
        return FAMILIES.get(str(read_json(self.folder / "config.json").get("_class_name")))

    def check(self) -> None:
        """Find missing, pickled or damaged weight files from their headers; a plan needs no weights."""
        if is_weightless():
            _ = resolve(self.network, nn.Module, self.card_file) if self.network else diffusers_class(self.folder)
        elif self.network:
            resolve(self.network, nn.Module, self.card_file)
            check_safetensors(self._weights())
        elif self.file is not None:
            check_safetensors(self.file)
            diffusers_class(self.folder)
        else:
            diffusers_class(self.folder)
            check_diffusers_weights(self.folder, self.given.variant)
        if (null_file := self._null_file()) is not None:
            check_safetensors(null_file)

    def _weights(self) -> Path:
        return self.root / self.card.get("weights", "model.safetensors")

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The network with its weights, in eval mode."""
        if self.file is not None:
            network = load_single_file(self.file, self.folder, dtype)
            # as networks read from a folder remember theirs, for the other components of an export
            network.register_to_config(_name_or_path=str(self.folder))  # type: ignore[operator]
            return network
        if not self.network:
            return load_diffusers_network(self.folder, dtype, self.given.variant)
        from safetensors.torch import load_file

        with seeded(0), skeleton():
            network = construct(self.network, nn.Module, self.card_file)
        if is_weightless():
            return network.to(dtype).eval()
        try:
            network.load_state_dict(load_file(self._weights()))
        except RuntimeError as error:
            raise ValueError(
                f"{self._weights()} does not fit {self.network['class_path']} as described in "
                f"{self.card_file}: {str(error).splitlines()[-1].strip()}"
            ) from None
        return network.to(dtype).eval()

    def process_at(self, shape: Sequence[int] | None) -> NoiseProcess:
        """The process, with the shift that the scheduler has at the network's own sample shape.

        Args:
            shape: of one sample as the network states it; None where it does not.
        """
        if shape is None or self.scheduler_file is None or not self._shift_from_scheduler:
            return self.process
        return read_scheduler(self.scheduler_file, self.family, shape)[0] or self.process

    def null_cond(self) -> dict[str, Any]:
        """The unconditional embeddings by condition, each (1, ...); empty where there is no file.

        None stands for the zeros of the family where the pipeline takes the embedding of the empty prompt instead
        (``force_zeros_for_empty_prompt`` of Stable Diffusion XL).
        """
        from safetensors.torch import load_file

        null: dict[str, Any] = {}
        index = beside(self.root, self.folder, "model_index.json")
        settings = {} if index is None else read_json(index)
        if self.family is not None and settings.get("force_zeros_for_empty_prompt") is False:
            null = {key: None for key, value in self.family.null.items() if value is not SAME}
        file = self._null_file()
        return null if file is None else null | load_file(file)

    def _null_file(self) -> Path | None:
        if self.given.null_cond is not None:
            return Path(self.given.null_cond).expanduser()
        return beside(self.root, self.folder, NULL_FILE)


def _agreed(what: str, folder: Path, sources: list[tuple[str, Any]], equal: Callable[[Any, Any], bool]) -> Any:
    """The first value given; an error when two sources contradict each other or none says anything."""
    given = [(origin, value) for origin, value in sources if value is not None]
    if not given:
        raise ValueError(
            f"neither a scheduler nor a card.json says the {what} of {folder}; give {what}=... to the spec."
        )
    (origin, value), *others = given
    for other, contradicting in others:
        if not equal(value, contradicting):
            raise ValueError(
                f"{what} of {folder} is {value!r} by {origin} but {contradicting!r} by {other}; leave the "
                "argument out, or correct the one that is wrong."
            )
    return value
