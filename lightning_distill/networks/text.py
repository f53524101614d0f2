"""Text conditions by the stock pipeline's own ``encode_prompt``, with nothing else of the pipeline in memory.

A ``TextEntry`` says in which order ``encode_prompt`` of a pipeline class returns its tensors; all other settings
(lengths, templates, instructions) are the defaults of the same pipeline's ``__call__``, so that the conditions are
those that the stock pipeline would have used.

``plain_text.TransformersText`` does the same for a plain text model, such as a sentence transformer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from lightning_distill.metrics.extractors import file_sha256
from lightning_distill.networks.folders import variant_of
from lightning_distill.networks.json_files import read_json
from lightning_distill.networks.text_entries import MASK, TEXT_ENTRIES, TOKENS, TextEntry

__all__ = ["LENGTH", "PipelineText", "TextEncoder", "quiet", "text_digest"]

#: argument names by which the classes know how many tokens they may use
LENGTH = "max_sequence_length"
#: arguments of ``encode_prompt`` that are not settings
_NOT_SETTINGS = ("self", "prompt", "device", "dtype", "negative_prompt", "do_classifier_free_guidance")


class TextEncoder(Protocol):
    """What turns prompts into conditions."""

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditions by name, each (B, ...), on the CPU."""

    def null(self, negative_prompt: str | None = None) -> dict[str, Tensor]:
        """What the teacher's guidance puts in their place, each (1, ...)."""

    def identity(self) -> dict[str, Any]:
        """What decides the result, as plain values: digest of the weights, classes, settings."""


class PipelineText:
    """Tokenizers and text encoders of a diffusers pipeline; network and autoencoder stay on disk.

    Args:
        folder: of the pipeline, with ``model_index.json``.
        dtype: of the text encoders and of the embeddings.
        device: where they run.
        max_length: tokens per prompt, for pipelines that take such a number; None for the pipeline's own default.
        size: height and width of the pictures in pixels, for models that are conditioned on it; None for the size the
            network was made for.

    Raises:
        FileNotFoundError: no pipeline, or a component without files.
        ValueError: an unknown pipeline class, or a ``max_length`` that the pipeline does not take.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.dtype, self.device, self.size = dtype, torch.device(device), size
        self.index = _pipeline_index(self.folder)
        self.pipeline_class = _pipeline_class(self.folder, self.index)
        self.entry = _entry_of(self.folder, self.pipeline_class)
        self.parts = _text_parts(self.index)
        for part in self.parts:
            if not any((self.folder / part).glob("*.json")):
                raise FileNotFoundError(f"{self.folder / part} is missing or empty; complete the pipeline's folder.")
        self.settings = _call_settings(self.pipeline_class)
        if max_length is not None:
            if LENGTH not in self.settings:
                raise ValueError(
                    f"max_length={max_length}: {self.pipeline_class.__name__} has a fixed number of tokens; leave "
                    "max_length out."
                )
            if self.entry.longest is not None and max_length > self.entry.longest:
                raise ValueError(
                    f"max_length={max_length}: {self.pipeline_class.__name__} samples with {self.entry.longest} tokens "
                    "at most."
                )
            self.settings[LENGTH] = max_length
        self._pipe: Any = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the conditions that ``encode`` returns."""
        keys = [name for name in self.entry.outputs if name and not name.startswith("null ")]
        if self.entry.ragged and MASK not in keys:
            keys.append(MASK)
        return (*keys, *self._sizes())

    def identity(self) -> dict[str, Any]:
        """Digest of the text encoders, class of the pipeline and settings of its call, as plain values."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(self.settings.items())}
        if self.index.get("force_zeros_for_empty_prompt") is False:  # the null depends on it; True is the default
            settings["force_zeros_for_empty_prompt"] = False
        return {
            "text_encoder": text_digest(self.folder),
            "pipeline": self.pipeline_class.__name__,
            "settings": settings,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of prompts, as the stock pipeline makes them.

        Args:
            prompts: B texts.

        Returns:
            by condition, each (B, ...), on the CPU: embeddings in ``dtype``, masks as uint8, sizes as float32.
        """
        found = self._call(list(prompts), guided=False)
        return self._finished({k: v for k, v in found.items() if not k.startswith("null ")}, len(prompts))

    @torch.no_grad()
    def null(self, negative_prompt: str | None = None) -> dict[str, Tensor]:
        """What classifier-free guidance of the stock pipeline puts in the place of a prompt.

        Args:
            negative_prompt: None for what the pipeline takes where none is given.

        Returns:
            by condition, each (1, ...); without the sizes, which both branches share.
        """
        if any(name.startswith("null ") for name in self.entry.outputs):
            found = self._call([""], guided=True, negative=negative_prompt)
            null = {k.removeprefix("null "): v for k, v in found.items() if k.startswith("null ")}
        else:
            null = self._call([negative_prompt or ""], guided=False)
        made = self._finished(null, 1)
        return {k: v for k, v in made.items() if k not in self._sizes()}

    # ------------------------------------------------------------------------------------------------ inner parts
    @property
    def pipe(self) -> Any:
        """The stock pipeline with its text parts alone, loaded on first use."""
        if self._pipe is None:
            self._pipe = self._load()
        return self._pipe

    def _load(self) -> Any:
        import diffusers

        kept = {*self.parts, "scheduler"}
        missing = {name: None for name, value in self.index.items() if _is_component(value) and name not in kept}
        variant = _variant([self.folder / part for part in self.parts])
        if "requires_safety_checker" in inspect.signature(self.pipeline_class.__init__).parameters:
            missing["requires_safety_checker"] = False  # type: ignore[assignment]  # nothing is shown to anyone
        try:
            with quiet():
                pipe = self.pipeline_class.from_pretrained(
                    str(self.folder),
                    **missing,
                    torch_dtype=self.dtype,
                    local_files_only=True,
                    use_safetensors=True,
                    variant=variant,
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"the text encoders of {self.folder} cannot be loaded ({reason}); its {', '.join(self.parts)} must be "
                f"whole, with safetensors weights that diffusers {diffusers.__version__} reads."
            ) from None
        # some pipelines ask the network's configuration for a width
        config = next((self.folder / n / "config.json" for n in ("transformer", "unet") if n in missing), None)
        if config is not None and config.is_file():
            name = config.parent.name
            setattr(pipe, name, SimpleNamespace(config=SimpleNamespace(**read_json(config)), dtype=self.dtype))
        return pipe.to(self.device)

    def _call(self, prompts: list[str], guided: bool, negative: str | None = None) -> dict[str, Any]:
        accepted = inspect.signature(self.pipeline_class.encode_prompt).parameters
        given: dict[str, Any] = dict(self.settings)
        for name in ("prompt_2", "prompt_3"):
            if name in accepted:
                given[name] = None
        for name in ("num_images_per_prompt", "num_videos_per_prompt"):
            if name in accepted:
                given[name] = 1
        if "do_classifier_free_guidance" in accepted:
            given["do_classifier_free_guidance"] = guided
        if guided:
            # None stands for "not given" and is not the same as "" everywhere
            given["negative_prompt"] = self._default_negative() if negative is None else [negative] * len(prompts)
        out = self.pipe.encode_prompt(prompt=prompts, device=self.device, **given)
        named = zip(self.entry.outputs, out if isinstance(out, tuple) else (out,))
        return {name: value for name, value in named if name and (guided or not name.startswith("null "))}

    def _default_negative(self) -> Any:
        parameter = inspect.signature(self.pipeline_class.__call__).parameters.get("negative_prompt")
        return None if parameter is None or parameter.default is parameter.empty else parameter.default

    def _finished(self, found: dict[str, Any], n: int) -> dict[str, Tensor]:
        if self.entry.ragged:
            found = _padded(found, self.settings[LENGTH])
        made = {}
        for key, value in found.items():
            value = value.detach().cpu()
            made[key] = (value != 0).to(torch.uint8) if key == MASK else value.to(self.dtype).contiguous()
        for key in self._sizes():
            made[key] = self._size(key).expand(n, -1).contiguous()
        return made

    def _sizes(self) -> tuple[str, ...]:
        if self.entry.sizes == ("resolution", "aspect_ratio") and self._network_config().get("sample_size") != 128:
            return ()
        return self.entry.sizes

    def _network_config(self) -> dict[str, Any]:
        for name in ("unet", "transformer"):
            if (file := self.folder / name / "config.json").is_file():
                return read_json(file)
        raise FileNotFoundError(
            f"{self.folder} has no unet/config.json and no transformer/config.json, which say the size that the "
            "pictures have; complete the pipeline's folder."
        )

    def _size(self, key: str) -> Tensor:
        if self.size is None:
            side = int(self._network_config()["sample_size"]) * 8
            height, width = side, side
        else:
            height, width = self.size
        rows = {
            "time_ids": [height, width, 0, 0, height, width],
            "resolution": [height, width],
            "aspect_ratio": [height / width],
        }
        return torch.tensor(rows[key], dtype=torch.float32)


def text_digest(folder: str | Path) -> str:
    """SHA-256 of everything that turns text into embeddings: weights, configurations and tokenizers.

    Args:
        folder: of a pipeline, or of a text model.
    """
    folder = Path(folder).expanduser()
    parts = [""]
    if (folder / "model_index.json").is_file():
        parts = _text_parts(_pipeline_index(folder))
    digest = hashlib.sha256()
    for part in parts:
        for file in sorted((folder / part).iterdir()):
            if file.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja") and file.is_file():
                digest.update(f"{part}/{file.name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ helpers
@contextmanager
def quiet() -> Iterator[None]:
    """Load models without their libraries' progress bars, and without the notice that an argument is renamed."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype")
            yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def _pipeline_index(folder: Path) -> dict[str, Any]:
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'model_index.json'} does not exist; give the folder of a diffusers pipeline."
        )
    return read_json(folder / "model_index.json")


def _pipeline_class(folder: Path, index: dict[str, Any]) -> Any:
    import diffusers

    name = index.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(
            f"{folder / 'model_index.json'} names the pipeline {name!r}, which diffusers {diffusers.__version__} does "
            "not have; update diffusers."
        )
    return cls


def _entry_of(folder: Path, cls: type) -> TextEntry:
    for parent in cls.__mro__:
        if parent.__name__ in TEXT_ENTRIES:
            return TEXT_ENTRIES[parent.__name__]
    raise ValueError(
        f"{folder} is a {cls.__name__}, whose encode_prompt is not described; register a TextEntry for it, or use one "
        f"of {', '.join(sorted(TEXT_ENTRIES))}."
    )


def _is_component(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _text_parts(index: dict[str, Any]) -> list[str]:
    """Names of the tokenizers and text encoders that a pipeline has."""
    return sorted(
        name
        for name, value in index.items()
        if name.startswith(("tokenizer", "text_encoder")) and _is_component(value) and value[0] is not None
    )


def _call_settings(cls: Any) -> dict[str, Any]:
    """Settings of ``encode_prompt`` with the values that the pipeline's ``__call__`` passes by default."""
    encode = inspect.signature(cls.encode_prompt).parameters
    call = inspect.signature(cls.__call__).parameters
    settings = {}
    for name, parameter in encode.items():
        setting = name not in _NOT_SETTINGS and "embeds" not in name and not name.endswith(("_2", "_3", "_mask"))
        if not setting or name.startswith("num_") or parameter.kind is parameter.VAR_KEYWORD:
            continue
        default = call[name].default if name in call else parameter.default
        if default is not None and default is not parameter.empty:
            settings[name] = default
    if settings.get("clean_caption") and not all(importlib.util.find_spec(name) for name in ("bs4", "ftfy")):
        settings["clean_caption"] = False  # as the pipeline itself does, prompt by prompt and with a warning
    return settings


def _variant(folders: Sequence[Path]) -> str | None:
    """``fp16`` where the text encoders have no other weights."""
    for folder in folders:
        variants = {variant_of(file.name.removeprefix("model")) for file in folder.glob("model*.safetensors")}
        if variants and None not in variants:
            return min(str(variant) for variant in variants)
    return None


def _padded(found: dict[str, Any], length: int) -> dict[str, Tensor]:
    """Tokens of different lengths at one length, with the mask that hides the rest."""
    tokens, mask = found[TOKENS], found.get(MASK)
    rows = list(tokens)
    keep = [torch.ones(len(row)) for row in rows] if mask is None else [row.float().cpu() for row in mask]
    full = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    hidden = torch.zeros(len(rows), length)
    for i, (row, kept) in enumerate(zip(rows, keep)):
        n = min(len(row), length)
        full[i, :n], hidden[i, :n] = row[:n], kept[:n]
    return {**found, TOKENS: full, MASK: hidden}
