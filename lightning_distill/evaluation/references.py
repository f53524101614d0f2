"""Where the reference of an evaluation comes from: shipped, a file, or the data of the run."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import SequentialSampler, default_collate

from lightning_distill.batch import as_batch
from lightning_distill.checkpoints import fingerprint
from lightning_distill.data.base import DistillationDataModule
from lightning_distill.data.loader import Source
from lightning_distill.evaluation.conditions import _items_of, _rows_of
from lightning_distill.evaluation.evaluator import Evaluator
from lightning_distill.evaluation.runner import _say_once
from lightning_distill.metrics.extractors import Extractor, ZooClassifier
from lightning_distill.metrics.reference import (
    Reference,
    ReferenceCache,
    load_reference,
    reference_from_images,
    reference_from_points,
    statistics_reference,
)
from lightning_distill.zoo import list_zoo

__all__ = ["check_references", "reference_samples", "resolve_reference"]

DATA = "data"


def check_references(
    reference: str | Mapping[str, str] | None, extractors: Sequence[Extractor], shape: Sequence[int]
) -> dict[str, str]:
    """Raise for extractors and references that will not do, before anything is trained or sampled.

    Every extractor is built and reads one blank image.

    Args:
        reference: see ``GenerativeEvaluation.reference``.
        extractors: all extractors of the evaluation.
        shape: of one sample, (C, H, W).

    Returns:
        source of each extractor's reference by its name, see ``resolve_reference``.

    Raises:
        FileNotFoundError: weights of an extractor, or a reference, are not there.
        ValueError: an extractor cannot read samples of this shape, or a reference is none of its features.
    """
    if not extractors and isinstance(reference, str) and reference != DATA:
        raise ValueError(
            f"reference={reference!r}: samples of shape {tuple(shape)} are compared with the run's data as they are, "
            "and no extractor reads a reference; leave it out."
        )
    named = reference if isinstance(reference, Mapping) else {e.name: reference for e in extractors}
    if wrong := [name for name in named if name not in {e.name for e in extractors}]:
        known = ", ".join(e.name for e in extractors) or "none"
        raise ValueError(f"reference: there is no extractor {wrong[0]!r}; the extractors are {known}.")
    sources = {e.name: _source(named.get(e.name), e) for e in extractors}
    for extractor in extractors:
        extractor.check()
        _check_name(sources[extractor.name], extractor)
    trial = Evaluator(extractors, dict.fromkeys(["", *sources], Reference({}, {}, {}, {})), ())
    with isolate_rng():  # layers draw their first weights
        trial.probe(shape)
    for extractor in extractors:
        _check_width(sources[extractor.name], extractor, trial.widths[extractor.name])
    return sources


def _check_name(source: str, extractor: Extractor) -> None:
    """Raise for a reference that is not there, and for a shipped one of another extractor."""
    if source == DATA or (isinstance(extractor, ZooClassifier) and extractor.data == source):
        return
    if source in list_zoo():
        raise ValueError(
            f"reference={source!r} holds features of the classifier shipped for {source!r}, not of "
            f"{extractor.name!r}; give reference=data, or an .npz with mu and sigma of that extractor."
        )
    if not Path(source).expanduser().exists():
        raise FileNotFoundError(
            f"reference={source!r} does not exist; give an .npz with mu and sigma, a folder with "
            f"reference.safetensors, 'data', or a zoo entry ({', '.join(list_zoo())})."
        )


def _check_width(source: str, extractor: Extractor, width: int) -> None:
    """Raise for a reference that cannot be read, or has another number of features."""
    if source == DATA:
        return
    try:
        found = len(_read_reference(source).statistics["train"].mean)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"reference={source!r}: {error}") from None
    except (ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"reference={source!r} cannot be read: {error}") from error
    if found != width:
        raise ValueError(
            f"reference={source!r} holds statistics of {found} features, and the extractor {extractor.name!r} has "
            f"{width}; give a reference made with that extractor."
        )


def _source(source: str | None, extractor: Extractor | None) -> str:
    """What None stands for: the zoo entry of a zoo classifier, else the data."""
    return source or (extractor.data if isinstance(extractor, ZooClassifier) else DATA)


def _read_reference(source: str) -> Reference:
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        return statistics_reference(path)
    return load_reference(path if path.exists() else source)


def resolve_reference(
    source: str | None,
    extractor: Extractor | None,
    data: Any,
    limit: int = 50_000,
    cache: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Reference:
    """The reference for an extractor.

    Args:
        source: zoo entry, folder, ``.npz`` file, ``data``, or None for the extractor's own zoo entry, else ``data``.
        extractor: feature extractor; None for points that are compared as they are.
        data: the run's data module, for ``data``.
        limit: most samples taken from it.
        cache: folder of the cache.
        device: where features are computed.
    """
    source = _source(source, extractor)
    if source != DATA:
        return _read_reference(source)
    samples, labels = reference_samples(data, limit)
    if extractor is None:
        return reference_from_points(samples)
    key = f"{extractor.key}-{_content_key(samples, labels)}"

    def build() -> Reference:
        return reference_from_images(extractor, samples, labels, device=device)

    return ReferenceCache(cache).get(key, build)


def reference_samples(data: Any, limit: int, say: bool = True) -> tuple[Tensor, Tensor | None]:
    """Clean samples of a data module and their classes: all of them, or ``limit`` drawn at random, always the same.

    Of data of several sizes those of the first; of a loader that cannot be asked for single samples, or has an order of
    its own, the first ``limit``.

    Args:
        data: a ``DistillationDataModule``, or any data module whose validation or training loader yields clean samples.
        limit: most samples.
        say: tell once what was left out.

    Raises:
        ValueError: the data module has no clean samples.
    """
    batches: list[Any] = []
    loader = data
    if data is not None and not isinstance(data, DistillationDataModule):
        loader = data.val_dataloader() if is_overridden("val_dataloader", data) else data.train_dataloader()
    items = _items_of(loader)
    own_order = not isinstance(getattr(loader, "sampler", None), SequentialSampler)
    if items is not None and (loader is data or (len(items) > limit and not own_order)):
        gather, count = _rows_of(items, getattr(loader, "collate_fn", None) or default_collate)
        rows = torch.arange(count)
        if count > limit:  # stored by class, the first ones would lack classes
            rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].sort().values
        left_out = [("of the first size", count < len(items)), ("drawn at random", len(rows) < count)]
        which = ", ".join(words for words, true in left_out if true)
        if which and say:
            _say_once(f"The reference has {len(rows)} of the {len(items)} samples of {type(data).__name__}, {which}.")
        batches = [gather(part) for part in rows.split(4096 if isinstance(items, Source) else 256)]
    elif loader is not None:
        seen = 0
        for raw in loader:
            batches.append(as_batch(raw))
            seen += batches[-1].size
            if seen >= limit:
                break
    if not batches or batches[0].x0 is None:
        name = "no data module" if data is None else f"{type(data).__name__}, which yields no clean samples"
        raise ValueError(
            f"the reference of the evaluation would come from the data of the run, but the run has {name}; give "
            "reference=... (an .npz with mu and sigma, or a folder with reference.safetensors), or a data module with "
            "images."
        )
    samples = torch.cat([b.x0.float().cpu() for b in batches])[:limit]
    labels = None
    if "class_labels" in batches[0].cond:
        labels = torch.cat([b.cond["class_labels"].cpu() for b in batches])[:limit]
    return samples, labels


def _content_key(samples: Tensor, labels: Tensor | None) -> str:
    """Hash of a spread of the samples, of a checksum of all of them, and of the labels."""
    checksum = 0
    for part in samples.split(4096):  # several times as fast as a hash
        checksum = zlib.crc32(part.contiguous().numpy().data, checksum)
    told = [torch.tensor([len(samples), checksum]), samples[:: max(1, len(samples) // 512)]]
    return fingerprint(told if labels is None else [*told, labels])[:16]
