"""Specs: small recipes for denoisers, so that a configuration is checked before weights are read.

A spec holds plain arguments only. ``check`` is cheap (files, names, headers) and runs before training starts;
``build`` reads the weights. Nothing is downloaded unless the spec says ``allow_download``.
"""

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from torch import nn

from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.families import family_of
from lightning_distill.networks.folders import WEIGHTS_VARIABLE, check_safetensors
from lightning_distill.networks.quantisation import check_quantisation, quantise
from lightning_distill.networks.seeding import seeded
from lightning_distill.networks.sources import FolderSource, Given, check_prediction_type, same_path
from lightning_distill.networks.weightless import is_weightless, skeleton, weightless
from lightning_distill.processes import NoiseProcess

__all__ = [
    "WEIGHTS_VARIABLE",
    "AnalyticTeacher",
    "DenoiserSpec",
    "DiffusersDenoiser",
    "NewDenoiser",
    "PretrainedDenoiser",
    "ZooDenoiser",
    "as_denoiser",
    "same_path",
    "seeded",
]

#: endings of further copies of the same weights on the hub
_VARIANTS = ("fp16", "bf16", "non_ema", "ema", "int8", "fp32")


class DenoiserSpec(ABC):
    """How to make one denoiser.

    Attributes:
        plannable: whether ``build`` makes a network without weights inside of ``weightless.weightless()``.
    """

    plannable: ClassVar[bool] = False

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
        with weightless(is_weightless() and source.plannable):
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
        null_cond: safetensors file with what means "no condition", a row (1, ...) per condition: the embedding of the
            empty prompt, which ``lightning-distill cache`` writes beside its store; needed to drop and guide text.
    """

    plannable = True

    def __init__(
        self,
        network: Callable[[], nn.Module],
        process: NoiseProcess,
        prediction_type: str,
        network_process: NoiseProcess | None = None,
        sigma_data: float = 1.0,
        null_class: int | None = None,
        seed: int = 0,
        null_cond: str | None = None,
    ) -> None:
        self.network = network
        self.process = process
        self.prediction_type = prediction_type
        self.network_process = network_process
        self.sigma_data = sigma_data
        self.null_class = null_class
        self.seed = seed
        self.null_cond = null_cond

    def check(self) -> None:  # noqa: D102
        check_prediction_type(self.prediction_type)
        if isinstance(self.network, nn.Module):  # jsonargparse calls a function named in YAML at once
            raise ValueError(
                "NewDenoiser(network=...) got a finished module; in YAML name a class (for example "
                "diffusers.UNet2DModel), in Python give a function that makes the module, not a function's result."
            )
        if self.null_cond is not None:
            file = Path(self.null_cond).expanduser()
            if not file.is_file():
                raise FileNotFoundError(
                    f"NewDenoiser(null_cond={self.null_cond!r}): there is no such file; lightning-distill cache writes "
                    "it beside the store of the embeddings."
                )
            check_safetensors(file)

    def build(self) -> Denoiser:  # noqa: D102
        from safetensors.torch import load_file

        null_cond = None if self.null_cond is None else load_file(Path(self.null_cond).expanduser())
        with seeded(self.seed), skeleton():
            network = self.network()
        return Denoiser(
            network,
            self.process,
            self.prediction_type,
            network_process=self.network_process,
            sigma_data=self.sigma_data,
            null_class=self.null_class,
            null_cond=null_cond,
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
    """A trained network from a local folder or file: diffusers pipeline, diffusers model, or network with a card.

    The pipeline's scheduler says the noise process and the prediction type; a ``card.json`` beside
    ``model_index.json`` says what a scheduler cannot (sigma_data, null_class), ``null_cond.safetensors`` what text
    models mean by no prompt. What is given here must agree with all of them. Schedulers of EDM and of consistency
    models say sigma_data as well; both kinds of network are read as EDM's denoiser (``networks.preconditioning``): give
    a teacher's weights, and for those of a consistency model a method with its ``edm`` boundary. For networks that are
    not diffusers' the card names the class and the file:

        {"network": {"class_path": "package.Net", "init_args": {"width": 64}}, "weights": "net.safetensors",
         "process": {"class_path": "lightning_distill.processes.FlowMatching"},
         "prediction_type": "flow_prediction", "sigma_data": 0.5, "null_class": 10}

    Weights are read from safetensors only: a pickle can run code. Nothing is fetched without ``allow_download``: a name
    that is no folder is looked up below ``$LIGHTNING_DISTILL_WEIGHTS`` and in the local cache of the Hugging Face hub.

    Args:
        path: folder, a single ``.safetensors`` file (with ``config_path``), or the name of a model on the hub.
        subfolder: component of the pipeline, None for its ``transformer`` or ``unet``; ``transformer_2`` is the
            low-noise expert of Wan 2.2.
        process: noise process, None to read it from the scheduler.
        prediction_type: what the network outputs, None to read it from the scheduler.
        sigma_data: standard deviation of the data, per element; None for the card's, else 1.
        null_class: label that means "no class"; None for the card's.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps float32.
        allow_download: fetch ``path`` from the Hugging Face hub when it is no local folder.
        method_process: noise process that the method works in when it is not the network's own; the exact change of
            process makes a flow-matching teacher of any other, for example. None for the network's own, TrigFlow for
            Sana-Sprint, whose pipeline samples in it.
        null_cond: safetensors file with what means "no condition", a row (1, ...) per condition: the embedding of the
            empty or negative prompt; None for ``null_cond.safetensors`` of the pipeline, if it is there.
        guidance: scale told to networks that embed it; None for their family's.
        variant: of the weight files, for example ``fp16``; None for the plain files, or the only variant there is.
        revision: branch, tag or commit on the hub.
        config_path: folder with the ``config.json`` (or the whole pipeline without weights) of a single file.
        shape: of one sample, for schedulers whose shift depends on it (FLUX.1, Qwen-Image, LTX); None for the
            network's own, or for the largest size the scheduler names.
        quantize: store the weights of the blocks' linear layers as ``int8``, ``fp8`` or ``nf4`` (4 bits), for a teacher
            whose roles are adapters; a full copy starts from the rounded weights. Needs the extra ``quant``.
    """

    plannable = True

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
        null_cond: str | None = None,
        guidance: float | None = None,
        variant: str | None = None,
        revision: str | None = None,
        config_path: str | None = None,
        shape: list[int] | None = None,
        quantize: str | None = None,
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
        self.null_cond = null_cond
        self.guidance = guidance
        self.variant = variant
        self.revision = revision
        self.config_path = config_path
        self.shape = shape
        self.quantize = quantize

    def check(self) -> None:  # noqa: D102
        _dtype(self.dtype)
        check_quantisation(self.quantize)
        local = self.local_path()
        if local is None:
            if not self.allow_download:
                raise FileNotFoundError(
                    f"{type(self).__name__}(path={self.path!r}) is not a folder{self._looked_in()}; download "
                    f"the model beforehand and give its folder as path, set {WEIGHTS_VARIABLE} to the folder "
                    "that holds it, or set allow_download=True to fetch it from the Hugging Face hub."
                )
            return
        self._read(local).check()

    def build(self) -> Denoiser:  # noqa: D102
        _dtype(self.dtype)
        source = self._read(self.local_path() or self._download())
        source.check()
        network = source.load(_dtype(self.dtype))
        process, inner, scale = source.process, source.network_process, None
        family = family_of(network)
        if source.preconditioning is not None:
            family = replace(family, sign=source.preconditioning.sign * family.sign)
        wanted = self.method_process or source.sampling_process
        if wanted is not None and not same_path(wanted, process):
            if source.preconditioning is not None:
                raise ValueError(
                    f"{self.path} is preconditioned as in EDM and knows noise up to sigma = {process.t_max:g}, "
                    f"so that it cannot work in {wanted!r}; leave out method_process."
                )
            if inner is not None:
                raise ValueError(
                    f"{self.path} already reaches its network through a change of process; leave out method_process "
                    "and set process in its card."
                )
            process, inner, scale = wanted, process, 1.0
        denoiser = Denoiser(
            network,
            process,
            source.prediction_type,
            network_process=inner,
            sigma_data=source.sigma_data,
            data_scale=scale,
            family=family,
            null_class=source.null_class,
            null_cond=source.null_cond(),
            guidance=self.guidance,
        )
        if inner is None:
            denoiser.process = source.process_at(denoiser.sample_shape)
        if self.quantize is not None:
            quantise(network, self.quantize, denoiser.family.blocks)
        return denoiser

    def local_path(self) -> Path | None:
        """The folder or file that ``path`` names, None where there is none."""
        base = os.environ.get(WEIGHTS_VARIABLE)
        candidates = [Path(self.path).expanduser()]
        if base:
            candidates += [Path(base) / self.path, Path(base) / Path(self.path).name]
        found = next((c for c in candidates if c.is_dir() or c.is_file()), None)
        return found if found is not None or self.allow_download else self._cached()

    def _cached(self) -> Path | None:
        """The hub's local copy of a model that an earlier download left."""
        if self.path.count("/") != 1 or self.path.startswith((".", "/", "~")):
            return None
        import huggingface_hub

        for name in ("model_index.json", "config.json"):
            try:
                file = huggingface_hub.try_to_load_from_cache(self.path, name, revision=self.revision)
            except ValueError:  # no name of a model
                return None
            if isinstance(file, str):
                return Path(file).parent
        return None

    def _looked_in(self) -> str:
        base = os.environ.get(WEIGHTS_VARIABLE)
        return f" (nor one below {WEIGHTS_VARIABLE}={base})" if base else ""

    def _download(self) -> Path:
        if not self.allow_download:
            self.check()
        import huggingface_hub

        ending = "*.safetensors" if self.variant is None else f"*.{self.variant}*.safetensors"
        # a pipeline's folders with their tokenizers, or a model alone; no checkpoints in a single file beside them
        options: dict[str, Any] = {
            "allow_patterns": ["*.json", "*.txt", "*.model", f"*/{ending}", f"diffusion_pytorch_model{ending}"],
            "ignore_patterns": [f"*.{kind}*.safetensors" for kind in _VARIANTS if kind != self.variant],
            "revision": self.revision,
        }
        try:
            return Path(huggingface_hub.snapshot_download(self.path, **options))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{type(self).__name__}(path={self.path!r}, allow_download=True) could not be fetched from "
                f"the Hugging Face hub ({type(error).__name__}); check the name and the connection, or give "
                f"a local folder as path or through {WEIGHTS_VARIABLE}."
            ) from error

    def _read(self, local: Path) -> FolderSource:
        given = Given(
            subfolder=self.subfolder,
            process=self.process,
            prediction_type=self.prediction_type,
            sigma_data=self.sigma_data,
            null_class=self.null_class,
            null_cond=self.null_cond,
            variant=self.variant,
            config_path=self.config_path,
            shape=self.shape,
        )
        return FolderSource(local, given)


#: a pipeline of diffusers is one kind of what ``PretrainedDenoiser`` reads
DiffusersDenoiser = PretrainedDenoiser


class ZooDenoiser(DenoiserSpec):
    """A small teacher shipped with the package.

    Args:
        name: folder of ``lightning_distill/zoo``.
        method_process: noise process that the method works in; ``FlowMatching()`` makes a flow-matching teacher of any
            entry, exactly.
    """

    plannable = True

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


def _dtype(name: str | None) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in dtypes:
        raise ValueError(f"dtype={name!r} is unknown; choose one of {', '.join(dtypes)}.")
    return dtypes[name or "float32"]
