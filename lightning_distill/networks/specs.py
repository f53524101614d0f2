"""Specs: small recipes for denoisers, so that a configuration is checked before weights are read.

A spec holds plain arguments only. ``check`` is cheap (files, names, headers) and runs before training starts;
``build`` reads the weights. Nothing is downloaded unless the spec says ``allow_download``.
"""

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.folders import (
    WEIGHTS_VARIABLE,
    beside,
    check_diffusers_weights,
    check_safetensors,
    construct,
    diffusers_class,
    load_diffusers_network,
    network_folder,
    read_json,
    read_scheduler,
    resolve,
)
from lightning_distill.prediction import PREDICTION_TYPES
from lightning_distill.processes import NoiseProcess

__all__ = [
    "WEIGHTS_VARIABLE",
    "AnalyticTeacher",
    "DenoiserSpec",
    "NewDenoiser",
    "PretrainedDenoiser",
    "ZooDenoiser",
    "as_denoiser",
    "same_path",
    "seeded",
]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights (made on the CPU) from ``seed`` and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        # the CPU generator alone: torch.manual_seed would also reseed devices, which are not restored
        torch.random.default_generator.manual_seed(seed)
        yield


def same_path(a: NoiseProcess, b: NoiseProcess) -> bool:
    """Whether two processes put the same x_t at the same native time (a flow's ``shift`` does not matter)."""
    t = torch.linspace(1e-3, 1.0, 101, dtype=torch.float64) * min(a.t_max, b.t_max)
    return type(a) is type(b) and all(
        torch.allclose(f(t), g(t), rtol=1e-5, atol=1e-7) for f, g in ((a.alpha, b.alpha), (a.sigma, b.sigma))
    )


class DenoiserSpec(ABC):
    """How to make one denoiser."""

    @abstractmethod
    def build(self) -> Denoiser:
        """Make the network, read its weights and wrap it; float32 on the CPU by default."""

    def check(self) -> None:  # noqa: B027  (most specs have something to check, a custom one need not)
        """Find what is wrong without reading a weight.

        Raises:
            ValueError: contradicting or unknown settings.
            FileNotFoundError: a missing file, with the argument and the environment variable that name it.
        """


def as_denoiser(source: DenoiserSpec | Denoiser) -> Denoiser:
    """The denoiser itself, or the one a spec describes (checked first).

    Raises:
        TypeError: neither of the two.
    """
    if isinstance(source, Denoiser):
        return source
    if isinstance(source, DenoiserSpec):
        source.check()
        return source.build()
    raise TypeError(
        f"expected a Denoiser or a spec such as PretrainedDenoiser(path), got {type(source).__name__}; wrap "
        "a network as Denoiser(network, process, prediction_type)."
    )


class NewDenoiser(DenoiserSpec):
    """A network with fresh random weights, equal on every rank.

    Args:
        network: makes the module; in YAML ``class_path`` and ``init_args`` of any ``nn.Module``.
        process: noise process of x_t and t.
        prediction_type: what the network outputs.
        network_process: native process of the network, None when it is ``process``.
        sigma_data: standard deviation of the data, per element.
        null_class: label that means "no class".
        seed: of the initial weights.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        process: NoiseProcess,
        prediction_type: str,
        network_process: NoiseProcess | None = None,
        sigma_data: float = 1.0,
        null_class: int | None = None,
        seed: int = 0,
    ) -> None:
        self.network = network
        self.process = process
        self.prediction_type = prediction_type
        self.network_process = network_process
        self.sigma_data = sigma_data
        self.null_class = null_class
        self.seed = seed

    def check(self) -> None:  # noqa: D102
        _check_prediction_type(self.prediction_type)
        if isinstance(self.network, nn.Module):  # jsonargparse calls a function named in YAML at once
            raise ValueError(
                "NewDenoiser(network=...) got a finished module; in YAML name a class (for example "
                "diffusers.UNet2DModel), in Python give a function that makes the module, not a function's result."
            )

    def build(self) -> Denoiser:  # noqa: D102
        with seeded(self.seed):
            network = self.network()
        return Denoiser(
            network,
            self.process,
            self.prediction_type,
            network_process=self.network_process,
            sigma_data=self.sigma_data,
            null_class=self.null_class,
        )


class AnalyticTeacher(DenoiserSpec):
    """The exact posterior mean of a known distribution: a teacher without error and without weights.

    Args:
        problem: name of a mixture in ``networks.analytic``: ``ring``, ``ring4``, ...
        process: noise process.
        labelled: make every component a class of its own.
    """

    def __init__(self, problem: str, process: NoiseProcess, labelled: bool = False) -> None:
        self.problem = problem
        self.process = process
        self.labelled = labelled

    def check(self) -> None:  # noqa: D102
        self._maker()

    def build(self) -> Denoiser:  # noqa: D102
        from lightning_distill.networks.analytic import analytic_denoiser

        return analytic_denoiser(self._maker()(labelled=self.labelled), self.process)

    def _maker(self) -> Callable[..., Any]:
        from lightning_distill.networks import analytic

        makers = {
            name: f
            for name, f in inspect.getmembers(analytic, inspect.isfunction)
            if name in analytic.__all__ and get_type_hints(f).get("return") is analytic.GaussianMixture
        }
        if self.problem not in makers:
            raise ValueError(
                f"AnalyticTeacher(problem={self.problem!r}) is unknown; choose one of {', '.join(sorted(makers))}."
            )
        return makers[self.problem]


class PretrainedDenoiser(DenoiserSpec):
    """A trained network from a local folder: diffusers pipeline, diffusers model, or network with a card.

    The pipeline's scheduler says the noise process and the prediction type; a ``card.json`` beside
    ``model_index.json`` says what a scheduler cannot (sigma_data, null_class). What is given here must agree
    with both. For networks that are not diffusers' the card names the class and the file:

        {"network": {"class_path": "package.Net", "init_args": {"width": 64}}, "weights": "net.safetensors",
         "process": {"class_path": "lightning_distill.processes.FlowMatching"},
         "prediction_type": "flow_prediction", "sigma_data": 0.5, "null_class": 10}

    Weights are read from safetensors only: a pickle can run code.

    Args:
        path: folder; a name that is no folder is looked up below ``$LIGHTNING_DISTILL_WEIGHTS``.
        subfolder: component of the pipeline, None for its ``transformer`` or ``unet``.
        process: noise process, None to read it from the scheduler.
        prediction_type: what the network outputs, None to read it from the scheduler.
        sigma_data: standard deviation of the data, per element; None for the card's, else 1.
        null_class: label that means "no class"; None for the card's.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps float32.
        allow_download: fetch ``path`` from the Hugging Face hub when it is no local folder.
        method_process: noise process that the method works in when it is not the network's own; the exact change of
            process makes a flow-matching teacher of any other, for example.
    """

    def __init__(
        self,
        path: str,
        subfolder: str | None = None,
        process: NoiseProcess | None = None,
        prediction_type: str | None = None,
        sigma_data: float | None = None,
        null_class: int | None = None,
        dtype: str | None = None,
        allow_download: bool = False,
        method_process: NoiseProcess | None = None,
    ) -> None:
        self.path = str(path)
        self.subfolder = subfolder
        self.process = process
        self.prediction_type = prediction_type
        self.sigma_data = sigma_data
        self.null_class = null_class
        self.dtype = dtype
        self.allow_download = allow_download
        self.method_process = method_process

    def check(self) -> None:  # noqa: D102
        _dtype(self.dtype)
        root = self._local()
        if root is None:
            if not self.allow_download:
                raise FileNotFoundError(
                    f"{type(self).__name__}(path={self.path!r}) is not a folder{self._looked_in()}; download "
                    f"the model beforehand and give its folder as path, set {WEIGHTS_VARIABLE} to the folder "
                    "that holds it, or set allow_download=True to fetch it from the Hugging Face hub."
                )
            return
        self._read(root).check()

    def build(self) -> Denoiser:  # noqa: D102
        _dtype(self.dtype)
        source = self._read(self._local() or self._download())
        source.check()
        network = source.load(_dtype(self.dtype))
        process, inner, scale = source.process, source.network_process, None
        if self.method_process is not None and not same_path(self.method_process, process):
            if inner is not None:
                raise ValueError(
                    f"{self.path} already reaches its network through a change of process; leave out method_process "
                    "and set process in its card."
                )
            process, inner, scale = self.method_process, process, 1.0
        return Denoiser(
            network,
            process,
            source.prediction_type,
            network_process=inner,
            sigma_data=source.sigma_data,
            data_scale=scale,
            null_class=source.null_class,
        )

    def _local(self) -> Path | None:
        """The folder that ``path`` names, None where there is none."""
        base = os.environ.get(WEIGHTS_VARIABLE)
        candidates = [Path(self.path).expanduser()]
        if base:
            candidates += [Path(base) / self.path, Path(base) / Path(self.path).name]
        return next((c for c in candidates if c.is_dir()), None)

    def _looked_in(self) -> str:
        base = os.environ.get(WEIGHTS_VARIABLE)
        return f" (nor one below {WEIGHTS_VARIABLE}={base})" if base else ""

    def _download(self) -> Path:
        if not self.allow_download:
            self.check()
        import huggingface_hub

        patterns = ["*.json", "*.safetensors"]
        try:
            return Path(huggingface_hub.snapshot_download(self.path, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{type(self).__name__}(path={self.path!r}, allow_download=True) could not be fetched from "
                f"the Hugging Face hub ({type(error).__name__}); check the name and the connection, or give "
                f"a local folder as path or through {WEIGHTS_VARIABLE}."
            ) from error

    def _read(self, root: Path) -> "_Source":
        return _Source(root, self.subfolder, self.process, self.prediction_type, self.sigma_data, self.null_class)


class ZooDenoiser(DenoiserSpec):
    """A small teacher shipped with the package.

    Args:
        name: folder of ``lightning_distill/zoo``.
        method_process: noise process that the method works in; ``FlowMatching()`` makes a flow-matching teacher of any
            entry, exactly.
    """

    def __init__(self, name: str, method_process: NoiseProcess | None = None) -> None:
        self.name = name
        self.method_process = method_process

    def check(self) -> None:  # noqa: D102
        self._folder().check()

    def build(self) -> Denoiser:  # noqa: D102
        denoiser = self._folder().build()
        denoiser.zoo_name = self.name if self.method_process is None else None
        return denoiser

    def _folder(self) -> PretrainedDenoiser:
        from lightning_distill.zoo import zoo_path

        return PretrainedDenoiser(str(zoo_path(self.name)), method_process=self.method_process)


# ---------------------------------------------------------------------------------------- folders
class _Source:
    """Everything a folder says about its network, merged with what the user gave."""

    def __init__(
        self,
        root: Path,
        subfolder: str | None,
        process: NoiseProcess | None,
        prediction_type: str | None,
        sigma_data: float | None,
        null_class: int | None,
    ) -> None:
        self.root = root
        own = read_json(root / "card.json") if (root / "card.json").is_file() else {}
        self.network = own.get("network")
        self.folder = root if self.network else network_folder(root, subfolder)
        self.card_file = beside(root, self.folder, "card.json") or root / "card.json"
        self.card = read_json(self.card_file) if self.card_file.is_file() else {}
        scheduler_process, scheduler_type, scheduler = self._scheduler()
        card_process = None
        if "process" in self.card:
            card_process = construct(self.card["process"], NoiseProcess, self.card_file)
        card = str(self.card_file)
        self.process: NoiseProcess = _agreed(
            "process",
            self.folder,
            [("argument process", process), (card, card_process), (scheduler, scheduler_process)],
            same_path,
        )
        self.prediction_type: str = _agreed(
            "prediction_type",
            self.folder,
            [
                ("argument prediction_type", prediction_type),
                (card, self.card.get("prediction_type")),
                (scheduler, scheduler_type),
            ],
            lambda a, b: a == b,
        )
        _check_prediction_type(self.prediction_type)
        self.network_process: NoiseProcess | None = None
        if "network_process" in self.card:
            self.network_process = construct(self.card["network_process"], NoiseProcess, self.card_file)
        self.sigma_data = float(self.card.get("sigma_data", 1.0) if sigma_data is None else sigma_data)
        self.null_class = self.card.get("null_class") if null_class is None else null_class

    def _scheduler(self) -> tuple[NoiseProcess | None, str | None, str]:
        file = beside(self.root, self.folder, "scheduler/scheduler_config.json")
        return (None, None, "scheduler") if file is None else (*read_scheduler(file), str(file))

    def check(self) -> None:
        """Find missing, pickled or damaged weight files from their headers."""
        if self.network:
            resolve(self.network, nn.Module, self.card_file)
            check_safetensors(self._weights())
        else:
            diffusers_class(self.folder)
            check_diffusers_weights(self.folder)

    def _weights(self) -> Path:
        return self.root / self.card.get("weights", "model.safetensors")

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The network with its weights, in eval mode."""
        if not self.network:
            return load_diffusers_network(self.folder, dtype)
        from safetensors.torch import load_file

        with seeded(0):
            network = construct(self.network, nn.Module, self.card_file)
        try:
            network.load_state_dict(load_file(self._weights()))
        except RuntimeError as error:
            raise ValueError(
                f"{self._weights()} does not fit {self.network['class_path']} as described in "
                f"{self.card_file}: {str(error).splitlines()[-1].strip()}"
            ) from None
        return network.to(dtype).eval()


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


def _check_prediction_type(kind: str) -> None:
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={kind!r} is unknown; choose one of {', '.join(PREDICTION_TYPES)}.")


def _dtype(name: str | None) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in dtypes:
        raise ValueError(f"dtype={name!r} is unknown; choose one of {', '.join(dtypes)}.")
    return dtypes[name or "float32"]
